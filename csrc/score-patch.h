// Where a graph's routing can be changed while it runs: scores that are overwritten before a top-k reads them.

#pragma once

#include "collector.h"
#include "intervene.h"
#include "moe-plan.h"

#include <vector>

namespace moetrace {

struct score_patch {
    int           layer  = 0;
    uint32_t      stages = 0;       // intervention_stage: which rules are applied here
    ggml_tensor * scores = nullptr; // contiguous f32: n_rows times n_expert
    const ggml_tensor * write_after   = nullptr; // the last node before the top-k
    const ggml_tensor * restore_after = nullptr; // nullptr: nobody reads the scores again
    uint32_t      n_rows   = 0;
    uint32_t      n_expert = 0;
    std::vector<float> before; // the scores as they were
};

// a row of the ubatch, as the rules see it
struct intervened_row {
    int32_t sequence = -1;
    int32_t position = -1;
    bool    touched  = false; // some rule is about it
};

struct graph_patches {
    std::vector<score_patch> patches;
    std::vector<const ggml_tensor *> nodes; // to stop at, sorted
    std::vector<int>         impossible; // layers whose scores cannot be changed

    // The graph must be allocated: the scheduler may have put its nodes into another order.
    void make(ggml_abi & abi, ggml_cgraph * graph, const moe_graph & moe);

    bool wants(const ggml_tensor * node) const;

    // Before the graph runs: why the rules cannot be kept in it; nullptr if they can.
    const char * begin(const intervention & rules, const std::vector<intervened_row> & rows, const output_rows & outputs);

    // Node was computed: puts back scores that were read, changes those that are read next.
    void follow(const ggml_abi & abi, const ggml_tensor * node, intervention & rules,
        const std::vector<intervened_row> & rows, const output_rows & outputs);
};

// The row of the ubatch that row r of a layer's n_rows is; -1 if that cannot be known.
int64_t row_place(uint32_t r, uint32_t n_rows, uint32_t n_tokens, const output_rows & outputs);

// What the layers' routers are like.
std::vector<router_shape> router_shapes(const model_shape & shape);

} // namespace moetrace
