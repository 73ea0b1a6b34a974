// The tracer as hosts use it, on a ggml of our own: contexts on several threads, contexts that come and go, forks, memory
// that runs out, graphs that were reordered or never announced. Run it under ThreadSanitizer, too (make sanitize).

#include "check.h"
#include "fake-graph.h"
#include "record.h"
#include "ring.h"
#include "tracer.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <dirent.h>
#include <fcntl.h>
#include <functional>
#include <new>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

using namespace moetrace;

//
// memory that runs out: from one allocation on, for ever or once
//

static std::atomic<long> n_allocations { 0 };
static std::atomic<long> fails_from { -1 };
static std::atomic<long> fails_to { -1 };

void * operator new(size_t size) {
    const long n = n_allocations++;
    void * p = n >= fails_from && n < fails_to ? nullptr : malloc(size);
    if (!p) {
        throw std::bad_alloc();
    }
    return p;
}
void * operator new(size_t size, const std::nothrow_t &) noexcept { // as the library's, under a sanitizer too
    try {
        return operator new(size);
    } catch (...) {
        return nullptr;
    }
}
void operator delete(void * p) noexcept { free(p); }
void operator delete(void * p, size_t) noexcept { free(p); }

//
// a host
//

static constexpr int64_t N = 4, N_EMBD = 8, N_EXPERT = 4, K = 2;

struct one_layer : fake_graph {
    ggml_tensor * positions;

    one_layer() {
        fake().nodes.clear();
        const auto placed = [&](ggml_tensor * t) {
            place(t, 1024);
            return t;
        };
        ggml_tensor * tokens = placed(leaf("inp_tokens", TYPE_I32, N, 1));
        positions = placed(leaf("inp_pos", TYPE_I32, N, 1));
        fake().nodes = { tokens, positions }; // the fake looks for names among the nodes only
        ggml_tensor * x = placed(node("GET_ROWS", TYPE_F32, N_EMBD, N, 1, { leaf("token_embd.weight", TYPE_F32, N_EMBD, 99), tokens }));
        ggml_tensor * logits = placed(node("MUL_MAT", TYPE_F32, N_EXPERT, N, 1, { leaf("blk.0.ffn_gate_inp.weight", TYPE_F32, N_EMBD, N_EXPERT), x }));
        ggml_tensor * probs = placed(node("SOFT_MAX", TYPE_F32, N_EXPERT, N, 1, { logits }));
        ggml_tensor * ids = placed(node("TOP_K", TYPE_I32, K, N, 1, { probs }));
        ggml_tensor * weights = placed(node("GET_ROWS", TYPE_F32, 1, K, N, { probs, ids }));
        ggml_tensor * up = placed(node("MUL_MAT_ID", TYPE_F32, N_EMBD, K, N, { leaf("blk.0.ffn_up_exps.weight", TYPE_F32, N_EMBD, N_EMBD, N_EXPERT), x, ids }));
        placed(node("MUL", TYPE_F32, N_EMBD, K, N, { up, weights }));
    }

    // positions of the ubatch's tokens
    void begin_at(int32_t first) {
        for (int32_t i = 0; i < N; i++) {
            ((int32_t *) fake().at<void *>(positions, fake().data))[i] = first + i;
        }
    }
};

static int  compute(sched_t, ggml_cgraph *) { return 0; }
static void set_callback(sched_t, eval_callback, void *) {}

struct host {
    llama_context * ctx;
    sched_t sched;
    ggml_cgraph * graph;

    explicit host(uintptr_t n) : ctx((llama_context *) (0x1000*n)), sched((sched_t) (0x1000*n + 0x100)), graph((ggml_cgraph *) (0x1000*n + 0x200)) {}

    void decode(int32_t first = 0, bool announced = true, const std::function<void()> & reorder = {}, bool knows_positions = true) const {
        int32_t token[N] = {}, position[N], n_seq[N] = { 1, 1, 1, 1 }, zero = 0;
        int32_t * sequence[N] = { &zero, &zero, &zero, &zero };
        int8_t output[N] = { 0, 0, 0, 1 };
        for (int32_t i = 0; i < N; i++) {
            position[i] = first + i;
        }
        batch_view batch = {};
        batch.n_tokens = N;
        batch.token    = token;
        batch.pos      = knows_positions ? position : nullptr;
        batch.n_seq_id = n_seq;
        batch.seq_id   = sequence;
        batch.logits   = output;
        batch_scope scope(ctx, batch, false);
        if (announced) {
            sched_on_alloc(sched, graph);
        }
        if (reorder) {
            reorder();
        }
        sched_on_compute(sched, graph, compute, set_callback);
    }

