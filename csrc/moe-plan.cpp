#include "moe-plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace moetrace {

static constexpr int64_t MAX_EXPERTS = 65535; // in a layer; ids are stored in two bytes, and one means none
static constexpr int64_t MAX_EMBD    = 1 << 22;

bool is_view(op_kind op) {
    return op == OP_VIEW || op == OP_RESHAPE || op == OP_PERMUTE || op == OP_TRANSPOSE;
}

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

bool same_memory(const ggml_abi & abi, ggml_tensor * a, ggml_tensor * b) {
    return a == b || (a && b && abi.root(a) == abi.root(b) && abi.view_offs(a) == abi.view_offs(b));
}

// What a GET_ROWS takes its rows from: a result, or a weight (a scale per expert), which may be repeated for each token.
static ggml_tensor * rows_table(ggml_abi & abi, ggml_tensor * get_rows) {
    ggml_tensor * t = view_skip(abi, abi.src(get_rows, 0));
    while (t && abi.op(t) == OP_REPEAT) {
        t = view_skip(abi, abi.src(t, 0));
    }
    return t;
}

// the router's probabilities, if t was made from those gathered at the layer's ids; otherwise nullptr
static ggml_tensor * weights_table(ggml_abi & abi, ggml_tensor * t, const moe_layer & layer) {
    for (int depth = 0; t && depth < 16; depth++) {
        switch (abi.op(t)) {
            case OP_GET_ROWS: {
                // a per-expert scale is gathered at the same ids, but from a weight, not from a result
                ggml_tensor * table = rows_table(abi, t);
                return table && abi.op(table) != OP_NONE && same_memory(abi, abi.src(t, 1), layer.ids) ? table : nullptr;
            }
            case OP_VIEW: case OP_RESHAPE: case OP_CONT: case OP_SCALE: case OP_SOFT_MAX: case OP_DIV:
            case OP_CLAMP: case OP_UNARY: case OP_ADD: case OP_MUL:
                t = abi.src(t, 0);
                break;
            default:
                return nullptr;
        }
    }
    return nullptr;
}

static bool is_selector(ggml_abi & abi, ggml_tensor * t) {
    return t && (abi.op(t) == OP_ARGSORT || abi.op(t) == OP_TOP_K);
}

