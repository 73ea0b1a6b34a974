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
    }
    return true;
}

bool is_wanted_tensor(const config & cfg, const char * name) {
    return std::any_of(cfg.tensors.begin(), cfg.tensors.end(), [&](const std::string & pattern) {
        return fnmatch(pattern.c_str(), name, 0) == 0;
    });
}

static bool is_readable_type(int32_t type) {
    return type == TYPE_F32 || type == TYPE_F16 || type == TYPE_I32;
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
        shape.has[3]  |= layer.scores     != nullptr;
        shape.has[4]  |= layer.gate_input != nullptr;
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
            const bool ok = is_readable_type(abi.type(node)) && strlen(name) < 32 &&
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
    bool any[6] = {};
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
        for (int c = 0; c < 6; c++) {
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
    off_tensors.reserve(shape.tensors.size()); // addresses are taken below
    for (const auto & [name, width] : shape.tensors) {
        if (width < 0) {
            refused.push_back(name);
            continue;
        }
        tensors.push_back(name);
        off_tensors.push_back(0);
        add("tensor." + name, "<f4", { (uint32_t) width }, off_tensors.back());
    }

    stride = ring_fields_layout(fields);
    if (stride != 0 && (cfg.channels & CHANNEL_ATTENTION)) {
        stride = std::max(stride, ATTENTION_STRIDE_MIN);
    }
    for (size_t i = 0; i < fields.size(); i++) {
        *offsets[i] = fields[i].offset;
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

void graph_sources::make(ggml_abi & abi, ggml_cgraph * graph, const moe_graph & moe, const row_layout & layout, const config & cfg) {
    *this = {};
    const uint32_t K = (uint32_t) layout.k_max;
    const uint32_t E = (uint32_t) layout.e_max;
    const uint32_t D = (uint32_t) layout.n_embd;

    for (const auto & layer : moe.layers) {
        const int index = layout.layer_index(layer.layer);
        if (index < 0) {
            continue;
        }
        const uint32_t i = (uint32_t) index;
        const auto add = [&](ggml_tensor * t, ggml_tensor * ask, bool is_ids, uint32_t field, uint32_t value_bytes, uint32_t row_width, int64_t width, int row_dim) {
            if (field == 0 || !t) {
                return;
            }
            row_source source;
            source.t       = t;
            source.ask     = ask;
            source.is_ids  = is_ids;
            source.index   = index;
            source.offset  = field + i*row_width*value_bytes;
            source.width   = (uint32_t) width;
            source.row_dim = row_dim;
            source.n_rows  = abi.ne(t)[row_dim];
            sources.push_back(source);
        };
        const bool fits = layer.k <= layout.k[i] && layer.n_expert <= layout.n_expert[i];
        if (!fits || moe.trouble) {
            not_understood.push_back(index);
            continue;
        }
        // ids are read with the weights: asking inside the pattern would undo a fused top-k on a GPU
        ggml_tensor * last = layer.weights && layout.off_weights ? layer.weights : layer.ids;
        add(layer.ids, last, true, layout.off_experts, layout.id_bytes, K, layer.k, 1);
        if (layer.weights) {
            const int row_dim = abi.ne(layer.weights)[0] == 1 && abi.ne(layer.weights)[1] == layer.k ? 2 : 1;
            add(layer.weights, layer.weights, false, layout.off_weights, 4, K, layer.k, row_dim);
        }
        add(layer.logits, layer.logits, false, layout.off_logits, 4, E, layer.n_expert, 1);
        add(layer.scores, layer.scores, false, layout.off_scores, 4, E, layer.n_expert, 1);
        if (layer.gate_input) {
            add(layer.gate_input, layer.gate_input, false, layout.off_gate_input, 4, D, abi.ne(layer.gate_input)[0], 1);
        }
    }

    if (!layout.tensors.empty()) {
        const int64_t n_outputs = moe.out_ids ? abi.ne(moe.out_ids)[0] : moe.n_tokens;
        tensors_for_each(abi, graph, cfg, [&](ggml_tensor * node) {
            const auto it = std::find(layout.tensors.begin(), layout.tensors.end(), abi.name(node));
            row_source source;
            int64_t width;
            if (it == layout.tensors.end() || !is_readable_type(abi.type(node)) ||
                    (!rows_shape(abi, node, moe.n_tokens, source.row_dim, width) && !rows_shape(abi, node, n_outputs, source.row_dim, width))) {
                return;
            }
            const size_t index = (size_t) (it - layout.tensors.begin());
            source.t      = node;
            source.ask    = node;
            source.offset = layout.off_tensors[index];
            source.width  = (uint32_t) width;
            source.n_rows = source.row_dim > 3 ? 1 : abi.ne(node)[source.row_dim];
            sources.push_back(source);
        });
    }

    std::stable_sort(sources.begin(), sources.end(), [](const row_source & a, const row_source & b) {
        return std::less<const ggml_tensor *>()(a.ask, b.ask);
    });
    for (uint32_t s = 0; s < sources.size(); s++) {
        sources[s].scratch = scratch_bytes;
        scratch_bytes += (abi.span(sources[s].t) + 63) & ~(size_t) 63;
        if (asks.empty() || asks.back().first != sources[s].ask) {
            asks.emplace_back(sources[s].ask, s);
        }
    }
}

int graph_sources::find(const ggml_tensor * node) const {
    const auto it = std::lower_bound(asks.begin(), asks.end(), node, [](const auto & entry, const ggml_tensor * t) {
        return std::less<const ggml_tensor *>()(entry.first, t);
    });
    return it != asks.end() && it->first == node ? (int) it->second : -1;
}

//
// rows
//

bool row_block::reset(const row_layout & layout, uint32_t n) {
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
    for (uint32_t row = 0; row < n; row++) {
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

// copies the values of one row, whatever the strides below the row dimension
static void floats_copy(const ggml_abi & abi, const row_source & source, const char * src, float * dst) {
    const int64_t * ne = abi.ne(source.t);
    const size_t *  nb = abi.nb(source.t);
    const int32_t type = abi.type(source.t);
    const int64_t n1 = source.row_dim > 1 ? ne[1] : 1;
    const int64_t n2 = source.row_dim > 2 ? ne[2] : 1;
    for (int64_t i2 = 0; i2 < n2; i2++) {
        for (int64_t i1 = 0; i1 < n1; i1++) {
            const char * run = src + (size_t) i2*nb[2] + (size_t) i1*nb[1];
            if (type == TYPE_F32 && (nb[0] == 4 || ne[0] == 1)) {
                memcpy(dst, run, (size_t) ne[0]*4);
                dst += ne[0];
                continue;
            }
            for (int64_t i0 = 0; i0 < ne[0]; i0++) {
                const char * value = run + (size_t) i0*nb[0];
                switch (type) {
                    case TYPE_F16: *dst++ = half_to_float(*(const uint16_t *) value);   break;
                    case TYPE_I32: *dst++ = (float) *(const int32_t *) value;           break;
                    default:       *dst++ = *(const float *) value;                     break;
                }
            }
        }
    }
}

void rows_copy(const ggml_abi & abi, const row_source & source, const char * base, const row_layout & layout,
        const int32_t * out_ids, int64_t n_out_ids, row_block & block) {
    const size_t step = source.row_dim > 3 ? 0 : abi.nb(source.t)[source.row_dim];
    const bool   all  = source.n_rows == block.n_rows;
    if (!all && (!out_ids || n_out_ids != source.n_rows)) {
        if (source.index >= 0) {
            rows_mark_lost(layout, source.index, block);
        }
        return;
    }
    const size_t element = abi.nb(source.t)[0];
    for (int64_t r = 0; r < source.n_rows; r++) {
        const int64_t row = all ? r : out_ids[r];
        if (row < 0 || row >= block.n_rows) {
            continue;
        }
        uint8_t *    record = block.record((uint32_t) row);
        const char * src    = base + (size_t) r*step;
        if (!source.is_ids) {
            floats_copy(abi, source, src, (float *) (record + source.offset));
            continue;
        }
        const int n_expert = layout.n_expert[(size_t) source.index];
        uint8_t * dst = record + source.offset;
        const bool ok = layout.id_bytes == 1
            ? ids_copy(src, element, source.width, n_expert, dst)
            : ids_copy(src, element, source.width, n_expert, (uint16_t *) dst);
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