    void free() const {
        context_on_free(ctx);
        sched_on_free(sched);
    }
};

//
// its rings
//

struct ring_view {
    const ring_header * header = nullptr;
    const uint8_t *     data   = nullptr;
    size_t              size   = 0;

    explicit ring_view(const std::string & folder) {
        const int fd = open((folder + "/ring").c_str(), O_RDWR);
        CHECK(fd >= 0);
        struct stat info;
        CHECK(fstat(fd, &info) == 0);
        size = (size_t) info.st_size;
        void * base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        CHECK(base != MAP_FAILED);
        header = (const ring_header *) base;
        data   = (const uint8_t *) base + header->data_offset;
    }
    ~ring_view() { munmap((void *) header, size); }
    ring_view(const ring_view &) = delete;
    ring_view & operator=(const ring_view &) = delete;

    uint64_t count(ring_counter c) const { return header->counters[c]; }
    std::vector<const record_head *> records() const { // those that are still there
        std::vector<const record_head *> found;
        const uint64_t head = header->head;
        for (uint64_t i = head > header->capacity ? head - header->capacity : 0; i < head; i++) {
            found.push_back((const record_head *) (data + (i % header->capacity)*header->stride));
        }
        return found;
    }
    std::vector<const record_head *> rows() const {
        auto found = records();
        found.erase(std::remove_if(found.begin(), found.end(), [](const record_head * r) { return r->kind != RECORD_ROW; }), found.end());
        return found;
    }
};

static std::string folder_new() {
    char name[] = "/tmp/moetrace-test-XXXXXX";
    CHECK(mkdtemp(name));
    return name;
}

static std::vector<std::string> contexts_in(const std::string & trace) {
    std::vector<std::string> found;
    DIR * dir = opendir(trace.c_str());
    CHECK(dir);
    while (const dirent * entry = readdir(dir)) {
        if (strncmp(entry->d_name, "ctx", 3) == 0) {
            found.push_back(trace + "/" + entry->d_name);
        }
    }
    closedir(dir);
    std::sort(found.begin(), found.end());
    return found;
}

static std::string begin(const std::string & options = "") {
    const std::string trace = folder_new();
    std::string error;
    CHECK(tracer_start(("trace=" + trace + "\n" + options).c_str(), error));
    return trace;
}

static void tidy(const std::string & trace) {
    tracer_stop();
    for (const auto & folder : contexts_in(trace)) {
        unlink((folder + "/ring").c_str());
        rmdir(folder.c_str());
    }
    rmdir(trace.c_str());
}

//
// tests
//

// One context gets its server's launches on one thread while another computes on a second: nobody writes into the
// other's ring, and no task of the one begins one of the other.
static void two_threads() {
    const std::string trace = begin("on_full=overwrite\n");
    const host a(1), b(2);
    a.decode();
    b.decode();
    std::atomic<bool> done { false };
    std::thread serves([&] {
        while (!done) {
            context_on_launch(a.ctx, 0);
            batch_on_add(&done, 0, 0, 1);
            batch_on_clear(&done);
        }
    });
    std::thread computes([&] {
        for (int i = 0; i < 2000; i++) {
            b.decode();
        }
        done = true;
    });
    serves.join();
    computes.join();
    const auto folders = contexts_in(trace);
    CHECK(folders.size() == 2);
    const ring_view of_b(folders[1]);
    CHECK(of_b.count(COUNT_ROWS_COMMITTED) == 2001*N);
    CHECK(of_b.header->head == of_b.count(COUNT_ROWS_COMMITTED) + of_b.count(COUNT_EVENTS_COMMITTED));
    CHECK(of_b.count(COUNT_EVENTS_COMMITTED) == 0);
    for (const record_head * row : of_b.rows()) {
        CHECK(row->arg0 == 0);
    }
    tidy(trace);
}

