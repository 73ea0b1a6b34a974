#include "moe-plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace moetrace {

static constexpr int64_t MAX_EXPERTS = 65535; // in a layer; ids are stored in two bytes, and one means none
static constexpr int64_t MAX_EMBD    = 1 << 22;

bool layer_name_parse(const char * name, int & layer, const char ** tensor) {
    const char * start = strstr(name, "blk.");
    if (!start || (start != name && start[-1] != '.')) {
        return false;
    }
    char * end = nullptr;
    const long number = strtol(start + 4, &end, 10);
    if (end == start + 4 || *end != '.' || number < 0 || number > 1'000'000) {
        return false;
    }
    layer   = (int) number;
    *tensor = end + 1;
    return true;
}

static uint8_t matrix_of(const char * tensor) {
    static constexpr struct { const char * name; uint8_t bit; } NAMES[] = {
        { "ffn_gate_exps.weight",    MATRIX_GATE    },
        { "ffn_up_exps.weight",      MATRIX_UP      },
        { "ffn_down_exps.weight",    MATRIX_DOWN    },
        { "ffn_gate_up_exps.weight", MATRIX_GATE_UP },
    };
    for (const auto & entry : NAMES) {
        if (strcmp(tensor, entry.name) == 0) {
            return entry.bit;
        }
    }
    return 0;
}

static ggml_tensor * view_skip(ggml_abi & abi, ggml_tensor * t) {
    while (t && (abi.op(t) == OP_VIEW || abi.op(t) == OP_RESHAPE || abi.op(t) == OP_CONT)) {
        t = abi.src(t, 0);
    }
    return t;
}

static bool same_memory(ggml_abi & abi, ggml_tensor * a, ggml_tensor * b) {
    return a == b || (a && b && abi.root(a) == abi.root(b) && abi.view_offs(a) == abi.view_offs(b));
}

// whether t was made from the router's probabilities gathered at the layer's ids
static bool is_mixing_weight(ggml_abi & abi, ggml_tensor * t, const moe_layer & layer) {
    for (int depth = 0; t && depth < 16; depth++) {
        switch (abi.op(t)) {
            case OP_GET_ROWS: {
                // a per-expert scale is gathered at the same ids, but from a weight, not from a result
                ggml_tensor * table = view_skip(abi, abi.src(t, 0));
                return table && abi.op(table) != OP_NONE && same_memory(abi, abi.src(t, 1), layer.ids);
            }
            case OP_VIEW: case OP_RESHAPE: case OP_CONT: case OP_SCALE: case OP_SOFT_MAX: case OP_DIV:
            case OP_CLAMP: case OP_UNARY: case OP_ADD: case OP_MUL:
                t = abi.src(t, 0);
                break;
            default:
                return false;
        }
    }
    return false;
}

// [width, rows], in numbers that can be read
static bool is_table(const ggml_abi & abi, const ggml_tensor * t, int64_t width) {
    const int64_t * ne = abi.ne(t);
    return abi.is_readable(t) && ne[0] == width && ne[2] == 1 && ne[3] == 1;
}

static moe_layer * layer_find(std::vector<moe_layer> & layers, int number) {
    for (auto & layer : layers) {
        if (layer.layer == number) {
            return &layer;
        }
    }
    return nullptr;
}

