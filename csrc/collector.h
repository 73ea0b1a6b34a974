// From the tensors of one graph to rows of records: the layout of a record, and the copying.

#pragma once

#include "config.h"
#include "moe-plan.h"
#include "record.h"
#include "ring.h"

#include <map>
#include <string>
#include <vector>

namespace moetrace {

// The name of the nodes that keep tensors alive to the end of a graph (ubatch.h).
constexpr char KEEPER_NAME[] = "moetrace.keep";

bool is_wanted_tensor(const config & cfg, const char * name);

// For each layer the node after which its ids are read while the graph runs; the graph must be allocated.
std::vector<ggml_tensor *> ids_asks_find(ggml_abi & abi, ggml_backend_sched * sched, ggml_cgraph * graph, const moe_graph & moe);

// What the graphs of one context have shown so far; the record's layout is made from it.
struct model_shape {
    struct layer_shape {
        int     n_expert = 0;
        int     k        = 0;
        int     n_embd   = 0; // of the gate input
        int     n_group  = 0;
        int     n_group_used = 0;
        bool    selects  = false; // by scores, so that interventions can change its choice
        uint8_t matrices = 0;
        bool    has[7]   = {}; // by channel bit: experts, weights, logits, scores, gate_input, attention, outputs
    };
    std::map<int, layer_shape>     layers;
    std::map<std::string, int64_t> tensors; // named tensor -> values per token; -1: not one row per token

    // Takes in a graph. Returns false if its layers route another number of experts than seen before:
    // llama.cpp's warm-up.
    bool learn(ggml_abi & abi, ggml_cgraph * graph, const moe_graph & moe, const config & cfg);
};

// Where each captured value of a token goes within its record.
struct row_layout {
    std::vector<ring_field> fields;
    std::vector<int>        layers;   // llama.cpp's layer numbers, ascending
    std::vector<int>        n_expert; // per layer
    std::vector<int>        k;        // per layer
    std::vector<uint8_t>    matrices; // per layer
    std::vector<std::string> tensors; // names, in the order of their fields
    std::vector<int64_t>     tensor_widths; // values per token of each
    std::vector<std::string> refused; // named tensors that have no row per token
    int      k_max    = 0;
    int      e_max    = 0;
    int      n_embd   = 0;
    uint32_t id_bytes = 1;
    uint32_t stride   = 0;
    uint64_t n_values = 0; // in all fields but the state
    uint32_t off_state = 0, off_experts = 0, off_weights = 0, off_logits = 0, off_scores = 0, off_gate_input = 0,
             off_outputs = 0, off_attention = 0; // the last a field of attention records only
    std::vector<uint32_t> off_tensors;
    std::vector<uint8_t>  blank; // a record in which nothing was computed

    void make(const model_shape & shape, const config & cfg);
    int  layer_index(int layer) const; // -1 if not recorded
};

// One tensor whose rows are copied into one field. All that copying needs is kept here, packed: by the end of a
// graph nothing of the tensors is in the cache any more, and every line touched costs a memory access.
struct row_source {
    const char * base    = nullptr; // its bytes in host memory; nullptr: elsewhere
    uint32_t     step    = 0;       // bytes from row to row
    uint32_t     n_rows  = 0;
    uint32_t     width   = 0;       // values per row
    uint32_t     offset  = 0;       // of the field within the record
    int32_t      index   = -1;      // of the layer; -1 for a named tensor
    uint16_t     element = 0;       // bytes from value to value
    enum : uint8_t {
        VALUES, // as they are
        PLAIN,  // the same, where rows are contiguous f32
        IDS,    // of experts
        NORMS,  // of the vectors that the values are
    } what = VALUES;
};
static_assert(sizeof(row_source) == 32, "two to a cache line");

// The tensor of a source, for what is not the plain case. Its shape is kept, too: rows of devices are copied when the
// host may have built the next graph where this one was.
struct source_tensor {
    ggml_tensor * t       = nullptr;
    int32_t       type    = 0;
    uint32_t      ne[3]   = { 1, 1, 1 }; // below the row dimension
    size_t        nb[3]   = {};
    ggml_tensor * ask     = nullptr; // node after which it may be read while the graph runs
    bool          in_slab = false;   // it comes with its slab
    int           row_dim = 1;       // which dimension counts rows
    size_t        scratch = 0;       // offset in the readback buffer, if not in host memory
};

// Where tensors of devices are copied to: memory that a device copies into without making anybody wait, if there is a
// device that gives such.
class readback_buffer {
  public:
    readback_buffer() = default;
    ~readback_buffer();
    readback_buffer(const readback_buffer &) = delete;
    readback_buffer & operator=(const readback_buffer &) = delete;

