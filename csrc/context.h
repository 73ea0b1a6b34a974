// One llama context, and the recording that it writes to.
//
// Who may touch what: a context, its schedulers and graphs belong to the thread that calls llama.cpp with the context
// (llama.cpp's own rule). Its mutex is held while its recording is written to, so that others can close it. What other
// contexts' threads have to tell it they put into its inbox. Locks are taken in this order: a context's, the tracer's
// (over the lists), an inbox's; nobody waits for a ring's reader under the tracer's.

#pragma once

#include "attention.h"
#include "batch-watch.h"
#include "collector.h"
#include "config.h"
#include "ggml-abi.h"
#include "moe-plan.h"
#include "ring.h"
#include "score-patch.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace moetrace {

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
    int32_t  (*vocab_bos)(const void *) = nullptr; // of a model where there is no get_vocab
    int32_t  (*vocab_eos)(const void *) = nullptr;

    void find() {
        const auto look = [](auto *& out, const char * name, const char * older = nullptr) {
            void * address = symbol_find(name);
            out = (std::decay_t<decltype(out)>) (address || !older ? address : symbol_find(older));
        };
        look(get_model,  "llama_get_model");
        look(meta_val,   "llama_model_meta_val_str");
        look(desc,       "llama_model_desc");
        look(n_layer,    "llama_model_n_layer", "llama_n_layer");
        look(n_embd,     "llama_model_n_embd", "llama_n_embd");
        look(n_ctx,      "llama_n_ctx");
        look(n_ubatch,   "llama_n_ubatch");
        look(n_seq_max,  "llama_n_seq_max");
        look(get_memory, "llama_get_memory");
        look(get_vocab,  "llama_model_get_vocab");
        look(vocab_bos,  get_vocab ? "llama_vocab_bos" : "llama_token_bos");
        look(vocab_eos,  get_vocab ? "llama_vocab_eos" : "llama_token_eos");
    }
};

struct context_event {
    event_code code;
    int32_t sequence, p0, p1, arg;
};

// an input of a graph: numbers that the host sets before it computes
struct graph_input {
    const ggml_tensor * t    = nullptr; // nullptr: the graph does not have it
    const int32_t *     host = nullptr; // where the numbers are, if in host memory
    int64_t             n    = 0;
};

// one graph that was allocated on a scheduler
struct graph_trace {
    ggml_cgraph * graph = nullptr;
    moe_graph     moe;
    graph_input   tokens, positions, out_ids; // set, as the sources are, once the graph is allocated
    std::vector<ggml_tensor *> to_place; // what is not kept in its place, since it gets one of our own
    std::vector<slab_use> placed;
    graph_sources sources;
    std::vector<attention_source> attention;
    bool          warmup  = false;
    bool          adopted = false;    // its allocation was not seen: nothing keeps its tensors
    uint64_t      bound_to = 0;       // number of the context whose layout the sources fit
    bool          by_callback = false; // what was to be kept is not
    graph_patches patches;            // made once an intervention needs them
    bool          has_patches = false;

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

// a scheduler; llama.cpp makes a context a new one now and then
struct sched_trace {
    ggml_backend_sched * sched = nullptr;
    std::shared_ptr<context_trace> context;
    uint64_t         generation = 0; // of the tracing that its graphs were read for
    eval_callback    user_callback = nullptr;
    void *           user_data     = nullptr;
    bool             user_aborted  = false; // the host's callback stopped the graph
    bool             user_asked    = false;
    bool             chained       = false; // our callback is installed
    uint64_t         prepare_ns    = 0;     // spent on reading graphs since the last ubatch
    uint64_t         setup_ns      = 0;     // spent on opening the ring: once
    bool             is_async      = true;  // it has more backends than the CPU's
    model_shape      shape;
    std::vector<std::unique_ptr<graph_trace>> graphs;
    std::unordered_map<const ggml_cgraph *, std::vector<uint64_t>> keepers; // memory of the nodes that were added
    std::vector<std::unique_ptr<result_slab>> slabs;

    graph_trace * find(const ggml_cgraph * graph) {
        for (auto & g : graphs) {
            if (g->graph == graph) {
                return g.get();
            }
        }
        return nullptr;
    }
};

// One ring: its contents' layout, and what goes on from one llama context to the next of the same model (a server that
// sleeps frees its context and makes another).
struct recording {
    std::string          name;
    std::string          facts; // the ring's JSON text but for name and process: equal, and it is the same model's
    ring_writer          ring;
    row_layout           layout;
    std::vector<uint8_t> event_record;
    std::vector<int32_t> tasks; // by sequence: LAUNCHes so far
    uint32_t             n_events = 0;
    uint64_t             serial   = 0;
    uint32_t             first_step  = 0; // of the present context
    uint32_t             first_batch = 0;
    bool                 was_paused  = false;
    uint64_t             n_unrecorded = 0; // rows since the pause began
    intervention         rules;
    uint32_t             intervention_seen = 0; // the control word, when it was last looked at

