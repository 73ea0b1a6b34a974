// What a ubatch leaves in a context's counters when its rows are not recorded. How rows are written is in test-tracer.

#include "check.h"
#include "fake-graph.h"
#include "ubatch.h"

using namespace moetrace;

static moe_graph graph_of(std::initializer_list<std::pair<int, int>> layers, int64_t n_tokens) { // experts, chosen
    moe_graph moe;
    for (const auto & [n_expert, k] : layers) {
        moe_layer layer;
        layer.layer    = (int) moe.layers.size();
        layer.n_expert = n_expert;
        layer.k        = k;
        layer.n_rows   = n_tokens;
        moe.layers.push_back(layer);
    }
    moe.n_tokens = n_tokens;
    return moe;
}

int main() {
    // llama.cpp warms up with all experts, in all layers
    CHECK(graph_is_warmup(graph_of({ { 8, 8 }, { 4, 4 } }, 2)));
    CHECK(!graph_is_warmup(graph_of({ { 8, 8 }, { 4, 2 } }, 2)));

    // rows that are pending are lost once
    context_trace waiting;
    row_layout layout;
    layout.stride = 64;
    layout.blank.assign(64, 0);
    CHECK(waiting.block.reset(layout, 3, true));
    graph_trace g;
    ubatch_forget(waiting);
    CHECK(waiting.counts_early[COUNT_ROWS_LOST_ERROR] == 0);
    waiting.pending = &g;
    ubatch_forget(waiting);
    ubatch_forget(waiting);
    CHECK(!waiting.pending && waiting.counts_early[COUNT_ROWS_LOST_ERROR] == 3 && waiting.counts_early[COUNT_ROWS_PRODUCED] == 3);

    // nothing is pending: nothing is finished, and no device is asked
    tracer_env env;
    ubatch_finish(env, waiting, false);
    CHECK(waiting.counts_early[COUNT_SYNCS] == 0);
    printf("ok\n");
    return 0;
}
