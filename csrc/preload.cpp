// The functions of libggml-base and libllama that are taken over, each forwarding to the real one; and the
// library's own few C functions.

#include "batch-watch.h"
#include "hook.h"
#include "tracer.h"

#include <climits>
#include <cstdio>
#include <cstring>

using namespace moetrace;

using llama_seq_id = int32_t;
using llama_token  = int32_t;
using llama_pos    = int32_t;

struct llama_batch_ext;
struct llama_sampler;
struct llama_embd { // by value in the API
    const float * data;
    size_t n_rows;
    size_t n_embd;
};
using llama_memory_t = void *;

//
// the scheduler: every graph
//

MOETRACE_HOOK(void, ggml_backend_sched_set_eval_callback, (ggml_backend_sched * sched, eval_callback callback, void * user_data),
        (sched, callback, user_data)) {
    sched_on_callback(sched, callback, user_data);
    real(sched, callback, user_data);
}

MOETRACE_HOOK(bool, ggml_backend_sched_reserve, (ggml_backend_sched * sched, ggml_cgraph * graph), (sched, graph)) {
    sched_on_reserve(sched, graph);
    return real(sched, graph);
}

MOETRACE_HOOK(void, ggml_backend_sched_reserve_size, (ggml_backend_sched * sched, ggml_cgraph * graph, size_t * sizes),
        (sched, graph, sizes)) {
    sched_on_reserve(sched, graph);
    real(sched, graph, sizes);
}

MOETRACE_HOOK(bool, ggml_backend_sched_alloc_graph, (ggml_backend_sched * sched, ggml_cgraph * graph), (sched, graph)) {
    sched_on_alloc(sched, graph);
    const bool ok = real(sched, graph);
    if (ok) {
        sched_on_allocated(sched, graph);
    }
    return ok;
}

MOETRACE_HOOK_ANY(int, ggml_backend_sched_graph_compute_async, (ggml_backend_sched * sched, ggml_cgraph * graph),
        (sched, graph)) {
    if (!traced) {
        graph_on_elsewhere();
        return real(sched, graph);
    }
    static const auto set_callback = (set_callback_fn) symbol_find("ggml_backend_sched_set_eval_callback");
    return sched_on_compute(sched, graph, real, set_callback);
}

MOETRACE_HOOK(void, ggml_backend_sched_synchronize, (ggml_backend_sched * sched), (sched)) {
    real(sched);
    sched_on_synchronized(sched);
}

MOETRACE_HOOK(void, ggml_backend_sched_free, (ggml_backend_sched * sched), (sched)) {
    sched_on_free(sched);
    real(sched);
}

//
// contexts and batches: whose tokens
//

struct gguf_context;
struct gguf_init_params { // by value in the API
    bool no_alloc;
    struct ggml_context ** ctx;
};

MOETRACE_HOOK(gguf_context *, gguf_init_from_file, (const char * path, gguf_init_params params), (path, params)) {
    model_on_open(path);
    return real(path, params);
}

MOETRACE_HOOK(int32_t, llama_decode, (llama_context * ctx, batch_view batch), (ctx, batch)) {
    batch_scope scope(ctx, batch, false);
    return real(ctx, batch);
}

MOETRACE_HOOK(int32_t, llama_encode, (llama_context * ctx, batch_view batch), (ctx, batch)) {
    batch_scope scope(ctx, batch, true);
    return real(ctx, batch);
}

MOETRACE_HOOK(int32_t, llama_process, (llama_context * ctx, int type, llama_batch_ext * batch), (ctx, type, batch)) {
    batch_scope scope(ctx, batch, type == 0); // LLAMA_PROCESS_TYPE_ENCODE
    return real(ctx, type, batch);
}

MOETRACE_HOOK(void, llama_free, (llama_context * ctx), (ctx)) {
    context_on_free(ctx);
    real(ctx);
}

MOETRACE_HOOK(void, llama_set_warmup, (llama_context * ctx, bool warmup), (ctx, warmup)) {
    context_on_warmup(ctx, warmup);
    real(ctx, warmup);
}

MOETRACE_HOOK(int32_t, llama_batch_ext_add, (llama_batch_ext * batch, llama_seq_id seq_id), (batch, seq_id)) {
    return batch_on_add(batch, real(batch, seq_id), seq_id, -1);
}

MOETRACE_HOOK(int32_t, llama_batch_ext_add_token, (llama_batch_ext * batch, llama_seq_id seq_id, llama_token id),
        (batch, seq_id, id)) {
    return batch_on_add(batch, real(batch, seq_id, id), seq_id, id);
}

MOETRACE_HOOK(int32_t, llama_batch_ext_add_embd, (llama_batch_ext * batch, llama_seq_id seq_id, llama_embd embd),
        (batch, seq_id, embd)) {
    return batch_on_add(batch, real(batch, seq_id, embd), seq_id, -1);
}

MOETRACE_HOOK(bool, llama_batch_ext_add_seq, (llama_batch_ext * batch, int32_t idx, llama_seq_id seq_id),
        (batch, idx, seq_id)) {
    const bool ok = real(batch, idx, seq_id);
    if (ok) {
        batch_on_add_sequence(batch, idx);
    }
    return ok;
}

