// Scores that are changed just before a top-k reads them, and put back for who reads them later, in the order in which
// the nodes are computed.

#include "check.h"
#include "fake-graph.h"
#include "intervention-file.h"
#include "score-patch.h"

#include <algorithm>
#include <cmath>

using namespace moetrace;

static constexpr int64_t N = 3, N_EMBD = 8, N_EXPERT = 4, K = 2;

struct routed : fake_graph {
    ggml_tensor *scores, *ids, *weights, *up;

    routed() {
        fake().nodes.clear();
        ggml_tensor * x = node("ROPE", TYPE_F32, N_EMBD, N, 1, { leaf("x", TYPE_F32, N_EMBD, N) });
        ggml_tensor * logits = node("MUL_MAT", TYPE_F32, N_EXPERT, N, 1, { leaf("blk.7.ffn_gate_inp.weight", TYPE_F32, N_EMBD, N_EXPERT), x });
        scores  = node("SOFT_MAX", TYPE_F32, N_EXPERT, N, 1, { logits });
        ids     = node("TOP_K", TYPE_I32, K, N, 1, { scores });
        weights = node("GET_ROWS", TYPE_F32, 1, K, N, { scores, ids });
        up      = node("MUL_MAT_ID", TYPE_F32, N_EMBD, K, N, { leaf("blk.7.ffn_up_exps.weight", TYPE_F32, N_EMBD, N_EMBD, N_EXPERT), x, ids });
        node("MUL", TYPE_F32, N_EMBD, K, N, { up, weights });
        place(scores, N_EXPERT*N*4);
        reset();
    }

    float * values() const { return (float *) fake().at<void *>(scores, fake().data); }
    void reset() {
        for (int i = 0; i < N_EXPERT*N; i++) {
            values()[i] = (float) i;
        }
    }
};

static intervention ablate(uint16_t expert, int layer) {
    return make({ { INTERVENE_ABLATE, { expert }, -1, layer } });
}

int main() {
    ggml_abi abi;
    std::string error;
    CHECK(abi.attach(error));
    ggml_cgraph * graph = nullptr; // the fake asks for none
    fake().reads = true;
    const output_rows all;
    std::vector<intervened_row> rows(N);
    rows[1].touched = true;

    {
        routed g;
        const moe_graph moe = moe_graph_read(abi, graph);
        graph_patches patches;
        patches.make(abi, graph, moe);
        CHECK(patches.patches.size() == 1 && patches.impossible.empty());
        CHECK(patches.wants(g.scores) && patches.wants(g.ids) && !patches.wants(g.up));
        intervention rules = ablate(2, 7);
        CHECK(!patches.begin(rules, rows, all));

        patches.follow(abi, g.scores, rules, rows, all); // before the top-k: one expert of the one row
        for (int i = 0; i < N_EXPERT*N; i++) {
            CHECK(i == N_EXPERT + 2 ? std::isinf(g.values()[i]) : g.values()[i] == (float) i);
        }
        patches.follow(abi, g.ids, rules, rows, all); // behind it: as they were, for the weights
        for (int i = 0; i < N_EXPERT*N; i++) {
            CHECK(g.values()[i] == (float) i);
        }

        // another layer's rules change nothing here
        intervention other = ablate(2, 6);
        CHECK(!patches.begin(other, rows, all));
        patches.follow(abi, g.scores, other, rows, all);
        CHECK(g.values()[N_EXPERT + 2] == (float) (N_EXPERT + 2));

        // rows of which nobody knows whose they are
        rows.resize(N + 1);
        CHECK(patches.begin(rules, rows, all));
        rows.resize(N);
    }

    // read by nobody behind the top-k: they stay changed
    {
        routed g;
        auto & nodes = fake().nodes;
        nodes.erase(std::remove(nodes.begin(), nodes.end(), (void *) g.weights), nodes.end());
        nodes.insert(std::find(nodes.begin(), nodes.end(), (void *) g.ids), (void *) g.weights); // an order that a backend chose
        moe_graph moe = moe_graph_read(abi, graph);
        graph_patches patches;
        patches.make(abi, graph, moe);
        CHECK(patches.patches.size() == 1 && !patches.patches[0].restore_after);
        CHECK(patches.patches[0].write_after == g.weights);
    }

    // scores that do not lie together cannot be written at once
    {
        routed g;
        moe_graph moe = moe_graph_read(abi, graph);
        fake().at<size_t>(g.scores, fake().nb + 8) *= 2;
        graph_patches patches;
        patches.make(abi, graph, moe);
        CHECK(patches.patches.empty() && patches.impossible == std::vector<int> { 7 });
        CHECK(patches.begin(ablate(2, 7), rows, all) && !patches.begin(ablate(2, 6), rows, all));
    }
    printf("ok\n");
    return 0;
}
