// Who is this token? Sequence ids are not in the graph, so the public batch API is watched and the rows of
// a ubatch are matched to the tokens of the batch that it was cut from.

#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace moetrace {

enum output_kind : uint8_t { // what is asked of a token
    OUTPUT_LOGITS    = 1u << 0,
    OUTPUT_EMBEDDING = 1u << 1,
};

struct batch_entry {
    static constexpr int32_t UNKNOWN = INT32_MIN;

    int32_t  token       = -1;      // -1: a vector input
    int32_t  position    = UNKNOWN; // UNKNOWN: llama.cpp continues the sequence by itself
    int32_t  sequence    = -1;
    uint16_t n_sequences = 0;
    uint8_t  outputs     = 0;       // output_kind
    uint8_t  used        = 0;       // already matched to a row: a bit for each way of cutting
    bool     sure        = false;   // ... and nothing else could have been
};

// the contents of every llama_batch_ext that is alive
class batch_mirror {
  public:
    int32_t add(const void * batch, int32_t index, int32_t sequence, int32_t token);
    void add_sequence(const void * batch, int32_t index);
    void set_position(const void * batch, int32_t index, int32_t position);
    void set_output(const void * batch, int32_t index, uint8_t what, bool wanted);
    void clear(const void * batch);
    void free(const void * batch);
    const std::vector<batch_entry> * find(const void * batch) const;

  private:
    batch_entry * entry(const void * batch, int32_t index);

    std::unordered_map<const void *, std::vector<batch_entry>> batches;
};

// How llama.cpp cuts a batch into ubatches. It depends on the context's memory and does not show from outside,
// so each way gathers votes: one for every ubatch that it explains and another way does not. Within a batch each
// way goes on from its own ubatches, until one comes that it does not explain.
enum split_kind : uint8_t {
    SPLIT_SIMPLE,           // the next tokens, in batch order (unified KV cache)
    SPLIT_EQUAL_SEQUENTIAL, // equally many tokens of each of several sequences with rising ids (a stream each)
    SPLIT_EQUAL,            // the same, ids in any order (recurrent memory)
    SPLIT_SEQUENCE,         // tokens of one sequence
    SPLIT_N,
};

struct row_identity {
    int32_t  sequence    = -1;
    uint16_t n_sequences = 0;
    bool     uncertain   = false; // another way of cutting gives another sequence
    bool     found       = false;
    bool     vector      = false; // the batch gave a vector instead of a token
    int32_t  position    = batch_entry::UNKNOWN; // as the batch gave it
};

// Matches the ubatches of one batch, one after the other.
class batch_matcher {
  public:
    // The batch's tokens, to be filled in by the caller before begin().
    std::vector<batch_entry> &       entries()       { return batch; }
    const std::vector<batch_entry> & entries() const { return batch; }
    void begin();

    // tokens: nullptr if the graph has no token input; positions: nullptr if it has no positions.
    // Fills out[0..n).
    void match(const int32_t * tokens, const int32_t * positions, uint32_t n, std::vector<row_identity> & out);

  private:
    // A way explains rows as llama.cpp would have cut them, or only if it has cut off less than it could have.
    enum fit : uint8_t { FIT_NONE, FIT_LOOSE, FIT_WHOLE };

    fit  cut(split_kind kind, const int32_t * tokens, const int32_t * positions, uint32_t n, std::vector<uint32_t> & rows);
    bool match_cut(const int32_t * tokens, const int32_t * positions, uint32_t n, std::vector<row_identity> & out);
    void match_alone(const int32_t * tokens, const int32_t * positions, uint32_t n, std::vector<row_identity> & out);
    bool explains(const std::vector<uint32_t> & rows, const int32_t * tokens, const int32_t * positions) const;
    bool fits(const batch_entry & e, const int32_t * tokens, const int32_t * positions, uint32_t row) const;

    std::vector<batch_entry> batch;
    bool                     one_sequence = false;
    uint8_t                  alive = 0;          // ways that have explained the batch so far, a bit each
    int                      last  = 0;          // the way that was believed last
    uint32_t                 n_rows_max = 0;     // of any ubatch: llama.cpp cuts off as many if it can
    uint64_t                 votes[SPLIT_N] = {};

    // scratch, kept so that matching does not allocate
    std::vector<uint32_t>              candidate[SPLIT_N];
    std::vector<int32_t>               sequences;
    std::vector<std::vector<uint32_t>> members;
};

} // namespace moetrace