    int32_t task_of(int32_t sequence) const {
        return sequence >= 0 && (size_t) sequence < tasks.size() ? tasks[(size_t) sequence] : 0;
    }
};

// what every context needs of the process
struct tracer_env {
    config      cfg;
    ggml_abi    abi;
    llama_facts facts;
    std::vector<std::string> model_files; // GGUF files that were opened, in order
    std::vector<std::unique_ptr<recording>> idle; // of contexts that were freed: the next of the same model goes on
    std::mutex  mutex; // over the two lists, and those of tracer.cpp
};

enum class context_state { waiting, recording, failed };

struct context_trace {
    uint64_t            number = 0; // never given twice
    llama_context *     ctx   = nullptr; // nullptr: it computes outside of any decode call that we see
    const llama_model * model = nullptr;
    void *              memory = nullptr;
    uint32_t            n_seq_max = 0;
    const char *        role   = "main"; // main, draft, mtp
    std::vector<int>    moe_layers; // of its graphs
    std::atomic<std::thread::id> thread {}; // that decoded last
    std::atomic<bool>   ended { false };
    std::mutex          mutex;
    context_state       state  = context_state::waiting;
    bool                warmup = false; // llama_set_warmup

    std::unique_ptr<recording> rec; // once it is recording
    row_block           block;
    readback_buffer     readback;
    std::vector<context_event> early; // before there was a ring
    uint64_t            counts_early[COUNT_N] = {};

    std::mutex          inbox_mutex;
    std::vector<context_event> inbox; // from other contexts' threads
    uint32_t            inbox_lost = 0;

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
    std::vector<int32_t> sampled;   // by sequence: position that the host sampled from last; -2: none
    std::vector<int32_t> positions_last; // by sequence: of its last row
    std::vector<row_identity> identities;
    output_rows         outputs;
    std::vector<int32_t> tokens, positions, out_ids; // inputs that were not in host memory
    std::vector<intervened_row> rows;

    // the graph that is being computed
    graph_trace *       running = nullptr; // if it is recorded
    graph_trace *       patched = nullptr; // if its routing is changed
    uint64_t            hook_ns = 0;

    // the graph that devices are computing: its rows are read when they have finished
    graph_trace *       pending = nullptr;
    sched_trace *       pending_on = nullptr;

    void count(ring_counter c, uint64_t n = 1) {
        if (rec && rec->ring.is_open()) {
            rec->ring.count(c, n);
        } else {
            counts_early[c] += n;
        }
    }
};

// Says something on stderr, in one line.
void say(const std::string & text);

// Stops recording the context for good; the host goes on.
void context_fail(context_trace & c, const std::string & why);

// Gives the context a recording, now that its graphs have shown their shape: the idle one of its model, or a new folder
// and ring.
void context_open(tracer_env & env, sched_trace & s, context_trace & c);

// Whether tensors lie in pieces on several devices (-sm tensor): then none may be touched.
bool sched_is_split(const tracer_env & env, const sched_trace & s);

// The llama context is gone: its recording becomes idle.
void context_end(tracer_env & env, context_trace & c);

// A batch is about to be decoded; `known`: its tokens are in c.matcher.entries().
void context_batch_begin(const tracer_env & env, context_trace & c, bool known, bool encode);

// Something happened to a sequence. The caller holds the context's mutex.
void context_event_push(context_trace & c, const context_event & e);

// Looks whether recording was switched off or on, and says so. The caller holds the context's mutex.
void context_pause_look(context_trace & c);

// Whether other threads have told something.
bool context_has_mail(context_trace & c);

// Takes in what other threads have told. The caller holds the context's mutex.
void context_inbox_take(context_trace & c);

// The host has sampled from a row of the last batch: its index there, or counted from the last output if negative.
// Gives the row's sequence and position; -1 if it is not known.
std::pair<int32_t, int32_t> context_sample(context_trace & c, int32_t index);

// A row of the sequence is computed at this position.
void context_position(context_trace & c, int32_t sequence, int32_t position);

// It was sampled from in another context that this one serves (a draft's).
void context_sampled(context_trace & c, int32_t sequence, int32_t position);

// The host has looked at all outputs of the last batch: a sequence with just one was sampled from.
void context_sample_all(context_trace & c);

// The collector in force: auto is decided by the channels.
collector_kind collector_choose(const config & cfg);

} // namespace moetrace
