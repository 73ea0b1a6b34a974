// Graphs as releases of different times build them: inputs with and without names, weights before and after the
// experts, another graph at the address of the last one, and routers with a bias and LoRA adapters.

#include "check.h"
#include "collector.h"
#include "fake-graph.h"
#include "moe-plan.h"

#include <algorithm>

using namespace moetrace;

static constexpr int64_t N_TOKENS = 5, N_OUTPUTS = 2, N_EMBD = 8, N_EXPERT = 4, K = 2;

struct built {
    ggml_tensor *tokens, *positions, *out_ids, *ids, *gathered, *weights, *gate_input, *logits, *outputs;
};

// what stands between the router's matrix and its experts' choice
struct router_form {
    int  n_adapters     = 0;
    bool is_scaled      = true; // the adapters
    bool bias           = false;
    bool softmax        = true; // or chosen by logits
    bool selection_bias = false;
    bool scaled_experts = false;
};

// one layer with attention, and its experts on the output rows only
static built build(fake_graph & g, bool names, bool weights_first, const router_form & form = {}) {
    built b;
    fake().nodes.clear();
    b.tokens    = g.leaf(names ? "inp_tokens" : "leaf_1", TYPE_I32, N_TOKENS, 1);
    b.positions = g.leaf(names ? "inp_pos" : "leaf_2", TYPE_I32, N_TOKENS, 1);
    b.out_ids   = g.leaf(names ? "inp_out_ids" : "leaf_3", TYPE_I32, N_OUTPUTS, 1);
    if (names) { // the fake looks for names among the nodes only
        for (ggml_tensor * t : { b.tokens, b.positions, b.out_ids }) {
            fake().nodes.push_back(t);
        }
    }
    ggml_tensor * copied = g.leaf("leaf_4", TYPE_I32, N_OUTPUTS, 1); // which recurrent states go on
    ggml_tensor * states = g.leaf("cache_r_l0", TYPE_F32, N_EMBD, N_TOKENS);
    ggml_tensor * x = g.node("GET_ROWS", TYPE_F32, N_EMBD, N_TOKENS, 1, { g.leaf("token_embd.weight", TYPE_F32, N_EMBD, 99), b.tokens });
    g.node("GET_ROWS", TYPE_F32, N_EMBD, N_OUTPUTS, 1, { g.view("RESHAPE", N_EMBD, N_TOKENS, 1, states), copied });
    x = g.node("ROPE", TYPE_F32, N_EMBD, N_TOKENS, 1, { x, b.positions });
    x = g.node("GET_ROWS", TYPE_F32, N_EMBD, N_OUTPUTS, 1, { x, b.out_ids });

    ggml_tensor * logits = g.node("MUL_MAT", TYPE_F32, N_EXPERT, N_OUTPUTS, 1, { g.leaf("blk.0.ffn_gate_inp.weight", TYPE_F32, N_EMBD, N_EXPERT), x });
    for (int i = 0; i < form.n_adapters; i++) {
        ggml_tensor * low   = g.node("MUL_MAT", TYPE_F32, 3, N_OUTPUTS, 1, { g.leaf("blk.0.ffn_gate_inp.weight.lora_a", TYPE_F32, N_EMBD, 3), x });
        ggml_tensor * delta = g.node("MUL_MAT", TYPE_F32, N_EXPERT, N_OUTPUTS, 1, { g.leaf("blk.0.ffn_gate_inp.weight.lora_b", TYPE_F32, 3, N_EXPERT), low });
        if (form.is_scaled) {
            delta = g.node("SCALE", TYPE_F32, N_EXPERT, N_OUTPUTS, 1, { delta });
        }
        logits = g.node("ADD", TYPE_F32, N_EXPERT, N_OUTPUTS, 1, { logits, delta });
    }
    if (form.bias) {
        logits = g.node("ADD", TYPE_F32, N_EXPERT, N_OUTPUTS, 1, { logits, g.leaf("blk.0.ffn_gate_inp.bias", TYPE_F32, N_EXPERT, 1) });
    }
    b.gate_input = x;
    b.logits     = logits;
    ggml_tensor * probs  = form.softmax ? g.node("SOFT_MAX", TYPE_F32, N_EXPERT, N_OUTPUTS, 1, { logits }) : logits;
    ggml_tensor * scores = !form.selection_bias ? probs :
        g.node("ADD", TYPE_F32, N_EXPERT, N_OUTPUTS, 1, { probs, g.leaf("blk.0.exp_probs_b.bias", TYPE_F32, N_EXPERT, 1) });
    ggml_tensor * sorted = g.node("ARGSORT", TYPE_I32, N_EXPERT, N_OUTPUTS, 1, { scores });
    b.ids = g.view("VIEW", K, N_OUTPUTS, 1, sorted);
    const auto weigh = [&] {
        ggml_tensor * table = g.view("RESHAPE", 1, N_EXPERT, N_OUTPUTS, probs);
        b.gathered = g.node("GET_ROWS", TYPE_F32, 1, K, N_OUTPUTS, { table, b.ids });
        ggml_tensor * sum = g.node("UNARY", TYPE_F32, 1, 1, N_OUTPUTS, { b.gathered });
        b.weights = g.node("DIV", TYPE_F32, 1, K, N_OUTPUTS, { b.gathered, sum });
    };
    if (weights_first) {
        weigh();
    }
    ggml_tensor * up   = g.node("MUL_MAT_ID", TYPE_F32, N_EMBD, K, N_OUTPUTS, { g.leaf("blk.0.ffn_up_exps.weight", TYPE_F32, N_EMBD, N_EMBD, N_EXPERT), x, b.ids });
    ggml_tensor * down = g.node("MUL_MAT_ID", TYPE_F32, N_EMBD, K, N_OUTPUTS, { g.leaf("blk.0.ffn_down_exps.weight", TYPE_F32, N_EMBD, N_EMBD, N_EXPERT), up, b.ids });
    if (!weights_first) {
        weigh();
    }
    for (int i = 0; i < form.n_adapters; i++) {
        ggml_tensor * low   = g.node("MUL_MAT_ID", TYPE_F32, 3, K, N_OUTPUTS, { g.leaf("blk.0.ffn_down_exps.weight.lora_a", TYPE_F32, N_EMBD, 3, N_EXPERT), up, b.ids });
        ggml_tensor * delta = g.node("MUL_MAT_ID", TYPE_F32, N_EMBD, K, N_OUTPUTS, { g.leaf("blk.0.ffn_down_exps.weight.lora_b", TYPE_F32, 3, N_EMBD, N_EXPERT), low, b.ids });
        if (form.is_scaled) {
            delta = g.node("SCALE", TYPE_F32, N_EMBD, K, N_OUTPUTS, { delta });
        }
        down = g.node("ADD", TYPE_F32, N_EMBD, K, N_OUTPUTS, { down, delta });
    }
    if (form.bias) {
        down = g.node("ADD_ID", TYPE_F32, N_EMBD, K, N_OUTPUTS, { down, g.leaf("blk.0.ffn_down_exps.bias", TYPE_F32, N_EMBD, N_EXPERT), b.ids });
    }
    if (form.scaled_experts) { // each by a number of its own
        ggml_tensor * table = g.view("RESHAPE", 1, N_EXPERT, 1, g.leaf("blk.0.ffn_down_exps.scale", TYPE_F32, N_EXPERT, 1));
        table = g.node("REPEAT", TYPE_F32, 1, N_EXPERT, N_OUTPUTS, { table });
        ggml_tensor * scale = g.node("GET_ROWS", TYPE_F32, 1, K, N_OUTPUTS, { table, b.ids });
        down = g.node("MUL", TYPE_F32, N_EMBD, K, N_OUTPUTS, { down, scale });
    }
    b.outputs = down;
    ggml_tensor * weighted = g.node("MUL", TYPE_F32, N_EMBD, K, N_OUTPUTS, { down, b.weights });
    g.node("ADD", TYPE_F32, N_EMBD, K, N_OUTPUTS, { weighted, weighted });
    return b;
}

