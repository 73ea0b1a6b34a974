// Caches of S slots that keep what is worth most: which accesses of a stream hit.

#include "kernels.h"

#include <queue>

namespace moetrace {

namespace {

// One cache: each access (worth: of keeping its item from now on, different for different items) hits, or takes the slot
// of the item of least worth.
void cache_run(const int32_t * items, const int64_t * worth, size_t n, size_t slots, std::vector<int64_t> & held, uint8_t * hit) {
    using entry = std::pair<int64_t, int32_t>;
    std::priority_queue<entry, std::vector<entry>, std::greater<entry>> least; // with entries that no longer hold
    std::fill(held.begin(), held.end(), -1);
    size_t n_held = 0;
    for (size_t t = 0; t < n; t++) {
        const int32_t item = items[t];
        hit[t] = item >= 0 && held[(size_t) item] >= 0;
        if (item < 0) {
            continue;
        }
        if (!hit[t] && n_held == slots) {
            while (held[(size_t) least.top().second] != least.top().first) {
                least.pop();
            }
            held[(size_t) least.top().second] = -1;
            least.pop();
        } else {
            n_held += !hit[t];
        }
        held[(size_t) item] = worth[t];
        least.emplace(worth[t], item);
    }
}

// (Z, S, T) whether accesses hit in caches of each of Z sizes: streams of items (S, T), below 0 no access, and worth (S, T).
array<bool> cache_hits(const array<int32_t> & items, const array<int64_t> & worth, const array<int64_t> & slots, int64_t n_items, int n_threads) {
    need(items.ndim() == 2 && worth.ndim() == 2 && items.shape(0) == worth.shape(0) && items.shape(1) == worth.shape(1), "worth is one per access");
    const size_t S = (size_t) items.shape(0), T = (size_t) items.shape(1), Z = (size_t) slots.size();
    const int32_t * item = items.data();
    const int64_t * value = worth.data(), * size = slots.data();
    need(std::all_of(item, item + S*T, [&](int32_t i) { return i < n_items; }), "an item is not there");
    need(std::all_of(value, value + S*T, [&](int64_t w) { return w >= 0; }), "worth is not negative");
    need(std::all_of(size, size + Z, [](int64_t s) { return s > 0; }), "a cache has a slot");
    array<bool> out({ (py::ssize_t) Z, (py::ssize_t) S, (py::ssize_t) T });
    uint8_t * hits = (uint8_t *) out.mutable_data();
    parallel_for(Z*S, n_threads, [&] { return std::vector<int64_t>((size_t) n_items); }, [&](size_t job, std::vector<int64_t> & held) {
        const size_t stream = job % S;
        cache_run(item + stream*T, value + stream*T, T, (size_t) size[job/S], held, hits + job*T);
    });
    return out;
}

} // namespace

void bind_caches(py::module_ & m) {
    m.def("cache_hits", &cache_hits, py::arg("items"), py::arg("worth"), py::arg("slots"), py::arg("n_items"), py::arg("n_threads") = 0);
}

} // namespace moetrace
