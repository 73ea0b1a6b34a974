#include "tracer.h"

#include "context.h"
#include "json.h"
#include "ubatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

namespace moetrace {

namespace {

struct tracer_state : tracer_env {
    std::mutex mutex; // guards the lists; a context's own state belongs to the thread that computes on it
    std::atomic<bool> active { false };
    bool        tried_attach = false;
    std::vector<std::unique_ptr<context_trace>> contexts;
    std::vector<std::unique_ptr<sched_trace>>   scheds;
    batch_mirror mirror;
    const void * cleared = nullptr; // memory of a context that has computed nothing yet
};

tracer_state & tracer() {
    static tracer_state * state = new tracer_state; // never destroyed: hooks run until the process ends
    return *state;
}

thread_local llama_context * current_ctx = nullptr; // of the decode call on this thread

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

// Runs body(tracer) with the lists locked, if anything is traced at all.
template <typename F>
void when_active(F && body) {
    tracer_state & T = tracer();
    if (!T.active) {
        return;
    }
    guarded([&] {
        std::lock_guard<std::mutex> lock(T.mutex);
        body(T);
    });
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
        c.cleared = c.memory && c.memory == T.cleared;
    }
    return c;
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

// The oldest of the contexts that there are: the host makes and warms up the one that it serves with first. A draft
// model's context may well be the first that records rows.
const context_trace * context_main(const tracer_state & T) {
    for (const auto & c : T.contexts) {
        if (c->ctx) {
            return c.get();
        }
    }
    return nullptr;
}

const char * context_role(const tracer_state & T, const context_trace & c) {
    const context_trace * first = context_main(T);
    if (!first || first == &c) {
        return "main";
    }
    return first->model && first->model == c.model ? "mtp" : "draft";
}

// the callback: asked before a node is computed, called again after it
bool callback_trampoline(ggml_tensor * t, bool ask, void * user_data) {
    sched_trace & s = *(sched_trace *) user_data;
    if (!s.context) { // tracing has ended since the callback was installed
        return s.user_callback ? s.user_callback(t, ask, s.user_data) : !ask;
    }
    context_trace & c = *s.context;
    const int first = c.running ? c.running->sources.find(t) : -1;
    const attention_source * attention = c.running ? c.running->attention_at(t) : nullptr;
    const bool patched = c.patched && c.patched->patches.wants(t);
    if (ask) {
        s.user_asked = s.user_callback && s.user_callback(t, true, s.user_data);
        return first >= 0 || attention || patched || s.user_asked;
    }
    if (first >= 0 || attention || patched) {
        const uint64_t start = clock_ns();
        guarded([&] {
            if (first >= 0 || attention) {
                ubatch_read_node(tracer(), c, t, first, attention);
            }
            if (patched) {
                c.patched->patches.follow(tracer().abi, t, c.rules, c.rows, c.outputs);
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

// a graph is about to be allocated (or measured): read it, learn its shape, keep its tensors alive
void graph_prepare(sched_t sched, ggml_cgraph * graph, bool computed) {
    tracer_state & T = tracer();
    std::lock_guard<std::mutex> lock(T.mutex);
    if (!T.active || !ensure_attached(T)) {
        return;
    }
    const uint64_t start = clock_ns();
    sched_trace & s = sched_get(T, sched);
    moe_graph moe = moe_graph_read(T.abi, graph);
    graph_keep(T, moe, graph);
    const bool known = s.shape.learn(T.abi, graph, moe, T.cfg);
    if (!computed) {
        return; // measured once, before anything is served
    }
    graph_trace * g = s.find(graph);
    if (!g) {
        s.graphs.push_back(std::make_unique<graph_trace>());
        g = s.graphs.back().get();
        g->graph = graph;
    }
    g->warmup = !known && graph_is_warmup(moe);
    if (!known && !g->warmup) {
        moe.trouble = "a layer uses another number of experts than before";
    }
    g->moe      = std::move(moe);
    g->bound_to = nullptr;
    s.prepare_ns += clock_ns() - start;
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
        s->graphs.clear(); // graphs that are allocated while we look away would be taken for these
    }
    T.contexts.clear();
}

void tracer_intervene(uint32_t number) {
    when_active([&](tracer_state & T) {
        T.cfg.intervention  = number;
        T.cfg.intervene_all = true;
        for (auto & c : T.contexts) {
            if (c->ring.is_open()) {
                c->ring.header()->intervention.store(number, std::memory_order_release);
            }
        }
    });
}

void sched_on_callback(sched_t sched, eval_callback callback, void * user_data) {
    when_active([&](tracer_state & T) {
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
        if (!g || !moe_graph_is_same(T.abi, graph, g->moe)) {
            // allocated before tracing began, or (older releases, when they tidy the KV cache) not allocated at all
            s = nullptr;
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
        if (c.state == context_state::waiting) {
            c.role = context_role(T, c);
        }
        c.patched  = nullptr;
        recorded   = ubatch_begin(T, *s, *g);
        c.running  = recorded ? g : nullptr;
        c.hook_ns  = 0;
    });
    if (!s) {
        return compute(sched, graph);
    }

    context_trace & c = *s->context;
    // only a callback can change tensors; then it reads them too, while they are what the top-k saw
    const bool by_callback = c.patched || (recorded && collector_choose(T.cfg) == COLLECTOR_CALLBACK);
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
    uint64_t own_ns = clock_ns() - start;

    const int status = compute(sched, graph);

    const uint64_t after = clock_ns();
    const uint64_t waited = recorded ? c.ring.waited() : 0;
    guarded([&] {
        if (recorded && status == 0) {
            if (!by_callback) {
                ubatch_read(T, *s, *c.running);
            }
            if (s->user_aborted) {
                ubatch_drop(c, true);
            } else {
                ubatch_commit(c);
            }
        } else if (recorded) {
            ubatch_drop(c, false);
        }
        c.n_steps++;
        c.running = nullptr;
        c.patched = nullptr;
    });
    if (recorded) {
        own_ns += clock_ns() - after + c.hook_ns + s->prepare_ns - s->setup_ns;
        c.count(COUNT_HOOK_NS, own_ns - (c.ring.waited() - waited));
        s->prepare_ns = s->setup_ns = 0;
    }
    return status;
}

batch_scope::batch_scope(llama_context * ctx, const batch_view & batch, bool encode) : outer(current_ctx) {
    current_ctx = ctx;
    when_active([&](tracer_state & T) {
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
        context_batch_begin(T, c, true, encode);
    });
}

batch_scope::batch_scope(llama_context * ctx, const void * batch_ext, bool encode) : outer(current_ctx) {
    current_ctx = ctx;
    when_active([&](tracer_state & T) {
        context_trace & c = context_get(T, ctx);
        const auto * entries = T.mirror.find(batch_ext);
        if (entries) {
            c.matcher.entries().assign(entries->begin(), entries->end());
        }
        context_batch_begin(T, c, entries != nullptr, encode);
    });
}

batch_scope::~batch_scope() {
    when_active([&](tracer_state & T) {
        if (context_trace * c = context_find(T, current_ctx)) {
            c->in_batch = false;
            c->n_batches++;
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
    when_active([&](tracer_state & T) {
        context_get(T, ctx).warmup = warmup;
    });
}

void context_on_event(llama_context * ctx, event_code code, int32_t sequence, int32_t p0, int32_t p1, int32_t arg) {
    when_active([&](tracer_state & T) {
        context_event_push(context_get(T, ctx), { code, sequence, p0, p1, arg });
    });
}

// A context that has decoded nothing yet is not known: samplers that are set while it is made begin no task. A draft
// model's context, or MTP's, serves the tasks of the main one, unless each sequence has one of its own (before summer
// 2026): of which sequence one is does not show.
void context_on_launch(llama_context * ctx, int32_t sequence) {
    when_active([&](tracer_state & T) {
        const auto n_sequences = [&](const context_trace & c) {
            return T.facts.n_seq_max && c.ctx ? T.facts.n_seq_max(c.ctx) : 0;
        };
        const context_trace * launched = context_find(T, ctx);
        const bool is_main = launched && launched == context_main(T);
        for (auto & c : T.contexts) {
            if (c.get() == launched || (is_main && n_sequences(*c) == n_sequences(*launched))) {
                context_event_push(*c, { EVENT_LAUNCH, sequence, 0, 0, 0 });
            }
        }
    });
}

void memory_on_event(void * memory, event_code code, int32_t sequence, int32_t p0, int32_t p1, int32_t arg) {
    when_active([&](tracer_state & T) {
        for (auto & c : T.contexts) {
            if (c->memory == memory && memory) {
                context_event_push(*c, { code, sequence, p0, p1, arg });
                return;
            }
        }
        T.cleared = code == EVENT_CLEAR ? memory : T.cleared;
    });
}

int32_t batch_on_add(const void * batch, int32_t index, int32_t sequence, int32_t token) {
    when_active([&](tracer_state & T) {
        T.mirror.add(batch, index, sequence, token);
    });
    return index;
}

void batch_on_add_sequence(const void * batch, int32_t index) {
    when_active([&](tracer_state & T) {
        T.mirror.add_sequence(batch, index);
    });
}

void batch_on_position(const void * batch, int32_t index, int32_t position) {
    when_active([&](tracer_state & T) {
        T.mirror.set_position(batch, index, position);
    });
}

void batch_on_clear(const void * batch) {
    when_active([&](tracer_state & T) {
        T.mirror.clear(batch);
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
