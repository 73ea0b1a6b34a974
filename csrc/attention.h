// Attention weights: ragged rows, as many keys as a token may see, in the order of their positions.

#pragma once

#include "batch-watch.h"
#include "config.h"
#include "ggml-abi.h"

#include <vector>

namespace moetrace {

struct attention_source {
    int           layer   = -1;
    ggml_tensor * probs   = nullptr; // [n_kv, rows per stream, n_head, n_stream] f32, after the soft-max
    ggml_tensor * mask    = nullptr; // [n_kv, rows per stream, 1, n_stream] f32 or f16: -inf hides a cell
    ggml_tensor * k_idxs  = nullptr; // [n_tokens] i64: the cell that each token's key is written to
    int64_t       kv_size = 0;       // cells per stream
    int           group   = 0;       // layers of one KV cache share their k_idxs
};

// Attention nodes of a graph (none with flash attention), in graph order.
std::vector<attention_source> attention_find(ggml_abi & abi, ggml_cgraph * graph, const config & cfg);

// Which position lies in which cell of the KV cache.
class kv_cells {
  public:
    void write(int group, const int64_t * cells, const int32_t * positions, const std::vector<row_identity> & who);
    void shift(int32_t sequence, int32_t p0, int32_t p1, int32_t delta);
    void forget(); // after a state was restored: nobody knows any more
    int32_t position(int group, int64_t cell) const; // -1 unknown

  private:
    struct cell { int32_t position = -1; int32_t sequence = -1; };
    std::vector<std::vector<cell>> groups;
};

// One token's attention in one layer, put together: n_head x n_keys.
struct attention_row {
    std::vector<float> values;
    uint32_t n_head = 0;
    uint32_t n_keys = 0;
    int32_t  first_position = -1; // of the first key; the others follow without a gap. -1: keys are in cell order
};

// Reads one row. `probs` and `mask` hold the tensors' bytes, `cell` is where the row's own key lies. False if the
// shapes do not fit.
bool attention_read(const ggml_abi & abi, const attention_source & source, const char * probs, const char * mask,
    int64_t row, int64_t cell, const kv_cells & cells, attention_row & out);

} // namespace moetrace
