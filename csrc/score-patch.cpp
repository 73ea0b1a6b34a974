#include "score-patch.h"

#include <algorithm>

namespace moetrace {

int64_t row_place(uint32_t r, uint32_t n_rows, uint32_t n_tokens, const output_rows & outputs) {
    if (n_rows == n_tokens) {
        return r;
    }
    return outputs.ids && outputs.n == n_rows ? outputs.ids[r] : -1;
}

std::vector<router_shape> router_shapes(const model_shape & shape) {
    std::vector<router_shape> routers;
    for (const auto & [number, layer] : shape.layers) {
        routers.push_back({ number, layer.n_expert, layer.k, layer.n_group, layer.n_group_used, layer.selects });
    }
    return routers;
}

static bool is_contiguous(const ggml_abi & abi, const ggml_tensor * t) {
    size_t expected = 4;
    for (int d = 0; d < 4; d++) {
        if (abi.ne(t)[d] != 1 && abi.nb(t)[d] != expected) {
            return false;
        }
        expected *= (size_t) abi.ne(t)[d];
    }
    return abi.type(t) == TYPE_F32;
}

void graph_patches::make(ggml_abi & abi, ggml_cgraph * graph, const moe_graph & moe) {
    *this = {};
    for (const auto & layer : moe.layers) {
        const bool grouped = layer.group_choice.scores;
        if (!layer.selects() || moe.trouble) {
            impossible.push_back(layer.layer);
            continue;
        }
        for (const auto & [choice, stages] : {
                std::make_pair(&layer.group_choice, grouped ? (uint32_t) STAGE_SCORES : 0u),
                std::make_pair(&layer.choice,       grouped ? (uint32_t) STAGE_CHOICE : STAGE_SCORES | STAGE_CHOICE) }) {
            if (!stages) {
                continue;
            }
            score_patch patch;
            patch.layer    = layer.layer;
            patch.stages   = stages;
            patch.scores   = choice->scores;
            patch.n_rows   = (uint32_t) layer.n_rows;
            patch.n_expert = (uint32_t) layer.n_expert;
            bool chosen = false; // in the order in which the nodes are computed
            for (int i = 0; i < abi.graph_n_nodes(graph); i++) {
                ggml_tensor * node = abi.graph_node(graph, i);
                if (node == choice->selector && i > 0) {
                    patch.write_after = abi.graph_node(graph, i - 1);
                }
                if (chosen && std::find(choice->readers.begin(), choice->readers.end(), node) != choice->readers.end()) {
                    patch.restore_after = layer.choice.selector; // it is to read what the router said
                }
                chosen |= node == layer.choice.selector;
            }
            // between devices the scheduler has the top-k read a copy
            if (!patch.write_after || abi.src(choice->selector, 0) != choice->scores || !is_contiguous(abi, choice->scores)) {
                impossible.push_back(layer.layer);
                continue;
            }
            for (const ggml_tensor * node : { patch.write_after, patch.restore_after }) {
                if (node) {
                    nodes.push_back(node);
                }
            }
            patches.push_back(std::move(patch));
        }
    }
    std::sort(nodes.begin(), nodes.end(), std::less<const ggml_tensor *>());
}

bool graph_patches::wants(const ggml_tensor * node) const {
    return std::binary_search(nodes.begin(), nodes.end(), node, std::less<const ggml_tensor *>());
}

const char * graph_patches::begin(const intervention & rules, const std::vector<intervened_row> & rows, const output_rows & outputs) {
    for (int layer : impossible) {
        if (rules.has_layer(layer)) {
            return "a layer's scores cannot be changed";
        }
    }
    for (auto & patch : patches) {
        patch.before.clear(); // of a graph that was aborted
        if (rules.has_layer(patch.layer) && patch.n_rows > 0 && row_place(0, patch.n_rows, (uint32_t) rows.size(), outputs) < 0) {
            return "it is not known whose a layer's rows are";
        }
    }
    return nullptr;
}

void graph_patches::follow(const ggml_abi & abi, const ggml_tensor * node, intervention & rules,
        const std::vector<intervened_row> & rows, const output_rows & outputs) {
    for (auto & patch : patches) {
        if (patch.restore_after == node && !patch.before.empty()) {
            abi.tensor_set(patch.scores, patch.before.data(), 0, patch.before.size()*4);
            patch.before.clear();
        }
    }
    static thread_local std::vector<float> scores;
    for (auto & patch : patches) {
        const size_t n = (size_t) patch.n_rows*patch.n_expert;
        if (patch.write_after != node || n == 0 || !rules.has_layer(patch.layer)) {
            continue;
        }
        scores.resize(n);
        abi.tensor_get(patch.scores, scores.data(), 0, n*4);
        if (patch.restore_after) {
            patch.before = scores;
        }
        for (uint32_t r = 0; r < patch.n_rows; r++) {
            const int64_t place = row_place(r, patch.n_rows, (uint32_t) rows.size(), outputs);
            if (place < 0 || place >= (int64_t) rows.size() || !rows[(size_t) place].touched) {
                continue;
            }
            const intervened_row & row = rows[(size_t) place];
            rules.apply(patch.layer, patch.stages, row.sequence, row.position, scores.data() + (size_t) r*patch.n_expert,
                (int) patch.n_expert);
        }
        abi.tensor_set(patch.scores, scores.data(), 0, n*4);
    }
}

} // namespace moetrace
