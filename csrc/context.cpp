#include "context.h"

#include "json.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sys/stat.h>
#include <unistd.h>

namespace moetrace {

static constexpr size_t MAX_EARLY_EVENTS = 4096;

// after an error nothing is recorded any more; the host goes on
void say(const std::string & text) {
    fprintf(stderr, "moetrace: %s\n", text.c_str());
}

void context_fail(context_trace & c, const std::string & why) {
    if (c.state != context_state::failed) {
        c.state = context_state::failed;
        say((c.name.empty() ? "a context" : c.name) + " is not traced any more: " + why);
        c.ring.close(why.c_str());
    }
}

collector_kind collector_choose(const config & cfg) {
    if (cfg.collector != COLLECTOR_AUTO) {
        return cfg.collector;
    }
    // keeping wide tensors alive to the end of the graph would cost more memory than reading them at once
    const bool wide = (cfg.channels & (CHANNEL_GATE_INPUT | CHANNEL_ATTENTION)) || !cfg.tensors.empty();
    return wide ? COLLECTOR_CALLBACK : COLLECTOR_TAP;
}

//
// what the ring says of itself
//

static std::string json_matrices(uint8_t bits) {
    std::vector<std::string> names;
    if (bits & MATRIX_GATE)    { names.push_back("ffn_gate_exps"); }
    if (bits & MATRIX_UP)      { names.push_back("ffn_up_exps"); }
    if (bits & MATRIX_GATE_UP) { names.push_back("ffn_gate_up_exps"); }
    if (bits & MATRIX_DOWN)    { names.push_back("ffn_down_exps"); }
    return json_list(names, json_string);
}

static std::string model_meta(const llama_facts & facts, const llama_model * model, const std::string & key) {
    char text[256] = "";
    if (!facts.meta_val || !model || facts.meta_val(model, key.c_str(), text, sizeof(text)) < 0) {
        return "";
    }
    return text;
}

static std::string context_meta(const tracer_env & env, const sched_trace & s, const context_trace & c) {
    static constexpr const char * COUNTERS[] = {
        "rows_produced", "rows_committed", "rows_lost_full", "rows_lost_error", "rows_overwritten",
        "events_committed", "events_lost", "events_overwritten", "rows_warmup", "rows_paused", "rows_unrouted",
        "rows_unidentified", "graphs", "batches", "wait_ns", "hook_ns", "sync_ns", "attention_lost",
        "rows_intervened", "graphs_unread", "contexts", "contexts_freed",
    };
    static_assert(sizeof(COUNTERS)/sizeof(COUNTERS[0]) == COUNT_N, "a counter has no name");

    const auto number = [](int64_t n) { return std::to_string(n); };
    const auto & facts = env.facts;
    const std::string arch = model_meta(facts, c.model, "general.architecture");
    char desc[256] = "";
    if (facts.desc && c.model) {
        facts.desc(c.model, desc, sizeof(desc));
    }
    std::vector<std::string> channels;
    for (uint32_t bit = 0; bit < 6; bit++) {
        if (env.cfg.channels & (1u << bit)) {
            channels.push_back(channel_name((channel) (1u << bit)));
        }
    }
    for (const auto & tensor : c.layout.tensors) {
        channels.push_back("tensor:" + tensor);
    }
    const row_layout & layout = c.layout;

    std::string out = "{\"name\":" + json_string(c.name) + ",\"role\":\"" + c.role + "\",\"pid\":" + number(getpid());
    out += ",\"collector\":\"";
    out += collector_choose(env.cfg) == COLLECTOR_TAP ? "tap" : "callback";
    out += "\",\"ggml\":" + json_string(env.abi.version);
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
    out += ",\"routers\":" + json_list(router_shapes(s.shape), [&](const router_shape & r) {
        return "[" + number(r.layer) + "," + number(r.n_expert) + "," + number(r.k) + "," + number(r.n_group) + "," +
            number(r.n_group_used) + "," + number(r.selects) + "]";
    });
    out += ",\"counter_names\":" + json_list(std::vector<std::string>(std::begin(COUNTERS), std::end(COUNTERS)), json_string);
    return out + "}";
}

//
// batches and events
//

// Before it serves anyone, llama.cpp decodes BOS and EOS to warm up, and two tokens 0 right after clearing its
// memory to learn whether the memory can forget.
static bool is_trial(const tracer_env & env, const context_trace & c) {
    const auto & entries = c.matcher.entries();
    if (c.launched || entries.empty() || entries.size() > 2) {
        return false;
    }
    if ((c.cleared || c.n_batches == 0) && entries.size() == 2 && entries[0].token == 0 && entries[1].token == 0) {
        return true;
    }
    if (c.n_batches > 0 || !env.facts.vocab_bos || !env.facts.vocab_eos || !c.model) {
        return false;
    }
    const void * vocab = env.facts.get_vocab ? env.facts.get_vocab(c.model) : c.model;
    std::vector<int32_t> expected;
    for (int32_t token : { env.facts.vocab_bos(vocab), env.facts.vocab_eos(vocab) }) {
        if (token >= 0) {
            expected.push_back(token);
        }
    }
    return expected.size() == entries.size() && std::equal(entries.begin(), entries.end(), expected.begin(),
        [](const batch_entry & e, int32_t token) { return e.token == token; });
}

void context_batch_begin(const tracer_env & env, context_trace & c, bool known, bool encode) {
    c.in_batch = known;
    c.encode   = encode || (env.facts.get_memory && c.model && !c.memory); // no memory: an encoder
    c.trial    = known && is_trial(env, c);
    c.cleared  = false;
    if (known) {
        c.matcher.begin();
    }
    c.count(COUNT_BATCHES);
}

void context_event_push(context_trace & c, const context_event & e) {
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

//
// the ring
//

void context_open(tracer_env & env, sched_trace & s, context_trace & c) {
    for (int i = 0; i < env.abi.sched_get_n_backends(s.sched); i++) {
        // a tensor of llama.cpp's "Meta" backend (-sm tensor) lies in pieces on several devices
        if (strncmp(env.abi.backend_name(env.abi.sched_get_backend(s.sched, i)), "Meta", 4) == 0) {
            context_fail(c, "its tensors are split over several devices (-sm tensor); use -sm layer");
            return;
        }
    }
    c.layout.make(s.shape, env.cfg);
    if (c.layout.layers.empty()) {
        context_fail(c, "none of the layers asked for routes tokens to experts");
        return;
    }
    if (c.layout.stride == 0) {
        context_fail(c, "a record would take more than 1 GiB; choose fewer layers or channels");
        return;
    }

    struct stat info;
    if (stat(env.cfg.dir.c_str(), &info) == 0 && info.st_uid != geteuid() && (info.st_mode & S_IWOTH)) {
        context_fail(c, env.cfg.dir + " belongs to another user, and anybody may write to it");
        return;
    }
    std::string folder;
    for (int i = 0; i < 10000; i++) {
        c.name = "ctx" + std::to_string(i);
        folder = env.cfg.dir + "/" + c.name;
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
    params.meta     = context_meta(env, s, c);
    params.bytes    = env.cfg.ring_bytes;
    params.on_full  = env.cfg.on_full;
    params.block_ns = env.cfg.block_ns;
    params.paused   = env.cfg.paused;
    params.intervention = env.cfg.intervene_all || strcmp(c.role, "main") == 0 ? env.cfg.intervention : 0;
    std::string error;
    if (!c.ring.create(folder + "/ring", params, error)) {
        rmdir(folder.c_str());
        context_fail(c, "cannot make its ring in " + folder + ": " + error);
        return;
    }
    c.state      = context_state::recording;
    c.was_paused = env.cfg.paused;
    c.event_record.assign(c.layout.stride, 0);
    for (uint32_t i = 0; i < COUNT_N; i++) {
        c.ring.count((ring_counter) i, c.counts_early[i]);
    }
    for (const auto & e : c.early) {
        context_event_push(c, e);
    }
    c.early.clear();
}

} // namespace moetrace
