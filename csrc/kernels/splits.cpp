// A sequence that is cut in two at every step: how much the experts of both parts differ.

#include "kernels.h"

#include <cmath>

namespace moetrace {

namespace {

// (B, width - 1) weighted Jensen-Shannon divergence in bits between the picks of steps before t + 1 and from it on, mean
// over layers, for orders (B, M) of rows; rows begin[t] to begin[t + 1] of an order are of step t.
array<double> split_divergence(const array<uint16_t> & experts, const array<int32_t> & order, const array<int64_t> & begin,
        int64_t n_expert, int n_threads) {
    need(experts.ndim() == 3 && order.ndim() == 2 && begin.ndim() == 1 && begin.size() >= 2, "experts are (N, L, k), orders (B, M)");
    const size_t N = (size_t) experts.shape(0), L = (size_t) experts.shape(1), k = (size_t) experts.shape(2), E = (size_t) n_expert;
    const size_t B = (size_t) order.shape(0), M = (size_t) order.shape(1), width = (size_t) begin.size() - 1;
    const uint16_t * ids = experts.data();
    const int32_t * rows = order.data();
    const int64_t * at = begin.data();
    need(std::all_of(rows, rows + B*M, [N](int32_t r) { return r >= 0 && (size_t) r < N; }), "an order names a row that is not there");
    need(std::is_sorted(at, at + width + 1) && at[0] == 0 && (size_t) at[width] == M, "steps do not hold the rows");
    std::vector<double> f(M*k + 1, 0.0); // c*log2(c)
    for (size_t c = 1; c < f.size(); c++) {
        f[c] = (double) c*std::log2((double) c);
    }
    array<double> out({ (py::ssize_t) B, (py::ssize_t) (width - 1) });
    double * bits = out.mutable_data();
    struct parts { std::vector<int32_t> before, after; };
    parallel_for(B, n_threads, [E] { return parts { std::vector<int32_t>(E), std::vector<int32_t>(E) }; }, [&](size_t draw, parts & s) {
        double * mine = bits + draw*(width - 1);
        const int32_t * my_rows = rows + draw*M;
        std::fill(mine, mine + width - 1, 0.0);
        for (size_t layer = 0; layer < L; layer++) {
            std::fill(s.before.begin(), s.before.end(), 0);
            std::fill(s.after.begin(), s.after.end(), 0);
            const auto each = [&](size_t i, auto && use) {
                const uint16_t * chosen = ids + ((size_t) my_rows[i]*L + layer)*k;
                for (size_t j = 0; j < k; j++) {
                    if (chosen[j] < E) {
                        use(chosen[j]);
                    }
                }
            };
            size_t n_before = 0, n_after = 0;
            for (size_t i = 0; i < M; i++) {
                each(i, [&](uint16_t e) { s.after[e]++; n_after++; });
            }
            double in_before = 0.0, in_after = 0.0; // sums of f
            for (const int32_t c : s.after) {
                in_after += f[(size_t) c];
            }
            const double whole = f[n_after] - in_after, n = (double) n_after;
            for (size_t t = 0; t + 1 < width; t++) {
                for (size_t i = (size_t) at[t]; i < (size_t) at[t + 1]; i++) {
                    each(i, [&](uint16_t e) {
                        int32_t & a = s.before[e], & b = s.after[e];
                        in_before += f[(size_t) a + 1] - f[(size_t) a];
                        in_after  += f[(size_t) b - 1] - f[(size_t) b];
                        a++;
                        b--;
                        n_before++;
                        n_after--;
                    });
                }
                if (n_before && n_after) {
                    mine[t] += (whole - (f[n_before] - in_before) - (f[n_after] - in_after))/n;
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
