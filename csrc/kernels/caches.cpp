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

// (Z, T) whether accesses hit in caches of each of Z budgets that hold items of different sizes. What is needed together
// (one group) is looked for first, and what is missing fetched then: a hit is never lost to what is fetched beside it.
// worth: (2, T) of keeping an item that was there, and one that was fetched.
array<bool> budget_hits(const array<int32_t> & items, const array<int64_t> & worth, const array<int64_t> & groups, const array<int64_t> & sizes,
        const array<int64_t> & budgets, int n_threads) {
    need(items.ndim() == 1 && worth.ndim() == 2 && worth.shape(0) == 2 && worth.shape(1) == items.size() && groups.size() == items.size(),
        "worth and group are one per access");
    const size_t T = (size_t) items.size(), Z = (size_t) budgets.size(), M = (size_t) sizes.size();
    const int32_t * item = items.data();
    const int64_t * value = worth.data(), * group = groups.data(), * size = sizes.data(), * budget = budgets.data();
    need(std::all_of(item, item + T, [&](int32_t i) { return i >= 0 && (size_t) i < M; }), "an item is not there");
    need(std::all_of(value, value + 2*T, [&](int64_t w) { return w >= 0; }), "worth is not negative");
    need(std::all_of(size, size + M, [](int64_t s) { return s > 0; }), "an item has a size");
    array<bool> out({ (py::ssize_t) Z, (py::ssize_t) T });
    uint8_t * hits = (uint8_t *) out.mutable_data();
    parallel_for(Z, n_threads, [&] { return std::vector<int64_t>(M); }, [&](size_t job, std::vector<int64_t> & held) {
        using entry = std::pair<int64_t, int32_t>;
        std::priority_queue<entry, std::vector<entry>, std::greater<entry>> least; // with entries that no longer hold
        std::fill(held.begin(), held.end(), -1);
        uint8_t * hit = hits + job*T;
        int64_t free = budget[job];
        for (size_t begin = 0, end = 0; begin < T; begin = end) {
            while (end < T && group[end] == group[begin]) {
                const size_t i = (size_t) item[end];
                hit[end] = held[i] >= 0;
                if (hit[end]) {
                    held[i] = value[end];
                    least.emplace(value[end], item[end]);
                }
                end++;
            }
            for (size_t t = begin; t < end; t++) {
                const size_t i = (size_t) item[t];
                if (hit[t] || size[i] > budget[job]) {
                    continue;
                }
                while (free < size[i]) {
                    const entry first = least.top();
                    least.pop();
                    if (held[(size_t) first.second] == first.first) {
                        held[(size_t) first.second] = -1;
                        free += size[first.second];
                    }
                }
                held[i] = value[T + t];
                least.emplace(value[T + t], item[t]);
                free -= size[i];
            }
        }
    });
    return out;
}

} // namespace

void bind_caches(py::module_ & m) {
    m.def("budget_hits", &budget_hits, py::arg("items"), py::arg("worth"), py::arg("groups"), py::arg("sizes"), py::arg("budgets"),
        py::arg("n_threads") = 0);
    m.def("cache_hits", &cache_hits, py::arg("items"), py::arg("worth"), py::arg("slots"), py::arg("n_items"), py::arg("n_threads") = 0);
}

} // namespace moetrace
