#include "tracer.h"

#include "attention.h"
#include "batch-watch.h"
#include "collector.h"
#include "config.h"
#include "moe-plan.h"
#include "ring.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

namespace moetrace {

namespace {

constexpr size_t MAX_EARLY_EVENTS = 4096;

// functions of libllama that say what a context is; any of them may be missing
struct llama_facts {
    const llama_model * (*get_model)(const llama_context *) = nullptr;
    int32_t  (*meta_val)(const llama_model *, const char *, char *, size_t) = nullptr;
    int32_t  (*desc)(const llama_model *, char *, size_t) = nullptr;
    int32_t  (*n_layer)(const llama_model *) = nullptr;
    int32_t  (*n_embd)(const llama_model *) = nullptr;
    uint32_t (*n_ctx)(const llama_context *) = nullptr;
    uint32_t (*n_ubatch)(const llama_context *) = nullptr;
    uint32_t (*n_seq_max)(const llama_context *) = nullptr;
    void *   (*get_memory)(const llama_context *) = nullptr;
    const void * (*get_vocab)(const llama_model *) = nullptr;
    int32_t  (*vocab_bos)(const void *) = nullptr;
    int32_t  (*vocab_eos)(const void *) = nullptr;

    void find() {
        const auto look = [](auto *& out, const char * name) { out = (std::decay_t<decltype(out)>) symbol_find(name); };
        look(get_model,  "llama_get_model");
        look(meta_val,   "llama_model_meta_val_str");
        look(desc,       "llama_model_desc");
        look(n_layer,    "llama_model_n_layer");
        look(n_embd,     "llama_model_n_embd");
        look(n_ctx,      "llama_n_ctx");
        look(n_ubatch,   "llama_n_ubatch");
        look(n_seq_max,  "llama_n_seq_max");
        look(get_memory, "llama_get_memory");
        look(get_vocab,  "llama_model_get_vocab");
        look(vocab_bos,  "llama_vocab_bos");
        look(vocab_eos,  "llama_vocab_eos");
    }
};

struct early_event {
    event_code code;
    int32_t sequence, p0, p1, arg;
};

// one graph that was allocated on a scheduler
struct graph_trace {
    ggml_cgraph * graph = nullptr;
    moe_graph     moe;
    graph_sources sources;
    std::vector<attention_source> attention;
    bool          warmup = false;
    const void *  bound_to = nullptr; // the context whose layout the sources fit

    const attention_source * attention_at(const ggml_tensor * t) const {
        for (const auto & source : attention) {
            if (source.probs == t) {
                return &source;
            }
        }
        return nullptr;
    }
};

struct context_trace;

struct sched_trace {
    sched_t          sched = nullptr;
    context_trace *  context = nullptr;
    eval_callback    user_callback = nullptr;
    void *           user_data     = nullptr;
    bool             user_aborted  = false; // the host's callback stopped the graph
    bool             user_asked    = false;
    bool             chained       = false; // our callback is installed
    model_shape      shape;
    std::vector<std::unique_ptr<graph_trace>> graphs;

    graph_trace * find(const ggml_cgraph * graph) {
        for (auto & g : graphs) {
            if (g->graph == graph) {
                return g.get();
            }
        }
        return nullptr;
    }
};

enum class context_state { waiting, recording, failed };

struct context_trace {
    llama_context *     ctx   = nullptr;
    const llama_model * model = nullptr;
    void *              memory = nullptr;
    std::string         name;
    context_state       state  = context_state::waiting;
    bool                warmup = false; // llama_set_warmup
    bool                was_paused = false;
    uint64_t            n_unrecorded = 0; // rows since the pause began

    ring_writer         ring;
    row_layout          layout;
    row_block           block;
    std::vector<uint8_t> event_record;
    std::vector<uint8_t> readback;
    std::vector<early_event> early;
    uint64_t            counts_early[COUNT_N] = {};

    batch_matcher       matcher;
    kv_cells            cells;
    attention_row       attention;
    std::vector<std::vector<int64_t>> cell_idxs; // by group: where the ubatch's keys go
    std::vector<char>   attention_bytes;
    bool                in_batch = false;
    bool                encode   = false;
    bool                trial    = false; // llama.cpp runs the batch for itself
    bool                cleared  = false; // the memory was cleared and nothing decoded since
    bool                launched = false; // a server has given out tasks
    uint32_t            n_batches = 0;
    uint32_t            n_steps   = 0;
    uint64_t            serial    = 0;
    std::vector<row_identity> identities;
    std::vector<int32_t> tokens, positions, out_ids; // inputs that were not in host memory

    // the graph that is being computed
    graph_trace *       running = nullptr;
    uint64_t            hook_ns = 0;

