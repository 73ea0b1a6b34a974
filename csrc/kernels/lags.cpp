// How far tokens agree with those some places before them, the tokens being put in other orders.

#include "kernels.h"

namespace moetrace {

namespace {

// Of rows from `lag` on and the ones so many before them, where both are known and belong together: how many these are, and
// how many have equal first experts. `both` says which they are.
FOR_EACH_CPU void pairs_alike(const uint16_t * first, const uint8_t * known, const uint8_t * joined, size_t lag, size_t m,
        uint8_t * both, int64_t & n, int64_t & same) {
    constexpr size_t PART = 65536; // sums fit into 32 bits, which more of are added at once
    for (size_t begin = lag; begin < m; begin += PART) {
        uint32_t pairs = 0, equal = 0;
        for (size_t i = begin; i < std::min(m, begin + PART); i++) {
            const uint8_t b = joined[i] & known[i] & known[i - lag];
            both[i] = b;
            pairs  += b;
            equal  += b & (uint8_t) (first[i] == first[i - lag]);
        }
        n    += pairs;
        same += equal;
    }
}

// bits that are set in both, summed over rows m with both[m]: of row m and the one `lag` before it
FOR_EACH_CPU int64_t bits_shared(const uint64_t * word, const uint8_t * both, size_t lag, size_t m) {
    int64_t n = 0;
    for (size_t i = lag; i < m; i++) {
        n += __builtin_popcountll(word[i] & word[i - lag] & (0 - (uint64_t) both[i]));
    }
    return n;
}

// Of words (W, L, M) of which experts each token uses, first experts (L, M) (n_expert or more: none is known), and for each
// lag whether row m and the one before belong together (G, M): for orders (B, M) of rows, (B, L, G) pairs where both are
// known, equal first experts, and experts in common.
py::tuple lag_agreement(const array<uint64_t> & words, const array<uint16_t> & first, const array<int64_t> & lags, const array<bool> & together,
        const array<int32_t> & order, int64_t n_expert, int n_threads) {
    need(words.ndim() == 3 && first.ndim() == 2 && together.ndim() == 2 && order.ndim() == 2, "words are (W, L, M), orders (B, M)");
    const size_t W = (size_t) words.shape(0), L = (size_t) words.shape(1), M = (size_t) words.shape(2), B = (size_t) order.shape(0),
        G = (size_t) lags.size();
    need((size_t) first.shape(0) == L && (size_t) first.shape(1) == M && (size_t) together.shape(1) == M && (size_t) order.shape(1) == M &&
        (size_t) together.shape(0) == G, "rows are not as many everywhere");
    const int32_t * rows = order.data();
    need(all_below(rows, B*M, (int64_t) M), "an order names a row that is not there");
    const int64_t * lag = lags.data();
    need(std::all_of(lag, lag + G, [M](int64_t g) { return g > 0 && (size_t) g < M; }), "a lag is longer than the rows");
    const std::vector<py::ssize_t> shape { (py::ssize_t) B, (py::ssize_t) L, (py::ssize_t) G };
    array<int64_t> pairs(shape), same(shape), shared(shape);
    int64_t * const n_pairs = pairs.mutable_data(), * const n_same = same.mutable_data(), * const n_shared = shared.mutable_data();
    const uint64_t * word = words.data();
    const uint16_t * primary = first.data();
    const uint8_t * joined = (const uint8_t *) together.data();
    struct moved {
        std::vector<uint64_t> word;
        std::vector<uint16_t> first;
        std::vector<uint8_t>  known, both;
    };
    parallel_for(B, n_threads, [&] {
        return moved { std::vector<uint64_t>(W*M), std::vector<uint16_t>(M), std::vector<uint8_t>(M), std::vector<uint8_t>(M) };
    }, [&](size_t draw, moved & s) {
        const int32_t * mine = rows + draw*M;
        for (size_t layer = 0; layer < L; layer++) {
            for (size_t i = 0; i < M; i++) {
                s.first[i] = primary[layer*M + (size_t) mine[i]];
                s.known[i] = s.first[i] < n_expert;
            }
            for (size_t w = 0; w < W; w++) {
                for (size_t i = 0; i < M; i++) {
                    s.word[w*M + i] = word[(w*L + layer)*M + (size_t) mine[i]];
                }
            }
            for (size_t g = 0; g < G; g++) {
                const size_t by = (size_t) lag[g], out = (draw*L + layer)*G + g;
                n_pairs[out] = n_same[out] = n_shared[out] = 0;
                pairs_alike(s.first.data(), s.known.data(), joined + g*M, by, M, s.both.data(), n_pairs[out], n_same[out]);
                for (size_t w = 0; w < W; w++) {
                    n_shared[out] += bits_shared(s.word.data() + w*M, s.both.data(), by, M);
                }
            }
        }
    });
    return py::make_tuple(pairs, same, shared);
}

} // namespace

void bind_lags(py::module_ & m) {
    m.def("lag_agreement", &lag_agreement, py::arg("words"), py::arg("first"), py::arg("lags"), py::arg("together"), py::arg("order"),
        py::arg("n_expert"), py::arg("n_threads") = 0);
}

} // namespace moetrace
