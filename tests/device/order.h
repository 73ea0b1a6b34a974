// Puts a graph's nodes into another order that computes the same, as some backends do before memory is given out.

#pragma once

#include "ggml-plugin.h"

#include <string>

// Reorders a split's nodes in place and gives how many stand elsewhere than before. How: "" (as they are), "vulkan" (a
// short look ahead for nodes that need none of those skipped), "metal" (sets of nodes that can run at once), or
// "random:SEED" (any order that is valid). Fused groups stay together.
int nodes_reorder(ggml_cgraph * graph, const std::string & how);

// Whether there is such an order.
bool is_order(const std::string & how);
