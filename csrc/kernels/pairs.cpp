// Experts of two layers that tokens use together, the later layer's routing being rearranged.

#include "kernels.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace moetrace {

namespace {

constexpr double SLACK = 1e-9; // equal statistics may differ by rounding

struct pair_tables {
    const uint16_t * a;
    const uint16_t * b;
    const int64_t *  first_a;
    const int64_t *  first_b;
    size_t           n, k_a, k_b, E;
    const double *   expected;
    const double *   spread;
    const double *   score;
    std::vector<int32_t> eligible; // cells
};

// c*log2(c) for c up to n
std::vector<double> log_table(size_t n) {
    std::vector<double> table(n + 1, 0.0);
    for (size_t c = 1; c <= n; c++) {
        table[c] = (double) c*std::log2((double) c);
    }
    return table;
}

typedef uint8_t byte_block __attribute__((vector_size(32)));

// Which experts layer b uses, as bytes: a row of them is added at once, which is quicker than pick by pick where experts are
// few. Sums of `rows` rows fit into a byte.
struct byte_rows {
    static constexpr size_t BLOCK = sizeof(byte_block);
    size_t               width = 0; // of a row, whole blocks; 0: experts are many
    size_t               rows  = 0;
    std::vector<uint8_t> uses;

    explicit byte_rows(const pair_tables & in) {
        const size_t wide = (in.E + BLOCK - 1)/BLOCK*BLOCK;
        if (wide >= BLOCK*in.k_b) {
            return;
        }
        const auto most = [&in](const uint16_t * ids, size_t k) {
            long n = 1; // an expert's times in a row
            for (size_t r = 0; r < in.n; r++) {
                for (size_t j = 1; j < k; j++) {
                    n = std::max<long>(n, 1 + std::count(ids + r*k, ids + r*k + j, ids[r*k + j]));
                }
            }
            return (size_t) n;
        };
        const size_t of_a_row = most(in.a, in.k_a)*most(in.b, in.k_b);
        if (of_a_row > 255) {
            return;
        }
        width = wide;
        rows  = 255/of_a_row;
        uses.assign(in.n*width, 0);
        for (size_t r = 0; r < in.n; r++) {
            for (size_t j = 0; j < in.k_b; j++) {
                if (in.b[r*in.k_b + j] < in.E) {
                    uses[r*width + in.b[r*in.k_b + j]]++;
                }
            }
        }
    }
};

FOR_EACH_CPU void joint_of_bytes(const pair_tables & in, const byte_rows & b, const int32_t * turned, uint8_t * part, int32_t * joint) {
    const size_t n = in.n, k_a = in.k_a, E = in.E, width = b.width;
    const uint16_t * a = in.a;
    const uint8_t * uses = b.uses.data();
    for (size_t begin = 0; begin < n; begin += b.rows) {
        const size_t end = std::min(n, begin + b.rows);
        for (size_t r = begin; r < end; r++) {
            const uint8_t * from = uses + (size_t) turned[r]*width;
            for (size_t i = r*k_a; i < (r + 1)*k_a; i++) {
                const size_t e = a[i];
                if (e < E) {
                    uint8_t * to = part + e*width;
                    for (size_t v = 0; v < width; v += sizeof(byte_block)) {
                        byte_block sum, more;
                        std::memcpy(&sum, to + v, sizeof(sum));
                        std::memcpy(&more, from + v, sizeof(more));
                        sum += more;
                        std::memcpy(to + v, &sum, sizeof(sum));
                    }
                }
            }
        }
        for (size_t e = 0; e < E; e++) {
            for (size_t j = 0; j < E; j++) {
                joint[e*E + j] += part[e*width + j];
            }
        }
        std::fill(part, part + E*width, (uint8_t) 0);
    }
}

// joint[i*E + j]: rows of which layer a uses i, and layer b, at the row that is put there, j
void joint_count(const pair_tables & in, const byte_rows & bytes, const int32_t * turned, uint8_t * part, int32_t * joint) {
    if (bytes.width) {
        joint_of_bytes(in, bytes, turned, part, joint);
        return;
    }
    for (size_t r = 0; r < in.n; r++) {
        const uint16_t * chosen = in.b + (size_t) turned[r]*in.k_b;
        for (size_t i = 0; i < in.k_a; i++) {
            const uint16_t e = in.a[r*in.k_a + i];
            if (e >= in.E) {
                continue;
            }
            int32_t * of_e = joint + (size_t) e*in.E;
            for (size_t j = 0; j < in.k_b; j++) {
                if (chosen[j] < in.E) {
                    of_e[chosen[j]]++;
                }
            }
        }
    }
}

// Of rearrangements (B, N) of layer b's rows: how often each cell's statistic (joint - expected)/spread reaches `score`,
// the largest of each rearrangement, and the entropy in bits of the two first experts together.
py::tuple pair_draws(const array<uint16_t> & a, const array<uint16_t> & b, const array<int64_t> & first_a, const array<int64_t> & first_b,
        const array<int32_t> & order, const array<double> & expected, const array<double> & spread, const array<double> & score,
        const array<bool> & eligible, int n_threads) {
    need(a.ndim() == 2 && b.ndim() == 2 && a.shape(0) == b.shape(0) && order.ndim() == 2 && order.shape(1) == a.shape(0), "rows are not as many everywhere");
    need(first_a.ndim() == 1 && first_b.ndim() == 1 && first_a.size() == a.shape(0) && first_b.size() == a.shape(0), "first experts are one per row");
    need(expected.ndim() == 2 && expected.shape(0) == expected.shape(1), "tables are (E, E)");
    need(spread.size() == expected.size() && score.size() == expected.size() && eligible.size() == expected.size(), "tables are (E, E)");
    pair_tables in { a.data(), b.data(), first_a.data(), first_b.data(), (size_t) a.shape(0), (size_t) a.shape(1), (size_t) b.shape(1),
        (size_t) expected.shape(0), expected.data(), spread.data(), score.data(), {} };
    const size_t size = in.E*in.E, B = (size_t) order.shape(0);
    for (size_t cell = 0; cell < size; cell++) {
        if (eligible.data()[cell]) {
            in.eligible.push_back((int32_t) cell);
        }
    }
    const int32_t * turned = order.data();
    need(all_below(turned, B*in.n, (int64_t) in.n), "a rearrangement names a row that is not there");
    for (const int64_t * first : { in.first_a, in.first_b }) {
        need(all_below(first, in.n, (int64_t) in.E), "a first expert is not there");
    }
    array<double> largest((py::ssize_t) B), entropy((py::ssize_t) B);
    array<int32_t> reached({ (py::ssize_t) in.E, (py::ssize_t) in.E });
    double * const max_of = largest.mutable_data(), * const bits = entropy.mutable_data();
    int32_t * const total = reached.mutable_data();
    std::fill(total, total + size, 0);
    const std::vector<double> logs = log_table(in.n);
    const byte_rows bytes(in);
    std::vector<uint32_t> of_a(in.n); // an expert's row of the table of pairs
    std::vector<uint16_t> of_b(in.n);
    for (size_t r = 0; r < in.n; r++) {
        of_a[r] = (uint32_t) ((size_t) in.first_a[r]*in.E);
        of_b[r] = (uint16_t) in.first_b[r];
    }
    std::mutex adding;
    struct scratch {
        std::vector<int32_t> joint, pairs;
        std::vector<uint8_t> part;
        std::vector<int32_t> met;
    };
    parallel_for(B, n_threads, [&] {
        return scratch { std::vector<int32_t>(size), std::vector<int32_t>(size), std::vector<uint8_t>(in.E*bytes.width), {} };
    }, [&](size_t draw, scratch & s) {
        const int32_t * mine = turned + draw*in.n;
        std::fill(s.joint.begin(), s.joint.end(), 0);
        joint_count(in, bytes, mine, s.part.data(), s.joint.data());
        double top = -std::numeric_limits<double>::infinity();
        s.met.clear();
        for (const int32_t cell : in.eligible) {
            const double z = ((double) s.joint[(size_t) cell] - in.expected[cell])/in.spread[cell];
            top = std::max(top, z);
            if (z >= in.score[cell] - SLACK) {
                s.met.push_back(cell);
            }
        }
        max_of[draw] = top;
        for (size_t r = 0; r < in.n; r++) {
            s.pairs[of_a[r] + of_b[mine[r]]]++;
        }
        double sum = 0.0; // of c*log2(c), each cell once
        const auto take = [&](int32_t & c) {
            sum += logs[(size_t) c];
            c = 0;
        };
        if (size <= in.n) {
            std::for_each(s.pairs.begin(), s.pairs.end(), take);
        } else {
            for (size_t r = 0; r < in.n; r++) {
                take(s.pairs[of_a[r] + of_b[mine[r]]]);
            }
        }
        const double n = (double) in.n;
        bits[draw] = in.n ? std::log2(n) - sum/n : std::numeric_limits<double>::quiet_NaN();
        const std::lock_guard<std::mutex> lock(adding);
        for (const int32_t cell : s.met) {
            total[cell]++;
        }
    });
    return py::make_tuple(reached, largest, entropy);
}

} // namespace

void bind_pairs(py::module_ & m) {
    m.def("pair_draws", &pair_draws, py::arg("a"), py::arg("b"), py::arg("first_a"), py::arg("first_b"), py::arg("order"),
        py::arg("expected"), py::arg("spread"), py::arg("score"), py::arg("eligible"), py::arg("n_threads") = 0);
}

} // namespace moetrace
