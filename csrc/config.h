// What to record, as the command line, Python or the environment asked for it.

#pragma once

#include "record.h"

#include <string>
#include <utility>
#include <vector>

namespace moetrace {

enum channel : uint32_t {
    CHANNEL_EXPERTS    = 1u << 0,
    CHANNEL_WEIGHTS    = 1u << 1,
    CHANNEL_LOGITS     = 1u << 2,
    CHANNEL_SCORES     = 1u << 3,
    CHANNEL_GATE_INPUT = 1u << 4,
    CHANNEL_ATTENTION  = 1u << 5,
    CHANNEL_OUTPUTS    = 1u << 6, // norms of what each expert made
};

enum collector_kind : uint32_t {
    COLLECTOR_AUTO,
    COLLECTOR_TAP,      // tensors are kept alive and read once, after the graph
    COLLECTOR_CALLBACK, // tensors are read as they are computed
};

struct config {
    std::string              dir;      // the trace folder; empty: do nothing
    uint64_t                 dir_inode = 0; // of that folder when tracing began; 0: it was not there
    uint32_t                 channels  = CHANNEL_EXPERTS | CHANNEL_WEIGHTS;
    std::vector<std::string> tensors;  // glob patterns of named tensors
    std::vector<std::pair<int, int>> layers; // closed ranges; empty: all
    collector_kind           collector = COLLECTOR_AUTO;
    ring_on_full             on_full   = RING_BLOCK;
    uint64_t                 ring_bytes = 16u << 20;
    uint64_t                 block_ns   = 10'000'000'000ull;
    bool                     paused     = false;
    uint32_t                 intervention = 0; // in force from the beginning; 0: none
    bool                     intervene_all = false; // in drafts' contexts too

    bool has_layer(int layer) const;
};

// "key=value" lines; the keys are trace, capture, layers, collector, on_full, ring_size, block_ms, paused,
// intervention.
// On a bad value `error` says which and false is returned.
bool config_parse(const std::string & text, config & out, std::string & error);

// the same keys from MOETRACE_TRACE, MOETRACE_CAPTURE, ...
std::string config_from_env();

const char * channel_name(channel c);

} // namespace moetrace