// Two models that compute at once, with events of their own.
static void two_models_compute() {
    const std::string trace = begin("on_full=overwrite\n");
    std::vector<std::thread> threads;
    for (uintptr_t n = 1; n <= 2; n++) {
        threads.emplace_back([n] {
            const host h(n);
            for (int i = 0; i < 1000; i++) {
                context_on_launch(h.ctx, 0);
                h.decode();
                context_on_event(h.ctx, EVENT_SEQ_RM, 0, 0, -1, 0);
            }
        });
    }
    for (auto & t : threads) {
        t.join();
    }
    host(1).free(); // not before: the other would go on in its recording
    host(2).free();
    for (const auto & folder : contexts_in(trace)) {
        const ring_view ring(folder);
        CHECK(ring.count(COUNT_ROWS_COMMITTED) == 1000*N);
        CHECK(ring.header->head == ring.count(COUNT_ROWS_COMMITTED) + ring.count(COUNT_EVENTS_COMMITTED));
    }
    tidy(trace);
}

// While one context waits for its reader, another's hooks go on.
static void a_full_ring_holds_its_own() {
    const std::string trace = begin("on_full=block\nring_size=2048\nblock_ms=60000\n");
    const host a(1), b(2);
    a.decode();
    const ring_view ring(contexts_in(trace)[0]);
    while (ring.header->head < ring.header->capacity) {
        context_on_event(a.ctx, EVENT_SEQ_RM, 0, 0, -1, 0);
    }
    std::atomic<bool> waiting { true };
    std::thread waits([&] {
        context_on_event(a.ctx, EVENT_SEQ_RM, 0, 0, -1, 0);
        waiting = false;
    });
    batch_on_clear(&waiting); // another thread's
    context_on_warmup(b.ctx, false);
    context_on_free(b.ctx);
    CHECK(waiting);
    const_cast<ring_header *>(ring.header)->tail.store(ring.header->head, std::memory_order_release);
    waits.join();
    CHECK(ring.count(COUNT_EVENTS_LOST) == 0);
    tidy(trace);
}

// A server that sleeps: its contexts follow each other in one ring, what was set stays set, and events on the memory of
// a new context at the old one's address are the new one's.
static void contexts_follow_each_other() {
    const std::string trace = begin("on_full=overwrite\n");
    static char memory[1];
    fake().memory = memory;
    for (uintptr_t n = 1; n <= 200; n++) {
        const host h(n);
        h.decode();
        memory_on_event(memory, EVENT_SEQ_RM, 0, 0, -1, 0);
        h.free();
        const ring_view ring(contexts_in(trace)[0]);
        CHECK(ring.count(COUNT_CONTEXTS) == n);
        CHECK(ring.count(COUNT_CONTEXTS_FREED) == n);
        CHECK(!ring.header->closed);
        if (n == 100) {
            const_cast<ring_header *>(ring.header)->paused = 1;
        }
    }
    fake().memory = nullptr;
    const auto folders = contexts_in(trace);
    CHECK(folders.size() == 1);
    const ring_view ring(folders[0]);
    CHECK(ring.count(COUNT_ROWS_COMMITTED) == 100*N);
    CHECK(ring.count(COUNT_ROWS_PAUSED) == 100*N);
    const auto records = ring.records();
    CHECK(std::count_if(records.begin(), records.end(), [](const record_head * r) {
        return r->kind == RECORD_EVENT && r->token == EVENT_CONTEXT;
    }) == 199);
    uint32_t next = 0;
    uint64_t serial = 0;
    for (const record_head * r : records) {
        if (r->kind == RECORD_EVENT) {
            CHECK(r->row == next++);
        } else {
            CHECK(r->serial == serial++);
            CHECK((uint32_t) r->arg1 == next);
        }
    }
    tidy(trace);
}

