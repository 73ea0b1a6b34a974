// What is among the best of each row.

#include "kernels.h"

#include <limits>

namespace moetrace {

namespace {

// (n, Z) the sum of `used` (n, E) over each row's m best scores (n, E), for each m of sizes; of equal scores the lower
// column is better, and what is no number is worst.
template <typename T>
array<double> top_sums(const array<T> & scores, const array<float> & used, const array<int64_t> & sizes, int n_threads) {
    need(scores.ndim() == 2 && used.ndim() == 2 && scores.shape(0) == used.shape(0) && scores.shape(1) == used.shape(1), "scores and used are (n, E)");
    const size_t n = (size_t) scores.shape(0), E = (size_t) scores.shape(1), Z = (size_t) sizes.size();
    const int64_t * size = sizes.data();
    need(Z && std::all_of(size, size + Z, [E](int64_t m) { return m > 0 && (size_t) m <= E; }), "sizes are 1 to E");
    const size_t most = (size_t) *std::max_element(size, size + Z);
    const T * score = scores.data();
    const float * use = used.data();
    array<double> out({ (py::ssize_t) n, (py::ssize_t) Z });
    double * sums = out.mutable_data();
    constexpr size_t BLOCK = 256; // rows
    struct best { std::vector<T> score; std::vector<int32_t> which; };
    parallel_for((n + BLOCK - 1)/BLOCK, n_threads, [&] { return best { std::vector<T>(most), std::vector<int32_t>(most) }; }, [&](size_t block, best & s) {
        for (size_t r = block*BLOCK; r < std::min(n, (block + 1)*BLOCK); r++) {
            size_t kept = 0; // of the columns so far, the best first
            for (size_t e = 0; e < E; e++) {
                const T x = score[r*E + e] == score[r*E + e] ? score[r*E + e] : -std::numeric_limits<T>::infinity();
                if (kept == most && !(x > s.score[most - 1])) {
                    continue;
                }
                size_t at = kept < most ? kept++ : most - 1;
                for (; at > 0 && x > s.score[at - 1]; at--) {
                    s.score[at] = s.score[at - 1];
                    s.which[at] = s.which[at - 1];
                }
                s.score[at] = x;
                s.which[at] = (int32_t) e;
            }
            for (size_t z = 0; z < Z; z++) {
                double sum = 0.0;
                for (size_t i = 0; i < (size_t) size[z]; i++) {
                    sum += (double) use[r*E + (size_t) s.which[i]];
                }
                sums[r*Z + z] = sum;
            }
        }
    });
    return out;
}

} // namespace

void bind_tops(py::module_ & m) {
    m.def("top_sums", &top_sums<float>, py::arg("scores").noconvert(), py::arg("used"), py::arg("sizes"), py::arg("n_threads") = 0);
    m.def("top_sums", &top_sums<double>, py::arg("scores"), py::arg("used"), py::arg("sizes"), py::arg("n_threads") = 0);
}

} // namespace moetrace