    void   reserve(const ggml_abi & abi, ggml_backend_sched * sched, size_t size);
    char * data() { return base; }

  private:
    void release();

    char *            base = nullptr;
    size_t            size = 0;
    std::vector<char> plain;
    ggml_backend_buffer * buffer = nullptr;
    void           (* free)(ggml_backend_buffer *) = nullptr;
};

// Memory of our own, on a device or the host, for the results that are read: they lie side by side there, so that one
// copy fetches them, or few cache lines. llama.cpp's own memory is laid out before they move there, as if they did not:
// backends fuse nodes, or do not, by where these lie.
struct result_slab {
    ggml_backend *        backend = nullptr;
    void *                type    = nullptr; // of the buffer
    ggml_backend_buffer * buffer  = nullptr;
    char *                base    = nullptr;
    size_t                size    = 0;
    ggml_tensor *         whole   = nullptr; // all of it, as bytes in 32-bit words
    std::vector<uint64_t> arena;             // memory of that tensor
};

// what a graph has in a slab
struct slab_use {
    const result_slab * slab = nullptr;
    size_t bytes   = 0;
    size_t scratch = 0; // where they are copied to, in the readback buffer
};

// Everything to read from one graph.
struct graph_sources {
    std::vector<row_source>    rows;    // of one ask node: neighbours
    std::vector<source_tensor> tensors; // of the same index
    std::vector<std::pair<const ggml_tensor *, uint32_t>> asks; // sorted by address: node -> first source
    std::vector<int>        not_understood; // layer indices whose routing cannot be read
    std::vector<slab_use>   slabs;
    size_t scratch_bytes = 0; // of the tensors that are not in host memory
    bool   covers_all = false; // every value of every row's record is written: no need to begin with blank ones

    // The graph must be allocated on the scheduler.
    void make(ggml_abi & abi, ggml_backend_sched * sched, ggml_cgraph * graph, const moe_graph & moe, const row_layout & layout, const config & cfg,
        const std::vector<slab_use> & placed = {});
    // index of the first source to read at this node, or -1
    int  find(const ggml_tensor * node) const;
};

// Calls use(node) for every node that a tensor pattern of the configuration names.
template <typename F>
void tensors_for_each(ggml_abi & abi, ggml_cgraph * graph, const config & cfg, F && use) {
    const int n_nodes = abi.graph_n_nodes(graph);
    for (int i = 0; i < n_nodes; i++) {
        ggml_tensor * node = abi.graph_node(graph, i);
        if (is_wanted_tensor(cfg, abi.name(node))) {
            use(node);
        }
    }
}

// The rows of one ubatch while they are put together.
struct row_block {
    std::vector<uint8_t> bytes;
    uint32_t n_rows = 0;
    uint32_t stride = 0;

    // n records, blank ones if asked for; false if there is no memory for them
    bool reset(const row_layout & layout, uint32_t n, bool blank);
    uint8_t *     record(uint32_t row)       { return bytes.data() + (size_t) row*stride; }
    record_head * head(uint32_t row)         { return (record_head *) record(row); }
};

// Where the rows of a tensor that has fewer than the ubatch belong: output row -> ubatch row.
struct output_rows {
    const int32_t * ids = nullptr; // nullptr: the graph does not say
    int64_t n = 0;
};

// Copies a source's rows into the block. `base` holds the tensor's bytes (its strides apply). Rows that cannot be
// placed are marked lost.
void rows_copy(const row_source & source, const source_tensor & tensor, const char * base,
    const row_layout & layout, const output_rows & outputs, row_block & block);

void rows_mark_lost(const row_layout & layout, int index, row_block & block);

} // namespace moetrace