    void count(ring_counter c, uint64_t n = 1) {
        if (ring.is_open()) {
            ring.count(c, n);
        } else {
            counts_early[c] += n;
        }
    }
};

struct tracer_state {
    std::mutex mutex; // guards the lists; a context's own state belongs to the thread that computes on it
    std::atomic<bool> active { false };
    config      cfg;
    ggml_abi    abi;
    llama_facts facts;
    bool        tried_attach = false;
    std::vector<std::unique_ptr<context_trace>> contexts;
    std::vector<std::unique_ptr<sched_trace>>   scheds;
    batch_mirror mirror;
};

tracer_state & tracer() {
    static tracer_state * state = new tracer_state; // never destroyed: hooks run until the process ends
    return *state;
}

thread_local llama_context * current_ctx = nullptr; // of the decode call on this thread

// after an error nothing is recorded any more; the host goes on
void say(const std::string & text) {
    fprintf(stderr, "moetrace: %s\n", text.c_str());
}

template <typename F>
void guarded(F && body) {
    try {
        body();
    } catch (...) {
        if (tracer().active.exchange(false)) {
            say("tracing stopped: out of memory in the tracer; the server goes on untraced");
        }
    }
}

bool ensure_attached(tracer_state & T) {
    if (T.tried_attach) {
        return T.abi.attached;
    }
    T.tried_attach = true;
    std::string error;
    if (!T.abi.attach(error)) {
        say("not tracing: " + error + "; see `moetrace doctor`");
        T.active = false;
        return false;
    }
    T.facts.find();
    return true;
}

void context_fail(context_trace & c, const std::string & why) {
    if (c.state != context_state::failed) {
        c.state = context_state::failed;
        say((c.name.empty() ? "a context" : c.name) + " is not traced any more: " + why);
        c.ring.close(why.c_str());
    }
}

// --- JSON, as little as is needed

std::string json_string(const std::string & text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if ((unsigned char) c < 0x20) {
            char code[8];
            snprintf(code, sizeof(code), "\\u%04x", (unsigned) c);
            out += code;
        } else {
            out += c;
        }
    }
    return out + "\"";
}

template <typename T, typename F>
std::string json_list(const std::vector<T> & items, F && text) {
    std::string out = "[";
    for (const auto & item : items) {
        out += (out.size() > 1 ? "," : "") + text(item);
    }
    return out + "]";
}

std::string json_matrices(uint8_t bits) {
    std::vector<std::string> names;
    if (bits & MATRIX_GATE)    { names.push_back("ffn_gate_exps"); }
    if (bits & MATRIX_UP)      { names.push_back("ffn_up_exps"); }
    if (bits & MATRIX_GATE_UP) { names.push_back("ffn_gate_up_exps"); }
    if (bits & MATRIX_DOWN)    { names.push_back("ffn_down_exps"); }
    return json_list(names, json_string);
}

std::string model_meta(const llama_facts & facts, const llama_model * model, const std::string & key) {
    char text[256] = "";
    if (!facts.meta_val || !model || facts.meta_val(model, key.c_str(), text, sizeof(text)) < 0) {
        return "";
    }
    return text;
}

collector_kind collector_choose(const config & cfg) {
    if (cfg.collector != COLLECTOR_AUTO) {
        return cfg.collector;
    }
    // keeping wide tensors alive to the end of the graph would cost more memory than reading them at once
    const bool wide = (cfg.channels & (CHANNEL_GATE_INPUT | CHANNEL_ATTENTION)) || !cfg.tensors.empty();
    return wide ? COLLECTOR_CALLBACK : COLLECTOR_TAP;
}

std::string context_meta(tracer_state & T, const context_trace & c, const char * role) {
    static constexpr const char * COUNTERS[] = {
        "rows_produced", "rows_committed", "rows_lost_full", "rows_lost_error", "rows_overwritten",
        "events_committed", "events_lost", "events_overwritten", "rows_warmup", "rows_paused", "rows_unrouted",
        "rows_unidentified", "graphs", "batches", "wait_ns", "hook_ns", "sync_ns", "attention_lost",
    };
    static_assert(sizeof(COUNTERS)/sizeof(COUNTERS[0]) == COUNT_N, "a counter has no name");

    const auto number = [](int64_t n) { return std::to_string(n); };
    const auto & facts = T.facts;
    const std::string arch = model_meta(facts, c.model, "general.architecture");
    char desc[256] = "";
    if (facts.desc && c.model) {
        facts.desc(c.model, desc, sizeof(desc));
    }
    std::vector<std::string> channels;
    for (uint32_t bit = 0; bit < 6; bit++) {
        if (T.cfg.channels & (1u << bit)) {
            channels.push_back(channel_name((channel) (1u << bit)));
        }
    }
    for (const auto & tensor : c.layout.tensors) {
        channels.push_back("tensor:" + tensor);
    }
    const row_layout & layout = c.layout;

    std::string out = "{\"name\":" + json_string(c.name) + ",\"role\":\"" + role + "\",\"pid\":" + number(getpid());
    out += ",\"collector\":\"";
    out += collector_choose(T.cfg) == COLLECTOR_TAP ? "tap" : "callback";
    out += "\",\"ggml\":" + json_string(T.abi.version);
    out += ",\"channels\":" + json_list(channels, json_string);
    out += ",\"refused_tensors\":" + json_list(layout.refused, json_string);
    out += ",\"model\":{\"name\":" + json_string(model_meta(facts, c.model, "general.name"));
    out += ",\"architecture\":" + json_string(arch) + ",\"description\":" + json_string(desc);
    out += ",\"n_layer\":" + number(facts.n_layer && c.model ? facts.n_layer(c.model) : 0);
    out += ",\"n_embd\":" + number(facts.n_embd && c.model ? facts.n_embd(c.model) : 0);
    out += ",\"n_expert\":" + number(layout.e_max) + ",\"n_expert_used\":" + number(layout.k_max);
    out += ",\"n_ctx\":" + number(facts.n_ctx && c.ctx ? facts.n_ctx(c.ctx) : 0);
    out += ",\"n_ubatch\":" + number(facts.n_ubatch && c.ctx ? facts.n_ubatch(c.ctx) : 0);
    out += ",\"n_seq_max\":" + number(facts.n_seq_max && c.ctx ? facts.n_seq_max(c.ctx) : 0) + "}";
    out += ",\"layers\":" + json_list(layout.layers, number);
    out += ",\"n_expert\":" + json_list(layout.n_expert, number);
    out += ",\"n_expert_used\":" + json_list(layout.k, number);
    out += ",\"consumers\":" + json_list(layout.matrices, json_matrices);
    out += ",\"counter_names\":" + json_list(std::vector<std::string>(std::begin(COUNTERS), std::end(COUNTERS)), json_string);
    return out + "}";
}

// --- contexts

context_trace * context_find(tracer_state & T, const llama_context * ctx) {
    for (auto & c : T.contexts) {
        if (ctx && c->ctx == ctx) {
            return c.get();
        }
    }
    return nullptr;
}

context_trace & context_get(tracer_state & T, llama_context * ctx) {
    if (context_trace * c = context_find(T, ctx)) {
        return *c;
    }
    T.contexts.push_back(std::make_unique<context_trace>());
    context_trace & c = *T.contexts.back();
    c.ctx = ctx;
    if (ensure_attached(T)) {
        c.model  = T.facts.get_model  ? T.facts.get_model(ctx)  : nullptr;
        c.memory = T.facts.get_memory ? T.facts.get_memory(ctx) : nullptr;
    }
    return c;
}

// Before it serves anyone, llama.cpp decodes BOS and EOS to warm up, and two tokens 0 right after clearing its
// memory to learn whether the memory can forget.
bool is_trial(const tracer_state & T, const context_trace & c) {
    const auto & entries = c.matcher.entries();
    if (c.launched || entries.empty() || entries.size() > 2) {
        return false;
    }
    if (c.cleared && entries.size() == 2 && entries[0].token == 0 && entries[1].token == 0) {
        return true;
    }
    if (c.n_batches > 0 || !T.facts.get_vocab || !T.facts.vocab_bos || !T.facts.vocab_eos || !c.model) {
        return false;
    }
    const void * vocab = T.facts.get_vocab(c.model);
    std::vector<int32_t> expected;
    for (int32_t token : { T.facts.vocab_bos(vocab), T.facts.vocab_eos(vocab) }) {
        if (token >= 0) {
            expected.push_back(token);
        }
    }
    return expected.size() == entries.size() && std::equal(entries.begin(), entries.end(), expected.begin(),
        [](const batch_entry & e, int32_t token) { return e.token == token; });
}

void batch_begin(tracer_state & T, context_trace & c, bool known, bool encode) {
    c.in_batch = known;
    c.encode   = encode;
    c.trial    = known && is_trial(T, c);
    c.cleared  = false;
    if (known) {
        c.matcher.begin();
    }
    c.count(COUNT_BATCHES);
}

sched_trace & sched_get(tracer_state & T, sched_t sched) {
    for (auto & s : T.scheds) {
        if (s->sched == sched) {
            return *s;
        }
    }
    T.scheds.push_back(std::make_unique<sched_trace>());
    T.scheds.back()->sched = sched;
    return *T.scheds.back();
}

const char * context_role(const tracer_state & T, const context_trace & c) {
    for (const auto & other : T.contexts) {
        if (other.get() == &c) {
            return "main";
        }
        if (other->ring.is_open() || other->state == context_state::failed) {
            return other->model && other->model == c.model ? "mtp" : "draft";
        }
    }
    return "other";
}

void event_push(context_trace & c, const early_event & e) {
    c.cleared  |= e.code == EVENT_CLEAR;
    if (e.code == EVENT_SEQ_ADD) {
        c.cells.shift(e.sequence, e.p0, e.p1, e.arg);
    } else if (e.code == EVENT_RESTORE) {
        c.cells.forget();
    }
    c.launched |= e.code == EVENT_LAUNCH;
    if (!c.ring.is_open()) {
        if (c.state == context_state::waiting && c.early.size() < MAX_EARLY_EVENTS) {
            c.early.push_back(e);
        } else {
            c.count(COUNT_EVENTS_LOST);
        }
        return;
    }
    record_head * head = (record_head *) c.event_record.data();
    head->serial      = c.serial;
    head->time_ns     = (int64_t) clock_ns();
    head->step        = c.n_steps;
    head->batch       = c.n_batches;
    head->token       = e.code;
    head->position    = e.p0;
    head->sequence    = e.sequence;
    head->kind        = RECORD_EVENT;
    head->n_sequences = 0;
    head->flags       = 0;
    head->row         = 0;
    head->arg0        = e.p1;
    head->arg1        = e.arg;
    c.ring.count(c.ring.push(head) ? COUNT_EVENTS_COMMITTED : COUNT_EVENTS_LOST);
}

void context_open(tracer_state & T, context_trace & c, const model_shape & shape) {
    c.layout.make(shape, T.cfg);
    if (c.layout.layers.empty()) {
        context_fail(c, "none of the layers asked for routes tokens to experts");
        return;
    }
    if (c.layout.stride == 0) {
        context_fail(c, "a record would take more than 1 GiB; choose fewer layers or channels");
        return;
    }

    std::string folder;
    for (int i = 0; i < 10000; i++) {
        c.name = "ctx" + std::to_string(i);
        folder = T.cfg.dir + "/" + c.name;
        if (mkdir(folder.c_str(), 0700) == 0) {
            break;
        }
        if (errno != EEXIST) {
            context_fail(c, "cannot make " + folder + ": " + strerror(errno));
            return;
        }
    }

    ring_params params;
    params.fields   = c.layout.fields;
    params.meta     = context_meta(T, c, context_role(T, c));
    params.bytes    = T.cfg.ring_bytes;
    params.stride   = c.layout.stride;
    params.on_full  = T.cfg.on_full;
    params.block_ns = T.cfg.block_ns;
    params.paused   = T.cfg.paused;
    std::string error;
    if (!c.ring.create(folder + "/ring", params, error)) {
        rmdir(folder.c_str());
        context_fail(c, "cannot make its ring in " + folder + ": " + error);
        return;
    }
    c.state      = context_state::recording;
    c.was_paused = T.cfg.paused;
    c.event_record.assign(c.layout.stride, 0);
    for (uint32_t i = 0; i < COUNT_N; i++) {
        c.ring.count((ring_counter) i, c.counts_early[i]);
    }
    for (const auto & e : c.early) {
        event_push(c, e);
    }
    c.early.clear();
}

// --- one ubatch

// the first n numbers of an input tensor
const int32_t * input_read(const ggml_abi & abi, const ggml_tensor * t, int64_t n, std::vector<int32_t> & buffer) {
    if (!t || abi.type(t) != TYPE_I32 || abi.ne(t)[0] < n || !abi.buffer(t)) {
        return nullptr;
    }
    if (abi.is_host(t)) {
        return (const int32_t *) abi.data(t);
    }
    buffer.resize((size_t) n);
    abi.tensor_get(t, buffer.data(), 0, (size_t) n*4);
    return buffer.data();
}

void heads_fill(context_trace & c, const int32_t * tokens, const int32_t * positions, const int32_t * out_ids, int64_t n_out_ids) {
    const int64_t now = (int64_t) clock_ns();
    const uint32_t n = c.block.n_rows;
    uint64_t n_unidentified = 0;
    for (uint32_t row = 0; row < n; row++) {
        const row_identity & who = c.identities[row];
        record_head * head = c.block.head(row);
        head->time_ns     = now;
        head->step        = c.n_steps;
        head->batch       = c.n_batches;
        head->token       = tokens ? tokens[row] : -1;
        // a recurrent model has no position input; the batch had one
        head->position    = positions ? positions[row] : who.position == batch_entry::UNKNOWN ? -1 : who.position;
        head->sequence    = who.found ? who.sequence : -1;
        head->kind        = RECORD_ROW;
        head->n_sequences = who.n_sequences;
        head->row         = row;
        head->flags       = (who.uncertain ? ROW_SEQUENCE_UNCERTAIN : 0u) | (who.found ? 0u : ROW_UNIDENTIFIED) |
            (c.encode ? ROW_ENCODE : 0u) | (c.trial ? ROW_TRIAL : 0u) | (out_ids ? 0u : ROW_OUTPUT);
        n_unidentified += !who.found;
    }
    for (int64_t i = 0; out_ids && i < n_out_ids; i++) {
        if (out_ids[i] >= 0 && out_ids[i] < (int32_t) n) {
            c.block.head((uint32_t) out_ids[i])->flags |= ROW_OUTPUT;
        }
    }
    c.count(COUNT_ROWS_UNIDENTIFIED, n_unidentified);
}

// which tensors of the graph go where in the context's records
void graph_bind(tracer_state & T, sched_trace & s, graph_trace & g) {
    context_trace & c = *s.context;
    g.sources.make(T.abi, g.graph, g.moe, c.layout, T.cfg);
    g.bound_to = &c;
    g.attention = T.cfg.channels & CHANNEL_ATTENTION ? attention_find(T.abi, g.graph, T.cfg) : std::vector<attention_source>();
    if (c.readback.size() < g.sources.scratch_bytes) {
        c.readback.resize(g.sources.scratch_bytes);
    }
}

// which cells of the KV cache the ubatch's keys are written to
void cells_follow(tracer_state & T, context_trace & c, const graph_trace & g) {
    const uint32_t n = c.block.n_rows;
    for (auto & list : c.cell_idxs) {
        list.clear();
    }
    for (const auto & source : g.attention) {
        if (c.cell_idxs.size() <= (size_t) source.group) {
            c.cell_idxs.resize((size_t) source.group + 1);
        }
        auto & list = c.cell_idxs[(size_t) source.group];
        if (!list.empty() || !source.k_idxs || T.abi.ne(source.k_idxs)[0] != n || !T.abi.buffer(source.k_idxs)) {
            continue;
        }
        list.resize(n);
        T.abi.tensor_get(source.k_idxs, list.data(), 0, (size_t) n*8);
        const int32_t * positions = input_read(T.abi, g.moe.inp_pos, n, c.positions);
        c.cells.write(source.group, list.data(), positions, c.identities);
    }
}

// Before the graph runs: who its rows are. False if it is not recorded.
bool ubatch_begin(tracer_state & T, sched_trace & s, graph_trace & g) {
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
        context_open(T, c, s.shape);
    }
    if (c.state != context_state::recording) {
        return false;
    }
    if (g.bound_to != &c) {
        graph_bind(T, s, g);
    }
    const bool paused = c.ring.paused();
    if (paused != c.was_paused) {
        event_push(c, { paused ? EVENT_PAUSE : EVENT_RESUME, -1, 0, (int32_t) std::min<uint64_t>(c.n_unrecorded, INT_MAX), 0 });
        c.was_paused   = paused;
        c.n_unrecorded = 0;
    }
    const auto inputs = [&](auto && use) {
        const int32_t * tokens    = input_read(T.abi, g.moe.inp_tokens, n, c.tokens);
        const int32_t * positions = input_read(T.abi, g.moe.inp_pos,    n, c.positions);
        use(tokens, positions);
    };
    if (paused) {
        c.count(COUNT_ROWS_PAUSED, n);
        c.n_unrecorded += n;
        if (c.in_batch) { // later ubatches of the batch may be recorded
            inputs([&](const int32_t * tokens, const int32_t * positions) { c.matcher.match(tokens, positions, n, c.identities); });
        }
        return false;
    }
    if (!c.block.reset(c.layout, n)) {
        c.count(COUNT_ROWS_PRODUCED, n);
        c.count(COUNT_ROWS_LOST_ERROR, n);
        c.serial += n;
        return false;
    }
    inputs([&](const int32_t * tokens, const int32_t * positions) {
        if (c.in_batch) {
            c.matcher.match(tokens, positions, n, c.identities);
        } else {
            c.identities.assign(n, row_identity());
        }
        const int64_t n_out = g.moe.out_ids ? T.abi.ne(g.moe.out_ids)[0] : 0;
        const int32_t * out_ids = g.moe.out_ids && n_out < n ? input_read(T.abi, g.moe.out_ids, n_out, c.out_ids) : nullptr;
        static const int32_t none = 0;
        heads_fill(c, tokens, positions, n_out == 0 && g.moe.out_ids ? &none : out_ids, n_out);
        // a vector input leaves stale numbers in the token input
        for (uint32_t row = 0; row < n; row++) {
            if (c.identities[row].vector) {
                c.block.head(row)->token  = -1;
                c.block.head(row)->flags |= ROW_EMBEDDING_INPUT;
            }
        }
    });
    for (int index : g.sources.not_understood) {
        rows_mark_lost(c.layout, index, c.block);
    }
    if (!g.attention.empty()) {
        cells_follow(T, c, g);
    }
    return true;
}