// What was set for a model holds for its contexts that begin later, in another process too.
static void what_was_set_is_found() {
    const std::string trace = begin("on_full=overwrite\n");
    CHECK(mkdir((trace + "/control").c_str(), 0700) == 0);
    FILE * f = fopen((trace + "/control/all").c_str(), "w");
    CHECK(f && fputs("paused=1\nnonsense\nintervention=x\n", f) >= 0 && fclose(f) == 0);
    host(1).decode();
    const ring_view ring(contexts_in(trace)[0]);
    CHECK(ring.count(COUNT_ROWS_PAUSED) == N && ring.count(COUNT_ROWS_PRODUCED) == 0);
    CHECK(ring.header->paused == 1 && ring.header->intervention == 0);
    unlink((trace + "/control/all").c_str());
    rmdir((trace + "/control").c_str());
    tidy(trace);
}

// A folder that was put in the trace's place is left alone.
static void a_folder_in_its_place() {
    const std::string trace = begin("on_full=overwrite\n");
    const std::string moved = trace + "-moved";
    CHECK(rename(trace.c_str(), moved.c_str()) == 0 && mkdir(trace.c_str(), 0700) == 0);
    host(1).decode();
    CHECK(contexts_in(trace).empty());
    tidy(trace);
    rmdir(moved.c_str());
}

// Tasks are numbered, and what was sampled is flagged, through shifts and across tasks.
static void rows_say_what_came_before() {
    one_layer g;
    const std::string trace = begin("on_full=overwrite\n");
    const host h(1);
    g.begin_at(0);
    h.decode(0);
    context_on_sample(h.ctx, -1);
    g.begin_at(4);
    h.decode(4);
    context_on_sample(h.ctx, 1);
    context_on_event(h.ctx, EVENT_SEQ_RM, 0, 6, -1, 0);
    context_on_event(h.ctx, EVENT_SEQ_ADD, 0, 2, -1, -2);
    g.begin_at(4);
    h.decode(4); // follows position 5, now 3
    context_on_logits(h.ctx);
    context_on_launch(h.ctx, 0);
    g.begin_at(8);
    h.decode(8); // another task: a prompt
    const ring_view ring(contexts_in(trace)[0]);
    const auto rows = ring.rows();
    CHECK(rows.size() == 4*N);
    for (size_t i = 0; i < rows.size(); i++) {
        CHECK(rows[i]->position >= 0);
        CHECK(((rows[i]->flags & ROW_GENERATED) != 0) == (i == N || i == 2*N));
        CHECK(rows[i]->arg0 == (i >= 3*N));
    }
    tidy(trace);
}

// A host that leaves positions to llama.cpp: its first generated token is known, too.
static void positions_are_followed() {
    one_layer g;
    const std::string trace = begin("on_full=overwrite\n");
    const host h(1);
    for (int32_t first : { 0, 4 }) {
        g.begin_at(first);
        h.decode(first, true, {}, false);
        context_on_sample(h.ctx, -1);
    }
    const ring_view ring(contexts_in(trace)[0]);
    const auto rows = ring.rows();
    CHECK(rows.size() == 2*N);
    for (size_t i = 0; i < rows.size(); i++) {
        CHECK(rows[i]->position == (int32_t) i);
        CHECK(((rows[i]->flags & ROW_GENERATED) != 0) == (i == N));
    }
    tidy(trace);
}

// Nodes in another order than when the graph was announced; and a graph that never was.
static void graphs_change() {
    const std::string trace = begin("on_full=overwrite\n");
    const host h(1);
    const auto order = fake().nodes;
    h.decode(0, true, [] { std::reverse(fake().nodes.begin(), fake().nodes.end()); });
    fake().nodes = order;
    {
        const ring_view ring(contexts_in(trace)[0]);
        CHECK(ring.count(COUNT_ROWS_COMMITTED) == N);
        CHECK(ring.count(COUNT_GRAPHS_UNREAD) == 0);
    }
    h.decode();
    host unannounced(2);
    unannounced.ctx = h.ctx;
    unannounced.decode(0, false);
    const ring_view ring(contexts_in(trace)[0]);
    // it is read while it is computed
    CHECK(ring.count(COUNT_GRAPHS_UNREAD) == 0);
    CHECK(ring.count(COUNT_ROWS_LOST_ERROR) == 0);
    CHECK(ring.count(COUNT_ROWS_COMMITTED) == 3*N);
    tidy(trace);
}