MOETRACE_HOOK(bool, llama_batch_ext_set_pos, (llama_batch_ext * batch, int32_t idx, const llama_pos * pos),
        (batch, idx, pos)) {
    const bool ok = real(batch, idx, pos);
    if (ok) {
        batch_on_position(batch, idx, *pos);
    }
    return ok;
}

MOETRACE_HOOK(bool, llama_batch_ext_set_output_logits, (llama_batch_ext * batch, int32_t idx, bool value),
        (batch, idx, value)) {
    batch_on_output(batch, idx, OUTPUT_LOGITS, value);
    return real(batch, idx, value);
}

MOETRACE_HOOK(bool, llama_batch_ext_set_output_embd, (llama_batch_ext * batch, int32_t idx, bool value),
        (batch, idx, value)) {
    batch_on_output(batch, idx, OUTPUT_EMBEDDING, value);
    return real(batch, idx, value);
}

MOETRACE_HOOK(void, llama_batch_ext_clear, (llama_batch_ext * batch), (batch)) {
    batch_on_clear(batch);
    real(batch);
}

MOETRACE_HOOK(void, llama_batch_ext_free, (llama_batch_ext * batch), (batch)) {
    batch_on_free(batch);
    real(batch);
}

//
// what the host samples from
//

MOETRACE_HOOK(llama_token, llama_sampler_sample, (llama_sampler * sampler, llama_context * ctx, int32_t idx),
        (sampler, ctx, idx)) {
    context_on_sample(ctx, idx);
    return real(sampler, ctx, idx);
}

MOETRACE_HOOK(float *, llama_get_logits_ith, (llama_context * ctx, int32_t idx), (ctx, idx)) {
    context_on_sample(ctx, idx);
    return real(ctx, idx);
}

MOETRACE_HOOK(llama_token, llama_get_sampled_token_ith, (llama_context * ctx, int32_t idx), (ctx, idx)) {
    context_on_sample(ctx, idx);
    return real(ctx, idx);
}

MOETRACE_HOOK(float *, llama_get_logits, (llama_context * ctx), (ctx)) {
    context_on_logits(ctx);
    return real(ctx);
}

//
// what happens to sequences between batches
//

// An older name of a function may call the newer one, through our hook again: the outer call alone is reported.
namespace {
class outer_call {
  public:
    outer_call() : counts(depth++ == 0) {}
    ~outer_call() { depth--; }

    template <typename F, typename... Args>
    void report(F && on, Args... args) const {
        if (counts) {
            on(args...);
        }
    }

  private:
    static thread_local int depth;
    const bool counts;
};
thread_local int outer_call::depth = 0;
} // namespace

// llama-server calls this for a slot when it starts a task and when it ends one
MOETRACE_HOOK(bool, llama_set_sampler, (llama_context * ctx, llama_seq_id seq_id, llama_sampler * sampler),
        (ctx, seq_id, sampler)) {
    context_on_launch(ctx, seq_id);
    return real(ctx, seq_id, sampler);
}

// The memory functions went by three families of names; `on` is how an event is reported for each.
#define MOETRACE_MEMORY_HOOKS(prefix, owner_t, on)                                                                 \
    MOETRACE_HOOK(bool, prefix##_seq_rm, (owner_t owner, llama_seq_id seq_id, llama_pos p0, llama_pos p1),         \
            (owner, seq_id, p0, p1)) {                                                                             \
        const outer_call call;                                                                                     \
        const bool ok = real(owner, seq_id, p0, p1);                                                               \
        if (ok) {                                                                                                  \
            call.report(on, owner, EVENT_SEQ_RM, seq_id, p0, p1, 0);                                               \
        }                                                                                                          \
        return ok;                                                                                                 \
    }                                                                                                              \
    MOETRACE_HOOK(void, prefix##_seq_add, (owner_t owner, llama_seq_id seq_id, llama_pos p0, llama_pos p1,         \
            llama_pos delta), (owner, seq_id, p0, p1, delta)) {                                                    \
        const outer_call call;                                                                                     \
        call.report(on, owner, EVENT_SEQ_ADD, seq_id, p0, p1, delta);                                              \
        real(owner, seq_id, p0, p1, delta);                                                                        \
    }                                                                                                              \
    MOETRACE_HOOK(void, prefix##_seq_cp, (owner_t owner, llama_seq_id src, llama_seq_id dst, llama_pos p0,         \
            llama_pos p1), (owner, src, dst, p0, p1)) {                                                            \
        const outer_call call;                                                                                     \
        call.report(on, owner, EVENT_SEQ_CP, src, p0, p1, dst);                                                    \
        real(owner, src, dst, p0, p1);                                                                             \
    }                                                                                                              \
    MOETRACE_HOOK(void, prefix##_seq_keep, (owner_t owner, llama_seq_id seq_id), (owner, seq_id)) {                \
        const outer_call call;                                                                                     \
        call.report(on, owner, EVENT_SEQ_KEEP, seq_id, 0, -1, 0);                                                  \
        real(owner, seq_id);                                                                                       \
    }                                                                                                              \
    MOETRACE_HOOK(void, prefix##_seq_div, (owner_t owner, llama_seq_id seq_id, llama_pos p0, llama_pos p1,         \
            int divisor), (owner, seq_id, p0, p1, divisor)) {                                                      \
        const outer_call call;                                                                                     \
        call.report(on, owner, EVENT_SEQ_DIV, seq_id, p0, p1, divisor);                                            \
        real(owner, seq_id, p0, p1, divisor);                                                                      \
    }

