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
    const int32_t * ids = g.out_ids.t ? input_read(env.abi, g.out_ids, c.out_ids) : &none;
    if (ids != &none && ids != c.out_ids.data()) {
        c.out_ids.assign(ids, ids + g.out_ids.n); // the host may set the next ubatch's before this one's rows are read
        ids = c.out_ids.data();
    }
    return { ids, g.out_ids.n };
}

// whether the host has sampled from the position before
static bool is_generated(const context_trace & c, int32_t sequence, int32_t position) {
    return sequence >= 0 && (size_t) sequence < c.sampled.size() && position > 0 && c.sampled[(size_t) sequence] == position - 1;
}

static void heads_fill(context_trace & c, const int32_t * tokens, const int32_t * positions) {
    const recording & rec = *c.rec;
    const int64_t now = (int64_t) clock_ns();
    const uint32_t n = c.block.n_rows;
    uint64_t n_unidentified = 0;
    for (uint32_t row = 0; row < n; row++) {
        const row_identity & who = c.identities[row];
        record_head * head = c.block.head(row);
        head->time_ns     = now;
        head->step        = rec.first_step + c.n_steps;
        head->batch       = rec.first_batch + c.n_batches;
        head->token       = tokens && !who.vector ? tokens[row] : -1; // a vector leaves the token input as it was
        // a recurrent model has no position input; the batch had one
        head->position    = positions ? positions[row] : who.position == batch_entry::UNKNOWN ? -1 : who.position;
        head->sequence    = who.found ? who.sequence : -1;
        head->kind        = RECORD_ROW;
        head->n_sequences = who.n_sequences;
        head->row         = row;
        head->arg0        = rec.task_of(head->sequence);
        head->arg1        = (int32_t) rec.n_events;
        head->flags       = (who.uncertain ? ROW_SEQUENCE_UNCERTAIN : 0u) | (who.found ? 0u : ROW_UNIDENTIFIED) |
            (who.vector ? ROW_EMBEDDING_INPUT : 0u) | (c.encode ? ROW_ENCODE : 0u) | (c.trial ? ROW_TRIAL : 0u) | (c.outputs.ids ? 0u : ROW_OUTPUT) |
            (c.patched && c.rows[row].touched ? ROW_INTERVENED : 0u) | (is_generated(c, head->sequence, head->position) ? ROW_GENERATED : 0u);
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

// Whether what is to be kept is, in the order in which the nodes are computed: what comes after the nodes that keep it
// may be given its memory.
static bool is_kept(ggml_abi & abi, const graph_trace & g) {
    bool keeps = false;
    for (int i = g.moe.n_nodes - g.moe.n_keepers; i < g.moe.n_nodes; i++) {
        keeps = strcmp(abi.name(abi.graph_node(g.graph, i)), KEEPER_NAME) == 0;
        if (!keeps) {
            return false;
        }
    }
    return keeps || g.moe.n_keepers == 0;
}

// which tensors of the graph go where in the context's records
static void graph_bind(tracer_env & env, sched_trace & s, graph_trace & g) {
    context_trace & c = *s.context;
    g.sources.make(env.abi, s.sched, g.graph, g.moe, c.rec->layout, env.cfg, g.placed);
    g.bound_to = c.number;
    g.by_callback = collector_choose(env.cfg) == COLLECTOR_CALLBACK || g.adopted || !g.to_place.empty() || !is_kept(env.abi, g);
    g.has_patches = false;
    g.tokens    = input_find(env.abi, g.moe.inp_tokens, g.moe.n_tokens);
    g.positions = input_find(env.abi, g.moe.inp_pos,    g.moe.n_tokens);
    g.out_ids   = input_find(env.abi, g.moe.out_ids,    1);
    s.is_async  = env.abi.sched_get_n_backends(s.sched) > 1;
    g.attention = env.cfg.channels & CHANNEL_ATTENTION ? attention_find(env.abi, g.graph, env.cfg) : std::vector<attention_source>();
    c.readback.reserve(env.abi, s.sched, g.sources.scratch_bytes);
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
    ring_header * h = c.rec->ring.header();
    h->intervention_refused.store(0, std::memory_order_relaxed); // nobody reads a reason that is being written
    memset(h->intervention_why, 0, sizeof(h->intervention_why));
    memcpy(h->intervention_why, why.data(), std::min(why.size(), sizeof(h->intervention_why) - 1));
    h->intervention_refused.store(number, std::memory_order_release);
}

static void intervention_enter(context_trace & c, uint32_t number) {
    c.rec->ring.header()->intervention_active.store(number, std::memory_order_release);
    context_event_push(c, { EVENT_INTERVENE, -1, 0, 0, (int32_t) number });
}

// looks at the control word; one that is refused leaves in force what was
static void intervention_look(tracer_env & env, sched_trace & s, context_trace & c) {
    const uint32_t wanted = c.rec->ring.header()->intervention.load(std::memory_order_acquire);
    if (wanted == c.rec->intervention_seen) {
        return;
    }
    c.rec->intervention_seen = wanted;
    intervention next;
    std::string error;
    const std::string path = env.cfg.dir + "/interventions/" + std::to_string(wanted) + ".bin";
    if (wanted && (!next.read(path, error) || !next.fits(router_shapes(s.shape), error))) {
        intervention_refuse(c, wanted, error);
        return;
    }
    c.rec->rules = std::move(next);
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
        row.touched  = c.rec->rules.touches(row.sequence, row.position);
        n_touched   += row.touched;
    }
    if (n_touched == 0) {
        return;
    }
    if (!g.has_patches) {
        g.patches.make(env.abi, g.graph, g.moe);
        g.has_patches = true;
    }
    if (const char * why = g.patches.begin(c.rec->rules, c.rows, c.outputs)) {
        intervention_refuse(c, c.rec->intervention_seen, why);
        c.rec->rules.clear();
        intervention_enter(c, 0);
        return;
    }
    c.patched = &g;
    c.count(COUNT_ROWS_INTERVENED, n_touched);
}

// rows that were computed and could not be read
static void rows_lose(context_trace & c, uint32_t n) {
    c.count(COUNT_ROWS_PRODUCED, n);
    c.count(COUNT_ROWS_LOST_ERROR, n);
    if (c.rec) {
        c.rec->serial += n;
    }
}

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
    recording & rec = *c.rec;
    if (g.bound_to != c.number) {
        graph_bind(env, s, g);
    }
    context_inbox_take(c);
    context_pause_look(c);
    const bool paused = rec.was_paused;
    const int32_t * tokens    = input_read(env.abi, g.tokens, c.tokens);
    const int32_t * positions = input_read(env.abi, g.positions, c.positions);
    if (c.in_batch) { // also while paused: a later ubatch of the batch may be recorded
        c.matcher.match(tokens, positions, n, c.identities);
    } else {
        c.identities.assign(n, row_identity());
    }
    for (uint32_t row = 0; row < n && positions; row++) {
        if (c.identities[row].found) {
            context_position(c, c.identities[row].sequence, positions[row]);
        }
    }
    c.outputs = outputs_read(env, c, g);
    intervention_look(env, s, c);
    if (!rec.rules.is_empty() && !c.trial) {
        intervention_begin(env, c, g, positions); // also while paused
    }
    if (paused) {
        c.count(COUNT_ROWS_PAUSED, n);
        rec.n_unrecorded += n;
        return false;
    }
    if (!c.block.reset(rec.layout, n, !g.sources.covers_all)) {
        rows_lose(c, n);
        return false;
    }
    heads_fill(c, tokens, positions);
    for (int index : g.sources.not_understood) {
        rows_mark_lost(rec.layout, index, c.block);
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
    std::lock_guard<std::mutex> lock(c.mutex);
    if (!c.rec || !c.rec->ring.is_open()) {
        return;
    }
    recording & rec = *c.rec;
    record_head * head = (record_head *) rec.event_record.data();
    float * payload = (float *) (rec.event_record.data() + rec.layout.off_attention);
    for (uint32_t row = 0; row < c.block.n_rows; row++) {
        attention_row & a = c.attention;
        if (!attention_read(env.abi, source, probs, mask, row, row < idxs.size() ? idxs[row] : -1, c.cells, a)) {
            c.count(COUNT_ATTENTION_LOST);
            continue;
        }
        const uint32_t n = (uint32_t) a.values.size();
        for (uint32_t at = 0; at < n; at += ATTENTION_PIECE) {
            const record_head * of_row = c.block.head(row);
            head->serial      = rec.serial + row;
            head->time_ns     = of_row->time_ns;
            head->step        = of_row->step;
            head->batch       = of_row->batch;
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
            if (!rec.ring.push(head)) {
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
    rows_copy(source, tensor, base, c.rec->layout, c.outputs, c.block);
}

// starts copying everything that is not in host memory
static void sources_fetch(tracer_env & env, sched_trace & s, const graph_sources & sources) {
    context_trace & c = *s.context;
    for (const slab_use & use : sources.slabs) {
        env.abi.tensor_get_async(use.slab->backend, use.slab->whole, c.readback.data() + use.scratch, 0, use.bytes);
        c.count(COUNT_COPIES);
        c.count(COUNT_COPIED_BYTES, use.bytes);
    }
    for (size_t i = 0; i < sources.rows.size(); i++) {
        const source_tensor & tensor = sources.tensors[i];
        const size_t bytes = sources.rows[i].base || tensor.in_slab ? 0 : env.abi.span(tensor.t);
        if (bytes == 0) {
            continue;
        }
        if (ggml_backend * backend = env.abi.sched_get_tensor_backend(s.sched, env.abi.root(tensor.t))) {
            env.abi.tensor_get_async(backend, tensor.t, c.readback.data() + tensor.scratch, 0, bytes);
        } else {
            env.abi.tensor_get(tensor.t, c.readback.data() + tensor.scratch, 0, bytes);
        }
        c.count(COUNT_COPIES);
        c.count(COUNT_COPIED_BYTES, bytes);
    }
}

static void sources_take(context_trace & c, const graph_sources & sources) {
    // every layer's result lies somewhere else and was written long ago: fetch them all at once
    for (const auto & source : sources.rows) {
        __builtin_prefetch(source.base);
    }
    for (size_t i = 0; i < sources.rows.size(); i++) {
        const row_source & source = sources.rows[i];
        const char * base = source.base ? source.base : (const char *) c.readback.data() + sources.tensors[i].scratch;
        rows_copy(source, sources.tensors[i], base, c.rec->layout, c.outputs, c.block);
    }
}

void ubatch_read(tracer_env & env, sched_trace & s, graph_trace & g) {
    context_trace & c = *s.context;
    if (s.is_async) {
        sources_fetch(env, s, g.sources);
        c.pending    = &g;
        c.pending_on = &s;
    } else {
        sources_take(c, g.sources);
        ubatch_commit(c);
    }
}

void ubatch_finish(const tracer_env & env, context_trace & c, bool finished) {
    if (!c.pending) {
        return;
    }
    if (!c.rec || !c.rec->ring.is_open()) {
        c.pending = nullptr;
        return;
    }
    const uint64_t start  = clock_ns();
    const uint64_t waited = c.rec->ring.waited();
    if (!finished) {
        env.abi.sched_synchronize(c.pending_on->sched);
        c.count(COUNT_SYNCS);
        c.count(COUNT_SYNC_NS, clock_ns() - start);
    }
    const graph_trace & g = *c.pending;
    c.pending = nullptr;
    sources_take(c, g.sources);
    ubatch_commit(c);
    c.count(COUNT_HOOK_NS, clock_ns() - start - (c.rec->ring.waited() - waited));
}

void ubatch_forget(context_trace & c) {
    if (c.pending) {
        c.pending = nullptr;
        ubatch_lose(c);
    }
}

void ubatch_lose(context_trace & c) {
    rows_lose(c, c.block.n_rows);
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
        rows_lose(c, n);
    }
}

void ubatch_commit(context_trace & c) {
    const uint32_t n = c.block.n_rows;
    recording & rec = *c.rec;
    uint64_t n_committed = 0;
    for (uint32_t row = 0; row < n; row++) {
        c.block.head(row)->serial = rec.serial++;
        n_committed += rec.ring.push(c.block.record(row));
    }
    c.count(COUNT_ROWS_PRODUCED, n);
    c.count(COUNT_ROWS_COMMITTED, n_committed);
    c.count(COUNT_ROWS_LOST_FULL, n - n_committed);
}

// Adds nodes behind the last one. They are views, which no backend computes and which start no split; they depend on
// the last node, so that no backend moves them before it. Of the tensors they are users like any other: a pattern that
// would leave one out is not fused, one that has it as its result is.
static bool nodes_keep(const ggml_abi & abi, sched_trace & s, moe_graph & moe, ggml_cgraph * graph, const std::vector<ggml_tensor *> & kept) {
    if (kept.empty()) {
        return true;
    }
    static constexpr size_t N_SRC = 8; // of a node, at least, in every release
    const size_t n_keepers = (kept.size() + N_SRC - 2)/(N_SRC - 1);
    const int n_nodes = abi.graph_n_nodes(graph);
    // the scheduler's tables need room for leaves, too: llama.cpp sizes them for several nodes to each weight
    if (!abi.can_build() || n_nodes == 0 || 4*((size_t) n_nodes + n_keepers) > 3*(size_t) abi.graph_size(graph)) {
        return false;
    }
    while (strcmp(abi.name(abi.graph_node(graph, n_nodes - 1 - moe.n_keepers)), KEEPER_NAME) == 0) {
        moe.n_keepers++;
    }
    if (moe.n_keepers) {
        return true; // the graph is allocated once more
    }
    ggml_tensor * last = abi.graph_node(graph, n_nodes - 1);
    std::vector<uint64_t> arena((n_keepers*abi.tensor_overhead() + 64)/8 + 1);
    ggml_context * ctx = abi.init({ arena.size()*8, arena.data(), true });
    if (!ctx) {
        return false;
    }
    for (size_t i = 0; i < n_keepers; i++) {
        ggml_tensor * keeper = abi.view_1d(ctx, last, 0, 0); // of nothing: the last node may have no rows
        abi.set_name(keeper, KEEPER_NAME);
        for (size_t j = 0; j < N_SRC - 1 && i*(N_SRC - 1) + j < kept.size(); j++) {
            abi.set_src(keeper, (int) j + 1, kept[i*(N_SRC - 1) + j]);
        }
        // the last node may be one that is not chosen, so that it is not computed (backend sampling): nor shall it be then
        ggml_tensor * choice[2] = { kept[0], keeper };
        if (abi.build_forward_select) {
            abi.build_forward_select(graph, choice, 2, 0);
        } else {
            abi.build_forward_expand(graph, keeper);
        }
    }
    abi.free(ctx); // the tensors lie in the arena
    s.keepers[graph] = std::move(arena);
    moe.n_keepers = (int) n_keepers;
    moe.n_nodes   = abi.graph_n_nodes(graph);
    return true;
}

void graph_keep(tracer_env & env, sched_trace & s, moe_graph & moe, ggml_cgraph * graph, std::vector<ggml_tensor *> & to_place) {
    if (collector_choose(env.cfg) != COLLECTOR_TAP || moe.layers.empty()) {
        return;
    }
    std::vector<ggml_tensor *> kept;
    // marked as outputs, tensors keep their memory, and no pattern leaves them out
    const auto mark = [&](ggml_tensor * t) {
        env.abi.set_output(t);
        env.abi.set_output(env.abi.root(t)); // the allocator looks at the owner of the memory
    };
    for (const auto & layer : moe.layers) {
        if (!env.cfg.has_layer(layer.layer)) {
            continue;
        }
        const auto keep = [&](ggml_tensor * t, uint32_t channel, bool may_move) {
            if (t && (env.cfg.channels & channel)) {
                (may_move && env.abi.can_place() ? to_place : kept).push_back(t);
            }
        };
        keep(layer.ids,        CHANNEL_EXPERTS,    true);
        keep(layer.weights,    CHANNEL_WEIGHTS,    true);
        keep(layer.logits,     CHANNEL_LOGITS,     true);
        keep(layer.gate_input, CHANNEL_GATE_INPUT, false); // too wide
        keep(layer.outputs,    CHANNEL_OUTPUTS,    false); // and wider
        keep(layer.choice.scores, CHANNEL_SCORES,  false); // a fused top-k leaves them out, unless they have a user
    }
    if (!nodes_keep(env.abi, s, moe, graph, kept)) {
        for (ggml_tensor * t : kept) {
            mark(t);
        }
    }
    if (!env.cfg.tensors.empty()) {
        tensors_for_each(env.abi, graph, env.cfg, mark);
    }
}

static constexpr size_t MAX_SLAB = 64u << 20; // of one device; what is larger is left where it is

static result_slab * slab_reserve(const ggml_abi & abi, sched_trace & s, ggml_backend * backend, void * type, size_t size) {
    result_slab * slab = nullptr;
    for (const auto & known : s.slabs) {
        if (known->backend == backend && known->type == type) {
            slab = known.get();
        }
    }
    if (slab && slab->size >= size) {
        return slab;
    }
    if (!slab) {
        s.slabs.push_back(std::make_unique<result_slab>());
        slab = s.slabs.back().get();
        slab->backend = backend;
        slab->type    = type;
    }
    if (slab->buffer) {
        abi.sched_synchronize(s.sched); // a graph may still write there
        abi.buffer_free(slab->buffer);
    }
    slab->size   = 0;
    slab->buffer = abi.buft_alloc_buffer(type, size);
    if (!slab->buffer) {
        return nullptr;
    }
    abi.buffer_clear(slab->buffer, 0xFF); // no ids and no numbers: what is never written shows
    slab->base = (char *) abi.buffer_get_base(slab->buffer);
    slab->arena.assign((abi.tensor_overhead() + 64)/8 + 1, 0);
    ggml_context * ctx = abi.init({ slab->arena.size()*8, slab->arena.data(), true });
    slab->whole = ctx ? abi.new_tensor_4d(ctx, TYPE_I32, (int64_t) (size/4), 1, 1, 1) : nullptr;
    const bool ok = slab->whole && abi.tensor_alloc(slab->buffer, slab->whole, slab->base) == 0;
    if (ctx) {
        abi.free(ctx); // the tensor lies in the arena
    }
    slab->size = ok ? size : 0;
    return ok ? slab : nullptr;
}

// Whether a layer's results lie where its logits do: backends then do not fuse its top-k, and moved they would. Of few
// rows they do, since the kernel has read all before it writes.
static bool is_unfused_by_place(const ggml_abi & abi, const moe_graph & moe, ggml_tensor * root) {
    static constexpr int64_t FEW_ROWS = 8;
    for (const moe_layer & layer : moe.layers) {
        const bool is_result = (layer.ids && abi.root(layer.ids) == root) || (layer.weights && abi.root(layer.weights) == root);
        if (!is_result || layer.n_rows <= FEW_ROWS || !layer.choice.selector) {
            continue;
        }
        // the logits as the top-k's device has them: what the scores are computed from, or the scores themselves
        ggml_tensor * scores = abi.src(layer.choice.selector, 0);
        for (ggml_tensor * t : { scores, abi.src(abi.root(scores), 0) }) {
            const char * a = (const char *) abi.data(root);
            const char * b = t ? (const char *) abi.data(t) : nullptr;
            if (a && b && abi.buffer(t) == abi.buffer(root) && a < b + abi.span(t) && b < a + abi.span(root)) {
                return true;
            }
        }
    }
    return false;
}

void graph_place(tracer_env & env, sched_trace & s, graph_trace & g) {
    const ggml_abi & abi = env.abi;
    struct group { ggml_backend * backend; void * type; size_t size; std::vector<std::pair<ggml_tensor *, size_t>> roots; };
    std::vector<group> groups;
    std::vector<ggml_tensor *> rest;
    for (ggml_tensor * t : g.to_place) {
        ggml_tensor * root = abi.root(t);
        ggml_backend * backend = abi.sched_get_tensor_backend(s.sched, root);
        if (!backend || !abi.buffer(root) || abi.op_number(root) == 0 ||
                (!abi.buffer_is_host(abi.buffer(root)) && is_unfused_by_place(abi, g.moe, root))) {
            rest.push_back(t);
            continue;
        }
        void * type = abi.buffer_get_type(abi.buffer(root));
        auto of = std::find_if(groups.begin(), groups.end(), [&](const group & known) {
            return known.backend == backend && known.type == type;
        });
        if (of == groups.end()) {
            of = groups.insert(of, { backend, type, 0, {} });
        }
        if (std::none_of(of->roots.begin(), of->roots.end(), [&](const auto & known) { return known.first == root; })) {
            const size_t alignment = abi.buft_get_alignment(type);
            of->roots.emplace_back(root, of->size);
            of->size += (abi.buft_get_alloc_size(type, root) + alignment - 1)/alignment*alignment;
        }
    }
    for (const group & of : groups) {
        if (of.size == 0) {
            continue; // a ubatch without outputs: nothing is read
        }
        const result_slab * slab = of.size <= MAX_SLAB ? slab_reserve(abi, s, of.backend, of.type, of.size) : nullptr;
        for (const auto & [root, offset] : of.roots) {
            if (slab) {
                abi.unplace(root);
                abi.tensor_alloc(slab->buffer, root, slab->base + offset);
            } else {
                rest.push_back(root);
            }
        }
        if (slab) {
            g.placed.push_back({ slab, of.size, 0 });
        }
    }
    // whoever looks at them moves with them
    const int n_nodes = g.placed.empty() ? 0 : abi.graph_n_nodes(g.graph);
    for (int i = 0; i < n_nodes; i++) {
        ggml_tensor * node = abi.graph_node(g.graph, i);
        ggml_tensor * root = abi.root(node);
        const bool moved = node != root && std::any_of(g.placed.begin(), g.placed.end(), [&](const slab_use & use) {
            return abi.buffer(root) == use.slab->buffer;
        });
        if (moved) {
            abi.unplace(node);
            abi.view_init(node);
        }
    }
    g.to_place = std::move(rest);
}

void slabs_free(const tracer_env & env, sched_trace & s) {
    for (const auto & slab : s.slabs) {
        if (slab->buffer) {
            env.abi.buffer_free(slab->buffer);
        }
    }
    s.slabs.clear();
}

bool graph_is_warmup(const moe_graph & moe) {
    return !moe.layers.empty() && std::all_of(moe.layers.begin(), moe.layers.end(), [](const moe_layer & layer) {
        return layer.k == layer.n_expert;
    });
}

} // namespace moetrace
