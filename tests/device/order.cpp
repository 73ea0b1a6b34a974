#include "order.h"

#include "fusion.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>

namespace {

bool is_empty(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_NONE: case GGML_OP_RESHAPE: case GGML_OP_TRANSPOSE: case GGML_OP_VIEW: case GGML_OP_PERMUTE:
            return true;
        default:
            return false;
    }
}

const ggml_tensor * memory_of(const ggml_tensor * t) {
    while (t->view_src) {
        t = t->view_src;
    }
    return t;
}

struct unit { // nodes that stay together
    std::vector<ggml_tensor *> nodes;
    std::set<int>              needs; // units that must come before
    fusion_kind                kind = FUSION_KINDS;
    bool                       empty = true; // computes nothing: views
};

std::vector<unit> units_make(ggml_cgraph * graph) {
    ggml_tensor ** nodes = ggml_graph_nodes(graph);
    const int n_nodes = ggml_graph_n_nodes(graph);
    std::vector<unit> units;
    for (int i = 0; i < n_nodes; ) {
        const fusion f = fusion_at(graph, nodes, n_nodes, i);
        unit u;
        u.kind = f.n_nodes ? f.kind : FUSION_KINDS;
        for (const int end = i + std::max(f.n_nodes, 1); i < end; i++) {
            u.nodes.push_back(nodes[i]);
            u.empty = u.empty && is_empty(nodes[i]);
        }
        units.push_back(u);
    }

    struct use { int writer = -1; std::set<int> readers; };
    std::map<const ggml_tensor *, use> uses; // by memory
    std::map<const ggml_tensor *, int> made; // node -> unit
    for (int i = 0; i < (int) units.size(); i++) {
        for (ggml_tensor * t : units[i].nodes) {
            made[t] = i;
            for (ggml_tensor * src : t->src) {
                if (!src) {
                    continue;
                }
                if (const auto it = made.find(src); it != made.end() && it->second != i) {
                    units[i].needs.insert(it->second);
                }
                use & u = uses[memory_of(src)];
                if (!is_empty(t)) {
                    u.readers.insert(i);
                    if (u.writer >= 0 && u.writer != i) {
                        units[i].needs.insert(u.writer);
                    }
                }
            }
        }
        for (ggml_tensor * t : units[i].nodes) {
            if (is_empty(t)) {
                continue;
            }
            use & u = uses[memory_of(t)];
            for (const int reader : u.readers) {
                if (reader != i) {
                    units[i].needs.insert(reader);
                }
            }
            if (u.writer >= 0 && u.writer != i) {
                units[i].needs.insert(u.writer);
            }
            u.readers.clear();
            u.writer = i;
        }
    }
    return units;
}

bool is_ready(const unit & u, const std::vector<bool> & done) {
    return std::all_of(u.needs.begin(), u.needs.end(), [&](int need) { return done[need]; });
}

// The first node that is left, with those of the next ones that need nothing that was skipped: first nodes that compute,
// then views. A top-k is not pulled forward.
std::vector<int> order_vulkan(const std::vector<unit> & units) {
    const int n = (int) units.size();
    const int look_ahead = 20;
    std::vector<bool> done(n, false);
    std::vector<int>  order;
    for (int first = 0; first < n; first++) {
        if (done[first]) {
            continue;
        }
        std::vector<int> now = { first };
        const bool alone = units[first].kind == FUSION_TOPK_MOE;
        for (int pass = 0; pass < 2 && !alone; pass++) {
            const bool views = pass == 1;
            // the first one counts as done for views only: nodes that compute are to run at the same time as it
            done[first] = views;
            for (int j = first + 1; j < std::min(first + look_ahead, n); j++) {
                if (done[j] || units[j].empty != views || units[j].kind == FUSION_TOPK_MOE || !is_ready(units[j], done)) {
                    continue;
                }
                now.push_back(j);
                done[j] = views; // a view of a view may follow; what computes waits for the next set
            }
            for (const int j : now) {
                done[j] = true;
            }
        }
        done[first] = true;
        order.insert(order.end(), now.begin(), now.end());
    }
    return order;
}

