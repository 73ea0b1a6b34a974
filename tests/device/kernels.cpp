#include "kernels.h"

#include "memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>

static const ggml_tensor * memory_owner(const ggml_tensor * t) {
    while (t->view_src) {
        t = t->view_src;
    }
    return t;
}

// the same tensor, its data where the CPU backend can read it
ggml_tensor * kernels::twin(const ggml_tensor * t) {
    if (const auto it = twins.find(t); it != twins.end()) {
        return it->second;
    }
    tensors.push_back(*t);
    ggml_tensor * copy = &tensors.back();
    twins[t] = copy;
    copy->data   = nullptr; // a view that nobody reads may be of memory elsewhere
    copy->buffer = nullptr;
    if (t->data && memory_holds(t)) {
        copy->data   = memory_address(t);
        copy->buffer = memory_plain_buffer(t);
    }
    copy->view_src = nullptr;
    copy->extra    = nullptr;
    return copy;
}

// The same tensor, for a fused kernel: what the kernel computes lies in memory of its own.
ggml_tensor * kernels::twin_in_scratch(ggml_tensor * t, const fusion & f, ggml_tensor ** nodes) {
    const ggml_tensor * owner = memory_owner(t);
    const bool is_made = std::find(nodes + f.first, nodes + f.first + f.n_nodes, owner) != nodes + f.first + f.n_nodes;
    if (!is_made) {
        return twin(t);
    }
    if (const auto it = scratch_twins.find(t); it != scratch_twins.end()) {
        return it->second;
    }
    auto area = std::find_if(scratches.begin(), scratches.end(), [&](const scratch & s) { return s.of == owner; });
    if (area == scratches.end()) {
        scratches.push_back({ owner, std::vector<char>(ggml_nbytes(owner)) });
        area = std::prev(scratches.end());
    }
    tensors.push_back(*t);
    ggml_tensor * copy = &tensors.back();
    copy->data     = area->bytes.data() + ((char *) t->data - (char *) owner->data);
    copy->buffer   = nullptr;
    copy->view_src = nullptr;
    copy->extra    = nullptr;
    scratch_twins[t] = copy;
    return copy;
}

kernels::kernel kernels::kernel_make(const std::vector<ggml_tensor *> & nodes) {
    kernel k;
    k.context = ggml_init({ ggml_graph_overhead_custom(nodes.size(), false) + 1024, nullptr, true });
    k.graph   = ggml_new_graph_custom(k.context, nodes.size(), false);
    for (ggml_tensor * node : nodes) {
        ggml_graph_add_node(k.graph, node);
    }
    return k;
}

kernels::kernels(ggml_cgraph * graph, bool fuse, int64_t * n_fused) {
    ggml_tensor ** nodes = ggml_graph_nodes(graph);
    const int n_nodes = ggml_graph_n_nodes(graph);
    std::vector<ggml_tensor *> plain; // nodes that are computed one by one
    const auto flush = [&] {
        if (!plain.empty()) {
            list.push_back(kernel_make(plain));
            plain.clear();
        }
    };
    for (int i = 0; i < n_nodes; ) {
        const fusion f = fuse ? fusion_at(graph, nodes, n_nodes, i) : fusion { FUSION_KINDS, i, 0, {} };
        if (f.n_nodes == 0) {
            ggml_tensor * copy = twin(nodes[i]);
            for (int s = 0; s < GGML_MAX_SRC; s++) {
                copy->src[s] = nodes[i]->src[s] ? twin(nodes[i]->src[s]) : nullptr;
            }
            plain.push_back(copy);
            i++;
            continue;
        }
        flush();
        n_fused[f.kind]++;
        fused_nodes += f.n_nodes;
        scratch_twins.clear();
        std::vector<ggml_tensor *> fused;
        for (int j = i; j < i + f.n_nodes; j++) {
            ggml_tensor * copy = twin_in_scratch(nodes[j], f, nodes);
            for (int s = 0; s < GGML_MAX_SRC; s++) {
                copy->src[s] = nodes[j]->src[s] ? twin_in_scratch(nodes[j]->src[s], f, nodes) : nullptr;
            }
            fused.push_back(copy);
        }
        kernel k = kernel_make(fused);
        for (int j = i; j < i + f.n_nodes; j++) {
            if (!nodes[j]->view_src) {
                k.unwritten.emplace_back(memory_address(nodes[j]), ggml_nbytes(nodes[j]));
            }
        }
        for (const int j : f.outputs) {
            k.outputs.push_back({ twin_in_scratch(nodes[j], f, nodes), twin(nodes[j]) });
        }
        list.push_back(k);
        i += f.n_nodes;
    }
    flush();
}

kernels::~kernels() {
    for (kernel & k : list) {
        ggml_free(k.context);
    }
}

// A fused kernel rounds otherwise than the kernels that it stands for: what it gives differs in the last digits.
static void output_write(const ggml_tensor * from, const ggml_tensor * to) {
    for (int64_t i3 = 0; i3 < to->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < to->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < to->ne[1]; i1++) {
                const size_t row = (size_t) i3*to->nb[3] + (size_t) i2*to->nb[2] + (size_t) i1*to->nb[1];
                for (int64_t i0 = 0; i0 < to->ne[0]; i0++) {
                    const char * source = (const char *) from->data + row + (size_t) i0*to->nb[0];
                    char * target = (char *) to->data + row + (size_t) i0*to->nb[0];
                    if (to->type == GGML_TYPE_F32) {
                        float value;
                        memcpy(&value, source, 4);
                        value *= 1.0f + 0x1p-22f;
                        memcpy(target, &value, 4);
                    } else {
                        memcpy(target, source, ggml_type_size(to->type));
                    }
                }
            }
        }
    }
}

void kernels::run(ggml_backend_t cpu) {
    for (kernel & k : list) {
        GGML_ASSERT(ggml_backend_graph_compute(cpu, k.graph) == GGML_STATUS_SUCCESS);
        for (const auto & [address, size] : k.unwritten) {
            memset(address, 0xFF, size);
        }
        for (const output & o : k.outputs) {
            output_write(o.from, o.to);
        }
    }
}
