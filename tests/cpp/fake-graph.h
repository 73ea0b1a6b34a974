// Graphs of the fake ggml, built node by node.

#pragma once

#include "fuzz/fake-ggml.h"
#include "ggml-abi.h"

#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

namespace moetrace {

// tensors of a fake graph; those with an operation are its nodes
struct fake_graph {
    std::vector<std::unique_ptr<char[]>> memory;

    ggml_tensor * leaf(const char * name, int32_t type, int64_t a, int64_t b, int64_t c = 1) {
        const int64_t ne[4] = { a, b, c, 1 };
        memory.push_back(std::make_unique<char[]>(fake().size));
        void * t = memory.back().get();
        fake().fill(t, type, ne);
        strcpy((char *) t + fake().name, name);
        return (ggml_tensor *) t;
    }

    // gives a tensor zeros in host memory, as an allocation does
    void place(ggml_tensor * t, size_t bytes) {
        static char buffer[16];
        memory.push_back(std::make_unique<char[]>(bytes));
        fake().at<void *>(t, fake().buffer) = buffer;
        fake().at<void *>(t, fake().data)   = memory.back().get();
    }

    ggml_tensor * node(const char * op, int32_t type, int64_t a, int64_t b, int64_t c, std::initializer_list<ggml_tensor *> sources) {
        ggml_tensor * t = leaf("", type, a, b, c);
        for (int i = 0; i < FAKE_N_OPS; i++) {
            if (strcmp(FAKE_OPS[i], op) == 0) {
                fake().at<int32_t>(t, fake().op) = fake().first_op + i;
            }
        }
        size_t i = 0;
        for (ggml_tensor * source : sources) {
            fake().at<void *>(t, fake().src + 8*i++) = source;
        }
        fake().nodes.push_back(t);
        return t;
    }

    ggml_tensor * view(const char * op, int64_t a, int64_t b, int64_t c, ggml_tensor * of) {
        ggml_tensor * t = node(op, fake().at<int32_t>(of, fake().type), a, b, c, { of });
        void * root = fake().at<void *>(of, fake().view_src);
        fake().at<void *>(t, fake().view_src) = root ? root : of;
        return t;
    }
};

} // namespace moetrace
