// One ubatch: from the tensors of its graph to rows in the ring.

#pragma once

#include "context.h"

namespace moetrace {

// Before the scheduler allocates a graph: lets the tensors that the tap will read live to its end. What can be moved when
// the graph is allocated is given in `to_place`, and nothing else is done. For the rest nodes are added to the graph that
// compute nothing and have the tensors as sources; `moe` knows of them then.
void graph_keep(tracer_env & env, sched_trace & s, moe_graph & moe, ggml_cgraph * graph, std::vector<ggml_tensor *> & to_place);

// When the scheduler has allocated a graph: moves what is in `to_place` into memory of our own. What cannot
// be moved, or not without letting a backend fuse what it would not, stays in `to_place`: it must be read by callback.
void graph_place(tracer_env & env, sched_trace & s, graph_trace & g);

// The scheduler goes, and with it what was placed for its graphs.
void slabs_free(const tracer_env & env, sched_trace & s);

// Whether every layer uses all its experts.
bool graph_is_warmup(const moe_graph & moe);

// Before the graph runs: whose its rows are. False if it is not recorded.
bool ubatch_begin(tracer_env & env, sched_trace & s, graph_trace & g);

// After a node was computed (callback collector); `first` is its first source, or -1.
void ubatch_read_node(tracer_env & env, context_trace & c, const ggml_tensor * node, int first, const attention_source * attention);

// After the graph ran (tap collector): reads everything that was kept and writes the rows, at once on the CPU alone. Of
// devices it starts the copies, and the rest is left to ubatch_finish: the host itself will wait for its logits.
void ubatch_read(tracer_env & env, sched_trace & s, graph_trace & g);

// Writes the rows that are pending, if any. `finished`: the devices have. Call it before anything else happens in the
// context, and before its graph or scheduler goes.
void ubatch_finish(const tracer_env & env, context_trace & c, bool finished);

// Rows that are pending will not be read.
void ubatch_forget(context_trace & c);

// The block's rows were computed, and will not be written.
void ubatch_lose(context_trace & c);

// Writes the rows into the ring.
void ubatch_commit(context_trace & c);

// The ubatch failed: its rows are lost, or (not `computed`) never were.
void ubatch_drop(context_trace & c, bool computed);

} // namespace moetrace