int main() {
    ggml_abi abi;
    std::string error;
    CHECK(abi.attach(error));
    ggml_cgraph * graph = nullptr; // the fake asks for none

    for (const bool names : { true, false }) {
        for (const bool weights_first : { true, false }) {
            fake_graph g;
            const built b = build(g, names, weights_first);
            moe_graph moe = moe_graph_read(abi, graph);
            CHECK(moe.trouble == nullptr);
            CHECK(moe.layers.size() == 1);
            CHECK(moe.inp_tokens == b.tokens);
            CHECK(moe.inp_pos == b.positions);
            CHECK(moe.out_ids == b.out_ids);
            CHECK(moe.n_tokens == N_TOKENS);
            const moe_layer & layer = moe.layers[0];
            CHECK(layer.ids == b.ids);
            CHECK(layer.weights == b.weights);
            CHECK(layer.outputs == b.outputs);
            CHECK(layer.n_rows == N_OUTPUTS);
            // with the weights, unless the ids' memory may be gone by then
            CHECK(ids_asks_find(abi, nullptr, graph, moe) == std::vector<ggml_tensor *> { weights_first ? b.weights : b.gathered });

            // the order that counts is the one that a backend has put the nodes into
            std::vector<void *> & nodes = fake().nodes;
            const auto order = nodes;
            std::stable_partition(nodes.begin(), nodes.end(), [&](void * t) { return t != b.weights && t != b.gathered; });
            CHECK(moe_graph_is_same(abi, graph, moe));
            CHECK(ids_asks_find(abi, nullptr, graph, moe) == std::vector<ggml_tensor *> { b.gathered });
            std::reverse(nodes.begin(), nodes.end());
            CHECK(moe_graph_is_same(abi, graph, moe));
            nodes = order;

            // the same graph again; one with a node more; one that only copies, where this one was
            CHECK(moe_graph_is_same(abi, graph, moe));
            fake_graph other;
            ggml_tensor * more = other.node("CPY", TYPE_F32, 1, 1, 1, {});
            CHECK(!moe_graph_is_same(abi, graph, moe));
            fake().nodes.assign((size_t) moe.n_nodes, more);
            CHECK(!moe_graph_is_same(abi, graph, moe));
        }
    }

    // the router's output is what is computed last before the gating function; the selection bias is no part of it
    for (int bits = 0; bits < 4*16; bits++) {
        const router_form form { bits >> 4, !(bits & 1), (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0, (bits & 8) != 0 };
        fake_graph g;
        const built b = build(g, true, true, form);
        const moe_graph moe = moe_graph_read(abi, graph);
        CHECK(moe.layers.size() == 1);
        CHECK(moe.layers[0].logits == b.logits);
        CHECK(moe.layers[0].gate_input == b.gate_input);
        CHECK(moe.layers[0].outputs == b.outputs);
        CHECK(moe.layers[0].weights == b.weights);
    }

    // scores of a type that cannot be read are no scores, and nobody reads them
    {
        fake_graph g;
        const built b = build(g, true, true);
        ggml_tensor * scores = abi.src(abi.src(b.ids, 0), 0);
        CHECK(moe_graph_read(abi, graph).layers[0].choice.readers.size() == 1); // the weights
        fake().at<int32_t>(scores, fake().type) = 30;
        const moe_graph moe = moe_graph_read(abi, graph);
        CHECK(moe.layers.size() == 1 && moe.layers[0].ids == b.ids);
        CHECK(!moe.layers[0].choice.scores && !moe.layers[0].selects() && moe.layers[0].choice.readers.empty());
    }

    // a product of something else than what the router read is no adapter, and another layer's bias not this one's
    for (const bool bias : { false, true }) {
        fake_graph g;
        const built b = build(g, true, true);
        ggml_tensor * low = g.node("MUL_MAT", TYPE_F32, 3, N_OUTPUTS, 1, { g.leaf("a", TYPE_F32, N_EMBD, 3), b.out_ids });
        ggml_tensor * other = bias ? g.leaf("blk.1.ffn_gate_inp.bias", TYPE_F32, N_EXPERT, 1)
            : g.node("MUL_MAT", TYPE_F32, N_EXPERT, N_OUTPUTS, 1, { g.leaf("b", TYPE_F32, 3, N_EXPERT), low });
        g.node("ADD", TYPE_F32, N_EXPERT, N_OUTPUTS, 1, { b.logits, other });
        CHECK(moe_graph_read(abi, graph).layers[0].logits == b.logits);
    }
    printf("ok\n");
    return 0;
}
