#include "collector.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fnmatch.h>
#include <limits>

namespace moetrace {

//
// model_shape
//

static constexpr int64_t MAX_WIDTH = 1 << 22; // values per row; more make no record

// values per row and the dimension that counts the rows; false if rows are not outermost
static bool rows_shape(const ggml_abi & abi, const ggml_tensor * t, int64_t n, int & row_dim, int64_t & width) {
    const int64_t * ne = abi.ne(t);
    int outer = 3;
    while (outer > 0 && ne[outer] == 1) {
        outer--;
    }
    if (n == 1 && ne[outer] != 1) {
        outer++; // a single row: its dimension is the first that is not used
    }
    if (outer > 3 || ne[outer] != n) {
        return false;
    }
    row_dim = outer;
    width   = 1;
    for (int d = 0; d < outer; d++) {
        width *= ne[d];
        if (width > MAX_WIDTH) {
            return false;
        }
    }
    return true;
}

bool is_wanted_tensor(const config & cfg, const char * name) {
    return strcmp(name, KEEPER_NAME) != 0 && std::any_of(cfg.tensors.begin(), cfg.tensors.end(), [&](const std::string & pattern) {
        return fnmatch(pattern.c_str(), name, 0) == 0;
    });
}

bool model_shape::learn(ggml_abi & abi, ggml_cgraph * graph, const moe_graph & moe, const config & cfg) {
    for (const auto & layer : moe.layers) {
        const auto it = layers.find(layer.layer);
        if (it != layers.end() && it->second.k != layer.k) {
            return false;
        }
    }
    for (const auto & layer : moe.layers) {
        layer_shape & shape = layers[layer.layer];
        shape.n_expert = layer.n_expert;
        shape.k        = layer.k;
        shape.matrices = layer.matrices;
        shape.has[0]   = true;
        shape.has[1]  |= layer.weights    != nullptr;
        shape.has[2]  |= layer.logits     != nullptr;
        shape.has[3]  |= layer.choice.scores != nullptr;
        shape.has[4]  |= layer.gate_input != nullptr;
        shape.has[6]  |= layer.outputs    != nullptr;
        shape.n_group      = layer.n_group;
        shape.n_group_used = layer.n_group_used;
        shape.selects      = layer.selects();
        if (layer.gate_input) {
            shape.n_embd = (int) abi.ne(layer.gate_input)[0];
        }
    }
    if (!cfg.tensors.empty()) {
        const int64_t n_outputs = moe.out_ids ? abi.ne(moe.out_ids)[0] : moe.n_tokens;
        tensors_for_each(abi, graph, cfg, [&](ggml_tensor * node) {
            const char * name = abi.name(node);
            int row_dim;
            int64_t width;
            const bool ok = abi.is_readable(node) && strlen(name) < 32 &&
                (rows_shape(abi, node, moe.n_tokens, row_dim, width) || rows_shape(abi, node, n_outputs, row_dim, width));
            const auto seen = tensors.find(name);
            if (!ok || (seen != tensors.end() && seen->second != width)) {
                tensors[name] = -1;
            } else if (seen == tensors.end()) {
                tensors[name] = width;
            }
        });
    }
    return true;
}

//
// row_layout
//

static ring_field field_make(const std::string & name, const char * dtype, std::vector<uint32_t> shape) {
    ring_field field = {};
    strncpy(field.name,  name.c_str(), sizeof(field.name) - 1);
    strncpy(field.dtype, dtype,        sizeof(field.dtype) - 1);
    field.n_dims = (uint32_t) shape.size();
    for (size_t d = 0; d < 3; d++) {
        field.shape[d] = d < shape.size() ? shape[d] : 1;
    }
    return field;
}

void row_layout::make(const model_shape & shape, const config & cfg) {
    *this = {};
    bool any[7] = {};
    for (const auto & [number, layer] : shape.layers) {
        if (!cfg.has_layer(number)) {
            continue;
        }
        layers.push_back(number);
        n_expert.push_back(layer.n_expert);
        k.push_back(layer.k);
        matrices.push_back(layer.matrices);
        k_max  = std::max(k_max, layer.k);
        e_max  = std::max(e_max, layer.n_expert);
        n_embd = std::max(n_embd, layer.n_embd);
        for (int c = 0; c < 7; c++) {
            any[c] |= layer.has[c];
        }
    }
    const uint32_t L = (uint32_t) layers.size();
    const uint32_t K = (uint32_t) k_max;
    const uint32_t E = (uint32_t) e_max;
    id_bytes = E <= 255 ? 1 : 2; // the largest id is kept free: it marks absence

    std::vector<uint32_t *> offsets;
    const auto add = [&](const std::string & name, const char * dtype, std::vector<uint32_t> dims, uint32_t & offset) {
        fields.push_back(field_make(name, dtype, std::move(dims)));
        offsets.push_back(&offset);
    };
    add("state", "|u1", { L }, off_state);
    const auto wants = [&](channel c, int bit) { return (cfg.channels & c) && any[bit]; };
    if (wants(CHANNEL_EXPERTS,    0)) { add("experts",    id_bytes == 1 ? "|u1" : "<u2", { L, K }, off_experts); }
    if (wants(CHANNEL_WEIGHTS,    1)) { add("weights",    "<f4", { L, K }, off_weights); }
    if (wants(CHANNEL_LOGITS,     2)) { add("logits",     "<f4", { L, E }, off_logits); }
    if (wants(CHANNEL_SCORES,     3)) { add("scores",     "<f4", { L, E }, off_scores); }
    if (wants(CHANNEL_GATE_INPUT, 4)) { add("gate_input", "<f4", { L, (uint32_t) n_embd }, off_gate_input); }
    if (wants(CHANNEL_OUTPUTS,    6)) { add("outputs",    "<f4", { L, K }, off_outputs); }
    off_tensors.reserve(shape.tensors.size()); // addresses are taken below
    for (const auto & [name, width] : shape.tensors) {
        if (width < 0) {
            refused.push_back(name);
            continue;
        }
        tensors.push_back(name);
        tensor_widths.push_back(width);
        off_tensors.push_back(0);
        add("tensor." + name, "<f4", { (uint32_t) width }, off_tensors.back());
    }

    if (cfg.channels & CHANNEL_ATTENTION) {
        add("attention", "<f4", { ATTENTION_PIECE }, off_attention);
    }
    stride = ring_fields_layout(fields);
    if (stride == 0) {
        return; // too large: the caller gives up
    }
    for (size_t i = 0; i < fields.size(); i++) {
        *offsets[i] = fields[i].offset;
    }

    n_values = 0;
    for (const auto & field : fields) {
        const bool values = strcmp(field.name, "state") != 0 && strcmp(field.name, "attention") != 0;
        n_values += values ? (uint64_t) field.shape[0]*field.shape[1]*field.shape[2] : 0;
    }
    blank.assign(stride, 0);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (const auto & field : fields) {
        const size_t n = (size_t) field.shape[0]*field.shape[1]*field.shape[2];
        if (strcmp(field.name, "state") == 0) {
            memset(blank.data() + field.offset, STATE_NOT_COMPUTED, n);
        } else if (strcmp(field.name, "experts") == 0) {
            memset(blank.data() + field.offset, 0xFF, n*id_bytes);
        } else {
            for (size_t i = 0; i < n; i++) {
                memcpy(blank.data() + field.offset + i*4, &nan, 4);
            }
        }
    }
}

int row_layout::layer_index(int layer) const {
    const auto it = std::lower_bound(layers.begin(), layers.end(), layer);
    return it != layers.end() && *it == layer ? (int) (it - layers.begin()) : -1;
}

//
// graph_sources
//

static bool is_row_contiguous(const ggml_abi & abi, const source_tensor & source) {
    const int64_t * ne = abi.ne(source.t);
    const size_t *  nb = abi.nb(source.t);
    size_t expected = 4;
    for (int d = 0; d < source.row_dim && d < 4; d++) {
        if (ne[d] != 1 && nb[d] != expected) {
            return false;
        }
        expected *= (size_t) ne[d];
    }
    return true;
}

// With the weights, since asking inside the pattern would undo a fused top-k on a GPU; but not later than the ids are
// used last, when their memory may go. Where that is says only the order in which the nodes are computed; and nodes on
// another device read a copy, which is made when their split begins.
std::vector<ggml_tensor *> ids_asks_find(ggml_abi & abi, ggml_backend_sched * sched, ggml_cgraph * graph, const moe_graph & moe) {
    std::vector<std::pair<const ggml_tensor *, int>> places; // node -> its place in the order
    for (const auto & layer : moe.layers) {
        for (const ggml_tensor * t : layer.users) {
            places.emplace_back(t, -1);
        }
        places.emplace_back(layer.weights, -1);
    }
    const auto before = [](const auto & entry, const ggml_tensor * t) { return std::less<const ggml_tensor *>()(entry.first, t); };
    std::sort(places.begin(), places.end(), [&](const auto & a, const auto & b) { return before(a, b.first); });
    const auto entry_of = [&](const ggml_tensor * t) {
        const auto it = std::lower_bound(places.begin(), places.end(), t, before);
        return it != places.end() && it->first == t ? it : places.end();
    };
    const int n_nodes = abi.graph_n_nodes(graph);
    for (int i = 0; i < n_nodes; i++) {
        for (auto it = entry_of(abi.graph_node(graph, i)); it != places.end() && it->first == abi.graph_node(graph, i); it++) {
            it->second = i;
        }
    }
    const auto place_of = [&](const ggml_tensor * t) {
        const auto it = entry_of(t);
        return it == places.end() ? -1 : it->second;
    };
    const auto is_view_at = [&](int i) { return is_view(abi.op(abi.graph_node(graph, i))); }; // it belongs to no split

    std::vector<ggml_tensor *> asks;
    for (const auto & layer : moe.layers) {
        int last = -1;
        for (ggml_tensor * user : layer.users) {
            int at = place_of(user);
            if (at >= 0 && !same_memory(abi, abi.src(user, abi.op(user) == OP_GET_ROWS ? 1 : 2), layer.ids)) {
                const ggml_backend * backend = abi.sched_get_tensor_backend(sched, user);
                while (at > 0 && (is_view_at(at - 1) || abi.sched_get_tensor_backend(sched, abi.graph_node(graph, at - 1)) == backend)) {
                    at--;
                }
                at--; // the last node before the copy
            }
            last = std::max(last, at);
        }
        while (last >= 0 && last + 1 < n_nodes && is_view_at(last + 1)) {
            last++;
        }
        const int weights = layer.weights ? place_of(layer.weights) : -1;
        asks.push_back(!layer.weights || last < 0 ? layer.ids :
            weights >= 0 && weights <= last ? layer.weights : abi.graph_node(graph, last));
    }
    return asks;
}

void graph_sources::make(ggml_abi & abi, ggml_backend_sched * sched, ggml_cgraph * graph, const moe_graph & moe, const row_layout & layout, const config & cfg,
        const std::vector<slab_use> & placed) {
    *this = {};
    slabs = placed;
    slabs.erase(std::remove_if(slabs.begin(), slabs.end(), [&](const slab_use & use) {
        return abi.buffer_is_host(use.slab->buffer); // read where they are
    }), slabs.end());
    for (slab_use & use : slabs) {
        use.scratch = scratch_bytes;
        scratch_bytes += (use.bytes + 63) & ~(size_t) 63;
    }
    const std::vector<ggml_tensor *> ids_asks = ids_asks_find(abi, sched, graph, moe);
    const uint32_t K = (uint32_t) layout.k_max;
    const uint32_t E = (uint32_t) layout.e_max;
    const uint32_t D = (uint32_t) layout.n_embd;

    struct entry { row_source row; source_tensor tensor; };
    std::vector<entry> entries;
    uint64_t n_values = 0; // written per row
    for (size_t l = 0; l < moe.layers.size(); l++) {
        const moe_layer & layer = moe.layers[l];
        const int index = layout.layer_index(layer.layer);
        if (index < 0) {
            continue;
        }
        const uint32_t i = (uint32_t) index;
        const auto add = [&](ggml_tensor * t, ggml_tensor * ask, uint32_t field, uint32_t value_bytes, uint32_t row_width, int64_t width, int row_dim) {
            if (field == 0 || !t || width > row_width) {
                return; // not recorded, or another width than the first graphs had
            }
            entry e;
            e.row.what       = t == layer.ids ? row_source::IDS : t == layer.outputs ? row_source::NORMS : row_source::VALUES;
            e.row.index      = index;
            e.row.offset     = field + i*row_width*value_bytes;
            e.row.width      = (uint32_t) width;
            e.tensor.t       = t;
            e.tensor.ask     = ask;
            e.tensor.row_dim = row_dim;
            entries.push_back(e);
        };
        const bool fits = layer.k <= layout.k[i] && layer.n_expert <= layout.n_expert[i];
        if (!fits || moe.trouble) {
            not_understood.push_back(index);
            continue;
        }
        add(layer.ids, ids_asks[l], layout.off_experts, layout.id_bytes, K, layer.k, 1);
        if (layer.weights) {
            const int row_dim = abi.ne(layer.weights)[0] == 1 && abi.ne(layer.weights)[1] == layer.k ? 2 : 1;
            add(layer.weights, layer.weights, layout.off_weights, 4, K, layer.k, row_dim);
        }
        add(layer.logits, layer.logits, layout.off_logits, 4, E, layer.n_expert, 1);
        // an intervention may change them up to then
        add(layer.choice.scores, layer.choice.selector, layout.off_scores, 4, E, layer.n_expert, 1);
        if (layer.gate_input) {
            add(layer.gate_input, layer.gate_input, layout.off_gate_input, 4, D, abi.ne(layer.gate_input)[0], 1);
        }
        add(layer.outputs, layer.outputs, layout.off_outputs, 4, K, layer.k, 2);
    }

    if (!layout.tensors.empty()) {
        const int64_t n_outputs = moe.out_ids ? abi.ne(moe.out_ids)[0] : moe.n_tokens;
        tensors_for_each(abi, graph, cfg, [&](ggml_tensor * node) {
            const size_t which = (size_t) (std::find(layout.tensors.begin(), layout.tensors.end(), abi.name(node)) - layout.tensors.begin());
            entry e;
            int64_t width;
            if (which == layout.tensors.size() || !abi.is_readable(node) ||
                    (!rows_shape(abi, node, moe.n_tokens, e.tensor.row_dim, width) && !rows_shape(abi, node, n_outputs, e.tensor.row_dim, width)) ||
                    width != layout.tensor_widths[which]) {
                return;
            }
            e.row.offset = layout.off_tensors[which];
            e.row.width  = (uint32_t) width;
            e.tensor.t   = node;
            e.tensor.ask = node;
            entries.push_back(e);
        });
    }

    std::stable_sort(entries.begin(), entries.end(), [](const entry & a, const entry & b) {
        return std::less<const ggml_tensor *>()(a.tensor.ask, b.tensor.ask);
    });
    bool whole = not_understood.empty();
    for (entry & e : entries) {
        const int64_t * ne = abi.ne(e.tensor.t);
        const size_t *  nb = abi.nb(e.tensor.t);
        const int d = e.tensor.row_dim;
        e.row.n_rows   = (uint32_t) (d > 3 ? 1 : ne[d]);
        e.row.step     = (uint32_t) (d > 3 ? 0 : nb[d]);
        e.row.element  = (uint16_t) (ne[0] == 1 && d > 1 ? nb[1] : nb[0]);
        e.tensor.type  = abi.type(e.tensor.t);
        for (int below = 0; below < std::min(d, 3); below++) {
            e.tensor.ne[below] = (uint32_t) ne[below];
            e.tensor.nb[below] = nb[below];
        }
        if (e.row.what == row_source::VALUES && e.tensor.type == TYPE_F32 && is_row_contiguous(abi, e.tensor)) {
            e.row.what = row_source::PLAIN;
        }
        if (abi.is_host(e.tensor.t)) {
            e.row.base = (const char *) abi.data(e.tensor.t);
        } else {
            const auto in = std::find_if(slabs.begin(), slabs.end(), [&](const slab_use & use) {
                return use.slab->buffer == abi.buffer(abi.root(e.tensor.t));
            });
            e.tensor.in_slab = in != slabs.end();
            e.tensor.scratch = e.tensor.in_slab ? in->scratch + (size_t) ((char *) abi.data(e.tensor.t) - in->slab->base) : scratch_bytes;
            scratch_bytes += e.tensor.in_slab ? 0 : (abi.span(e.tensor.t) + 63) & ~(size_t) 63;
        }
        whole    = whole && e.row.n_rows == moe.n_tokens;
        n_values += e.row.width;
        if (asks.empty() || asks.back().first != e.tensor.ask) {
            asks.emplace_back(e.tensor.ask, (uint32_t) rows.size());
        }
        rows.push_back(e.row);
        tensors.push_back(e.tensor);
    }
    covers_all = whole && n_values == layout.n_values;
}

int graph_sources::find(const ggml_tensor * node) const {
    const auto it = std::lower_bound(asks.begin(), asks.end(), node, [](const auto & entry, const ggml_tensor * t) {
        return std::less<const ggml_tensor *>()(entry.first, t);
    });
    return it != asks.end() && it->first == node ? (int) it->second : -1;
}

//
// readback_buffer
//

readback_buffer::~readback_buffer() {
    release();
}

void readback_buffer::release() {
    if (buffer) {
        free(buffer);
    }
    buffer = nullptr;
    base   = nullptr;
    size   = 0;
}

void readback_buffer::reserve(const ggml_abi & abi, ggml_backend_sched * sched, size_t wanted) {
    if (wanted <= size) {
        return;
    }
    release();
    const bool known = abi.backend_get_device && abi.dev_host_buffer_type && abi.buft_alloc_buffer && abi.buffer_get_base;
    for (int i = 0; known && !buffer && i < abi.sched_get_n_backends(sched); i++) {
        void * device = abi.backend_get_device(abi.sched_get_backend(sched, i));
        void * type   = device ? abi.dev_host_buffer_type(device) : nullptr;
        buffer = type ? abi.buft_alloc_buffer(type, wanted) : nullptr;
        free   = abi.buffer_free;
    }
    if (buffer) {
        base = (char *) abi.buffer_get_base(buffer);
    } else {
        plain.resize(wanted);
        base = plain.data();
    }
    size = wanted;
}

//
// rows
//

bool row_block::reset(const row_layout & layout, uint32_t n, bool blank) {
    stride = layout.stride;
    n_rows = n;
    if (bytes.size() < (size_t) n*stride) {
        try {
            bytes.resize((size_t) n*stride);
        } catch (...) {
            n_rows = 0;
            return false;
        }
    }
    for (uint32_t row = 0; blank && row < n; row++) {
        memcpy(record(row), layout.blank.data(), stride);
    }
    return true;
}

static float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000u) << 16;
    const uint32_t mantissa = h & 0x3FFu;
    const int exponent = (h >> 10) & 31;
    float value;
    if (exponent == 31) {
        const uint32_t bits = sign | 0x7F800000u | (mantissa << 13);
        memcpy(&value, &bits, 4);
        return value;
    }
    value = exponent ? std::ldexp((float) (mantissa | 0x400u), exponent - 25) : std::ldexp((float) mantissa, -24);
    return sign ? -value : value;
}

