#include "tracer.h"

#include "context.h"
#include "json.h"
#include "ubatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <vector>

namespace moetrace {

namespace {

static constexpr size_t MAX_MODEL_FILES = 64;
static constexpr size_t MAX_INBOX       = 4096;

using context_ptr = std::shared_ptr<context_trace>;

struct tracer_state : tracer_env {
    std::atomic<bool>     active { false };
    std::atomic<uint64_t> generation { 0 }; // of tracing: what schedulers know from an earlier one is forgotten
    bool        tried_attach = false;
    uint64_t    n_contexts   = 0;
    std::vector<context_ptr>                  contexts; // that live, oldest first
    std::vector<std::unique_ptr<sched_trace>> scheds;
    batch_mirror mirror;
    const void * cleared = nullptr; // memory of a context that has computed nothing yet
    bool        told_elsewhere = false;
    uint64_t    n_elsewhere    = 0;     // graphs of another llama.cpp that no ring counts yet
};

tracer_state & tracer() {
    static tracer_state * state = new tracer_state; // never destroyed: hooks run until the process ends
    return *state;
}

thread_local llama_context * current_ctx = nullptr; // of the decode call on this thread

// There is no memory: nothing here may need any.
void give_up() {
    tracer_state & T = tracer();
    if (!T.active.exchange(false)) {
        return;
    }
    static constexpr char TEXT[] = "moetrace: tracing stopped: out of memory in the tracer; the server goes on untraced\n";
    const ssize_t written = write(STDERR_FILENO, TEXT, sizeof(TEXT) - 1);
    (void) written;
    std::lock_guard<std::mutex> lock(T.mutex);
    for (const auto & c : T.contexts) {
        if (c->mutex.try_lock()) { // who holds it finds out by himself
            if (c->rec && c->rec->ring.is_open()) {
                c->rec->ring.end("out of memory in the tracer");
            }
            c->mutex.unlock();
        }
    }
    for (const auto & rec : T.idle) {
        rec->ring.end("out of memory in the tracer");
    }
}

// Runs body(); false if it did not come to its end.
template <typename F>
bool guarded(F && body) {
    try {
        body();
        return true;
    } catch (...) {
        give_up();
        return false;
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

// --- contexts; the callers hold the tracer's mutex

context_ptr context_find(const tracer_state & T, const llama_context * ctx) {
    for (const auto & c : T.contexts) {
        if (ctx && c->ctx == ctx) {
            return c;
        }
    }
    return nullptr;
}

context_ptr context_make(tracer_state & T, llama_context * ctx) {
    auto c = std::make_shared<context_trace>();
    c->number = ++T.n_contexts;
    c->ctx    = ctx;
    c->thread = std::this_thread::get_id();
    if (ensure_attached(T) && ctx) {
        c->model  = T.facts.get_model  ? T.facts.get_model(ctx)  : nullptr;
        c->memory = T.facts.get_memory ? T.facts.get_memory(ctx) : nullptr;
        c->n_seq_max = T.facts.n_seq_max ? T.facts.n_seq_max(ctx) : 0;
        c->cleared = c->memory && c->memory == T.cleared;
    }
    T.contexts.push_back(c);
    return c;
}

context_ptr context_get(tracer_state & T, llama_context * ctx) {
    context_ptr c = context_find(T, ctx);
    return c ? c : context_make(T, ctx);
}

sched_trace & sched_get(tracer_state & T, sched_t sched) {
    sched_trace * found = nullptr;
    for (auto & s : T.scheds) {
        if (s->sched == sched) {
            found = s.get();
        }
    }
    if (!found) {
        T.scheds.push_back(std::make_unique<sched_trace>());
        found = T.scheds.back().get();
        found->sched = sched;
        found->generation = T.generation;
    }
    if (found->generation != T.generation) {
        found->generation = T.generation;
        found->context    = nullptr;
        found->graphs.clear(); // graphs that were allocated while we looked away would be taken for these
    }
    return *found;
}

// The oldest of the contexts that there are: the host makes and warms up the one that it serves with first. A draft
// model's context may well be the first that records rows.
context_ptr context_main(const tracer_state & T) {
    for (const auto & c : T.contexts) {
        if (c->ctx) {
            return c;
        }
    }
    return nullptr;
}

// llama.cpp's own programs: another model in one of them drafts for the first
bool host_drafts() {
    static const bool drafts = [] {
        char path[4096];
        const ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 1);
        path[n > 0 ? n : 0] = 0;
        const char * slash = strrchr(path, '/');
        return strncmp(slash ? slash + 1 : path, "llama", 5) == 0;
    }();
    return drafts;
}

// What a context is beside the oldest one: of another model, a draft's, in a program that drafts; of the same model, it
// predicts further tokens (MTP) if it computes other layers.
const char * context_role(const tracer_state & T, const context_trace & c) {
    const context_ptr first = context_main(T);
    if (!first || first.get() == &c || !c.ctx) {
        return "main";
    }
    if (!first->model || first->model != c.model) {
        return first->model && host_drafts() ? "draft" : "main";
    }
    const bool shares = first->moe_layers.empty() || std::any_of(c.moe_layers.begin(), c.moe_layers.end(), [&](int layer) {
        return std::find(first->moe_layers.begin(), first->moe_layers.end(), layer) != first->moe_layers.end();
    });
    return shares ? "main" : "mtp";
}

// the callback: asked before a node is computed, called again after it
bool callback_trampoline(ggml_tensor * t, bool ask, void * user_data) {
    sched_trace & s = *(sched_trace *) user_data;
    context_trace * c = s.context.get();
    if (!c) { // tracing has ended since the callback was installed
        return s.user_callback ? s.user_callback(t, ask, s.user_data) : !ask;
    }
    const ggml_abi & abi = tracer().abi;
    const int first = c->running ? c->running->sources.find(t) : -1;
    const attention_source * attention = c->running ? c->running->attention_at(t) : nullptr;
    const bool patched = c->patched && c->patched->patches.wants(t);
    if (ask) {
        s.user_asked = s.user_callback && strcmp(abi.name(t), KEEPER_NAME) != 0 && s.user_callback(t, true, s.user_data);
        return first >= 0 || attention || patched || s.user_asked;
    }
    if (first >= 0 || attention || patched) {
        const uint64_t start = clock_ns();
        const bool ok = guarded([&] {
            if (first >= 0 || attention) {
                ubatch_read_node(tracer(), *c, t, first, attention);
            }
            if (patched) {
                c->patched->patches.follow(abi, t, c->rec->rules, c->rows, c->outputs);
            }
        });
        if (!ok) {
            c->running = c->patched = nullptr;
        }
        c->hook_ns += clock_ns() - start;
    }
    if (s.user_asked && s.user_callback && !s.user_callback(t, false, s.user_data)) {
        s.user_aborted = true;
        return false; // the host's own wish
    }
    return true;
}

// What devices have computed, or will have; nothing of it is written once tracing has stopped.
void pending_settle(context_trace & c, bool finished) {
    if (tracer().active) {
        ubatch_finish(tracer(), c, finished);
    } else {
        ubatch_forget(c);
    }
}

// before what a scheduler computed goes
void pending_finish(const sched_trace & s, bool finished) {
    if (const context_ptr c = s.context) {
        std::lock_guard<std::mutex> lock(c->mutex);
        if (c->pending_on == &s) {
            pending_settle(*c, finished);
        }
    }
}

// a graph is about to be allocated (or measured): read it, learn its shape, keep its tensors alive
void graph_prepare(sched_t sched, ggml_cgraph * graph, bool computed) {
    tracer_state & T = tracer();
    sched_trace * s = nullptr;
    {
        std::lock_guard<std::mutex> lock(T.mutex);
        if (!T.active || !ensure_attached(T)) {
            return;
        }
        s = &sched_get(T, sched);
    }
    pending_finish(*s, false);
    const uint64_t start = clock_ns();
    moe_graph moe = moe_graph_read(T.abi, graph);
    std::vector<ggml_tensor *> to_place;
    if (!sched_is_split(T, *s)) {
        graph_keep(T, *s, moe, graph, to_place);
    }
    const bool known = s->shape.learn(T.abi, graph, moe, T.cfg);
    if (!computed) {
        return; // measured once, before anything is served
    }
    graph_trace * g = s->find(graph);
    if (!g) {
        s->graphs.push_back(std::make_unique<graph_trace>());
        g = s->graphs.back().get();
        g->graph = graph;
    }
    g->warmup = !known && graph_is_warmup(moe);
    if (!known && !g->warmup) {
        moe.trouble = "a layer uses another number of experts than before";
    }
    g->moe      = std::move(moe);
    g->adopted  = false;
    g->to_place = std::move(to_place);
    g->placed.clear();
    g->bound_to = 0;
    s->prepare_ns += clock_ns() - start;
}

// A graph is computed that was allocated while nobody looked: llama.cpp uses graphs again. It is read as it is, and by
// callback: what would have kept its tensors alive can no longer be added. nullptr: it routes nothing.
graph_trace * graph_adopt(tracer_state & T, sched_trace & s, ggml_cgraph * graph) {
    moe_graph moe = moe_graph_read(T.abi, graph);
    if (moe.layers.empty()) {
        return nullptr;
    }
    const bool known = s.shape.learn(T.abi, graph, moe, T.cfg);
    graph_trace * g = s.find(graph);
    if (!g) {
        s.graphs.push_back(std::make_unique<graph_trace>());
        g = s.graphs.back().get();
    }
    *g = graph_trace();
    g->graph   = graph;
    g->warmup  = !known && graph_is_warmup(moe);
    g->adopted = true;
    if (!known && !g->warmup) {
        moe.trouble = "a layer uses another number of experts than before";
    }
    g->moe = std::move(moe);
    return g;
}

// closes what is traced; contexts that are computing find out by themselves
void tracing_end(tracer_state & T) {
    std::vector<context_ptr> contexts;
    std::vector<std::unique_ptr<recording>> idle;
    {
        std::lock_guard<std::mutex> lock(T.mutex);
        T.active = false;
        T.generation++;
        contexts.swap(T.contexts);
        idle.swap(T.idle);
    }
    for (const auto & c : contexts) {
        std::lock_guard<std::mutex> lock(c->mutex);
        c->ended = true;
        c->state = context_state::failed;
        if (c->rec && c->rec->ring.is_open()) {
            ubatch_forget(*c);
            c->rec->ring.close("");
        }
    }
    for (const auto & rec : idle) {
        rec->ring.close("");
    }
}

// A process that ends closes its rings: nobody then needs to find out whether it lives. What a thread still computes with
// is left as it is.
struct exit_watch {
    ~exit_watch() {
        tracer_state & T = tracer();
        std::unique_lock<std::mutex> lists(T.mutex, std::try_to_lock);
        if (!lists || !T.active.exchange(false)) {
            return;
        }
        for (const auto & c : T.contexts) {
            std::unique_lock<std::mutex> lock(c->mutex, std::try_to_lock);
            if (lock && c->rec && c->rec->ring.is_open()) {
                ubatch_forget(*c);
                c->rec->ring.close("");
                c->state = context_state::failed;
            }
        }
        for (const auto & rec : T.idle) {
            rec->ring.close("");
        }
        T.idle.clear();
    }
};
const exit_watch at_exit;

// A forked child has its parent's memory, and no share in its rings: it begins anew.
void fork_prepare() { tracer().mutex.lock(); }
void fork_parent()  { tracer().mutex.unlock(); }
void fork_child() {
    tracer_state & T = tracer();
    T.generation++;
    for (const auto & c : T.contexts) {
        c->ended = true;
        if (c->rec) {
            c->rec->ring.abandon();
        }
    }
    for (const auto & rec : T.idle) {
        rec->ring.abandon();
    }
    // their mutexes may be held by threads that the child does not have: never touched again
    static std::vector<context_ptr> * const dead = new (std::nothrow) std::vector<context_ptr>();
    try {
        if (dead) {
            dead->insert(dead->end(), T.contexts.begin(), T.contexts.end());
        }
    } catch (...) {
    }
    T.contexts.clear();
    T.idle.clear();
    T.mutex.unlock();
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
    struct stat info;
    cfg.dir_inode = !cfg.dir.empty() && stat(cfg.dir.c_str(), &info) == 0 ? (uint64_t) info.st_ino : 0;
    static const int watched = pthread_atfork(fork_prepare, fork_parent, fork_child);
    (void) watched; // without it forks are what they were
    tracing_end(T);
    std::lock_guard<std::mutex> lock(T.mutex);
    T.cfg    = cfg;
    T.active = !cfg.dir.empty();
    return true;
}

void tracer_stop() {
    guarded([&] { tracing_end(tracer()); });
}

void tracer_intervene(uint32_t number) {
    std::vector<context_ptr> contexts;
    when_active([&](tracer_state & T) {
        T.cfg.intervention  = number;
        T.cfg.intervene_all = true;
        contexts = T.contexts;
        for (const auto & rec : T.idle) {
            rec->ring.header()->intervention.store(number, std::memory_order_release);
        }
    });
    for (const auto & c : contexts) {
        std::lock_guard<std::mutex> lock(c->mutex);
        if (c->rec && c->rec->ring.is_open()) {
            c->rec->ring.header()->intervention.store(number, std::memory_order_release);
        }
    }
}

void model_on_open(const char * path) {
    if (!tracer().active || !path) {
        return;
    }
    guarded([&] {
        std::string name = path; // links are not followed: what a cache calls its files says nothing
        if (*path != '/') {
            char folder[4096];
            name = getcwd(folder, sizeof(folder)) ? folder + ("/" + name) : name;
        }
        tracer_state & T = tracer();
        std::lock_guard<std::mutex> lock(T.mutex);
        auto & files = T.model_files;
        files.erase(std::remove(files.begin(), files.end(), name), files.end());
        files.push_back(name);
        if (files.size() > MAX_MODEL_FILES) {
            files.erase(files.begin());
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

void sched_on_allocated(sched_t sched, ggml_cgraph * graph) {
    sched_trace * s = nullptr;
    when_active([&](tracer_state & T) { s = &sched_get(T, sched); });
    if (s) {
        guarded([&] {
            graph_trace * g = s->find(graph);
            if (g && !g->to_place.empty()) {
                graph_place(tracer(), *s, *g);
            }
        });
    }
}

void sched_on_synchronized(sched_t sched) {
    const sched_trace * s = nullptr;
    when_active([&](tracer_state & T) { s = &sched_get(T, sched); });
    if (s) {
        guarded([&] { pending_finish(*s, true); });
    }
}

void graph_on_elsewhere() {
    when_active([](tracer_state & T) {
        T.n_elsewhere++;
        if (!T.told_elsewhere) {
            T.told_elsewhere = true;
            say("this process has two llama.cpp: the first that was used is recorded, the other is not");
        }
        for (const auto & c : T.contexts) {
            std::unique_lock<std::mutex> lock(c->mutex, std::try_to_lock);
            if (lock && c->rec && c->rec->ring.is_open()) {
                c->rec->ring.count(COUNT_GRAPHS_ELSEWHERE, std::exchange(T.n_elsewhere, 0));
                return;
            }
        }
        if (!T.idle.empty()) {
            T.idle.back()->ring.count(COUNT_GRAPHS_ELSEWHERE, std::exchange(T.n_elsewhere, 0));
        }
    });
}

void sched_on_free(sched_t sched) {
    guarded([&] {
        tracer_state & T = tracer();
        std::unique_ptr<sched_trace> gone;
        context_ptr own; // of a host whose contexts we do not see
        {
            std::lock_guard<std::mutex> lock(T.mutex);
            for (auto it = T.scheds.begin(); it != T.scheds.end(); it++) {
                if ((*it)->sched == sched) {
                    gone = std::move(*it);
                    T.scheds.erase(it);
                    break;
                }
            }
            if (gone && gone->context && !gone->context->ctx && !gone->context->ended) {
                own = gone->context;
                T.contexts.erase(std::remove(T.contexts.begin(), T.contexts.end(), own), T.contexts.end());
            }
        }
        if (gone) {
            pending_finish(*gone, false);
            slabs_free(T, *gone);
        }
        if (own) {
            context_end(T, *own);
        }
    });
}

namespace {

// One graph on its way through the scheduler.
struct computation {
    sched_trace * s = nullptr;
    graph_trace * g = nullptr; // if it was announced
    context_ptr   context;     // held to the end
    bool          recorded = false;
    uint64_t      start    = 0; // of our own time
    uint64_t      waited   = 0; // for the reader, until then
};

// Whose graph it is. The scheduler keeps its context while there is no decode call.
bool context_choose(tracer_state & T, sched_t sched, computation & now) {
    std::lock_guard<std::mutex> lock(T.mutex);
    if (!T.active || !ensure_attached(T)) {
        return false;
    }
    now.s = &sched_get(T, sched);
    context_ptr & context = now.s->context;
    if (context && context->ended) {
        context = nullptr;
    }
    if (current_ctx) {
        context = context_get(T, current_ctx);
    } else if (!context) {
        // computed outside of any decode call that we see: its rows stay without a sequence
        context = context_make(T, nullptr);
    }
    now.context = context;
    return true;
}

// What a context is shows when it first computes.
void role_learn(tracer_state & T, context_trace & c, const moe_graph & moe) {
    std::lock_guard<std::mutex> lists(T.mutex); // others look at these layers
    c.moe_layers.clear();
    for (const auto & layer : moe.layers) {
        c.moe_layers.push_back(layer.layer);
    }
    c.role = context_role(T, c);
}

void compute_begin(tracer_state & T, sched_t sched, ggml_cgraph * graph, computation & now) {
    if (!context_choose(T, sched, now)) {
        return;
    }
    context_trace & c = *now.context;
    std::lock_guard<std::mutex> lock(c.mutex);
    ubatch_finish(T, c, false); // it counts its own time
    now.start = clock_ns();
    c.patched = nullptr;
    c.running = nullptr;
    c.hook_ns = 0;
    graph_trace * g = now.s->find(graph);
    if (!g || !moe_graph_is_same(T.abi, graph, g->moe)) {
        // allocated before tracing began, or (older releases, when they tidy the KV cache) not allocated at all
        g = graph_adopt(T, *now.s, graph);
    }
    if (!g) {
        c.count(COUNT_GRAPHS);
        return;
    }
    if (c.state == context_state::waiting) {
        role_learn(T, c, g->moe);
    }
    now.recorded = ubatch_begin(T, *now.s, *g);
    now.waited   = now.recorded ? c.rec->ring.waited() : 0;
    c.running    = now.recorded ? g : nullptr;
    now.g        = g;
}

// The scheduler keeps its callback until the next graph is built, so it is set each time it changes.
void callback_choose(sched_trace & s, bool ours, set_callback_fn set_callback) {
    if (ours) {
        set_callback(s.sched, callback_trampoline, &s);
    } else if (s.chained) {
        set_callback(s.sched, s.user_callback, s.user_data);
    }
    s.chained = ours;
}

void compute_end(tracer_state & T, computation & now, bool by_callback, int status, uint64_t own_ns) {
    const uint64_t after = clock_ns();
    context_trace & c = *now.context;
    sched_trace & s = *now.s;
    std::lock_guard<std::mutex> lock(c.mutex);
    const bool recorded = now.recorded && c.running && c.rec && c.rec->ring.is_open();
    if (recorded && !T.active) {
        ubatch_lose(c);
    } else if (recorded && s.user_aborted) {
        ubatch_drop(c, true);
    } else if (recorded && status == 0 && by_callback) {
        ubatch_commit(c);
    } else if (recorded && status == 0) {
        ubatch_read(T, s, *now.g);
    } else if (recorded) {
        ubatch_drop(c, false);
    }
    c.n_steps++;
    c.running = nullptr;
    c.patched = nullptr;
    if (recorded) {
        own_ns += clock_ns() - after + c.hook_ns + s.prepare_ns - s.setup_ns;
        c.count(COUNT_HOOK_NS, own_ns - (c.rec->ring.waited() - now.waited));
    }
    s.prepare_ns = s.setup_ns = 0;
}

} // namespace

int sched_on_compute(sched_t sched, ggml_cgraph * graph, compute_fn compute, set_callback_fn set_callback) {
    tracer_state & T = tracer();
    computation now;
    if (!T.active || !guarded([&] { compute_begin(T, sched, graph, now); }) || !now.g) {
        return compute(sched, graph);
    }
    // only a callback can change tensors; then it reads them too, while they are what the top-k saw
    const bool by_callback = now.context->patched || (now.recorded && now.g->by_callback);
    callback_choose(*now.s, by_callback, set_callback);
    now.s->user_aborted = false;
    const uint64_t own_ns = clock_ns() - now.start;

    const int status = compute(sched, graph);

    guarded([&] { compute_end(T, now, by_callback, status, own_ns); });
    return status;
}

// Runs body(context) with the context's mutex, on the thread that calls llama.cpp with it.
template <typename F>
static void with_context(llama_context * ctx, bool make, F && body) {
    context_ptr c;
    when_active([&](tracer_state & T) {
        c = make ? context_get(T, ctx) : context_find(T, ctx);
    });
    if (c) {
        guarded([&] {
            std::lock_guard<std::mutex> lock(c->mutex);
            body(*c);
        });
    }
}

batch_scope::batch_scope(llama_context * ctx, const batch_view & batch, bool encode) : outer(current_ctx) {
    current_ctx = ctx;
    with_context(ctx, true, [&](context_trace & c) {
        auto & entries = c.matcher.entries();
        entries.resize((size_t) std::max(batch.n_tokens, 0));
        for (int32_t i = 0; i < batch.n_tokens; i++) {
            const int32_t n_seq = batch.n_seq_id && batch.seq_id ? batch.n_seq_id[i] : 1;
            batch_entry & e = entries[(size_t) i];
            e.token       = batch.token ? batch.token[i] : -1;
            e.position    = batch.pos ? batch.pos[i] : batch_entry::UNKNOWN;
            e.sequence    = batch.n_seq_id && batch.seq_id ? (n_seq > 0 ? batch.seq_id[i][0] : -1) : 0;
            e.n_sequences = (uint16_t) n_seq;
            e.outputs     = (batch.logits ? batch.logits[i] != 0 : i == batch.n_tokens - 1) ? OUTPUT_LOGITS : 0;
            e.used        = 0;
            e.sure        = false;
        }
        ubatch_finish(tracer(), c, false);
        context_batch_begin(tracer(), c, true, encode);
    });
}

batch_scope::batch_scope(llama_context * ctx, const void * batch_ext, bool encode) : outer(current_ctx) {
    current_ctx = ctx;
    std::vector<batch_entry> entries;
    bool known = false;
    when_active([&](tracer_state & T) {
        if (const auto * found = T.mirror.find(batch_ext)) {
            entries = *found;
            known   = true;
        }
    });
    with_context(ctx, true, [&](context_trace & c) {
        ubatch_finish(tracer(), c, false);
        c.matcher.entries().swap(entries);
        context_batch_begin(tracer(), c, known, encode);
    });
}

batch_scope::~batch_scope() {
    with_context(current_ctx, false, [&](context_trace & c) {
        c.in_batch = false;
        c.n_batches++;
    });
    current_ctx = outer;
}

void context_on_free(llama_context * ctx) {
    guarded([&] {
        tracer_state & T = tracer();
        context_ptr c;
        {
            std::lock_guard<std::mutex> lock(T.mutex);
            c = context_find(T, ctx);
            T.contexts.erase(std::remove(T.contexts.begin(), T.contexts.end(), c), T.contexts.end());
        }
        if (c) {
            {
                std::lock_guard<std::mutex> lock(c->mutex);
                pending_settle(*c, false);
            }
            context_end(T, *c);
        }
    });
}

void context_on_warmup(llama_context * ctx, bool warmup) {
    with_context(ctx, true, [&](context_trace & c) { c.warmup = warmup; });
}

static bool serves(const context_trace & c, const context_trace & main);

void context_on_sample(llama_context * ctx, int32_t index) {
    std::pair<int32_t, int32_t> who { -1, -1 };
    with_context(ctx, false, [&](context_trace & c) { who = context_sample(c, index); });
    if (who.first < 0) {
        return;
    }
    // what serves it goes on from there, too
    std::vector<context_ptr> others;
    when_active([&](tracer_state & T) {
        const context_ptr main = context_main(T);
        for (const auto & c : T.contexts) {
            if (main && main->ctx == ctx && serves(*c, *main)) {
                others.push_back(c);
            }
        }
    });
    for (const auto & c : others) {
        guarded([&] {
            std::lock_guard<std::mutex> lock(c->mutex);
            if (context_has_mail(*c)) { // the task that this was sampled in; the rows before it come first
                ubatch_finish(tracer(), *c, false);
                context_inbox_take(*c);
            }
            context_sampled(*c, who.first, who.second);
        });
    }
}

void context_on_logits(llama_context * ctx) {
    with_context(ctx, false, [&](context_trace & c) { context_sample_all(c); });
}

void context_on_event(llama_context * ctx, event_code code, int32_t sequence, int32_t p0, int32_t p1, int32_t arg) {
    with_context(ctx, true, [&](context_trace & c) {
        ubatch_finish(tracer(), c, false);
        context_inbox_take(c);
        context_event_push(c, { code, sequence, p0, p1, arg });
    });
}

// Whether a context works for the main one: a draft model's, or MTP's, on the same thread and with the same sequences.
static bool serves(const context_trace & c, const context_trace & main) {
    return &c != &main && strcmp(c.role, "main") != 0 && c.n_seq_max == main.n_seq_max &&
        c.thread.load() == std::this_thread::get_id();
}

// A context that has decoded nothing yet is not known: samplers that are set while it is made begin no task. A draft
// model's context, or MTP's, serves the tasks of the main one, unless each sequence has one of its own (before summer
// 2026): of which sequence one is does not show. It computes on the main one's thread.
void context_on_launch(llama_context * ctx, int32_t sequence) {
    const context_event launch { EVENT_LAUNCH, sequence, 0, 0, 0 };
    when_active([&](tracer_state & T) {
        const context_ptr launched = context_find(T, ctx);
        if (!launched || launched != context_main(T)) {
            return;
        }
        for (const auto & c : T.contexts) {
            if (serves(*c, *launched)) {
                std::lock_guard<std::mutex> lock(c->inbox_mutex);
                if (c->inbox.size() < MAX_INBOX) {
                    c->inbox.push_back(launch);
                } else {
                    c->inbox_lost++;
                }
            }
        }
    });
    with_context(ctx, false, [&](context_trace & c) {
        ubatch_finish(tracer(), c, false);
        context_pause_look(c); // what was unrecorded was before this task
        context_inbox_take(c);
        context_event_push(c, launch);
    });
}

void memory_on_event(void * memory, event_code code, int32_t sequence, int32_t p0, int32_t p1, int32_t arg) {
    context_ptr found;
    when_active([&](tracer_state & T) {
        for (const auto & c : T.contexts) {
            if (c->memory == memory && memory) {
                found = c;
                return;
            }
        }
        T.cleared = code == EVENT_CLEAR ? memory : T.cleared;
    });
    if (found) {
        guarded([&] {
            std::lock_guard<std::mutex> lock(found->mutex);
            ubatch_finish(tracer(), *found, false);
            context_inbox_take(*found);
            context_event_push(*found, { code, sequence, p0, p1, arg });
        });
    }
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

void batch_on_output(const void * batch, int32_t index, uint8_t what, bool wanted) {
    when_active([&](tracer_state & T) {
        T.mirror.set_output(batch, index, what, wanted);
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
