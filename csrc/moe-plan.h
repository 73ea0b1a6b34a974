// Which tensors of a graph route tokens to experts.

#pragma once

#include "ggml-abi.h"

#include <string>
#include <vector>

namespace moetrace {

enum expert_matrix : uint8_t { // which expert matrices consumed a layer's ids
    MATRIX_GATE    = 1u << 0,
    MATRIX_UP      = 1u << 1,
    MATRIX_DOWN    = 1u << 2,
    MATRIX_GATE_UP = 1u << 3,
};

// Where a choice is made: scores that a top-k reads.
struct selection {
    ggml_tensor * scores   = nullptr; // [n_expert, n_rows], or [n_expert per group, groups, n_rows]
    ggml_tensor * selector = nullptr; // the argsort or top-k
    std::vector<ggml_tensor *> readers; // other nodes that compute from the scores
};

// The router of one layer, as the graph spells it. Tensors that an architecture lacks are nullptr.
struct moe_layer {
    int           layer      = -1;
    ggml_tensor * ids        = nullptr; // [k, n_rows] i32, often a strided view of an argsort
    ggml_tensor * weights    = nullptr; // [1, k, n_rows] or [k, n_rows], as multiplied with the experts
    ggml_tensor * logits     = nullptr; // [n_expert, n_rows], the router's linear output with its bias and LoRA
    ggml_tensor * gate_input = nullptr; // [n_embd, n_rows], what the router read
    ggml_tensor * router     = nullptr; // the router's weight
    ggml_tensor * outputs    = nullptr; // [n_embd, k, n_rows], what each expert made, before it is weighted
    selection     choice;             // of the experts; its scores are [n_expert, n_rows]
    selection     group_choice;       // of the groups of experts that they are chosen from, if there are groups
    int           n_group      = 0;
    int           n_group_used = 0;
    std::vector<ggml_tensor *> users; // nodes that take the ids: when the last is done, their memory may go
    int           n_expert   = 0;
    int           k          = 0;
    int64_t       n_rows     = 0;
    uint8_t       matrices   = 0; // expert_matrix

    // Whether the choice is made by scores and can be followed to the weights.
    bool selects() const { return choice.selector && weights && (!group_choice.scores || group_choice.selector); }
};

struct moe_graph {
    std::vector<moe_layer> layers; // ascending
    ggml_tensor * inp_tokens = nullptr; // [n_tokens] i32
    ggml_tensor * inp_pos    = nullptr; // [n_tokens * positions per token] i32
    ggml_tensor * out_ids    = nullptr; // [n_outputs] i32: rows that the last layer keeps
    int64_t       n_tokens   = 0;
    const char *  trouble    = nullptr; // set if the graph routes in a way that is not understood

    // to know the graph again: another one may be built at its address
    int           n_nodes    = 0;
    int           n_keepers  = 0;       // of these, at the end, nodes that were added (ubatch.h)
    int           i_experts  = -1;      // of a node that multiplies with experts, when it was last seen
    ggml_tensor * experts    = nullptr; // that node
};

// Walks the graph. Call it before the scheduler splits the graph: splitting replaces sources by copies.
moe_graph moe_graph_read(ggml_abi & abi, ggml_cgraph * graph);

// Whether this still is the graph that was read; allocation may have put its nodes into another order.
bool moe_graph_is_same(ggml_abi & abi, ggml_cgraph * graph, moe_graph & moe);

// Whether it computes nothing: another look at the same memory.
bool is_view(op_kind op);

// Whether two tensors begin at the same place.
bool same_memory(const ggml_abi & abi, ggml_tensor * a, ggml_tensor * b);

// Layer number and tensor of "blk.N.TENSOR"; false for any other name.
bool layer_name_parse(const char * name, int & layer, const char ** tensor);

} // namespace moetrace