// A child that goes on computing has a ring of its own.
static void forks() {
    const std::string trace = begin("on_full=overwrite\n");
    const host h(1);
    h.decode();
    const pid_t pid = fork();
    CHECK(pid >= 0);
    for (int i = 0; i < 100; i++) {
        h.decode();
    }
    if (pid == 0) {
        _exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    const auto folders = contexts_in(trace);
    CHECK(folders.size() == 2);
    const ring_view parent(folders[0]), child(folders[1]);
    CHECK(parent.count(COUNT_ROWS_COMMITTED) == 101*N && parent.header->host_pid == (uint32_t) getpid());
    CHECK(child.count(COUNT_ROWS_COMMITTED) == 100*N && child.header->host_pid == (uint32_t) pid);
    CHECK(parent.header->head == 101*N);
    tidy(trace);
}

// A process that ends closes its rings, of contexts that it freed and of others; one that is killed cannot.
static void processes_end() {
    const std::string trace = folder_new();
    for (const bool exits : { false, true }) {
        const pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            std::string error;
            CHECK(tracer_start(("trace=" + trace + "\non_full=overwrite\n").c_str(), error));
            const host freed(1), other(2);
            freed.decode();
            other.decode();
            freed.free();
            exits ? exit(0) : _exit(0);
        }
        int status = 0;
        waitpid(pid, &status, 0);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        const auto folders = contexts_in(trace);
        CHECK(folders.size() == (exits ? 4 : 2));
        for (size_t i = exits ? 2 : 0; i < folders.size(); i++) {
            const ring_view ring(folders[i]);
            CHECK(ring.header->closed == exits);
            CHECK(ring.count(COUNT_ROWS_COMMITTED) == N);
        }
    }
    tidy(trace);
}

// Each allocation fails, once or for ever: no exception leaves a hook, and the host computes all its graphs.
static void memory_runs_out() {
    static std::atomic<int> n_computed;
    for (const bool for_ever : { false, true }) {
        for (const bool in_batch : { false, true }) {
            bool enough = false;
            for (long k = 0; k < 1000 && !enough; k++) {
                const std::string trace = folder_new();
                const pid_t pid = fork();
                CHECK(pid >= 0);
                if (pid == 0) {
                    const int null = open("/dev/null", O_WRONLY);
                    dup2(null, STDERR_FILENO);
                    std::string error;
                    const std::string text = "trace=" + trace + "\non_full=overwrite\nring_size=4096\n";
                    tracer_start(text.c_str(), error);
                    n_computed = 0;
                    const auto counted = [](sched_t, ggml_cgraph *) { n_computed++; return 0; };
                    const host h(1);
                    const long first = n_allocations + k;
                    fails_to   = for_ever ? (long) 1e9 : first + 1;
                    fails_from = first;
                    try {
                        for (int i = 0; i < 3; i++) {
                            if (in_batch) {
                                h.decode();
                                n_computed++;
                            } else {
                                sched_on_alloc(h.sched, h.graph);
                                sched_on_compute(h.sched, h.graph, counted, set_callback);
                            }
                        }
                        h.free();
                    } catch (...) {
                        _exit(7);
                    }
                    fails_from = -1;
                    fails_to   = -1;
                    _exit(n_computed != 3 ? 8 : n_allocations <= first ? 9 : 0);
                }
                int status = 0;
                waitpid(pid, &status, 0);
                CHECK(WIFEXITED(status));
                CHECK(WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 9);
                enough = WEXITSTATUS(status) == 9; // all of them have failed
                for (const auto & folder : contexts_in(trace)) {
                    unlink((folder + "/ring").c_str());
                    rmdir(folder.c_str());
                }
                rmdir(trace.c_str());
            }
            CHECK(enough);
        }
    }
}

int main() {
    one_layer g;
    memory_runs_out(); // first: it forks, and there are no threads yet
    forks();
    processes_end();
    contexts_follow_each_other();
    what_was_set_is_found();
    a_folder_in_its_place();
    graphs_change();
    a_full_ring_holds_its_own();
    two_threads();
    two_models_compute();
    rows_say_what_came_before();
    positions_are_followed();
    printf("ok\n");
    return 0;
}
