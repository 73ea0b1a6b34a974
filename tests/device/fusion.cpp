#include "fusion.h"

#include <cstring>

namespace {

// Walks on from node to node as long as each is what is expected.
struct walk {
    ggml_tensor ** nodes;
    int            n_nodes;
    int            at;

    ggml_tensor * here() const { return at < n_nodes ? nodes[at] : nullptr; }

    // the next node, if it is this operation on these sources (null: any)
    ggml_tensor * take(ggml_op op, const ggml_tensor * a, const ggml_tensor * b = nullptr) {
        ggml_tensor * t = here();
        if (!t || t->op != op || (a && t->src[0] != a) || (b && t->src[1] != b)) {
            return nullptr;
        }
        at++;
        return t;
    }
};

bool is_plain_softmax(const ggml_tensor * t) {
    float scale, max_bias;
    memcpy(&scale,    t->op_params,     sizeof(scale));
    memcpy(&max_bias, t->op_params + 1, sizeof(max_bias));
    return !t->src[1] && !t->src[2] && scale == 1.0f && max_bias == 0.0f && ggml_is_contiguous(t->src[0]);
}

// scores of the experts: softmax, sigmoid, or the root of softplus
ggml_tensor * take_scores(walk & w) {
    ggml_tensor * t = w.here();
    if (t && t->op == GGML_OP_SOFT_MAX && is_plain_softmax(t)) {
        return w.take(GGML_OP_SOFT_MAX, nullptr);
    }
    if (!t || t->op != GGML_OP_UNARY) {
        return nullptr;
    }
    w.at++;
    switch (ggml_get_unary_op(t)) {
        case GGML_UNARY_OP_SIGMOID:  return t;
        case GGML_UNARY_OP_SOFTPLUS: return w.take(GGML_OP_SQRT, t);
        default:                     return nullptr;
    }
}

bool is_expert_count(int64_t n) {
    return n <= 512 && (n & (n - 1)) == 0;
}

// scores, top-k, and the weights of the chosen experts; ids and weights are left
bool topk_moe(walk w, int & i_ids, int & i_weights) {
    if (ggml_tensor * logits_order = w.take(GGML_OP_ARGSORT, nullptr)) { // the softmax comes last
        ggml_tensor * ids = w.take(GGML_OP_VIEW, logits_order);
        i_ids = w.at - 1;
        ggml_tensor * t = ids ? w.take(GGML_OP_GET_ROWS, nullptr, ids) : nullptr;
        if (!t || t->src[0]->op != GGML_OP_RESHAPE || t->src[0]->src[0] != logits_order->src[0]) {
            return false;
        }
        t = w.take(GGML_OP_RESHAPE, t);
        t = t ? w.take(GGML_OP_SOFT_MAX, t) : nullptr;
        if (!t || !is_plain_softmax(t) || !w.take(GGML_OP_RESHAPE, t)) {
            return false;
        }
        i_weights = w.at - 1;
        return is_expert_count(logits_order->ne[0]);
    }
    ggml_tensor * scores = take_scores(w);
    ggml_tensor * rows   = scores ? w.take(GGML_OP_RESHAPE, scores) : nullptr;
    if (!rows) {
        return false;
    }
    ggml_tensor * biased = w.take(GGML_OP_ADD, scores);
    ggml_tensor * order  = w.take(GGML_OP_ARGSORT, biased ? biased : scores);
    ggml_tensor * ids    = order ? w.take(GGML_OP_VIEW, order) : nullptr;
    i_ids = w.at - 1;
    ggml_tensor * weights = ids ? w.take(GGML_OP_GET_ROWS, rows, ids) : nullptr;
    if (!weights || !is_expert_count(order->ne[0])) {
        return false;
    }
    walk norm = w; // divided by their sum?
    ggml_tensor * flat = norm.take(GGML_OP_RESHAPE, weights);
    ggml_tensor * sum  = flat ? norm.take(GGML_OP_SUM_ROWS, flat) : nullptr;
    ggml_tensor * most = sum  ? norm.take(GGML_OP_CLAMP, sum) : nullptr;
    ggml_tensor * part = most ? norm.take(GGML_OP_DIV, flat, most) : nullptr;
    if (ggml_tensor * back = part ? norm.take(GGML_OP_RESHAPE, part) : nullptr) {
        weights = back;
        w = norm;
    }
    w.take(GGML_OP_SCALE, weights);
    i_weights = w.at - 1;
    return true;
}

bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * at = (const char *) a->data;
    const char * bt = (const char *) b->data;
    return at && bt && at < bt + ggml_nbytes(b) && bt < at + ggml_nbytes(a);
}

// As CUDA does, a kernel that would write where it still reads is not used: so it depends on where tensors lie. Of few
// rows the top-k reads all logits before it writes.
bool writes_where_it_reads(ggml_tensor ** nodes, const fusion & f) {
    const ggml_tensor * logits = f.kind == FUSION_TOPK_MOE && ggml_nrows(nodes[f.first]) <= 8 ? nodes[f.first]->src[0] : nullptr;
    for (int output : f.outputs) {
        for (int i = f.first; i < f.first + f.n_nodes; i++) {
            for (const ggml_tensor * src : nodes[i]->src) {
                bool inside = !src || src->op == GGML_OP_NONE || src == logits || (logits && src->view_src == logits);
                for (int j = f.first; j < i; j++) {
                    inside |= nodes[j] == src;
                }
                if (!inside && overlap(nodes[output], src)) {
                    return true;
                }
            }
        }
    }
    return false;
}

fusion checked(const ggml_cgraph * graph, ggml_tensor ** nodes, fusion f) {
    std::vector<int>     index;
    std::vector<ggml_op> ops;
    for (int i = f.first; i < f.first + f.n_nodes; i++) {
        index.push_back(i);
        ops.push_back(nodes[i]->op);
    }
    // what is used outside, asked for as an output or viewed from outside must be written
    if (!ggml_can_fuse_subgraph_ext(graph, index.data(), f.n_nodes, ops.data(), f.outputs.data(), (int) f.outputs.size())) {
        f.n_nodes = 0;
    } else if (writes_where_it_reads(nodes, f)) {
        f.n_nodes = 0;
    }
    return f;
}

} // namespace

fusion fusion_at(const ggml_cgraph * graph, ggml_tensor ** nodes, int n_nodes, int first) {
    int i_ids, i_weights;
    if (topk_moe({ nodes, n_nodes, first }, i_ids, i_weights)) {
        return checked(graph, nodes, { FUSION_TOPK_MOE, first, i_weights + 1 - first, { i_ids, i_weights } });
    }
    ggml_tensor * a = nodes[first];
    ggml_tensor * b = first + 1 < n_nodes ? nodes[first + 1] : nullptr;
    const bool fits = b && a->type == GGML_TYPE_F32 && ggml_are_same_shape(a, b) && (b->src[0] == a || b->src[1] == a);
    if (fits && a->op == GGML_OP_RMS_NORM && b->op == GGML_OP_MUL) {
        return checked(graph, nodes, { FUSION_NORM_MUL, first, 2, { first + 1 } });
    }
    if (fits && a->op == GGML_OP_MUL_MAT && b->op == GGML_OP_ADD && a->ne[1] == 1) { // the matrix-vector kernel only
        return checked(graph, nodes, { FUSION_MATRIX_ADD, first, 2, { first + 1 } });
    }
    return { FUSION_KINDS, first, 0, {} };
}