template <typename T>
static bool ids_copy(const char * src, size_t step, uint32_t k, int n_expert, T * dst) {
    for (uint32_t j = 0; j < k; j++) {
        const int32_t id = *(const int32_t *) (src + j*step);
        if (id < 0 || id >= n_expert) {
            return false;
        }
        dst[j] = (T) id;
    }
    return true;
}

static float float_read(int32_t type, const char * value) {
    switch (type) {
        case TYPE_F16: return half_to_float(*(const uint16_t *) value);
        case TYPE_I32: return (float) *(const int32_t *) value;
        default:       return *(const float *) value;
    }
}

// copies the values of one row, whatever its type and its strides below the row dimension
static void floats_copy(const source_tensor & source, const char * src, float * dst) {
    for (size_t i2 = 0; i2 < source.ne[2]; i2++) {
        for (size_t i1 = 0; i1 < source.ne[1]; i1++) {
            for (size_t i0 = 0; i0 < source.ne[0]; i0++) {
                *dst++ = float_read(source.type, src + i2*source.nb[2] + i1*source.nb[1] + i0*source.nb[0]);
            }
        }
    }
}

// the Euclidean norms of the vectors that a row holds
static void norms_copy(const source_tensor & source, const char * src, float * dst) {
    for (size_t i1 = 0; i1 < source.ne[1]; i1++) {
        const char * vector = src + i1*source.nb[1];
        double sum = 0;
        for (size_t i0 = 0; i0 < source.ne[0]; i0++) {
            const double x = float_read(source.type, vector + i0*source.nb[0]);
            sum += x*x;
        }
        *dst++ = (float) std::sqrt(sum);
    }
}

