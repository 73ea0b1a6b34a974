// Graphs that no model has: any operations, shapes, names and strides. What is learnt from one must not let the
// rows of another be read or written outside of their memory.

#include "attention.h"
#include "collector.h"
#include "fake-ggml.h"
#include "input.h"
#include "moe-plan.h"

#include <cstring>
#include <memory>

using namespace moetrace;

namespace {

constexpr const char * NAMES[] = {
    "blk.%d.ffn_gate_exps.weight", "blk.%d.ffn_up_exps.weight", "blk.%d.ffn_down_exps.weight", "blk.%d.ffn_gate_inp.weight",
    "blk.%d.ffn_gate_inp.bias", "ffn_moe_topk-%d", "ffn_moe_weights-%d", "l_out-%d", "kq_soft_max-%d", "cache_k_l%d",
};
constexpr const char * INPUTS[] = { "inp_tokens", "inp_pos", "inp_out_ids", "inp_embd" };

// a graph with the memory of its tensors; every piece of exactly its size, so that a sanitizer sees past its end
struct graph {
    std::vector<std::unique_ptr<char[]>> memory;
    std::vector<void *> nodes;

    char * room(size_t bytes) {
        memory.push_back(std::make_unique<char[]>(bytes)); // zeroed
        return memory.back().get();
    }

    void make(fuzz_input & in) {
        const fake_ggml & f = fake();
        const size_t n = 1 + (size_t) in.below(48);
        for (size_t i = 0; i < n; i++) {
            static constexpr int32_t TYPES[] = { TYPE_F32, TYPE_I32, TYPE_F16, TYPE_I64 };
            const int32_t type = TYPES[in.below(4)];
            int64_t ne[4];
            for (auto & dim : ne) {
                const uint8_t b = in.byte();
                dim = b < 240 ? 1 + b % 9 : (int64_t) in.number();
            }
            void * t = room(f.size);
            f.fill(t, type, ne);
            f.at<int32_t>(t, f.op) = in.bit() ? 0 : 1 + (int32_t) in.below(FAKE_N_OPS + 1);
            const auto earlier = [&]() -> void * { return i && in.bit() ? nodes[in.below(i)] : nullptr; };
            for (size_t s = 0; s < 3; s++) {
                f.at<void *>(t, f.src + 8*s) = earlier();
            }
            char name[64];
            const size_t which = (size_t) in.below(16);
            if (which < 10) {
                snprintf(name, sizeof(name), NAMES[which], (int) in.below(3));
            } else if (which < 14) {
                strcpy(name, INPUTS[which - 10]);
            } else {
                snprintf(name, sizeof(name), "%s", in.text((size_t) in.below(40)).c_str());
            }
            strcpy((char *) t + f.name, name);
            place(in, t, earlier());
            nodes.push_back(t);
        }
    }

    // its own memory, or a view of another's
    void place(fuzz_input & in, void * t, void * of) {
        const fake_ggml & f = fake();
        const size_t bytes = span(t);
        if (bytes == 0 || bytes > 1 << 16) {
            return; // not in host memory, and too large to be read
        }
        static char buffer[16];
        if (of && f.at<void *>(of, f.data) && span(of) >= bytes) {
            void * root = f.at<void *>(of, f.view_src);
            f.at<void *>(t, f.view_src) = root ? root : of;
            f.at<void *>(t, f.data)     = f.at<void *>(of, f.data);
        } else if (in.below(4)) {
            f.at<void *>(t, f.buffer) = buffer;
            f.at<void *>(t, f.data)   = room(bytes);
            memset(f.at<void *>(t, f.data), in.byte() % 8, bytes);
        }
    }

    static size_t span(void * t) {
        const fake_ggml & f = fake();
        size_t bytes = f.at<int32_t>(t, f.type) == TYPE_F16 ? 2 : f.at<int32_t>(t, f.type) == TYPE_I64 ? 8 : 4;
        for (size_t d = 0; d < 4; d++) {
            const int64_t n = f.at<int64_t>(t, f.ne + 8*d);
            const size_t step = f.at<size_t>(t, f.nb + 8*d);
            if (n <= 0 || n > 1 << 16 || step > 1 << 20) {
                return 0;
            }
            bytes += (size_t) (n - 1)*step;
        }
        return bytes;
    }
};

ggml_abi & attached() {
    static ggml_abi abi = [] {
        fake() = fake_ggml();
        ggml_abi made;
        std::string error;
        CHECK(made.attach(error));
        return made;
    }();
    return abi;
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz_input in { data, size };
    ggml_abi & abi = attached();
    config cfg;
    cfg.channels = in.byte() | CHANNEL_EXPERTS;
    if (in.bit()) {
        cfg.tensors = { "l_out-*" };
    }

    // a layout from the first graph; rows from all
    model_shape shape;
    row_layout layout;
    row_block block;
    kv_cells cells;
    attention_row attention;
    const size_t n_graphs = 1 + (size_t) in.below(3);
    for (size_t i = 0; i < n_graphs; i++) {
        graph g;
        g.make(in);
        fake().nodes = g.nodes;
        ggml_cgraph * handle = nullptr; // the fake asks for none
        moe_graph moe = moe_graph_read(abi, handle);
        if (!shape.learn(abi, handle, moe, cfg)) {
            moe.trouble = "another number of experts";
        }
        if (i == 0) {
            layout.make(shape, cfg);
        }
        if (layout.layers.empty() || layout.stride == 0 || layout.stride > (1u << 20)) {
            continue;
        }
        graph_sources sources;
        sources.make(abi, nullptr, handle, moe, layout, cfg);
        const uint32_t n = (uint32_t) (moe.n_tokens < 0 ? 0 : moe.n_tokens > 64 ? 64 : moe.n_tokens);
        CHECK(block.reset(layout, n, true));
        block.bytes.resize((size_t) n*layout.stride); // exactly, so that a sanitizer sees past its end
        block.bytes.shrink_to_fit();
        const std::vector<int32_t> ids = { 0, 1, -1, (int32_t) n, 2 };
        const output_rows outputs = { ids.data(), (int64_t) ids.size() };
        for (size_t s = 0; s < sources.rows.size(); s++) {
            if (sources.rows[s].base) {
                rows_copy(sources.rows[s], sources.tensors[s], sources.rows[s].base, layout, outputs, block);
            }
        }
        for (int index : sources.not_understood) {
            rows_mark_lost(layout, index, block);
        }
        for (uint32_t row = 0; row < n; row++) { // an id that no expert has is never passed on
            for (size_t l = 0; l < layout.layers.size(); l++) {
                CHECK(block.record(row)[layout.off_state + l] <= STATE_NOT_COMPUTED);
            }
        }
        for (const auto & source : attention_find(abi, handle, cfg)) {
            const auto host = [&](ggml_tensor * t) { return t && abi.is_host(t) ? (const char *) abi.data(t) : nullptr; };
            const char * probs = host(source.probs);
            const char * mask  = host(source.mask);
            for (int64_t row = 0; probs && (mask || !source.mask) && row < 3; row++) {
                if (attention_read(abi, source, probs, mask, row, row, cells, attention)) {
                    CHECK(attention.values.size() == (size_t) attention.n_head*attention.n_keys);
                }
            }
        }
    }
    return 0;
}