// the bytes of a tensor, wherever it is
const char * tensor_bytes(const ggml_abi & abi, const ggml_tensor * t, std::vector<char> & buffer) {
    if (!t || abi.is_host(t)) {
        return t ? (const char *) abi.data(t) : nullptr;
    }
    buffer.resize(abi.span(t));
    abi.tensor_get(t, buffer.data(), 0, buffer.size());
    return buffer.data();
}

void attention_push(tracer_state & T, context_trace & c, const attention_source & source) {
    const char * probs = tensor_bytes(T.abi, source.probs, c.attention_bytes);
    static thread_local std::vector<char> mask_bytes;
    const char * mask = tensor_bytes(T.abi, source.mask, mask_bytes);
    const auto & idxs = c.cell_idxs[(size_t) source.group];
    record_head * head = (record_head *) c.event_record.data();
    float * payload = (float *) (head + 1);
    const uint32_t room = (c.layout.stride - (uint32_t) sizeof(record_head))/4;
    for (uint32_t row = 0; row < c.block.n_rows; row++) {
        attention_row & a = c.attention;
        if (!attention_read(T.abi, source, probs, mask, row, row < idxs.size() ? idxs[row] : -1, c.cells, a)) {
            c.count(COUNT_ATTENTION_LOST);
            continue;
        }
        const uint32_t n = (uint32_t) a.values.size();
        for (uint32_t at = 0; at < n; at += room) {
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
            head->arg0        = (int32_t) std::min(room, n - at);
            head->arg1        = 0;
            memcpy(payload, a.values.data() + at, (size_t) head->arg0*4);
            if (!c.ring.push(head)) {
                c.count(COUNT_ATTENTION_LOST);
            }
        }
    }
}

