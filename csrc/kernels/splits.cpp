// A sequence that is cut in two at every step: how much the experts of both parts differ.

#include "kernels.h"

#include <cmath>

namespace moetrace {

namespace {

// (B, width - 1) weighted Jensen-Shannon divergence in bits between the picks of steps before t + 1 and from it on, mean
// over layers of experts (L, N, k), for orders (B, M) of rows; rows begin[t] to begin[t + 1] of an order are of step t.
array<double> split_divergence(const array<uint16_t> & experts, const array<int32_t> & order, const array<int64_t> & begin,
        int64_t n_expert, int n_threads) {
    need(experts.ndim() == 3 && order.ndim() == 2 && begin.ndim() == 1 && begin.size() >= 2, "experts are (L, N, k), orders (B, M)");
    const size_t L = (size_t) experts.shape(0), N = (size_t) experts.shape(1), k = (size_t) experts.shape(2), E = (size_t) n_expert;
    const size_t B = (size_t) order.shape(0), M = (size_t) order.shape(1), width = (size_t) begin.size() - 1;
    const uint16_t * ids = experts.data();
    const int32_t * rows = order.data();
    const int64_t * at = begin.data();
    need(all_below(rows, B*M, (int64_t) N), "an order names a row that is not there");
    need(std::is_sorted(at, at + width + 1) && at[0] == 0 && (size_t) at[width] == M, "steps do not hold the rows");
    // c*log2(c) as whole numbers of 2^-shift: sums of them are exact, and a step is one addition
    const double most = (double) (M*k + 1)*std::log2((double) (M*k + 1));
    const int shift = 61 - (int) std::ceil(std::log2(most + 1.0));
    const double unit = std::ldexp(1.0, -shift);
    std::vector<int64_t> f(M*k + 1, 0), step(M*k + 1, 0);
    for (size_t c = 1; c < f.size(); c++) {
        f[c] = std::llround(std::ldexp((double) c*std::log2((double) c), shift));
        step[c - 1] = f[c] - f[c - 1];
    }
    const auto each_pick = [&](size_t layer, int32_t row, auto && use) {
        const uint16_t * chosen = ids + (layer*N + (size_t) row)*k;
        for (size_t j = 0; j < k; j++) {
            if (chosen[j] < E) {
                use(chosen[j]);
            }
        }
    };
    const auto totals = [&](size_t layer, const int32_t * my_rows, int32_t * count) {
        std::fill(count, count + E, 0);
        for (size_t i = 0; i < M; i++) {
            each_pick(layer, my_rows[i], [&](uint16_t e) { count[e]++; });
        }
    };
    const auto times = [&](const int32_t * my_rows) {
        std::vector<int32_t> n(N, 0);
        for (size_t i = 0; i < M; i++) {
            n[(size_t) my_rows[i]]++;
        }
        return n;
    };
    // most orders hold the same rows: then an expert's picks are as many
    std::vector<int32_t> first_totals(L*E), first_times;
    if (B) {
        first_times = times(rows);
        for (size_t layer = 0; layer < L; layer++) {
            totals(layer, rows, first_totals.data() + layer*E);
        }
    }
    array<double> out({ (py::ssize_t) B, (py::ssize_t) (width - 1) });
    double * bits = out.mutable_data();
    struct sides { int32_t before, after; };
    struct scratch { std::vector<sides> n; std::vector<int32_t> total; };
    parallel_for(B, n_threads, [E] { return scratch { std::vector<sides>(E), std::vector<int32_t>(E) }; }, [&](size_t draw, scratch & s) {
        double * mine = bits + draw*(width - 1);
        const int32_t * my_rows = rows + draw*M;
        const bool alike = times(my_rows) == first_times;
        std::fill(mine, mine + width - 1, 0.0);
        for (size_t layer = 0; layer < L; layer++) {
            const int32_t * total = first_totals.data() + layer*E;
            if (!alike) {
                totals(layer, my_rows, s.total.data());
                total = s.total.data();
            }
            size_t n_before = 0, n_after = 0;
            int64_t in_before = 0, in_after = 0; // sums of f
            for (size_t e = 0; e < E; e++) {
                s.n[e] = { 0, total[e] };
                n_after  += (size_t) total[e];
                in_after += f[(size_t) total[e]];
            }
            const int64_t whole = f[n_after] - in_after;
            const double n = (double) n_after;
            for (size_t t = 0; t + 1 < width; t++) {
                const size_t begin = (size_t) at[t], end = (size_t) at[t + 1];
                if ((end - begin)*k < E) {
                    for (size_t i = begin; i < end; i++) {
                        each_pick(layer, my_rows[i], [&](uint16_t e) {
                            sides & c = s.n[e];
                            in_before += step[(size_t) c.before++];
                            in_after  -= step[(size_t) --c.after];
                            n_before++;
                            n_after--;
                        });
                    }
                } else { // more picks than experts: these are counted, and summed up once
                    for (size_t i = begin; i < end; i++) {
                        each_pick(layer, my_rows[i], [&](uint16_t e) { s.n[e].before++; });
                    }
                    in_before = in_after = 0;
                    n_before  = n_after  = 0;
                    for (size_t e = 0; e < E; e++) {
                        sides & c = s.n[e];
                        c.after    = total[e] - c.before;
                        n_before  += (size_t) c.before;
                        n_after   += (size_t) c.after;
                        in_before += f[(size_t) c.before];
                        in_after  += f[(size_t) c.after];
                    }
                }
                if (n_before && n_after) {
                    mine[t] += (double) (whole - (f[n_before] - in_before) - (f[n_after] - in_after))*unit/n;
                }
            }
        }
        for (size_t t = 0; t + 1 < width; t++) {
            mine[t] /= (double) L;
        }
    });
    return out;
}

} // namespace

void bind_splits(py::module_ & m) {
    m.def("split_divergence", &split_divergence, py::arg("experts"), py::arg("order"), py::arg("begin"), py::arg("n_expert"),
        py::arg("n_threads") = 0);
}

} // namespace moetrace
