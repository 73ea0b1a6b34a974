#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace moetrace {

static bool number_after(const char * name, const char * prefix, int & number) {
    const size_t length = strlen(prefix);
    if (strncmp(name, prefix, length) != 0 || name[length] < '0' || name[length] > '9') {
        return false;
    }
    const long value = strtol(name + length, nullptr, 10);
    number = (int) value;
    return value <= 1'000'000;
}

// The layer whose attention a node holds, after the soft-max: by its name, or, where a release gives none, by the cache
// of keys that its scores were made with.
static bool attention_layer(ggml_abi & abi, ggml_tensor * node, int & layer) {
    if (number_after(abi.name(node), "kq_soft_max-", layer)) {
        return true;
    }
    ggml_tensor * t = abi.src(node, 0);
    for (int depth = 0; t && depth < 8; depth++) {
        switch (abi.op(t)) {
            case OP_SCALE: case OP_UNARY: case OP_ADD:
                t = abi.src(t, 0);
                break;
            case OP_MUL_MAT:
                return abi.src(t, 0) && number_after(abi.name(abi.root(abi.src(t, 0))), "cache_k_l", layer);
            default:
                return false;
        }
    }
    return false;
}

std::vector<attention_source> attention_find(ggml_abi & abi, ggml_cgraph * graph, const config & cfg) {
    std::vector<attention_source> found;
    struct cache { int layer; ggml_tensor * k_idxs; int64_t kv_size; };
    std::vector<cache> caches;
    const int n_nodes = abi.graph_n_nodes(graph);
    for (int i = 0; i < n_nodes; i++) {
        ggml_tensor * node = abi.graph_node(graph, i);
        const op_kind op = abi.op(node);
        int layer;
        if (op == OP_SET_ROWS && abi.src(node, 1) && abi.type(abi.src(node, 1)) == TYPE_I64) {
            const ggml_tensor * owner = abi.root(node);
            if (number_after(abi.name(owner), "cache_k_l", layer)) {
                caches.push_back({ layer, abi.src(node, 1), abi.ne(owner)[1] });
            }
        } else if (op == OP_SOFT_MAX && attention_layer(abi, node, layer) && cfg.has_layer(layer)) {
            attention_source source;
            source.layer = layer;
            source.probs = node;
            source.mask  = abi.src(node, 1);
            found.push_back(source);
        }
    }
    std::vector<ggml_tensor *> groups;
    for (auto & source : found) {
        for (const cache & c : caches) {
            if (c.layer != source.layer) {
                continue;
            }
            source.k_idxs  = c.k_idxs;
            source.kv_size = c.kv_size;
            const auto it = std::find(groups.begin(), groups.end(), c.k_idxs);
            source.group = (int) (it - groups.begin());
            if (it == groups.end()) {
                groups.push_back(c.k_idxs);
            }
        }
    }
    return found;
}

//
// kv_cells
//

void kv_cells::write(int group, const int64_t * cells, const int32_t * positions, const std::vector<row_identity> & who) {
    if (groups.size() <= (size_t) group) {
        groups.resize((size_t) group + 1);
    }
    auto & table = groups[(size_t) group];
    for (size_t row = 0; row < who.size(); row++) {
        if (cells[row] < 0 || cells[row] > (1 << 28)) {
            continue;
        }
        if (table.size() <= (size_t) cells[row]) {
            table.resize((size_t) cells[row] + 1);
        }
        table[(size_t) cells[row]] = { positions ? positions[row] : -1, who[row].sequence };
    }
}

void kv_cells::shift(int32_t sequence, int32_t p0, int32_t p1, int32_t delta) {
    for (auto & table : groups) {
        for (auto & c : table) {
            if (c.sequence == sequence && c.position >= p0 && (p1 < 0 || c.position < p1)) {
                c.position += delta;
            }
        }
    }
}

void kv_cells::forget() {
    groups.clear();
}

int32_t kv_cells::position(int group, int64_t cell) const {
    if ((size_t) group >= groups.size() || cell < 0 || (size_t) cell >= groups[(size_t) group].size()) {
        return -1;
    }
    return groups[(size_t) group][(size_t) cell].position;
}

//
// rows
//

bool attention_read(const ggml_abi & abi, const attention_source & source, const char * probs, const char * mask,
        int64_t row, int64_t cell, const kv_cells & cells, attention_row & out) {
    const int64_t * ne = abi.ne(source.probs);
    const size_t *  nb = abi.nb(source.probs);
    if (abi.type(source.probs) != TYPE_F32 || !abi.is_readable(source.probs) || nb[0] != 4 || ne[1] < 1 || row/ne[1] >= ne[3]) {
        return false;
    }
    if (source.mask && (!abi.is_readable(source.mask) || abi.ne(source.mask)[0] < ne[0] || abi.ne(source.mask)[1] < ne[1] ||
            abi.ne(source.mask)[3] < 1)) {
        return false;
    }
    const int64_t stream = row/ne[1];
    const int64_t i      = row%ne[1];
    const int64_t base   = source.kv_size > 0 && cell >= 0 ? cell - cell%source.kv_size : 0; // the stream's first cell

    // the cells that the mask lets the token see
    static thread_local std::vector<std::pair<int32_t, int64_t>> keys; // position, cell
    keys.clear();
    bool known = cell >= 0;
    for (int64_t k = 0; k < ne[0]; k++) {
        if (source.mask) {
            const size_t * mb = abi.nb(source.mask);
            const int64_t * me = abi.ne(source.mask);
            const char * at = mask + (size_t) k*mb[0] + (size_t) i*mb[1] + (size_t) (stream%me[3])*mb[3];
            const bool hidden = abi.type(source.mask) == TYPE_F32
                ? std::isinf(*(const float *) at)
                : (*(const uint16_t *) at & 0x7FFF) == 0x7C00;
            if (hidden) {
                continue;
            }
        }
        const int32_t position = cells.position(source.group, base + k);
        known = known && position >= 0;
        keys.emplace_back(position, k);
    }
    if (known) {
        std::sort(keys.begin(), keys.end());
        for (size_t j = 1; j < keys.size(); j++) {
            known = known && keys[j].first == keys[j - 1].first + 1;
        }
        if (!known) {
            std::sort(keys.begin(), keys.end(), [](const auto & a, const auto & b) { return a.second < b.second; });
        }
    }
    out.n_head = (uint32_t) ne[2];
    out.n_keys = (uint32_t) keys.size();
    out.first_position = known && !keys.empty() ? keys[0].first : -1;
    out.values.resize((size_t) out.n_head*out.n_keys);
    float * dst = out.values.data();
    for (int64_t h = 0; h < ne[2]; h++) {
        const char * src = probs + (size_t) i*nb[1] + (size_t) h*nb[2] + (size_t) stream*nb[3];
        for (const auto & key : keys) {
            *dst++ = ((const float *) src)[key.second];
        }
    }
    return true;
}

} // namespace moetrace