void rows_copy(const row_source & source, const source_tensor & tensor, const char * base,
        const row_layout & layout, const output_rows & outputs, row_block & block) {
    const bool all = source.n_rows == block.n_rows;
    if (!all && (!outputs.ids || outputs.n != source.n_rows)) {
        if (source.index >= 0) {
            rows_mark_lost(layout, source.index, block);
        }
        return;
    }
    for (int64_t r = 0; r < source.n_rows; r++) {
        const int64_t row = all ? r : outputs.ids[r];
        if (row < 0 || row >= block.n_rows) {
            continue;
        }
        uint8_t *    record = block.record((uint32_t) row);
        const char * src    = base + (size_t) r*source.step;
        uint8_t *    dst    = record + source.offset;
        if (source.what != row_source::IDS) {
            switch (source.what) {
                case row_source::PLAIN: memcpy(dst, src, source.width*sizeof(float)); break;
                case row_source::NORMS: norms_copy(tensor, src, (float *) dst);       break;
                default:                floats_copy(tensor, src, (float *) dst);      break;
            }
            continue;
        }
        const int n_expert = layout.n_expert[(size_t) source.index];
        const bool ok = layout.id_bytes == 1
            ? ids_copy(src, source.element, source.width, n_expert, dst)
            : ids_copy(src, source.element, source.width, n_expert, (uint16_t *) dst);
        record[layout.off_state + (uint32_t) source.index] = ok ? STATE_PRESENT : STATE_LOST;
        if (!ok) {
            memset(dst, 0xFF, source.width*layout.id_bytes);
        }
    }
}

void rows_mark_lost(const row_layout & layout, int index, row_block & block) {
    for (uint32_t row = 0; row < block.n_rows; row++) {
        block.record(row)[layout.off_state + (uint32_t) index] = STATE_LOST;
    }
}

} // namespace moetrace
