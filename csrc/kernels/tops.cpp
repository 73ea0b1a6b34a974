// What is among the best of each row, and what the rows that pick something have in sum.

#include "kernels.h"

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

// (n, L, Z) how many of the picks (n, L, k) are among the m best scores (n, L, E), for each m of sizes; of equal scores the
// lower column is better, and what is no number is worst. Picks of E or more are none.
template <typename T>
array<int32_t> top_hits(const array<T> & scores, const array<uint16_t> & picks, const array<int64_t> & sizes, int n_threads) {
    need(scores.ndim() == 3 && picks.ndim() == 3 && scores.shape(0) == picks.shape(0) && scores.shape(1) == picks.shape(1),
        "scores are (n, L, E), picks (n, L, k)");
    const size_t n = (size_t) scores.shape(0), L = (size_t) scores.shape(1), E = (size_t) scores.shape(2), k = (size_t) picks.shape(2),
        Z = (size_t) sizes.size();
    const int64_t * size = sizes.data();
    const T * score = scores.data();
    const uint16_t * pick = picks.data();
    array<int32_t> out({ (py::ssize_t) n, (py::ssize_t) L, (py::ssize_t) Z });
    int32_t * hits = out.mutable_data();
    constexpr size_t BLOCK = 256; // cells
    parallel_for((n*L + BLOCK - 1)/BLOCK, n_threads, [E] { return std::vector<T>(E); }, [&](size_t block, std::vector<T> & row) {
        const size_t begin = block*BLOCK, end = std::min(n*L, begin + BLOCK);
        hits_of(score + begin*E, E, pick + begin*k, k, end - begin, size, Z, row.data(), hits + begin*Z);
    });
    return out;
}

FOR_EACH_CPU void add_to(float * sum, const float * x, size_t F) {
    for (size_t f = 0; f < F; f++) {
        sum[f] += x[f];
    }
}

// (G, L, E, F) features (n, F) summed over the rows of each group (n,) that pick an expert, picks (n, L, k).
array<float> pick_sums(const array<float> & features, const array<uint16_t> & picks, const array<int32_t> & group, int64_t n_groups,
        int64_t n_expert, int n_threads) {
    need(features.ndim() == 2 && picks.ndim() == 3 && features.shape(0) == picks.shape(0) && group.size() == picks.shape(0),
        "features are (n, F), picks (n, L, k), groups (n,)");
    const size_t n = (size_t) picks.shape(0), L = (size_t) picks.shape(1), k = (size_t) picks.shape(2), F = (size_t) features.shape(1),
        E = (size_t) n_expert;
    const int32_t * of = group.data();
    need(n_groups >= 0 && n_expert >= 0 && std::all_of(of, of + n, [n_groups](int32_t g) { return g >= 0 && g < n_groups; }),
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
                const size_t e = pick[(r*L + layer)*k + j];
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
    m.def("pick_sums", &pick_sums, py::arg("features"), py::arg("picks"), py::arg("group"), py::arg("n_groups"), py::arg("n_expert"),
        py::arg("n_threads") = 0);
}

} // namespace moetrace