void source_read(tracer_state & T, context_trace & c, const graph_trace & g, const row_source & source, bool in_readback) {
    const ggml_abi & abi = T.abi;
    const char * base;
    if (in_readback) {
        base = (const char *) c.readback.data() + source.scratch;
    } else if (abi.is_host(source.t)) {
        base = (const char *) abi.data(source.t);
    } else {
        const size_t bytes = abi.span(source.t);
        if (bytes) {
            abi.tensor_get(source.t, c.readback.data() + source.scratch, 0, bytes);
        }
        base = (const char *) c.readback.data() + source.scratch;
    }
    const int64_t n_out = g.moe.out_ids ? abi.ne(g.moe.out_ids)[0] : 0;
    const int32_t * out_ids = input_read(abi, g.moe.out_ids, n_out, c.out_ids);
    static const int32_t none = 0;
    rows_copy(abi, source, base, c.layout, n_out == 0 && g.moe.out_ids ? &none : out_ids, n_out, c.block);
}

// the tap: everything is computed and still there
void ubatch_read_all(tracer_state & T, sched_trace & s, const graph_trace & g) {
    context_trace & c = *s.context;
    const ggml_abi & abi = T.abi;
    bool on_device = false;
    for (const auto & source : g.sources.sources) {
        if (abi.is_host(source.t)) {
            continue;
        }
        ggml_backend * backend = abi.sched_get_tensor_backend(s.sched, abi.root(source.t));
        const size_t bytes = abi.span(source.t);
        if (bytes == 0) {
            continue;
        }
        if (backend) {
            abi.tensor_get_async(backend, source.t, c.readback.data() + source.scratch, 0, bytes);
        } else {
            abi.tensor_get(source.t, c.readback.data() + source.scratch, 0, bytes);
        }
        on_device = true;
    }
    const uint64_t start = on_device ? clock_ns() : 0;
    abi.sched_synchronize(s.sched);
    if (on_device) {
        c.count(COUNT_SYNC_NS, clock_ns() - start);
    }
    for (const auto & source : g.sources.sources) {
        source_read(T, c, g, source, !abi.is_host(source.t));
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

// the callback: asked before a node is computed, called again after it
bool callback_trampoline(ggml_tensor * t, bool ask, void * user_data) {
    sched_trace & s = *(sched_trace *) user_data;
    context_trace & c = *s.context;
    const int first = c.running ? c.running->sources.find(t) : -1;
    const attention_source * attention = c.running ? c.running->attention_at(t) : nullptr;
    if (ask) {
        s.user_asked = s.user_callback && s.user_callback(t, true, s.user_data);
        return first >= 0 || attention || s.user_asked;
    }
    if (first >= 0 || attention) {
        const uint64_t start = clock_ns();
        guarded([&] {
            tracer_state & T = tracer();
            const auto & sources = c.running->sources.sources;
            for (size_t i = (size_t) first; first >= 0 && i < sources.size() && sources[i].ask == t; i++) {
                source_read(T, c, *c.running, sources[i], false);
            }
            if (attention) {
                attention_push(T, c, *attention);
            }
        });
        c.hook_ns += clock_ns() - start;
    }
    if (s.user_asked && s.user_callback && !s.user_callback(t, false, s.user_data)) {
        s.user_aborted = true;
        return false; // the host's own wish
    }
    return true;
}

void outputs_flag(tracer_state & T, const moe_graph & moe, ggml_cgraph * graph) {
    if (collector_choose(T.cfg) != COLLECTOR_TAP) {
        return;
    }
    // marked as outputs, tensors keep their memory to the end of the graph
    const auto keep = [&](ggml_tensor * t) {
        if (t) {
            T.abi.set_output(t);
            T.abi.set_output(T.abi.root(t)); // the allocator looks at the owner of the memory
        }
    };
    for (const auto & layer : moe.layers) {
        if (!T.cfg.has_layer(layer.layer)) {
            continue;
        }
        keep(layer.ids);
        if (T.cfg.channels & CHANNEL_WEIGHTS)    { keep(layer.weights); }
        if (T.cfg.channels & CHANNEL_LOGITS)     { keep(layer.logits); }
        if (T.cfg.channels & CHANNEL_SCORES)     { keep(layer.scores); }
        if (T.cfg.channels & CHANNEL_GATE_INPUT) { keep(layer.gate_input); }
    }
    if (!T.cfg.tensors.empty()) {
        tensors_for_each(T.abi, graph, T.cfg, keep);
    }
}

bool is_warmup(const moe_graph & moe) {
    return !moe.layers.empty() && std::all_of(moe.layers.begin(), moe.layers.end(), [](const moe_layer & layer) {
        return layer.k == layer.n_expert;
    });
}

// a graph is about to be allocated (or measured): read it, learn its shape, keep its tensors alive
void graph_prepare(sched_t sched, ggml_cgraph * graph, bool computed) {
    tracer_state & T = tracer();
    std::lock_guard<std::mutex> lock(T.mutex);
    if (!T.active || !ensure_attached(T)) {
        return;
    }
    sched_trace & s = sched_get(T, sched);
    moe_graph moe = moe_graph_read(T.abi, graph);
    outputs_flag(T, moe, graph);
    const bool known = s.shape.learn(T.abi, graph, moe, T.cfg);
    if (!computed) {
        return;
    }
    graph_trace * g = s.find(graph);
    if (!g) {
        s.graphs.push_back(std::make_unique<graph_trace>());
        g = s.graphs.back().get();
        g->graph = graph;
    }
    g->warmup = !known && is_warmup(moe);
    if (!known && !g->warmup) {
        moe.trouble = "a layer uses another number of experts than before";
    }
    g->moe      = std::move(moe);
    g->bound_to = nullptr;
}

} // namespace

//
// hooks
//

bool tracer_start(const char * text, std::string & error) {
    tracer_state & T = tracer();
    config cfg;
    const std::string source = text && *text ? text : config_from_env();
    if (!config_parse(source, cfg, error)) {
        return false;
    }
    tracer_stop();
    std::lock_guard<std::mutex> lock(T.mutex);
    T.cfg    = cfg;
    T.active = !cfg.dir.empty();
    return true;
}

void tracer_stop() {
    tracer_state & T = tracer();
    std::lock_guard<std::mutex> lock(T.mutex);
    T.active = false;
    for (auto & c : T.contexts) {
        c->ring.close("");
    }
    for (auto & s : T.scheds) {
        s->context = nullptr;
    }
    T.contexts.clear();
}

void sched_on_callback(sched_t sched, eval_callback callback, void * user_data) {
    guarded([&] {
        tracer_state & T = tracer();
        if (!T.active) {
            return;
        }
        std::lock_guard<std::mutex> lock(T.mutex);
        sched_trace & s = sched_get(T, sched);
        s.user_callback = callback;
        s.user_data     = user_data;
        s.chained       = false; // the host's own is installed now
    });
}

void sched_on_reserve(sched_t sched, ggml_cgraph * graph) {
    if (tracer().active) {
        guarded([&] { graph_prepare(sched, graph, false); });
    }
}

void sched_on_alloc(sched_t sched, ggml_cgraph * graph) {
    if (tracer().active) {
        guarded([&] { graph_prepare(sched, graph, true); });
    }
}

void sched_on_free(sched_t sched) {
    guarded([&] {
        tracer_state & T = tracer();
        std::lock_guard<std::mutex> lock(T.mutex);
        T.scheds.erase(std::remove_if(T.scheds.begin(), T.scheds.end(), [&](const auto & s) {
            return s->sched == sched;
        }), T.scheds.end());
    });
}

int sched_on_compute(sched_t sched, ggml_cgraph * graph, compute_fn compute, set_callback_fn set_callback) {
    tracer_state & T = tracer();
    if (!T.active) {
        return compute(sched, graph);
    }

    const uint64_t start = clock_ns();
    sched_trace * s = nullptr;
    bool recorded = false;
    guarded([&] {
        std::lock_guard<std::mutex> lock(T.mutex);
        if (!ensure_attached(T)) {
            return;
        }
        s = &sched_get(T, sched);
        graph_trace * g = s->find(graph);
        if (!g) {
            s = nullptr; // allocated before tracing began
            return;
        }
        if (current_ctx) {
            s->context = &context_get(T, current_ctx);
        } else if (!s->context) {
            // computed outside of any decode call that we see: its rows stay without a sequence
            T.contexts.push_back(std::make_unique<context_trace>());
            s->context = T.contexts.back().get();
        }
        context_trace & c = *s->context;
        recorded   = ubatch_begin(T, *s, *g);
        c.running  = recorded ? g : nullptr;
        c.hook_ns  = 0;
    });
    if (!s) {
        return compute(sched, graph);
    }

    const bool by_callback = recorded && collector_choose(T.cfg) == COLLECTOR_CALLBACK;
    if (by_callback || s->chained) {
        // the scheduler keeps its callback until the next graph is built, so set it each time it changes
        if (by_callback) {
            set_callback(sched, callback_trampoline, s);
        } else {
            set_callback(sched, s->user_callback, s->user_data);
        }
        s->chained = by_callback;
    }
    s->user_aborted = false;
    context_trace & c = *s->context;
    uint64_t own_ns = clock_ns() - start;

    const int status = compute(sched, graph);

    const uint64_t after = clock_ns();
    const uint64_t waited = recorded ? c.ring.waited() : 0;
    guarded([&] {
        if (recorded && status == 0) {
            if (!by_callback) {
                ubatch_read_all(T, *s, *c.running);
            }
            if (s->user_aborted) {
                event_push(c, { EVENT_FAILED, -1, 0, (int32_t) c.block.n_rows, 0 });
                c.count(COUNT_ROWS_PRODUCED, c.block.n_rows);
                c.count(COUNT_ROWS_LOST_ERROR, c.block.n_rows);
                c.serial += c.block.n_rows;
            } else {
                ubatch_commit(c);
            }
        } else if (recorded) {
            event_push(c, { EVENT_FAILED, -1, 0, (int32_t) c.block.n_rows, 0 });
        }
        c.n_steps++;
        c.running = nullptr;
    });
    if (recorded) {
        own_ns += clock_ns() - after + c.hook_ns;
        c.count(COUNT_HOOK_NS, own_ns - (c.ring.waited() - waited));
    }
    return status;
}

batch_scope::batch_scope(llama_context * ctx, const batch_view & batch, bool encode) : outer(current_ctx) {
    current_ctx = ctx;
    guarded([&] {
        tracer_state & T = tracer();
        if (!T.active) {
            return;
        }
        std::lock_guard<std::mutex> lock(T.mutex);
        context_trace & c = context_get(T, ctx);
        auto & entries = c.matcher.entries();
        entries.resize((size_t) std::max(batch.n_tokens, 0));
        for (int32_t i = 0; i < batch.n_tokens; i++) {
            const int32_t n_seq = batch.n_seq_id && batch.seq_id ? batch.n_seq_id[i] : 1;
            batch_entry & e = entries[(size_t) i];
            e.token       = batch.token ? batch.token[i] : -1;
            e.position    = batch.pos ? batch.pos[i] : batch_entry::UNKNOWN;
            e.sequence    = batch.n_seq_id && batch.seq_id ? (n_seq > 0 ? batch.seq_id[i][0] : -1) : 0;
            e.n_sequences = (uint16_t) n_seq;
            e.used        = false;
        }
        batch_begin(T, c, true, encode);
    });
}

batch_scope::batch_scope(llama_context * ctx, const void * batch_ext, bool encode) : outer(current_ctx) {
    current_ctx = ctx;
    guarded([&] {
        tracer_state & T = tracer();
        if (!T.active) {
            return;
        }
        std::lock_guard<std::mutex> lock(T.mutex);
        context_trace & c = context_get(T, ctx);
        const auto * entries = T.mirror.find(batch_ext);
        if (entries) {
            c.matcher.entries().assign(entries->begin(), entries->end());
        }
        batch_begin(T, c, entries != nullptr, encode);
    });
}

batch_scope::~batch_scope() {
    guarded([&] {
        tracer_state & T = tracer();
        if (T.active) {
            std::lock_guard<std::mutex> lock(T.mutex);
            if (context_trace * c = context_find(T, current_ctx)) {
                c->in_batch = false;
                c->n_batches++;
            }
        }
    });
    current_ctx = outer;
}

void context_on_free(llama_context * ctx) {
    guarded([&] {
        tracer_state & T = tracer();
        std::lock_guard<std::mutex> lock(T.mutex);
        if (context_trace * c = context_find(T, ctx)) {
            c->ring.close("");
            c->state = context_state::failed; // nothing more to record; a new context may get the same address
            c->ctx   = nullptr;
            for (auto & s : T.scheds) {
                if (s->context == c) {
                    s->context = nullptr;
                }
            }
        }
    });
}

void context_on_warmup(llama_context * ctx, bool warmup) {
    guarded([&] {
        tracer_state & T = tracer();
        if (T.active) {
            std::lock_guard<std::mutex> lock(T.mutex);
            context_get(T, ctx).warmup = warmup;
        }
    });
}

void context_on_event(llama_context * ctx, event_code code, int32_t sequence, int32_t p0, int32_t p1, int32_t arg) {
    guarded([&] {
        tracer_state & T = tracer();
        if (T.active) {
            std::lock_guard<std::mutex> lock(T.mutex);
            event_push(context_get(T, ctx), { code, sequence, p0, p1, arg });
        }
    });
}

void memory_on_event(void * memory, event_code code, int32_t sequence, int32_t p0, int32_t p1, int32_t arg) {
    guarded([&] {
        tracer_state & T = tracer();
        if (!T.active) {
            return;
        }
        std::lock_guard<std::mutex> lock(T.mutex);
        for (auto & c : T.contexts) {
            if (c->memory == memory && memory) {
                event_push(*c, { code, sequence, p0, p1, arg });
                return;
            }
        }
    });
}

int32_t batch_on_add(const void * batch, int32_t index, int32_t sequence, int32_t token) {
    guarded([&] {
        tracer_state & T = tracer();
        if (T.active) {
            std::lock_guard<std::mutex> lock(T.mutex);
            T.mirror.add(batch, index, sequence, token);
        }
    });
    return index;
}

void batch_on_add_sequence(const void * batch, int32_t index) {
    guarded([&] {
        tracer_state & T = tracer();
        if (T.active) {
            std::lock_guard<std::mutex> lock(T.mutex);
            T.mirror.add_sequence(batch, index);
        }
    });
}

void batch_on_position(const void * batch, int32_t index, int32_t position) {
    guarded([&] {
        tracer_state & T = tracer();
        if (T.active) {
            std::lock_guard<std::mutex> lock(T.mutex);
            T.mirror.set_position(batch, index, position);
        }
    });
}

void batch_on_clear(const void * batch) {
    guarded([&] {
        tracer_state & T = tracer();
        if (T.active) {
            std::lock_guard<std::mutex> lock(T.mutex);
            T.mirror.clear(batch);
        }
    });
}

void batch_on_free(const void * batch) {
    guarded([&] {
        tracer_state & T = tracer();
        std::lock_guard<std::mutex> lock(T.mutex);
        T.mirror.free(batch);
    });
}

std::string tracer_probe() {
    tracer_state & T = tracer();
    std::string error;
    bool ok = false;
    guarded([&] {
        std::lock_guard<std::mutex> lock(T.mutex);
        ok = T.abi.attach(error);
    });
    static constexpr const char * SYMBOLS[] = {
        "ggml_backend_sched_set_eval_callback", "ggml_backend_sched_alloc_graph", "ggml_backend_sched_reserve",
        "ggml_backend_sched_graph_compute_async", "llama_decode", "llama_encode", "llama_process",
        "llama_batch_ext_add_token", "llama_batch_ext_set_pos", "llama_batch_ext_clear", "llama_memory_seq_rm",
        "llama_kv_self_seq_rm", "llama_kv_cache_seq_rm", "llama_set_sampler", "llama_set_warmup",
    };
    std::string out = "{\"attached\":" + std::string(ok ? "true" : "false") + ",\"error\":" + json_string(error);
    out += ",\"ggml\":" + json_string(T.abi.version) + ",\"tensor_size\":" + std::to_string(T.abi.tensor_size) + ",\"symbols\":{";
    bool first = true;
    for (const char * name : SYMBOLS) {
        out += (first ? "" : ",") + json_string(name) + ":" + (symbol_find(name) ? "true" : "false");
        first = false;
    }
    return out + "}}";
}

} // namespace moetrace