// The group mask of DeepSeek-V3: the scores of the chosen groups, put back into a tensor of -inf. The groups were
// chosen by the sum of each one's two best scores.
static void groups_find(ggml_abi & abi, moe_layer & layer) {
    ggml_tensor * masked = view_skip(abi, layer.choice.scores);
    if (!masked || abi.op(masked) != OP_SET_ROWS) {
        return;
    }
    layer.group_choice.scores = masked; // a mask that may be made in another way
    ggml_tensor * kept = abi.src(masked, 0);
    if (abi.op(kept) != OP_GET_ROWS) {
        return;
    }
    layer.group_choice.scores = abi.src(kept, 0);
    layer.n_group      = (int) abi.ne(layer.group_choice.scores)[1];
    layer.n_group_used = (int) abi.ne(abi.src(kept, 1))[0];

    ggml_tensor * t = view_skip(abi, abi.src(kept, 1));
    for (int step = 0; t && step < 2; step++) { // the groups' argsort, their sums
        t = view_skip(abi, abi.src(t, 0));
    }
    t = t && abi.op(t) == OP_GET_ROWS ? view_skip(abi, abi.src(t, 1)) : nullptr;
    if (is_selector(abi, t) && same_memory(abi, abi.src(t, 0), layer.group_choice.scores)) {
        layer.group_choice.selector = t;
    }
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

static void users_find(ggml_abi & abi, ggml_cgraph * graph, int n_nodes, std::vector<moe_layer> & layers) {
    for (int i = 0; i < n_nodes; i++) {
        ggml_tensor * node = abi.graph_node(graph, i);
        const op_kind op = abi.op(node);
        if (op != OP_MUL_MAT_ID && op != OP_GET_ROWS && op != OP_ADD_ID) {
            continue;
        }
        for (auto & layer : layers) {
            if (same_memory(abi, abi.src(node, op == OP_GET_ROWS ? 1 : 2), layer.ids)) {
                layer.users.push_back(node);
            }
        }
    }
}

// What a LoRA adapter adds to the router's output: b (a x), scaled, of the same x.
static bool is_lora_delta(ggml_abi & abi, ggml_tensor * t, const ggml_tensor * x) {
    if (t && abi.op(t) == OP_SCALE) {
        t = abi.src(t, 0);
    }
    ggml_tensor * low = t && abi.op(t) == OP_MUL_MAT ? abi.src(t, 1) : nullptr;
    return low && abi.op(low) == OP_MUL_MAT && abi.src(low, 1) == x;
}

// Follows the router's output through a sum: its bias, and any number of LoRA adapters. Not the selection bias, which
// belongs to the scores.
static void logits_follow(ggml_abi & abi, ggml_tensor * sum, moe_layer & layer) {
    for (int s = 0; s < 2; s++) {
        ggml_tensor * other = abi.src(sum, 1 - s);
        if (!layer.logits || !other || abi.src(sum, s) != layer.logits) {
            continue;
        }
        int number;
        const char * tensor;
        const bool is_bias = layer_name_parse(abi.name(other), number, &tensor) && number == layer.layer &&
            strcmp(tensor, "ffn_gate_inp.bias") == 0;
        if ((is_bias || is_lora_delta(abi, other, layer.gate_input)) &&
                std::equal(abi.ne(sum), abi.ne(sum) + 4, abi.ne(layer.logits))) {
            layer.logits = sum;
            return;
        }
    }
}

// Who computes from the scores besides the top-k; while the graph is whole: later some of them read copies.
static void readers_find(ggml_abi & abi, ggml_cgraph * graph, int n_nodes, std::vector<moe_layer> & layers) {
    std::vector<std::pair<ggml_tensor *, selection *>> choices; // by the memory of their scores
    for (auto & layer : layers) {
        for (selection * choice : { &layer.choice, &layer.group_choice }) {
            if (choice->selector && choice->scores) {
                choices.emplace_back(abi.root(choice->scores), choice);
            }
        }
    }
    std::sort(choices.begin(), choices.end());
    for (int i = 0; i < n_nodes && !choices.empty(); i++) {
        ggml_tensor * node = abi.graph_node(graph, i);
        if (is_view(abi.op(node))) {
            continue;
        }
        for (int s = 0; s < 3; s++) {
            ggml_tensor * src = abi.src(node, s);
            const std::pair<ggml_tensor *, selection *> first { src ? abi.root(src) : nullptr, nullptr };
            for (auto it = std::lower_bound(choices.begin(), choices.end(), first); src && it != choices.end() && it->first == first.first; ++it) {
                auto & readers = it->second->readers;
                if (node != it->second->selector && (readers.empty() || readers.back() != node)) {
                    readers.push_back(node);
                }
            }
        }
    }
}

// numbers that the host sets before the graph runs
static bool is_number_input(ggml_abi & abi, ggml_tensor * t) {
    return t && abi.op(t) == OP_NONE && abi.type(t) == TYPE_I32;
}

// The graph's inputs, by name. Multi-token prediction leaves the tokens without one, and releases of 2025 the positions
// and the output rows: they are known by what they are used for.
static void inputs_find(ggml_abi & abi, ggml_cgraph * graph, moe_graph & out) {
    out.inp_tokens = abi.graph_get_tensor(graph, "inp_tokens");
    out.inp_pos    = abi.graph_get_tensor(graph, "inp_pos");
    for (const char * name : { "out_ids", "inp_out_ids" }) {
        if (!out.out_ids) {
            out.out_ids = abi.graph_get_tensor(graph, name);
        }
    }
    for (int i = 0; i < out.n_nodes && !(out.inp_tokens && out.inp_pos); i++) {
        ggml_tensor * node  = abi.graph_node(graph, i);
        ggml_tensor * input = abi.src(node, 1);
        const op_kind op = abi.op(node);
        if (op == OP_ROPE && !out.inp_pos && is_number_input(abi, input)) {
            out.inp_pos = input;
        } else if (op == OP_GET_ROWS && abi.src(node, 0) && is_number_input(abi, input)) {
            const char * table = abi.name(abi.src(node, 0));
            if (!out.inp_tokens && (strcmp(table, "token_embd.weight") == 0 || strstr(table, "nextn.embed_tokens.weight"))) {
                out.inp_tokens = input;
            } else if (!out.inp_pos && strcmp(table, "position_embd.weight") == 0) {
                out.inp_pos = input;
            }
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
    // rows of what the graph computed for every token (not of a table, not of a recurrent state), taken by an input
    for (int i = 0; i < out.n_nodes && !out.out_ids; i++) {
        ggml_tensor * node  = abi.graph_node(graph, i);
        ggml_tensor * table = abi.op(node) == OP_GET_ROWS ? view_skip(abi, abi.src(node, 0)) : nullptr;
        ggml_tensor * input = table ? abi.src(node, 1) : nullptr;
        if (table && abi.op(table) != OP_NONE && abi.ne(abi.src(node, 0))[1] == out.n_tokens &&
                is_number_input(abi, input) && input != out.inp_tokens && input != out.inp_pos) {
            out.out_ids = input;
        }
    }
}

// The layers: whoever multiplies with expert matrices.
static void layers_find(ggml_abi & abi, ggml_cgraph * graph, moe_graph & out) {
    for (int i = 0; i < out.n_nodes; i++) {
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
        if (abi.type(ids) != TYPE_I32 || !abi.is_readable(ids) || abi.ne(ids)[0] < 1 || abi.ne(ids)[0] > MAX_EXPERTS ||
                abi.ne(experts)[2] < 1 || abi.ne(experts)[2] > MAX_EXPERTS) {
            out.trouble = "expert ids are not a table of 32-bit integers";
            continue;
        }
        moe_layer * layer = layer_find(out.layers, number);
        if (out.layers.empty()) {
            out.i_experts = i;
            out.experts   = node;
        }
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
        if (matrix == MATRIX_DOWN) {
            layer->outputs = node;
        }
    }
    std::sort(out.layers.begin(), out.layers.end(), [](const moe_layer & a, const moe_layer & b) {
        return a.layer < b.layer;
    });
}

// Follows the experts' outputs through what still belongs to them: a bias, LoRA adapters, a scale per expert.
static void outputs_follow(ggml_abi & abi, ggml_tensor * node, moe_layer & layer) {
    ggml_tensor * other = abi.src(node, 1);
    if (!layer.outputs || abi.src(node, 0) != layer.outputs || !other || !std::equal(abi.ne(node), abi.ne(node) + 4, abi.ne(layer.outputs))) {
        return;
    }
    bool is_theirs = false;
    switch (abi.op(node)) {
        case OP_ADD_ID:
            is_theirs = same_memory(abi, abi.src(node, 2), layer.ids);
            break;
        case OP_ADD: {
            ggml_tensor * delta = abi.op(other) == OP_SCALE ? abi.src(other, 0) : other;
            is_theirs = delta && abi.op(delta) == OP_MUL_MAT_ID;
        } break;
        case OP_MUL: { // gathered from a weight; the mixing weights are gathered from a result
            ggml_tensor * scale = view_skip(abi, other);
            ggml_tensor * table = scale && abi.op(scale) == OP_GET_ROWS ? rows_table(abi, scale) : nullptr;
            is_theirs = table && abi.op(table) == OP_NONE && same_memory(abi, abi.src(scale, 1), layer.ids);
        } break;
        default:
            break;
    }
    if (is_theirs) {
        layer.outputs = node;
    }
}

// What the ids were chosen from.
static void choice_find(ggml_abi & abi, moe_layer & layer) {
    ggml_tensor * t = view_skip(abi, layer.ids);
    if (is_selector(abi, t)) {
        layer.choice.selector = t;
        layer.choice.scores = abi.src(t, 0);
        groups_find(abi, layer);
    }
}

// Whether the node multiplies what the layer's experts made, or take, with its mixing weights.
static void weights_find(ggml_abi & abi, ggml_tensor * product, moe_layer & layer) {
    for (int s = 1; s >= 0 && !layer.weights; s--) {
        ggml_tensor * t = abi.src(product, s);
        ggml_tensor * other = abi.src(product, 1 - s);
        // the experts' outputs (or inputs) have k columns, one per weight
        if (t && other && abi.ne(other)[1] == layer.k && abi.ne(other)[2] == layer.n_rows && abi.ne(t)[0] == 1 &&
                abi.ne(t)[1] == layer.k && weights_table(abi, t, layer)) {
            layer.weights = t;
        }
    }
}

// Router, mixing weights, and what the experts made.
static void routers_find(ggml_abi & abi, ggml_cgraph * graph, moe_graph & out) {
    for (int i = 0; i < out.n_nodes; i++) {
        ggml_tensor * node = abi.graph_node(graph, i);
        const op_kind op = abi.op(node);
        int number;
        const char * tensor;
        if (op == OP_MUL_MAT && abi.src(node, 0) && layer_name_parse(abi.name(abi.src(node, 0)), number, &tensor)) {
            moe_layer * layer = strcmp(tensor, "ffn_gate_inp.weight") == 0 ? layer_find(out.layers, number) : nullptr;
            if (layer) {
                layer->gate_input = abi.src(node, 1);
                layer->router     = abi.src(node, 0);
                layer->logits     = node;
            }
        } else if (op == OP_ADD || op == OP_MUL || op == OP_ADD_ID) {
            for (auto & layer : out.layers) {
                if (op == OP_ADD) {
                    logits_follow(abi, node, layer);
                } else if (op == OP_MUL) {
                    weights_find(abi, node, layer);
                }
                outputs_follow(abi, node, layer);
            }
        }
    }
}

// What has not one row per token, as wide as its layer, is something else of the same name.
static void misfits_drop(const ggml_abi & abi, moe_layer & layer) {
    if (layer.logits && !is_table(abi, layer.logits, layer.n_expert)) {
        layer.logits = nullptr;
    }
    if (layer.choice.scores && !is_table(abi, layer.choice.scores, layer.n_expert)) {
        layer.choice = {};
    }
    const int64_t n_embd = layer.gate_input ? abi.ne(layer.gate_input)[0] : 0;
    if (n_embd > MAX_EMBD || (layer.gate_input && !is_table(abi, layer.gate_input, n_embd))) {
        layer.gate_input = nullptr;
    }
    const int64_t * made = layer.outputs ? abi.ne(layer.outputs) : nullptr;
    if (made && (!abi.is_readable(layer.outputs) || made[0] > MAX_EMBD || made[1] != layer.k || made[2] != layer.n_rows || made[3] != 1)) {
        layer.outputs = nullptr;
    }
    if (layer.weights && (!abi.is_readable(layer.weights) || abi.ne(layer.weights)[3] != 1)) {
        layer.weights = nullptr;
    }
}

moe_graph moe_graph_read(ggml_abi & abi, ggml_cgraph * graph) {
    moe_graph out;
    out.n_nodes = abi.graph_n_nodes(graph);
    layers_find(abi, graph, out);
    if (out.layers.empty()) {
        return out;
    }
    for (auto & layer : out.layers) {
        choice_find(abi, layer);
    }
    routers_find(abi, graph, out);
    for (auto & layer : out.layers) {
        misfits_drop(abi, layer);
    }
    users_find(abi, graph, out.n_nodes, out.layers);
    readers_find(abi, graph, out.n_nodes, out.layers);
    inputs_find(abi, graph, out);
    return out;
}

bool moe_graph_is_same(ggml_abi & abi, ggml_cgraph * graph, moe_graph & moe) {
    if (abi.graph_n_nodes(graph) != moe.n_nodes) {
        return false;
    }
    if (moe.experts && abi.graph_node(graph, moe.i_experts) != moe.experts) {
        // backends reorder nodes when the graph is allocated
        int i = 0;
        while (i < moe.n_nodes && abi.graph_node(graph, i) != moe.experts) {
            i++;
        }
        if (i == moe.n_nodes) {
            return false;
        }
        moe.i_experts = i;
    }
    return !moe.experts || abi.op(moe.experts) == OP_MUL_MAT_ID;
}

} // namespace moetrace
