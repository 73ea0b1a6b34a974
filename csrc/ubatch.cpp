#include "ubatch.h"

#include <algorithm>
#include <climits>
#include <cstring>

namespace moetrace {

static graph_input input_find(const ggml_abi & abi, const ggml_tensor * t, int64_t n_least) {
    if (!t || abi.type(t) != TYPE_I32 || abi.ne(t)[0] < n_least || !abi.buffer(t)) {
        return {};
    }
    return { t, abi.is_host(t) ? (const int32_t *) abi.data(t) : nullptr, abi.ne(t)[0] };
}

// an input's numbers, fetched into `buffer` if they are not in host memory; nullptr if the graph does not have it
static const int32_t * input_read(const ggml_abi & abi, const graph_input & input, std::vector<int32_t> & buffer) {
    if (input.host || !input.t) {
        return input.host;
    }
    buffer.resize((size_t) input.n);
    abi.tensor_get(input.t, buffer.data(), 0, (size_t) input.n*4);
    return buffer.data();
}

// which rows of the ubatch are outputs; no ids if the graph does not say, and then all are
static output_rows outputs_read(tracer_env & env, context_trace & c, const graph_trace & g) {
    static const int32_t none = 0;
    if (!g.moe.out_ids) {
        return {};
    }
    return { g.out_ids.t ? input_read(env.abi, g.out_ids, c.out_ids) : &none, g.out_ids.n };
}

static void heads_fill(context_trace & c, const int32_t * tokens, const int32_t * positions) {
    const int64_t now = (int64_t) clock_ns();
    const uint32_t n = c.block.n_rows;
    uint64_t n_unidentified = 0;
    for (uint32_t row = 0; row < n; row++) {
        const row_identity & who = c.identities[row];
        record_head * head = c.block.head(row);
        head->time_ns     = now;
        head->step        = c.n_steps;
        head->batch       = c.n_batches;
        head->token       = tokens && !who.vector ? tokens[row] : -1; // a vector leaves the token input as it was
        // a recurrent model has no position input; the batch had one
        head->position    = positions ? positions[row] : who.position == batch_entry::UNKNOWN ? -1 : who.position;
        head->sequence    = who.found ? who.sequence : -1;
        head->kind        = RECORD_ROW;
        head->n_sequences = who.n_sequences;
        head->row         = row;
        head->flags       = (who.uncertain ? ROW_SEQUENCE_UNCERTAIN : 0u) | (who.found ? 0u : ROW_UNIDENTIFIED) |
            (who.vector ? ROW_EMBEDDING_INPUT : 0u) | (c.encode ? ROW_ENCODE : 0u) | (c.trial ? ROW_TRIAL : 0u) | (c.outputs.ids ? 0u : ROW_OUTPUT) |
            (c.patched && c.rows[row].touched ? ROW_INTERVENED : 0u);
        n_unidentified += !who.found;
    }
    for (int64_t i = 0; c.outputs.ids && i < c.outputs.n; i++) {
        const int32_t row = c.outputs.ids[i];
        if (row >= 0 && row < (int32_t) n) {
            c.block.head((uint32_t) row)->flags |= ROW_OUTPUT;
        }
    }
    c.count(COUNT_ROWS_UNIDENTIFIED, n_unidentified);
}

// which tensors of the graph go where in the context's records
static void graph_bind(tracer_env & env, sched_trace & s, graph_trace & g) {
    context_trace & c = *s.context;
    g.sources.make(env.abi, g.graph, g.moe, c.layout, env.cfg);
    g.bound_to = &c;
    g.has_patches = false;
    g.tokens    = input_find(env.abi, g.moe.inp_tokens, g.moe.n_tokens);
    g.positions = input_find(env.abi, g.moe.inp_pos,    g.moe.n_tokens);
    g.out_ids   = input_find(env.abi, g.moe.out_ids,    1);
    s.is_async  = env.abi.sched_get_n_backends(s.sched) > 1;
    g.attention = env.cfg.channels & CHANNEL_ATTENTION ? attention_find(env.abi, g.graph, env.cfg) : std::vector<attention_source>();
    if (c.readback.size() < g.sources.scratch_bytes) {
        c.readback.resize(g.sources.scratch_bytes);
    }
}

// which cells of the KV cache the ubatch's keys are written to
static void cells_follow(tracer_env & env, context_trace & c, const graph_trace & g) {
    const uint32_t n = c.block.n_rows;
    for (auto & list : c.cell_idxs) {
        list.clear();
    }
    for (const auto & source : g.attention) {
        if (c.cell_idxs.size() <= (size_t) source.group) {
            c.cell_idxs.resize((size_t) source.group + 1);
        }
        auto & list = c.cell_idxs[(size_t) source.group];
        if (!list.empty() || !source.k_idxs || env.abi.ne(source.k_idxs)[0] != n || !env.abi.buffer(source.k_idxs)) {
            continue;
        }
        list.resize(n);
        env.abi.tensor_get(source.k_idxs, list.data(), 0, (size_t) n*8);
        const int32_t * positions = input_read(env.abi, g.positions, c.positions);
        c.cells.write(source.group, list.data(), positions, c.identities);
    }
}

static void intervention_refuse(context_trace & c, uint32_t number, const std::string & why) {
    say("intervention " + std::to_string(number) + " is refused: " + why);
    ring_header * h = c.ring.header();
    h->intervention_refused.store(0, std::memory_order_relaxed); // nobody reads a reason that is being written
    memset(h->intervention_why, 0, sizeof(h->intervention_why));
    memcpy(h->intervention_why, why.data(), std::min(why.size(), sizeof(h->intervention_why) - 1));
    h->intervention_refused.store(number, std::memory_order_release);
}

static void intervention_enter(context_trace & c, uint32_t number) {
    c.ring.header()->intervention_active.store(number, std::memory_order_release);
    context_event_push(c, { EVENT_INTERVENE, -1, 0, 0, (int32_t) number });
}

// looks at the control word; one that is refused leaves in force what was
static void intervention_look(tracer_env & env, sched_trace & s, context_trace & c) {
    const uint32_t wanted = c.ring.header()->intervention.load(std::memory_order_acquire);
    if (wanted == c.intervention_seen) {
        return;
    }
    c.intervention_seen = wanted;
    intervention next;
    std::string error;
    const std::string path = env.cfg.dir + "/interventions/" + std::to_string(wanted) + ".bin";
    if (wanted && (!next.read(path, error) || !next.fits(router_shapes(s.shape), error))) {
        intervention_refuse(c, wanted, error);
        return;
    }
    c.rules = std::move(next);
    intervention_enter(c, wanted);
}

// which rows the rules are about; without any the graph runs as it would
static void intervention_begin(tracer_env & env, context_trace & c, graph_trace & g, const int32_t * positions) {
    c.rows.assign(c.identities.size(), intervened_row());
    uint64_t n_touched = 0;
    for (size_t i = 0; i < c.rows.size(); i++) {
        const row_identity & who = c.identities[i];
        intervened_row & row = c.rows[i];
        row.sequence = who.found ? who.sequence : -1;
        row.position = positions ? positions[i] : who.position;
        row.touched  = c.rules.touches(row.sequence, row.position);
        n_touched   += row.touched;
    }
    if (n_touched == 0) {
        return;
    }
    if (!g.has_patches) {
        g.patches.make(env.abi, g.graph, g.moe);
        g.has_patches = true;
    }
    if (const char * why = g.patches.begin(c.rules, c.rows, c.outputs)) {
        intervention_refuse(c, c.intervention_seen, why);
        c.rules.clear();
        intervention_enter(c, 0);
        return;
    }
    c.patched = &g;
    c.count(COUNT_ROWS_INTERVENED, n_touched);
}

// Before the graph runs: who its rows are. False if it is not recorded.
bool ubatch_begin(tracer_env & env, sched_trace & s, graph_trace & g) {
    context_trace & c = *s.context;
    const uint32_t n = (uint32_t) g.moe.n_tokens;
    c.count(COUNT_GRAPHS);
    if (g.moe.layers.empty() || n == 0) {
        c.count(COUNT_ROWS_UNROUTED, n);
        return false;
    }
    if (g.warmup || c.warmup) {
        c.count(COUNT_ROWS_WARMUP, n);
        return false;
    }
    if (c.state == context_state::waiting) {
        const uint64_t start = clock_ns();
        context_open(env, s, c);
        s.setup_ns = clock_ns() - start;
    }
    if (c.state != context_state::recording) {
        return false;
    }
    if (g.bound_to != &c) {
        graph_bind(env, s, g);
    }
    const bool paused = c.ring.paused();
    if (paused != c.was_paused) {
        context_event_push(c, { paused ? EVENT_PAUSE : EVENT_RESUME, -1, 0, (int32_t) std::min<uint64_t>(c.n_unrecorded, INT_MAX), 0 });
        c.was_paused   = paused;
        c.n_unrecorded = 0;
    }
    const int32_t * tokens    = input_read(env.abi, g.tokens, c.tokens);
    const int32_t * positions = input_read(env.abi, g.positions, c.positions);
    if (c.in_batch) { // also while paused: a later ubatch of the batch may be recorded
        c.matcher.match(tokens, positions, n, c.identities);
    } else {
        c.identities.assign(n, row_identity());
    }
    c.outputs = outputs_read(env, c, g);
    intervention_look(env, s, c);
    if (!c.rules.is_empty() && !c.trial) {
        intervention_begin(env, c, g, positions); // also while paused
    }
    if (paused) {
        c.count(COUNT_ROWS_PAUSED, n);
        c.n_unrecorded += n;
        return false;
    }
    if (!c.block.reset(c.layout, n, !g.sources.covers_all)) {
        c.count(COUNT_ROWS_PRODUCED, n);
        c.count(COUNT_ROWS_LOST_ERROR, n);
        c.serial += n;
        return false;
    }
    heads_fill(c, tokens, positions);
    for (int index : g.sources.not_understood) {
        rows_mark_lost(c.layout, index, c.block);
    }
    if (!g.attention.empty()) {
        cells_follow(env, c, g);
    }
    return true;
}

// the bytes of a tensor, wherever it is
static const char * tensor_bytes(const ggml_abi & abi, const ggml_tensor * t, std::vector<char> & buffer) {
    if (!t || abi.is_host(t)) {
        return t ? (const char *) abi.data(t) : nullptr;
    }
    buffer.resize(abi.span(t));
    abi.tensor_get(t, buffer.data(), 0, buffer.size());
    return buffer.data();
}

static void attention_push(tracer_env & env, context_trace & c, const attention_source & source) {
    const char * probs = tensor_bytes(env.abi, source.probs, c.attention_bytes);
    static thread_local std::vector<char> mask_bytes;
    const char * mask = tensor_bytes(env.abi, source.mask, mask_bytes);
    const auto & idxs = c.cell_idxs[(size_t) source.group];
    record_head * head = (record_head *) c.event_record.data();
    float * payload = (float *) (c.event_record.data() + c.layout.off_attention);
    for (uint32_t row = 0; row < c.block.n_rows; row++) {
        attention_row & a = c.attention;
        if (!attention_read(env.abi, source, probs, mask, row, row < idxs.size() ? idxs[row] : -1, c.cells, a)) {
            c.count(COUNT_ATTENTION_LOST);
            continue;
        }
        const uint32_t n = (uint32_t) a.values.size();
        for (uint32_t at = 0; at < n; at += ATTENTION_PIECE) {
            const record_head * of_row = c.block.head(row);
            head->serial      = c.serial + row;
            head->time_ns     = of_row->time_ns;
            head->step        = c.n_steps;
            head->batch       = c.n_batches;
            head->token       = source.layer;
            head->position    = a.first_position;
            head->sequence    = (int32_t) a.n_keys;
            head->kind        = RECORD_ATTENTION;
            head->n_sequences = (uint16_t) a.n_head;
            head->flags       = 0;
            head->row         = at;
            head->arg0        = (int32_t) std::min(ATTENTION_PIECE, n - at);
            head->arg1        = 0;
            memcpy(payload, a.values.data() + at, (size_t) head->arg0*4);
            if (!c.ring.push(head)) {
                c.count(COUNT_ATTENTION_LOST);
            }
        }
    }
}

// one source, while the graph stands still
static void source_read(tracer_env & env, context_trace & c, const row_source & source, const source_tensor & tensor) {
    const char * base = source.base;
    if (!base) {
        if (const size_t bytes = env.abi.span(tensor.t)) {
            env.abi.tensor_get(tensor.t, c.readback.data() + tensor.scratch, 0, bytes);
        }
        base = (const char *) c.readback.data() + tensor.scratch;
    }
    rows_copy(env.abi, source, tensor, base, c.layout, c.outputs, c.block);
}

// starts reading everything that is not in host memory, and waits for it
static void sources_fetch(tracer_env & env, sched_trace & s, const graph_sources & sources) {
    context_trace & c = *s.context;
    const uint64_t start = clock_ns();
    for (size_t i = 0; i < sources.rows.size(); i++) {
        const source_tensor & tensor = sources.tensors[i];
        const size_t bytes = sources.rows[i].base ? 0 : env.abi.span(tensor.t);
        if (bytes == 0) {
            continue;
        }
        if (ggml_backend * backend = env.abi.sched_get_tensor_backend(s.sched, env.abi.root(tensor.t))) {
            env.abi.tensor_get_async(backend, tensor.t, c.readback.data() + tensor.scratch, 0, bytes);
        } else {
            env.abi.tensor_get(tensor.t, c.readback.data() + tensor.scratch, 0, bytes);
        }
    }
    env.abi.sched_synchronize(s.sched);
    c.count(COUNT_SYNC_NS, clock_ns() - start);
}

void ubatch_read(tracer_env & env, sched_trace & s, const graph_trace & g) {
    context_trace & c = *s.context;
    const graph_sources & sources = g.sources;
    if (sources.scratch_bytes) {
        sources_fetch(env, s, sources);
    } else {
        if (s.is_async) {
            env.abi.sched_synchronize(s.sched);
        }
        // every layer's result lies somewhere else and was written long ago: fetch them all at once
        for (const auto & source : sources.rows) {
            __builtin_prefetch(source.base);
        }
    }
    for (size_t i = 0; i < sources.rows.size(); i++) {
        const row_source & source = sources.rows[i];
        const char * base = source.base ? source.base : (const char *) c.readback.data() + sources.tensors[i].scratch;
        rows_copy(env.abi, source, sources.tensors[i], base, c.layout, c.outputs, c.block);
    }
}

void ubatch_read_node(tracer_env & env, context_trace & c, const ggml_tensor * node, int first, const attention_source * attention) {
    const graph_sources & sources = c.running->sources;
    for (size_t i = (size_t) first; first >= 0 && i < sources.rows.size() && sources.tensors[i].ask == node; i++) {
        source_read(env, c, sources.rows[i], sources.tensors[i]);
    }
    if (attention) {
        attention_push(env, c, *attention);
    }
}

void ubatch_drop(context_trace & c, bool computed) {
    const uint32_t n = c.block.n_rows;
    context_event_push(c, { EVENT_FAILED, -1, 0, (int32_t) n, 0 });
    if (computed) {
        c.count(COUNT_ROWS_PRODUCED, n);
        c.count(COUNT_ROWS_LOST_ERROR, n);
        c.serial += n;
    }
}

void ubatch_commit(context_trace & c) {
    const uint32_t n = c.block.n_rows;
    uint64_t n_committed = 0;
    for (uint32_t row = 0; row < n; row++) {
        c.block.head(row)->serial = c.serial++;
        n_committed += c.ring.push(c.block.record(row));
    }
    c.count(COUNT_ROWS_PRODUCED, n);
    c.count(COUNT_ROWS_COMMITTED, n_committed);
    c.count(COUNT_ROWS_LOST_FULL, n - n_committed);
}

void graph_keep(tracer_env & env, const moe_graph & moe, ggml_cgraph * graph) {
    if (collector_choose(env.cfg) != COLLECTOR_TAP) {
        return;
    }
    // marked as outputs, tensors keep their memory to the end of the graph
    const auto keep = [&](ggml_tensor * t) {
        if (t) {
            env.abi.set_output(t);
            env.abi.set_output(env.abi.root(t)); // the allocator looks at the owner of the memory
        }
    };
    for (const auto & layer : moe.layers) {
        if (!env.cfg.has_layer(layer.layer)) {
            continue;
        }
        keep(layer.ids);
        if (env.cfg.channels & CHANNEL_WEIGHTS)    { keep(layer.weights); }
        if (env.cfg.channels & CHANNEL_LOGITS)     { keep(layer.logits); }
        if (env.cfg.channels & CHANNEL_SCORES)     { keep(layer.choice.scores); }
        if (env.cfg.channels & CHANNEL_GATE_INPUT) { keep(layer.gate_input); }
    }
    if (!env.cfg.tensors.empty()) {
        tensors_for_each(env.abi, graph, env.cfg, keep);
    }
}

bool graph_is_warmup(const moe_graph & moe) {
    return !moe.layers.empty() && std::all_of(moe.layers.begin(), moe.layers.end(), [](const moe_layer & layer) {
        return layer.k == layer.n_expert;
    });
}

} // namespace moetrace