bool is_movable(ggml_op op) {
    switch (op) {
        case GGML_OP_MUL_MAT: case GGML_OP_MUL_MAT_ID: case GGML_OP_ROPE: case GGML_OP_NORM: case GGML_OP_RMS_NORM:
        case GGML_OP_SUM_ROWS: case GGML_OP_MUL: case GGML_OP_ADD: case GGML_OP_SUB: case GGML_OP_DIV: case GGML_OP_GLU:
        case GGML_OP_SCALE: case GGML_OP_UNARY: case GGML_OP_CLAMP: case GGML_OP_GET_ROWS: case GGML_OP_SET_ROWS:
        case GGML_OP_CPY: case GGML_OP_CONT: case GGML_OP_REPEAT: case GGML_OP_SSM_CONV: case GGML_OP_SSM_SCAN:
            return true;
        default:
            return false;
    }
}

// Sets of nodes that run at once. When one needs something of the set, others that do not are looked for far ahead
// before the set is closed.
std::vector<int> order_metal(const std::vector<unit> & units) {
    const int n = (int) units.size();
    const int look_ahead = 64;
    std::vector<bool> done(n, false);
    std::vector<int>  order;
    std::set<int>     running;
    const auto runs_beside = [&](const unit & u) {
        return std::none_of(u.needs.begin(), u.needs.end(), [&](int need) { return running.count(need) != 0; });
    };
    for (int first = 0; first < n; first++) {
        if (done[first]) {
            continue;
        }
        if (!units[first].empty && !runs_beside(units[first])) {
            for (int j = first + 1; j < std::min(first + look_ahead, n); j++) {
                const ggml_op op = units[j].nodes[0]->op;
                if (!units[j].empty && !is_movable(op)) {
                    break;
                }
                if (!done[j] && is_ready(units[j], done) && (units[j].empty || runs_beside(units[j]))) {
                    done[j] = true;
                    running.insert(j);
                    order.push_back(j);
                }
            }
            running.clear();
        }
        done[first] = true;
        running.insert(first);
        order.push_back(first);
    }
    return order;
}

std::vector<int> order_random(const std::vector<unit> & units, uint32_t seed) {
    const int n = (int) units.size();
    std::mt19937 random(seed + (uint32_t) n);
    std::vector<bool> done(n, false);
    std::vector<int>  order;
    std::vector<int>  left(n);
    std::vector<std::vector<int>> needed_by(n);
    std::vector<int>  ready;
    for (int i = 0; i < n; i++) {
        left[i] = (int) units[i].needs.size();
        for (const int need : units[i].needs) {
            needed_by[need].push_back(i);
        }
        if (left[i] == 0) {
            ready.push_back(i);
        }
    }
    while (!ready.empty()) {
        std::swap(ready[random() % ready.size()], ready.back());
        const int i = ready.back();
        ready.pop_back();
        order.push_back(i);
        for (const int next : needed_by[i]) {
            if (--left[next] == 0) {
                ready.push_back(next);
            }
        }
    }
    return order;
}

} // namespace

bool is_order(const std::string & how) {
    return how.empty() || how == "vulkan" || how == "metal" || how.rfind("random:", 0) == 0;
}

int nodes_reorder(ggml_cgraph * graph, const std::string & how) {
    if (how.empty()) {
        return 0;
    }
    const std::vector<unit> units = units_make(graph);
    const std::vector<int> order =
        how == "vulkan" ? order_vulkan(units) :
        how == "metal"  ? order_metal(units)  : order_random(units, (uint32_t) std::stoul(how.substr(7)));
    GGML_ASSERT(order.size() == units.size());
    ggml_tensor ** nodes = ggml_graph_nodes(graph);
    int n_moved = 0;
    int at = 0;
    for (const int i : order) {
        for (ggml_tensor * t : units[i].nodes) {
            n_moved += nodes[at] != t;
            nodes[at++] = t;
        }
    }
    return n_moved;
}
