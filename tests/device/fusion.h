// Which nodes of a graph the device computes in one kernel, by the rules of ggml-cuda and ggml-vulkan.

#pragma once

#include "ggml-plugin.h"

#include <vector>

enum fusion_kind { FUSION_TOPK_MOE, FUSION_NORM_MUL, FUSION_MATRIX_ADD, FUSION_KINDS };

struct fusion {
    fusion_kind      kind;
    int              first;
    int              n_nodes;
    std::vector<int> outputs; // node indices; what the others hold is never written
};

// The fusion that begins at a node; n_nodes 0 if none does.
fusion fusion_at(const ggml_cgraph * graph, ggml_tensor ** nodes, int n_nodes, int first);
