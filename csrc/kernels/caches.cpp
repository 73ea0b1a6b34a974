// Caches of S slots that keep what is worth most: which accesses of a stream hit.

#include "kernels.h"

namespace moetrace {

namespace {

// Whole numbers below a limit, of which the least is found at once: a bit each, and bits of which words have any, level above
// level.
class number_set {
public:
    explicit number_set(size_t limit) {
        size_t size = 0;
        do {
            limit = (limit + 63)/64;
            begin[n_levels++] = size;
            size += limit;
        } while (limit > 1);
        words.resize(size);
    }

    void add(size_t i) {
        for (size_t level = 0; level < n_levels; level++, i /= 64) {
            uint64_t & word = words[begin[level] + i/64];
            const bool any = word != 0;
            word |= (uint64_t) 1 << i%64;
            if (any) {
                return;
            }
        }
    }

    // Takes the least away, and gives it. There is one.
    size_t take_least() {
        size_t i = 0;
        for (size_t level = n_levels; level-- > 0;) {
            i = i*64 + (size_t) __builtin_ctzll(words[begin[level] + i]);
        }
        size_t at = i;
        for (size_t level = 0; level < n_levels; level++, at /= 64) {
            uint64_t & word = words[begin[level] + at/64];
            word &= word - 1;
            if (word) {
                break;
            }
        }
        return i;
    }

    void clear() { std::fill(words.begin(), words.end(), 0); }

private:
    size_t begin[11] = {}, n_levels = 0;
    std::vector<uint64_t> words;
};

// What a cache holds, and what each item is worth: different for different items, and below a limit.
class held_items {
public:
    held_items(size_t n_items, size_t limit) : worth(n_items, -1), queued(n_items, -1), waiting(limit) {}

    bool has(size_t item) const { return worth[item] >= 0; }

    void keep(size_t item, int32_t value) {
        worth[item] = value;
        if (queued[item] < 0 || value < queued[item]) { // a rise is seen to when it comes up
            queue(item);
        }
    }

    // Drops the item of least worth, and gives it. `item_of` says whose a worth is; something is held.
    size_t drop(const int32_t * item_of) {
        for (;;) {
            const int32_t value = (int32_t) waiting.take_least();
            const size_t item = (size_t) item_of[value];
            if (worth[item] == value) {
                worth[item] = queued[item] = -1;
                return item;
            }
            if (has(item)) {
                queue(item);
            }
        }
    }

    void clear() {
        std::fill(worth.begin(), worth.end(), -1);
        std::fill(queued.begin(), queued.end(), -1);
        waiting.clear();
    }

private:
    void queue(size_t item) {
        queued[item] = worth[item];
        waiting.add((size_t) worth[item]);
    }

