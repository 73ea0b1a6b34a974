// Caches of S slots that keep what is worth most: which accesses of a stream hit.

#include "kernels.h"

#include <queue>

namespace moetrace {

namespace {

// What a cache holds, and what each item is worth: not negative, and different for different items.
class held_items {
public:
    explicit held_items(size_t n_items) : worth(n_items, -1), queued(n_items, -1) {}

    bool has(size_t item) const { return worth[item] >= 0; }

    void keep(size_t item, int64_t value) {
        worth[item] = value;
        if (queued[item] < 0 || value < queued[item]) { // a rise is seen to when the entry comes up
            enqueue(item);
        }
    }

    // Drops the item of least worth, and gives it.
    size_t drop() {
        for (;;) {
            const auto [value, item] = least.top();
            least.pop();
            if (value != queued[item]) {
                continue; // a later entry holds
            }
            if (value == worth[item]) {
                worth[item] = queued[item] = -1;
                return item;
            }
            enqueue(item);
        }
    }

    void clear() {
        std::fill(worth.begin(), worth.end(), -1);
        std::fill(queued.begin(), queued.end(), -1);
        least = {};
    }

private:
    using entry = std::pair<int64_t, size_t>;

    void enqueue(size_t item) {
        queued[item] = worth[item];
        least.emplace(worth[item], item);
        if (least.size() > 4*worth.size() + 64) { // most entries do not hold any more
            std::vector<entry> held;
            for (size_t i = 0; i < worth.size(); i++) {
                if ((queued[i] = worth[i]) >= 0) {
                    held.emplace_back(worth[i], i);
                }
            }
            least = decltype(least)(std::greater<entry>(), std::move(held));
        }
    }

    std::vector<int64_t> worth, queued; // queued: of the item's lowest entry in the queue
    std::priority_queue<entry, std::vector<entry>, std::greater<entry>> least;
};

// One cache: each access (worth: of keeping its item from now on) hits, or takes the slot of the item of least worth.
void cache_run(const int32_t * items, const int64_t * worth, size_t n, size_t slots, held_items & held, uint8_t * hit) {
    held.clear();
    size_t n_held = 0;
    for (size_t t = 0; t < n; t++) {
        const size_t item = (size_t) items[t];
        hit[t] = items[t] >= 0 && held.has(item);
        if (items[t] < 0) {
            continue;
        }
        if (!hit[t] && n_held == slots) {
            held.drop();
        } else {
            n_held += !hit[t];
        }
        held.keep(item, worth[t]);
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
    parallel_for(Z*S, n_threads, [&] { return held_items((size_t) n_items); }, [&](size_t job, held_items & held) {
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
    parallel_for(Z, n_threads, [&] { return held_items(M); }, [&](size_t job, held_items & held) {
        held.clear();
        uint8_t * hit = hits + job*T;
        int64_t free = budget[job];
        for (size_t begin = 0, end = 0; begin < T; begin = end) {
            while (end < T && group[end] == group[begin]) {
                const size_t i = (size_t) item[end];
                hit[end] = held.has(i);
                if (hit[end]) {
                    held.keep(i, value[end]);
                }
                end++;
            }
            for (size_t t = begin; t < end; t++) {
                const size_t i = (size_t) item[t];
                if (hit[t] || size[i] > budget[job]) {
                    continue;
                }
                while (free < size[i]) {
                    free += size[held.drop()];
                }
                held.keep(i, value[T + t]);
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
