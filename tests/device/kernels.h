// A graph on the device, made ready to run on the CPU backend.

#pragma once

#include "fusion.h"

#include <deque>
#include <map>
#include <memory>
#include <vector>

// What a graph looks like when it is given to the device; the host may change or free its tensors while it runs.
class kernels {
public:
    // Counts the fusions of each kind into n_fused.
    kernels(ggml_cgraph * graph, bool fuse, int64_t * n_fused);
    ~kernels();

    kernels(const kernels &) = delete;
    kernels & operator=(const kernels &) = delete;

    void    run(ggml_backend_t cpu);
    int64_t n_fused_nodes() const { return fused_nodes; }

private:
    struct output { const ggml_tensor * from; const ggml_tensor * to; };
    struct kernel {
        ggml_context * context = nullptr;
        ggml_cgraph *  graph   = nullptr;
        std::vector<std::pair<char *, size_t>> unwritten; // memory of what a fused kernel leaves out
        std::vector<output> outputs;
    };
    struct scratch { const ggml_tensor * of; std::vector<char> bytes; };

    ggml_tensor * twin(const ggml_tensor * t);
    ggml_tensor * twin_in_scratch(ggml_tensor * t, const fusion & f, ggml_tensor ** nodes);
    kernel        kernel_make(const std::vector<ggml_tensor *> & nodes);

    std::deque<ggml_tensor> tensors;
    std::map<const ggml_tensor *, ggml_tensor *> twins;         // with their data where the device has it
    std::map<const ggml_tensor *, ggml_tensor *> scratch_twins; // of the fused kernel that is being made
    std::deque<scratch> scratches;
    std::vector<kernel> list;
    int64_t fused_nodes = 0;
};
