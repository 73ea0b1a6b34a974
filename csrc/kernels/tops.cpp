// What is among the best of each row, and what the rows that pick something have in sum.

#include "kernels.h"

#include <cstring>
#include <limits>

namespace moetrace {

namespace {

// How many of the E scores are better than that of one: larger, or equal and further left.
template <typename T>
inline int64_t rank_of(const T * score, size_t E, size_t e) {
    const T x = score[e];
    int32_t larger = 0, no_less = 0;
    for (size_t j = 0; j < E; j++) {
        larger  += score[j] > x;
        no_less += score[j] >= x;
    }
    if (no_less > larger + 1) {
        for (size_t j = 0; j < e; j++) {
            larger += score[j] == x;
        }
    }
    return larger;
}

// Of `n` rows of E scores: how many of the k picks of each are among the m best, for each m of Z sizes.
template <typename T>
FOR_EACH_CPU void hits_of(const T * score, size_t E, const uint16_t * pick, size_t k, size_t n, const int64_t * size, size_t Z, T * row,
        int32_t * hits) {
    for (size_t cell = 0; cell < n; cell++) {
        for (size_t e = 0; e < E; e++) {
            const T x = score[cell*E + e];
            row[e] = x == x ? x : -std::numeric_limits<T>::infinity();
        }
        int32_t * mine = hits + cell*Z;
        std::fill(mine, mine + Z, 0);
        for (size_t i = 0; i < k; i++) {
            const size_t e = pick[cell*k + i];
            if (e < E) {
                const int64_t rank = rank_of(row, E, e);
                for (size_t z = 0; z < Z; z++) {
                    mine[z] += rank < size[z];
                }
            }
        }
    }
}

// (n, Z) how many of the picks (n, k) are among the m best scores (n, E), for each m of sizes; of equal scores the lower column
// is better, and what is no number is worst. Picks of E or more are none.
template <typename T>
array<int32_t> top_hits(const array<T> & scores, const array<uint16_t> & picks, const array<int64_t> & sizes, int n_threads) {
    need(scores.ndim() == 2 && picks.ndim() == 2 && scores.shape(0) == picks.shape(0), "scores are (n, E), picks (n, k)");
    const size_t n = (size_t) scores.shape(0), E = (size_t) scores.shape(1), k = (size_t) picks.shape(1), Z = (size_t) sizes.size();
    const int64_t * size = sizes.data();
    const T * score = scores.data();
    const uint16_t * pick = picks.data();
    array<int32_t> out({ (py::ssize_t) n, (py::ssize_t) Z });
    int32_t * hits = out.mutable_data();
    constexpr size_t BLOCK = 256; // rows
    parallel_for((n + BLOCK - 1)/BLOCK, n_threads, [E] { return std::vector<T>(E); }, [&](size_t block, std::vector<T> & row) {
        const size_t begin = block*BLOCK, end = std::min(n, begin + BLOCK);
        hits_of(score + begin*E, E, pick + begin*k, k, end - begin, size, Z, row.data(), hits + begin*Z);
    });
    return out;
}

// Scores of tokens that are looked at side by side.
constexpr size_t LANES = 8;
typedef float lanes __attribute__((vector_size(LANES*sizeof(float))));

// How many of the k picks of each of n tokens are among the M best of its scores (E, n). Tokens that two scores at the edge
// are equal of, and those that are left over, are told to `other`, and not counted.
template <size_t M, typename Other>
FOR_EACH_CPU int64_t hits_side_by_side(const float * score, size_t E, size_t n, const uint16_t * pick, size_t k, Other && other) {
    int64_t hits = 0;
    const lanes none = lanes {} - std::numeric_limits<float>::infinity();
    size_t begin = 0;
    for (; begin + LANES <= n; begin += LANES) {
        lanes best[M + 1];
        std::fill(best, best + M + 1, none);
        for (size_t e = 0; e < E; e++) {
            lanes x;
            std::memcpy(&x, score + e*n + begin, sizeof(x));
            for (lanes & held : best) { // no comparison is true of what is no number
                const lanes before = held;
                held = x > before ? x : before;
                x    = x > before ? before : x;
            }
        }
        const lanes edge = best[M - 1], next = best[M];
        for (size_t j = 0; j < LANES; j++) {
            const size_t token = begin + j;
            if (edge[j] == next[j]) {
                other(token);
                continue;
            }
            for (size_t i = 0; i < k; i++) {
                const size_t e = pick[token*k + i];
                hits += e < E && score[e*n + token] >= edge[j];
            }
        }
    }
    for (; begin < n; begin++) {
        other(begin);
    }
    return hits;
}

// hits_side_by_side for an m that is known later; of more than MOST all are other tokens.
constexpr size_t MOST = 16;
template <size_t M, typename Other>
int64_t hits_side_by_side(size_t m, const float * score, size_t E, size_t n, const uint16_t * pick, size_t k, Other && other) {
    if constexpr (M <= MOST) {
        return m == M ? hits_side_by_side<M>(score, E, n, pick, k, other) : hits_side_by_side<M + 1>(m, score, E, n, pick, k, other);
    }
    for (size_t token = 0; token < n; token++) {
        other(token);
    }
    return 0;
}

// (L,) how many of the picks (L, n, k) are among the m best scores (L, E, n) of their token, m of each layer (L,); as top_hits.
array<int64_t> layer_hits(const array<float> & scores, const array<uint16_t> & picks, const array<int64_t> & sizes, int n_threads) {
    need(scores.ndim() == 3 && picks.ndim() == 3 && scores.shape(0) == picks.shape(0) && scores.shape(2) == picks.shape(1) &&
        sizes.size() == scores.shape(0), "scores are (L, E, n), picks (L, n, k), sizes (L,)");
    const size_t L = (size_t) scores.shape(0), E = (size_t) scores.shape(1), n = (size_t) scores.shape(2), k = (size_t) picks.shape(2);
    const int64_t * size = sizes.data();
    const float * score = scores.data();
    const uint16_t * pick = picks.data();
    array<int64_t> out((py::ssize_t) L);
    int64_t * hits = out.mutable_data();
    parallel_for(L, n_threads, [E] { return std::vector<float>(2*E); }, [&](size_t layer, std::vector<float> & scratch) {
        const float * mine = score + layer*E*n;
        const uint16_t * chosen = pick + layer*n*k;
        int64_t one_by_one = 0;
        const auto other = [&](size_t token) {
            for (size_t e = 0; e < E; e++) {
                scratch[e] = mine[e*n + token];
            }
            int32_t found = 0;
            hits_of(scratch.data(), E, chosen + token*k, k, 1, size + layer, 1, scratch.data() + E, &found);
            one_by_one += found;
        };
        hits[layer] = hits_side_by_side<1>((size_t) size[layer], mine, E, n, chosen, k, other);
        hits[layer] += one_by_one;
    });
    return out;
}

FOR_EACH_CPU void add_to(float * sum, const float * x, size_t F) {
    for (size_t f = 0; f < F; f++) {
        sum[f] += x[f];
    }
}

// (G, L, E, F) features (n, F) summed over the rows of each group (n,) that pick an expert, picks (L, n, k).
array<float> pick_sums(const array<float> & features, const array<uint16_t> & picks, const array<int32_t> & group, int64_t n_groups,
        int64_t n_expert, int n_threads) {
    need(features.ndim() == 2 && picks.ndim() == 3 && features.shape(0) == picks.shape(1) && group.size() == picks.shape(1),
        "features are (n, F), picks (L, n, k), groups (n,)");
    const size_t L = (size_t) picks.shape(0), n = (size_t) picks.shape(1), k = (size_t) picks.shape(2), F = (size_t) features.shape(1),
        E = (size_t) n_expert;
    const int32_t * of = group.data();
    need(n_groups >= 0 && n_expert >= 0 && all_below(of, n, n_groups),
        "a group is not there");
    const float * x = features.data();
    const uint16_t * pick = picks.data();
    array<float> out({ (py::ssize_t) n_groups, (py::ssize_t) L, (py::ssize_t) n_expert, (py::ssize_t) F });
    float * sums = out.mutable_data();
    parallel_for(L, n_threads, [] { return 0; }, [&](size_t layer, int) {
        for (size_t g = 0; g < (size_t) n_groups; g++) {
            std::fill(sums + (g*L + layer)*E*F, sums + (g*L + layer + 1)*E*F, 0.0f);
        }
        for (size_t r = 0; r < n; r++) {
            float * mine = sums + ((size_t) of[r]*L + layer)*E*F;
            for (size_t j = 0; j < k; j++) {
                const size_t e = pick[(layer*n + r)*k + j];
                if (e < E) {
                    add_to(mine + e*F, x + r*F, F);
                }
            }
        }
    });
    return out;
}

} // namespace

void bind_tops(py::module_ & m) {
    m.def("top_hits", &top_hits<float>, py::arg("scores").noconvert(), py::arg("picks"), py::arg("sizes"), py::arg("n_threads") = 0);
    m.def("top_hits", &top_hits<double>, py::arg("scores"), py::arg("picks"), py::arg("sizes"), py::arg("n_threads") = 0);
    m.def("layer_hits", &layer_hits, py::arg("scores"), py::arg("picks"), py::arg("sizes"), py::arg("n_threads") = 0);
    m.def("pick_sums", &pick_sums, py::arg("features"), py::arg("picks"), py::arg("group"), py::arg("n_groups"), py::arg("n_expert"),
        py::arg("n_threads") = 0);
}

} // namespace moetrace
