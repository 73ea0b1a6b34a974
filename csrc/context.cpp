#include "context.h"

#include "json.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <fstream>
#include <sys/stat.h>
#include <unistd.h>

namespace moetrace {

static constexpr size_t MAX_EARLY_EVENTS = 4096;
static constexpr int32_t MAX_SEQUENCES   = 1 << 16; // whose tasks and samples are followed
static constexpr size_t MAX_IDLE         = 8;

void say(const std::string & text) {
    fprintf(stderr, "moetrace: %s\n", text.c_str());
}

// after an error nothing is recorded any more; the host goes on
void context_fail(context_trace & c, const std::string & why) {
    if (c.state != context_state::failed) {
        c.state = context_state::failed;
        say((c.rec ? c.rec->name : "a context") + " is not traced any more: " + why);
        if (c.rec) {
            c.rec->ring.close(why.c_str());
        }
    }
}

collector_kind collector_choose(const config & cfg) {
    if (cfg.collector != COLLECTOR_AUTO) {
        return cfg.collector;
    }
    // keeping wide tensors alive to the end of the graph would cost more memory than reading them at once
    const bool wide = (cfg.channels & (CHANNEL_GATE_INPUT | CHANNEL_ATTENTION | CHANNEL_OUTPUTS)) || !cfg.tensors.empty();
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

// what llama-server calls the model
static std::string host_alias() {
    std::ifstream file("/proc/self/cmdline", std::ios::binary);
    std::string argument;
    bool next = false;
    while (std::getline(file, argument, '\0')) {
        if (next) {
            return argument;
        }
        if (argument.rfind("--alias=", 0) == 0) {
            return argument.substr(8);
        }
        next = argument == "-a" || argument == "--alias";
    }
    const char * value = getenv("LLAMA_ARG_ALIAS");
    return value ? value : "";
}

// All that the ring says of its contexts, but for its name, its process and the model's files.
// Channels that are read so that a device may leave out fewer of its results than it would without us: what is kept alive
// has one user more, and the callback cuts the graph behind a node. Experts and weights are read without.
static std::vector<std::string> channels_unfused(const tracer_env & env, const sched_trace & s, const std::vector<std::string> & channels) {
    std::vector<std::string> out;
    if (env.abi.sched_get_n_backends(s.sched) < 2) {
        return out;
    }
    const bool tap = collector_choose(env.cfg) == COLLECTOR_TAP;
    for (const std::string & name : channels) {
        const bool moved = name == "experts" || name == "weights" || (tap && name == "logits" && env.abi.can_place());
        if (!moved) {
            out.push_back(name);
        }
    }
    return out;
}

static std::string context_facts(const tracer_env & env, const sched_trace & s, const context_trace & c, const row_layout & layout) {
    static constexpr const char * COUNTERS[] = {
        "rows_produced", "rows_committed", "rows_lost_full", "rows_lost_error", "rows_overwritten",
        "events_committed", "events_lost", "events_overwritten", "rows_warmup", "rows_paused", "rows_unrouted",
        "rows_unidentified", "graphs", "batches", "wait_ns", "hook_ns", "sync_ns", "attention_lost",
        "rows_intervened", "graphs_unread", "contexts", "contexts_freed", "syncs", "copies",
        "copied_bytes", "graphs_elsewhere",
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
    for (uint32_t bit = 0; bit < 7; bit++) {
        if (env.cfg.channels & (1u << bit)) {
            channels.push_back(channel_name((channel) (1u << bit)));
        }
    }
    for (const auto & tensor : layout.tensors) {
        channels.push_back("tensor:" + tensor);
    }

    std::string model = "{\"name\":" + json_string(model_meta(facts, c.model, "general.name"));
    model += ",\"architecture\":" + json_string(arch) + ",\"description\":" + json_string(desc);
    model += ",\"n_layer\":" + number(facts.n_layer && c.model ? facts.n_layer(c.model) : 0);
    model += ",\"n_embd\":" + number(facts.n_embd && c.model ? facts.n_embd(c.model) : 0);
    model += ",\"n_expert\":" + number(layout.e_max) + ",\"n_expert_used\":" + number(layout.k_max);
    const std::string alias = host_alias();
    const std::string named = model + json_string(alias);
    char id[16];
    snprintf(id, sizeof(id), "%08x", crc32(named.data(), named.size()));
    model += ",\"n_ctx\":" + number(facts.n_ctx && c.ctx ? facts.n_ctx(c.ctx) : 0);
    model += ",\"n_ubatch\":" + number(facts.n_ubatch && c.ctx ? facts.n_ubatch(c.ctx) : 0);
    model += ",\"n_seq_max\":" + number(c.n_seq_max) + "}";

    std::string out = "\"role\":\"" + std::string(c.role) + "\",\"collector\":\"";
    out += collector_choose(env.cfg) == COLLECTOR_TAP ? "tap" : "callback";
    out += "\",\"ggml\":" + json_string(env.abi.version);
    out += ",\"channels\":" + json_list(channels, json_string);
    out += ",\"may_unfuse\":" + json_list(channels_unfused(env, s, channels), json_string);
    out += ",\"refused_tensors\":" + json_list(layout.refused, json_string);
    out += ",\"numbered\":true,\"alias\":" + json_string(alias) + ",\"model_id\":\"" + id + "\"";
    out += ",\"model\":" + model;
    out += ",\"layers\":" + json_list(layout.layers, number);
    out += ",\"n_expert\":" + json_list(layout.n_expert, number);
    out += ",\"n_expert_used\":" + json_list(layout.k, number);
    out += ",\"consumers\":" + json_list(layout.matrices, json_matrices);
    out += ",\"routers\":" + json_list(router_shapes(s.shape), [&](const router_shape & r) {
        return "[" + number(r.layer) + "," + number(r.n_expert) + "," + number(r.k) + "," + number(r.n_group) + "," +
            number(r.n_group_used) + "," + number(r.selects) + "]";
    });
    out += ",\"counter_names\":" + json_list(std::vector<std::string>(std::begin(COUNTERS), std::end(COUNTERS)), json_string);
    return out;
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
    c.thread = std::this_thread::get_id();
    c.count(COUNT_BATCHES);
}

// grown as needed; nullptr for a sequence that is not followed
static int32_t * sequence_slot(std::vector<int32_t> & values, int32_t sequence, int32_t none) {
    if (sequence < 0 || sequence >= MAX_SEQUENCES) {
        return nullptr;
    }
    if ((size_t) sequence >= values.size()) {
        values.resize((size_t) sequence + 1, none);
    }
    return &values[(size_t) sequence];
}

// where an event leaves the positions that were sampled from last
static void sampled_follow(context_trace & c, const context_event & e) {
    const bool every = e.sequence < 0 || e.code == EVENT_CLEAR;
    const int64_t end = e.p1 < 0 ? INT64_MAX : e.p1;
    for (size_t s = 0; s < c.sampled.size(); s++) {
        int32_t & p = c.sampled[s];
        const bool mine = every || e.sequence == (int32_t) s;
        const bool in   = p >= std::max(e.p0, 0) && p < end;
        switch (e.code) {
            case EVENT_LAUNCH: case EVENT_RESTORE: p = mine ? -2 : p; break;
            case EVENT_CLEAR:    p = -2; break;
            case EVENT_SEQ_RM:   p = mine && in ? -2 : p; break;
            case EVENT_SEQ_ADD:  p = mine && in ? p + e.arg : p; break;
            case EVENT_SEQ_DIV:  p = mine && in && e.arg > 0 ? p/e.arg : p; break;
            case EVENT_SEQ_KEEP: p = e.sequence == (int32_t) s ? p : -2; break;
            default: break;
        }
    }
}

void context_position(context_trace & c, int32_t sequence, int32_t position) {
    if (int32_t * slot = sequence_slot(c.positions_last, sequence, -2)) {
        *slot = position;
    }
}

void context_sampled(context_trace & c, int32_t sequence, int32_t position) {
    if (int32_t * slot = sequence_slot(c.sampled, sequence, -2)) {
        *slot = position;
    }
}

static std::pair<int32_t, int32_t> entry_sampled(context_trace & c, size_t index) {
    const auto & entries = c.matcher.entries();
    const batch_entry & e = entries[index];
    int32_t position = e.position;
    if (position == batch_entry::UNKNOWN) { // llama.cpp continued the sequence by itself
        const int32_t * last = sequence_slot(c.positions_last, e.sequence, -2);
        const auto later = std::count_if(entries.begin() + (long) index + 1, entries.end(), [&](const batch_entry & other) {
            return other.sequence == e.sequence;
        });
        position = last && *last >= 0 ? *last - (int32_t) later : -2;
    }
    context_sampled(c, e.sequence, position);
    return { position >= 0 ? e.sequence : -1, position };
}

std::pair<int32_t, int32_t> context_sample(context_trace & c, int32_t index) {
    const auto & entries = c.matcher.entries();
    if (index >= 0) {
        return (size_t) index < entries.size() ? entry_sampled(c, (size_t) index) : std::make_pair(-1, -1);
    }
    for (size_t i = entries.size(); i-- > 0;) {
        if (entries[i].outputs && ++index == 0) {
            return entry_sampled(c, i);
        }
    }
    return { -1, -1 };
}

void context_sample_all(context_trace & c) {
    const auto & entries = c.matcher.entries();
    for (size_t i = 0; i < entries.size(); i++) {
        if (entries[i].outputs && std::none_of(entries.begin(), entries.end(), [&](const batch_entry & e) {
            return e.outputs && &e != &entries[i] && e.sequence == entries[i].sequence;
        })) {
            entry_sampled(c, i);
        }
    }
}

static void event_write(context_trace & c, const context_event & e) {
    recording & rec = *c.rec;
    int32_t arg = e.arg;
    if (e.code == EVENT_LAUNCH) {
        if (int32_t * task = sequence_slot(rec.tasks, e.sequence, 0)) {
            arg = ++*task;
        }
    }
    record_head * head = (record_head *) rec.event_record.data();
    head->serial      = rec.serial;
    head->time_ns     = (int64_t) clock_ns();
    head->step        = rec.first_step + c.n_steps;
    head->batch       = rec.first_batch + c.n_batches;
    head->token       = e.code;
    head->position    = e.p0;
    head->sequence    = e.sequence;
    head->kind        = RECORD_EVENT;
    head->n_sequences = 0;
    head->flags       = 0;
    head->row         = rec.n_events++; // lost or not: a gap tells
    head->arg0        = e.p1;
    head->arg1        = arg;
    rec.ring.count(rec.ring.push(head) ? COUNT_EVENTS_COMMITTED : COUNT_EVENTS_LOST);
}

void context_event_push(context_trace & c, const context_event & e) {
    c.cleared  |= e.code == EVENT_CLEAR;
    if (e.code == EVENT_SEQ_ADD) {
        c.cells.shift(e.sequence, e.p0, e.p1, e.arg);
    } else if (e.code == EVENT_RESTORE || e.code == EVENT_CONTEXT) {
        c.cells.forget();
    }
    c.launched |= e.code == EVENT_LAUNCH;
    sampled_follow(c, e);
    if (c.rec && c.rec->ring.is_open()) {
        event_write(c, e);
    } else if (c.state == context_state::waiting && c.early.size() < MAX_EARLY_EVENTS) {
        c.early.push_back(e);
    } else if (c.state == context_state::waiting) {
        c.count(COUNT_EVENTS_LOST);
    }
}

void context_pause_look(context_trace & c) {
    if (!c.rec || !c.rec->ring.is_open()) {
        return;
    }
    recording & rec = *c.rec;
    const bool paused = rec.ring.paused();
    if (paused != rec.was_paused) {
        context_event_push(c, { paused ? EVENT_PAUSE : EVENT_RESUME, -1, 0, (int32_t) std::min<uint64_t>(rec.n_unrecorded, INT32_MAX), 0 });
        rec.was_paused   = paused;
        rec.n_unrecorded = 0;
    }
}

bool context_has_mail(context_trace & c) {
    std::lock_guard<std::mutex> lock(c.inbox_mutex);
    return !c.inbox.empty() || c.inbox_lost;
}

void context_inbox_take(context_trace & c) {
    std::vector<context_event> events;
    {
        std::lock_guard<std::mutex> lock(c.inbox_mutex);
        events.swap(c.inbox);
        if (c.inbox_lost && c.rec) {
            c.rec->n_events += c.inbox_lost; // a gap tells
            c.count(COUNT_EVENTS_LOST, c.inbox_lost);
            c.inbox_lost = 0;
        }
    }
    for (const auto & e : events) {
        context_event_push(c, e);
    }
}

//
// the ring
//

// The folder of a new recording, ctx0, ctx1, ...; empty, with the reason, if there can be none.
static std::string folder_make(const config & cfg, std::string & name, std::string & error) {
    struct stat info;
    const bool there = stat(cfg.dir.c_str(), &info) == 0;
    if (cfg.dir_inode && (!there || info.st_ino != cfg.dir_inode)) {
        error = cfg.dir + (there ? " is another folder than when the recording began" : " is gone");
        return "";
    }
    if (there && info.st_uid != geteuid() && (info.st_mode & S_IWOTH)) {
        error = cfg.dir + " belongs to another user, and anybody may write to it";
        return "";
    }
    for (int i = 0; i < 10000; i++) {
        name = "ctx" + std::to_string(i);
        const std::string folder = cfg.dir + "/" + name;
        if (mkdir(folder.c_str(), 0700) == 0) {
            return folder;
        }
        if (errno != EEXIST) {
            error = "cannot make " + folder + ": " + strerror(errno);
            return "";
        }
    }
    error = cfg.dir + " has ten thousand contexts";
    return "";
}

static void control_read(const std::string & path, bool main, ring_params & params) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        const size_t eq = line.find('=');
        const std::string key = line.substr(0, eq), value = eq == std::string::npos ? "" : line.substr(eq + 1);
        if (value.empty() || value.size() > 9 || value.find_first_not_of("0123456789") != std::string::npos) {
            continue;
        }
        if (key == "paused") {
            params.paused = value != "0";
        } else if (key == "intervention" && main) {
            params.intervention = (uint32_t) std::stoul(value);
        }
    }
}

// What was set by `moetrace start|stop|intervene` for all models and for this one, should its server have ended and begun
// again (moetrace/trace/control.py).
static void controls_read(const config & cfg, const std::string & facts, const std::string & role, ring_params & params) {
    static constexpr char KEY[] = "\"model_id\":\"";
    const bool main = role == "main";
    const std::string model = facts.substr(facts.find(KEY) + sizeof(KEY) - 1, 8);
    control_read(cfg.dir + "/control/all", main, params);
    control_read(cfg.dir + "/control/" + model + (main ? "" : "-" + role), main, params);
}

// The idle recording of the same model, taken from the list; nullptr if there is none.
static std::unique_ptr<recording> idle_take(tracer_env & env, const std::string & facts) {
    std::lock_guard<std::mutex> lock(env.mutex);
    for (auto it = env.idle.begin(); it != env.idle.end(); it++) {
        if ((*it)->facts == facts) {
            std::unique_ptr<recording> found = std::move(*it);
            env.idle.erase(it);
            return found;
        }
    }
    return nullptr;
}

bool sched_is_split(const tracer_env & env, const sched_trace & s) {
    for (int i = 0; i < env.abi.sched_get_n_backends(s.sched); i++) {
        // llama.cpp's device that is made of several
        if (strncmp(env.abi.backend_name(env.abi.sched_get_backend(s.sched, i)), "Meta", 4) == 0) {
            return true;
        }
    }
    return false;
}

void context_open(tracer_env & env, sched_trace & s, context_trace & c) {
    if (sched_is_split(env, s)) {
        context_fail(c, "its tensors are split over several devices (-sm tensor); use -sm layer");
        return;
    }
    auto rec = std::make_unique<recording>();
    rec->layout.make(s.shape, env.cfg);
    if (rec->layout.layers.empty()) {
        context_fail(c, "none of the layers asked for routes tokens to experts");
        return;
    }
    if (rec->layout.stride == 0) {
        context_fail(c, "a record would take more than 1 GiB; choose fewer layers or channels");
        return;
    }
    rec->facts = context_facts(env, s, c, rec->layout);
    if (std::unique_ptr<recording> idle = idle_take(env, rec->facts)) {
        c.rec   = std::move(idle);
        c.state = context_state::recording;
        context_event_push(c, { EVENT_CONTEXT, -1, 0, -1, 0 });
    } else {
        std::string error;
        const std::string folder = folder_make(env.cfg, rec->name, error);
        if (folder.empty()) {
            context_fail(c, error);
            return;
        }
        ring_params params;
        params.fields   = rec->layout.fields;
        params.bytes    = env.cfg.ring_bytes;
        params.on_full  = env.cfg.on_full;
        params.block_ns = env.cfg.block_ns;
        params.paused   = env.cfg.paused;
        {
            std::lock_guard<std::mutex> lock(env.mutex);
            params.intervention = env.cfg.intervene_all || strcmp(c.role, "main") == 0 ? env.cfg.intervention : 0;
            params.meta = "{\"name\":" + json_string(rec->name) + ",\"pid\":" + std::to_string(getpid()) +
                ",\"model_files\":" + json_list(env.model_files, json_string) + "," + rec->facts + "}";
        }
        if (!rec->ring.create(folder + "/ring", params, error)) {
            rmdir(folder.c_str());
            context_fail(c, "cannot make its ring in " + folder + ": " + error);
            return;
        }
        // whoever sets something writes it first and looks for rings then
        controls_read(env.cfg, rec->facts, c.role, params);
        ring_header * header = rec->ring.header();
        header->paused.store(params.paused ? 1 : 0, std::memory_order_release);
        header->intervention.store(params.intervention, std::memory_order_release);
        rec->was_paused = params.paused;
        rec->event_record.assign(rec->layout.stride, 0);
        c.rec   = std::move(rec);
        c.state = context_state::recording;
    }
    if (const size_t at = c.rec->facts.find("\"may_unfuse\":[\""); at != std::string::npos) {
        const size_t from = at + sizeof("\"may_unfuse\":") - 1;
        const std::string names = c.rec->facts.substr(from + 1, c.rec->facts.find(']', from) - from - 1);
        say(c.rec->name + ": fusions on the device are undone to read " + names + "; logits may differ in their last digits");
    }
    const uint32_t n_lost = (uint32_t) c.counts_early[COUNT_EVENTS_LOST]; // behind those that are kept
    for (uint32_t i = 0; i < COUNT_N; i++) {
        if (c.counts_early[i]) { // some are another thread's to write
            c.rec->ring.count((ring_counter) i, std::exchange(c.counts_early[i], 0));
        }
    }
    c.count(COUNT_CONTEXTS);
    const std::vector<context_event> early = std::move(c.early);
    c.early.clear();
    for (const auto & e : early) {
        event_write(c, e); // what followed from it has happened
    }
    c.rec->n_events += n_lost; // a gap tells
}

void context_end(tracer_env & env, context_trace & c) {
    std::unique_ptr<recording> rec, oldest;
    {
        std::lock_guard<std::mutex> lock(c.mutex);
        c.ended = true;
        c.ctx = nullptr;
        c.memory = nullptr;
        if (c.state == context_state::recording && c.rec->ring.is_open()) {
            context_inbox_take(c);
            c.count(COUNT_CONTEXTS_FREED);
            c.rec->first_step  += c.n_steps;
            c.rec->first_batch += c.n_batches;
            rec = std::move(c.rec);
        }
        c.state = context_state::failed; // nothing more to record
    }
    std::lock_guard<std::mutex> lock(env.mutex);
    if (rec) {
        env.idle.push_back(std::move(rec));
    }
    if (env.idle.size() > MAX_IDLE) {
        oldest = std::move(env.idle.front()); // closed as it goes
        env.idle.erase(env.idle.begin());
    }
}

} // namespace moetrace
