// One tracer per process; in it, one context_trace per llama context.
//
// The hooks in preload.cpp call these functions and nothing else. None of them throws, none ever fails the host:
// on trouble a context stops recording, says so once on stderr and in its ring, and the host goes on.

#pragma once

#include "ggml-abi.h"
#include "record.h"

#include <cstdint>
#include <string>

namespace moetrace {

// (Re)starts tracing with "key=value" lines (config.h). An empty text means the environment.
// Contexts that were being traced are closed. Returns false and a message on a bad configuration.
bool tracer_start(const char * text, std::string & error);
void tracer_stop();

// Puts intervention `number` (TRACE/interventions/NUMBER.bin) in force in all contexts; 0: none.
void tracer_intervene(uint32_t number);

// What can be traced in this process, as JSON: symbols, layout, trouble. Used by `moetrace doctor`.
std::string tracer_probe();

using sched_t = ggml_backend_sched *;

// --- scheduler hooks
void sched_on_callback(sched_t sched, eval_callback callback, void * user_data);
void sched_on_reserve(sched_t sched, ggml_cgraph * graph);
void sched_on_alloc(sched_t sched, ggml_cgraph * graph);
void sched_on_allocated(sched_t sched, ggml_cgraph * graph);
void sched_on_free(sched_t sched);
void sched_on_synchronized(sched_t sched); // what it computed is there

using set_callback_fn = void (*)(sched_t, eval_callback, void *);
using compute_fn      = int (*)(sched_t, ggml_cgraph *);
int  sched_on_compute(sched_t sched, ggml_cgraph * graph, compute_fn compute, set_callback_fn set_callback);
void graph_on_elsewhere(); // another llama.cpp of the process computes

// --- context hooks
struct batch_view { // the fields of llama_batch that have kept their place
    int32_t    n_tokens;
    int32_t *  token;
    float *    embd;
    int32_t *  pos;
    int32_t *  n_seq_id;
    int32_t ** seq_id;
    int8_t *   logits;
    char       rest[16]; // older releases had three more numbers
};

// A llama_decode, llama_encode or llama_process call, alive while it runs.
class batch_scope {
  public:
    batch_scope(llama_context * ctx, const batch_view & batch, bool encode);
    batch_scope(llama_context * ctx, const void * batch_ext, bool encode);
    ~batch_scope();
    batch_scope(const batch_scope &) = delete;
    batch_scope & operator=(const batch_scope &) = delete;

  private:
    llama_context * outer;
};

void context_on_free(llama_context * ctx);
void context_on_warmup(llama_context * ctx, bool warmup);
void context_on_launch(llama_context * ctx, int32_t sequence); // a server gave the sequence a task, or ended one
void context_on_sample(llama_context * ctx, int32_t index); // in the last batch, or from the last output if negative
void context_on_logits(llama_context * ctx);                // of all outputs of the last batch
void context_on_event(llama_context * ctx, event_code code, int32_t sequence, int32_t p0, int32_t p1, int32_t arg);
void memory_on_event(void * memory, event_code code, int32_t sequence, int32_t p0, int32_t p1, int32_t arg);

void model_on_open(const char * path); // a GGUF file

// --- llama_batch_ext hooks
int32_t batch_on_add(const void * batch, int32_t index, int32_t sequence, int32_t token);
void    batch_on_add_sequence(const void * batch, int32_t index);
void    batch_on_position(const void * batch, int32_t index, int32_t position);
void    batch_on_output(const void * batch, int32_t index, uint8_t what, bool wanted); // output_kind
void    batch_on_clear(const void * batch);
void    batch_on_free(const void * batch);

} // namespace moetrace