MOETRACE_MEMORY_HOOKS(llama_memory,   llama_memory_t,  memory_on_event)
MOETRACE_MEMORY_HOOKS(llama_kv_self,  llama_context *, context_on_event)
MOETRACE_MEMORY_HOOKS(llama_kv_cache, llama_context *, context_on_event)

MOETRACE_HOOK(void, llama_memory_clear, (llama_memory_t memory, bool data), (memory, data)) {
    const outer_call call;
    call.report(memory_on_event, memory, EVENT_CLEAR, -1, 0, -1, 0);
    real(memory, data);
}

MOETRACE_HOOK(void, llama_kv_self_clear, (llama_context * ctx), (ctx)) {
    const outer_call call;
    call.report(context_on_event, ctx, EVENT_CLEAR, -1, 0, -1, 0);
    real(ctx);
}

MOETRACE_HOOK(void, llama_kv_cache_clear, (llama_context * ctx), (ctx)) {
    const outer_call call;
    call.report(context_on_event, ctx, EVENT_CLEAR, -1, 0, -1, 0);
    real(ctx);
}

static size_t restored(llama_context * ctx, llama_seq_id sequence, size_t bytes, const outer_call & call) {
    if (bytes > 0) {
        call.report(context_on_event, ctx, EVENT_RESTORE, sequence, 0, bytes < INT_MAX ? (int32_t) bytes : INT_MAX, 0);
    }
    return bytes;
}

MOETRACE_HOOK(size_t, llama_state_seq_set_data, (llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id seq_id),
        (ctx, src, size, seq_id)) {
    const outer_call call;
    return restored(ctx, seq_id, real(ctx, src, size, seq_id), call);
}

MOETRACE_HOOK(size_t, llama_state_seq_set_data_ext, (llama_context * ctx, const uint8_t * src, size_t size,
        llama_seq_id seq_id, uint32_t flags), (ctx, src, size, seq_id, flags)) {
    const outer_call call;
    return restored(ctx, seq_id, real(ctx, src, size, seq_id, flags), call);
}

MOETRACE_HOOK(size_t, llama_state_seq_load_file, (llama_context * ctx, const char * path, llama_seq_id seq_id,
        llama_token * tokens, size_t capacity, size_t * n_tokens), (ctx, path, seq_id, tokens, capacity, n_tokens)) {
    const outer_call call;
    return restored(ctx, seq_id, real(ctx, path, seq_id, tokens, capacity, n_tokens), call);
}

MOETRACE_HOOK(size_t, llama_state_set_data, (llama_context * ctx, const uint8_t * src, size_t size), (ctx, src, size)) {
    const outer_call call;
    return restored(ctx, -1, real(ctx, src, size), call);
}

MOETRACE_HOOK(bool, llama_state_load_file, (llama_context * ctx, const char * path, llama_token * tokens,
        size_t capacity, size_t * n_tokens), (ctx, path, tokens, capacity, n_tokens)) {
    const outer_call call;
    const bool ok = real(ctx, path, tokens, capacity, n_tokens);
    restored(ctx, -1, ok ? 1 : 0, call);
    return ok;
}

//
// our own functions
//

#define MOETRACE_API extern "C" __attribute__((visibility("default")))

// Starts tracing as the "key=value" lines say (csrc/config.h); an empty text means the environment. 0: ok;
// otherwise `error` (of `size` bytes) says why. Call it while no graph is being computed.
MOETRACE_API int moetrace_start(const char * text, char * error, size_t size) {
    std::string why;
    const bool ok = tracer_start(text, why);
    if (!ok && error && size) {
        snprintf(error, size, "%s", why.c_str());
    }
    return ok ? 0 : 1;
}

MOETRACE_API void moetrace_stop() {
    tracer_stop();
}

// Puts an intervention in force from the next graph on; 0: none (csrc/intervene.h).
MOETRACE_API void moetrace_intervene(uint32_t number) {
    tracer_intervene(number);
}

// What can be traced in this process, as JSON. Returns the length it would need.
MOETRACE_API size_t moetrace_probe(char * out, size_t size) {
    const std::string text = tracer_probe();
    if (out && size) {
        snprintf(out, size, "%s", text.c_str());
    }
    return text.size();
}

// The address of a function of the loaded llama.cpp or ggml, or nullptr.
MOETRACE_API void * moetrace_symbol(const char * name) {
    return symbol_find(name);
}

__attribute__((constructor)) static void preload_init() {
    std::string error;
    if (!tracer_start("", error)) {
        fprintf(stderr, "moetrace: not tracing: %s\n", error.c_str());
    }
}
