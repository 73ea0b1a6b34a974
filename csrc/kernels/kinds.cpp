// How often kinds of token meet experts when the routing is rearranged.

#include "kernels.h"

namespace moetrace {

namespace {

// What all of these take: the cells (kind, row) of a membership, experts of N rows, and B rearrangements of the rows.
struct rearranged {
    const int32_t *  kind;
    const int32_t *  row;
    size_t           n_cells;
    const uint16_t * ids;
    size_t           n_rows;
    size_t           k;
    const int32_t *  turned;
    size_t           n_draws;

    rearranged(const array<int32_t> & kinds, const array<int32_t> & rows, const array<uint16_t> & experts, const array<int32_t> & order,
            int64_t n_kinds) :
        kind(kinds.data()), row(rows.data()), n_cells((size_t) kinds.size()), ids(experts.data()) {
        need(kinds.ndim() == 1 && rows.ndim() == 1 && kinds.size() == rows.size(), "kinds and rows are of one length");
        need(experts.ndim() == 2 && order.ndim() == 2 && order.shape(1) == experts.shape(0), "experts are (N, k), rearrangements (B, N)");
        n_rows  = (size_t) experts.shape(0);
        k       = (size_t) experts.shape(1);
        turned  = order.data();
        n_draws = (size_t) order.shape(0);
        need(all_below(kind, n_cells, n_kinds) && all_below(row, n_cells, (int64_t) n_rows), "a kind or a row is not there");
        need(all_below(turned, n_draws*n_rows, (int64_t) n_rows), "a rearrangement names a row that is not there");
    }
};

// Counts (C, E + 1) of which pick, none of them more than E, each row of a kind has. K: how many, where that is known here.
template <size_t K>
void count_kinds(const rearranged & in, const int32_t * turned, const uint16_t * ids, size_t E, int32_t * counts) {
    const size_t k = K ? K : in.k;
    for (size_t cell = 0; cell < in.n_cells; cell++) {
        int32_t * __restrict of_kind = counts + (size_t) in.kind[cell]*(E + 1);
        const uint16_t * __restrict chosen = ids + (size_t) turned[in.row[cell]]*k;
#pragma GCC unroll 16
        for (size_t j = 0; j < k; j++) {
            of_kind[chosen[j]]++;
        }
    }
}

// (B, C, E) tokens of each kind that use each expert.
array<int32_t> kind_counts(const array<int32_t> & kinds, const array<int32_t> & rows, const array<uint16_t> & experts,
        const array<int32_t> & order, int64_t n_kinds, int64_t n_expert, int n_threads) {
    const rearranged in(kinds, rows, experts, order, n_kinds);
    const size_t C = (size_t) n_kinds, E = (size_t) n_expert;
    need(n_expert >= 0 && n_expert <= UINT16_MAX, "experts are numbered in 16 bits");
    std::vector<uint16_t> ids(in.ids, in.ids + in.n_rows*in.k);
    std::transform(ids.begin(), ids.end(), ids.begin(), [E](uint16_t id) { return std::min(id, (uint16_t) E); });
    const auto count = in.k == 1 ? count_kinds<1> : in.k == 2 ? count_kinds<2> : in.k == 4 ? count_kinds<4> : in.k == 6 ? count_kinds<6>
        : in.k == 8 ? count_kinds<8> : in.k == 10 ? count_kinds<10> : count_kinds<0>;
    array<int32_t> out({ (py::ssize_t) in.n_draws, (py::ssize_t) n_kinds, (py::ssize_t) n_expert });
    int32_t * to = out.mutable_data();
    parallel_for(in.n_draws, n_threads, [&] { return std::vector<int32_t>(C*(E + 1)); }, [&](size_t draw, std::vector<int32_t> & counts) {
        std::fill(counts.begin(), counts.end(), 0);
        count(in, in.turned + draw*in.n_rows, ids.data(), E, counts.data());
        for (size_t kind = 0; kind < C; kind++) {
            std::copy_n(counts.data() + kind*(E + 1), E, to + (draw*C + kind)*E);
        }
    });
    return out;
}

// The same by group (a row's prompt; cells are sorted by kind and group), of n tokens less `expected` (C, P, E): gives
// the sum over groups of n, and of (n - expected)^2 - expected^2. Few experts are met in a group, so neither is dense.
py::tuple kind_moments(const array<int32_t> & kinds, const array<int32_t> & rows, const array<int32_t> & groups,
        const array<uint16_t> & experts, const array<int32_t> & order, const array<double> & expected, int n_threads) {
    need(expected.ndim() == 3, "expected is (C, P, E)");
    const int64_t n_kinds = expected.shape(0);
    const size_t  P = (size_t) expected.shape(1), E = (size_t) expected.shape(2), size = (size_t) n_kinds*E;
    const rearranged in(kinds, rows, experts, order, n_kinds);
    need(groups.ndim() == 1 && (size_t) groups.size() == in.n_cells, "groups are one per cell");
    const int32_t * group = groups.data();
    for (size_t cell = 0; cell < in.n_cells; cell++) {
        need(group[cell] >= 0 && (size_t) group[cell] < P, "a group is not there");
        need(cell == 0 || std::make_pair(in.kind[cell - 1], group[cell - 1]) <= std::make_pair(in.kind[cell], group[cell]), "cells are not sorted");
    }
    const std::vector<py::ssize_t> shape { (py::ssize_t) in.n_draws, (py::ssize_t) n_kinds, (py::ssize_t) E };
    array<double> sums(shape), squares(shape);
    double * sum = sums.mutable_data(), * square = squares.mutable_data();
    const double * of = expected.data();
    struct met {
        std::vector<int32_t>  n;
        std::vector<uint16_t> which;
    };
    parallel_for(in.n_draws, n_threads, [E] { return met { std::vector<int32_t>(E), {} }; }, [&](size_t draw, met & scratch) {
        double * mine = sum + draw*size, * my_squares = square + draw*size;
        const int32_t * turned = in.turned + draw*in.n_rows;
        std::fill(mine, mine + size, 0.0);
        std::fill(my_squares, my_squares + size, 0.0);
        for (size_t cell = 0; cell < in.n_cells;) {
            const int32_t kind = in.kind[cell], who = group[cell];
            for (; cell < in.n_cells && in.kind[cell] == kind && group[cell] == who; cell++) {
                const uint16_t * chosen = in.ids + (size_t) turned[in.row[cell]]*in.k;
                for (size_t j = 0; j < in.k; j++) {
                    if (chosen[j] < E && scratch.n[chosen[j]]++ == 0) {
                        scratch.which.push_back(chosen[j]);
                    }
                }
            }
            const double * here = of + ((size_t) kind*P + (size_t) who)*E;
            for (const uint16_t e : scratch.which) {
                const double n = scratch.n[e];
                mine[(size_t) kind*E + e]       += n;
                my_squares[(size_t) kind*E + e] += n*(n - 2*here[e]);
                scratch.n[e] = 0;
            }
            scratch.which.clear();
        }
    });
    return py::make_tuple(sums, squares);
}

// Sums of rows of values (W, E) by group, for many ways (B, W) of handing out the groups: (B, G, E), each sum in the order
// of the rows.
array<double> group_sums(const array<int32_t> & groups, const array<double> & values, int64_t n_groups, int n_threads) {
    need(groups.ndim() == 2 && values.ndim() == 2 && groups.shape(1) == values.shape(0), "groups are (B, W), values (W, E)");
    const size_t B = (size_t) groups.shape(0), W = (size_t) groups.shape(1), E = (size_t) values.shape(1), size = (size_t) n_groups*E;
    const int32_t * of = groups.data();
    need(all_below(of, B*W, n_groups), "a group is not there");
    array<double> out({ (py::ssize_t) B, (py::ssize_t) n_groups, (py::ssize_t) E });
    double * sums = out.mutable_data();
    const double * value = values.data();
    parallel_for(B, n_threads, [] { return 0; }, [&](size_t draw, int) {
        double * mine = sums + draw*size;
        std::fill(mine, mine + size, 0.0);
        for (size_t w = 0; w < W; w++) {
            double * to = mine + (size_t) of[draw*W + w]*E;
            const double * from = value + w*E;
            for (size_t e = 0; e < E; e++) {
                to[e] += from[e];
            }
        }
    });
    return out;
}

} // namespace

void bind_kinds(py::module_ & m) {
    m.def("kind_counts", &kind_counts, py::arg("kinds"), py::arg("rows"), py::arg("experts"), py::arg("order"), py::arg("n_kinds"),
        py::arg("n_expert"), py::arg("n_threads") = 0);
    m.def("group_sums", &group_sums, py::arg("groups"), py::arg("values"), py::arg("n_groups"), py::arg("n_threads") = 0);
    m.def("kind_moments", &kind_moments, py::arg("kinds"), py::arg("rows"), py::arg("groups"), py::arg("experts"), py::arg("order"),
        py::arg("expected"), py::arg("n_threads") = 0);
}

} // namespace moetrace