    std::vector<int32_t> worth, queued; // queued: the least of the item's that waits
    number_set waiting;
};

// Whose each worth below a limit is, in item_of. worth: (V, T) of the accesses' items (T,), below 0 no access.
void name_worths(const int32_t * items, const int32_t * worth, size_t n, size_t n_worths, std::vector<int32_t> & item_of) {
    std::fill(item_of.begin(), item_of.end(), -1);
    for (size_t v = 0; v < n_worths; v++) {
        for (size_t t = 0; t < n; t++) {
            if (items[t] >= 0) {
                int32_t & owner = item_of[(size_t) worth[v*n + t]];
                need(owner < 0 || owner == items[t], "two items are worth the same");
                owner = items[t];
            }
        }
    }
}

// Above all worths, which are not negative.
size_t limit_of(const int32_t * worth, size_t n) {
    int32_t most = -1;
    for (size_t t = 0; t < n; t++) {
        need(worth[t] >= 0, "worth is not negative");
        most = std::max(most, worth[t]);
    }
    return (size_t) most + 1;
}

// One cache: each access (worth: of keeping its item from now on) hits, or takes the slot of the item of least worth.
void cache_run(const int32_t * items, const int32_t * worth, size_t n, size_t slots, const int32_t * item_of, held_items & held, uint8_t * hit) {
    held.clear();
    size_t n_held = 0;
    for (size_t t = 0; t < n; t++) {
        const size_t item = (size_t) items[t];
        hit[t] = items[t] >= 0 && held.has(item);
        if (items[t] < 0) {
            continue;
        }
        if (!hit[t] && n_held == slots) {
            held.drop(item_of);
        } else {
            n_held += !hit[t];
        }
        held.keep(item, worth[t]);
    }
}

// (Z, S, T) whether accesses hit in caches of each of Z sizes: streams of items (S, T), below 0 no access, and worth (S, T).
array<bool> cache_hits(const array<int32_t> & items, const array<int32_t> & worth, const array<int64_t> & slots, int64_t n_items, int n_threads) {
    need(items.ndim() == 2 && worth.ndim() == 2 && items.shape(0) == worth.shape(0) && items.shape(1) == worth.shape(1), "worth is one per access");
    const size_t S = (size_t) items.shape(0), T = (size_t) items.shape(1), Z = (size_t) slots.size();
    const int32_t * item = items.data();
    const int32_t * value = worth.data();
    const int64_t * size = slots.data();
    need(std::all_of(item, item + S*T, [&](int32_t i) { return i < n_items; }), "an item is not there");
    need(std::all_of(size, size + Z, [](int64_t s) { return s > 0; }), "a cache has a slot");
    array<bool> out({ (py::ssize_t) Z, (py::ssize_t) S, (py::ssize_t) T });
    uint8_t * hits = (uint8_t *) out.mutable_data();
    const size_t limit = limit_of(value, S*T);
    struct scratch { held_items held; std::vector<int32_t> item_of; };
    const auto make = [&] { return scratch { held_items((size_t) n_items, limit), std::vector<int32_t>(limit) }; };
    parallel_for(Z*S, n_threads, make, [&](size_t job, scratch & s) {
        const size_t stream = job % S;
        name_worths(item + stream*T, value + stream*T, T, 1, s.item_of);
        cache_run(item + stream*T, value + stream*T, T, (size_t) size[job/S], s.item_of.data(), s.held, hits + job*T);
    });
    return out;
}

// (Z, T) whether accesses hit in caches of each of Z budgets that hold items of different sizes. What is needed together
// (one group) is looked for first, and what is missing fetched then: a hit is never lost to what is fetched beside it.
// worth: (2, T) of keeping an item that was there, and one that was fetched.
array<bool> budget_hits(const array<int32_t> & items, const array<int32_t> & worth, const array<int32_t> & groups, const array<int64_t> & sizes,
        const array<int64_t> & budgets, int n_threads) {
    need(items.ndim() == 1 && worth.ndim() == 2 && worth.shape(0) == 2 && worth.shape(1) == items.size() && groups.size() == items.size(),
        "worth and group are one per access");
    const size_t T = (size_t) items.size(), Z = (size_t) budgets.size(), M = (size_t) sizes.size();
    const int32_t * item = items.data();
    const int32_t * value = worth.data(), * group = groups.data();
    const int64_t * size = sizes.data(), * budget = budgets.data();
    need(all_below(item, T, (int64_t) M), "an item is not there");
    need(std::all_of(size, size + M, [](int64_t s) { return s > 0; }), "an item has a size");
    array<bool> out({ (py::ssize_t) Z, (py::ssize_t) T });
    uint8_t * hits = (uint8_t *) out.mutable_data();
    const size_t limit = limit_of(value, 2*T);
    std::vector<int32_t> item_of(limit);
    name_worths(item, value, T, 2, item_of);
    parallel_for(Z, n_threads, [&] { return held_items(M, limit); }, [&](size_t job, held_items & held) {
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
                if (hit[t] || held.has(i) || size[i] > budget[job]) {
                    continue;
                }
                while (free < size[i]) {
                    free += size[held.drop(item_of.data())];
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