moe_graph moe_graph_read(ggml_abi & abi, ggml_cgraph * graph) {
    moe_graph out;
    const int n_nodes = abi.graph_n_nodes(graph);

    // the layers: whoever multiplies with expert matrices
    for (int i = 0; i < n_nodes; i++) {
        ggml_tensor * node = abi.graph_node(graph, i);
        if (abi.op(node) != OP_MUL_MAT_ID) {
            continue;
        }
        int number;
        const char * tensor;
        ggml_tensor * experts = abi.src(node, 0);
        ggml_tensor * ids     = abi.src(node, 2);
        if (!experts || !ids || !layer_name_parse(abi.name(experts), number, &tensor)) {
            continue;
        }
        const uint8_t matrix = matrix_of(tensor);
        if (!matrix) {
            continue; // LoRA, adjugate experts
        }
        if (abi.type(ids) != TYPE_I32 || !abi.is_readable(ids) || abi.ne(ids)[0] < 1 || abi.ne(ids)[0] > MAX_EXPERTS || abi.ne(experts)[2] < 1 ||
                abi.ne(experts)[2] > MAX_EXPERTS) {
            out.trouble = "expert ids are not a table of 32-bit integers";
            continue;
        }
        moe_layer * layer = layer_find(out.layers, number);
        if (!layer) {
            out.layers.emplace_back();
            layer = &out.layers.back();
            layer->layer    = number;
            layer->ids      = ids;
            layer->k        = (int) abi.ne(ids)[0];
            layer->n_rows   = abi.ne(ids)[1];
            layer->n_expert = (int) abi.ne(experts)[2];
        } else if (layer->ids != ids) {
            out.trouble = "the expert matrices of one layer do not share their ids";
        }
        layer->matrices |= matrix;
    }
    if (out.layers.empty()) {
        return out;
    }
    std::sort(out.layers.begin(), out.layers.end(), [](const moe_layer & a, const moe_layer & b) {
        return a.layer < b.layer;
    });

    // what the ids were chosen from
    for (auto & layer : out.layers) {
        ggml_tensor * t = view_skip(abi, layer.ids);
        if (t && (abi.op(t) == OP_ARGSORT || abi.op(t) == OP_TOP_K)) {
            layer.scores = abi.src(t, 0);
        }
    }

    // router and mixing weights
    for (int i = 0; i < n_nodes; i++) {
        ggml_tensor * node = abi.graph_node(graph, i);
        const op_kind op = abi.op(node);
        int number;
        const char * tensor;
        if (op == OP_MUL_MAT && abi.src(node, 0) && layer_name_parse(abi.name(abi.src(node, 0)), number, &tensor)) {
            if (strcmp(tensor, "ffn_gate_inp.weight") == 0) {
                if (moe_layer * layer = layer_find(out.layers, number)) {
                    layer->gate_input = abi.src(node, 1);
                    layer->logits     = node;
                }
            }
        } else if (op == OP_ADD && abi.src(node, 1) && layer_name_parse(abi.name(abi.src(node, 1)), number, &tensor)) {
            if (strcmp(tensor, "ffn_gate_inp.bias") == 0) {
                moe_layer * layer = layer_find(out.layers, number);
                if (layer && abi.src(node, 0) == layer->logits) {
                    layer->logits = node;
                }
            }
        } else if (op == OP_MUL) {
            for (auto & layer : out.layers) {
                for (int s = 1; s >= 0 && !layer.weights; s--) {
                    ggml_tensor * t = abi.src(node, s);
                    ggml_tensor * other = abi.src(node, 1 - s);
                    // the experts' outputs (or inputs) have k columns, one per weight
                    if (t && other && abi.ne(other)[1] == layer.k && abi.ne(other)[2] == layer.n_rows &&
                            abi.ne(t)[0] == 1 && abi.ne(t)[1] == layer.k && is_mixing_weight(abi, t, layer)) {
                        layer.weights = t;
                    }
                }
            }
        }
    }

    // what has not one row per token, as wide as its layer, is something else of the same name
    for (auto & layer : out.layers) {
        for (ggml_tensor ** t : { &layer.logits, &layer.scores }) {
            if (*t && !is_table(abi, *t, layer.n_expert)) {
                *t = nullptr;
            }
        }
        const int64_t n_embd = layer.gate_input ? abi.ne(layer.gate_input)[0] : 0;
        if (n_embd > MAX_EMBD || (layer.gate_input && !is_table(abi, layer.gate_input, n_embd))) {
            layer.gate_input = nullptr;
        }
        if (layer.weights && (!abi.is_readable(layer.weights) || abi.ne(layer.weights)[3] != 1)) {
            layer.weights = nullptr;
        }
    }

    out.inp_tokens = abi.graph_get_tensor(graph, "inp_tokens");
    out.inp_pos    = abi.graph_get_tensor(graph, "inp_pos");
    for (const char * name : { "out_ids", "inp_out_ids" }) {
        if (!out.out_ids) {
            out.out_ids = abi.graph_get_tensor(graph, name);
        }
    }
    if (out.inp_tokens) {
        out.n_tokens = abi.ne(out.inp_tokens)[0];
    } else if (ggml_tensor * embd = abi.graph_get_tensor(graph, "inp_embd")) {
        out.n_tokens = abi.ne(embd)[1];
    } else {
        for (const auto & layer : out.layers) {
            out.n_tokens = std::max(out.n_tokens, layer.n_rows);
        }
    }
    return out;
}

} // namespace moetrace
