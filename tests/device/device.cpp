// A device for tests, loaded by llama.cpp through GGML_BACKEND_PATH. It behaves as a GPU does: its memory is not the
// host's, what it is asked to do is done later, it fuses nodes and reorders them. It computes with the CPU backend, and so
// gives the same numbers, to the bit, where nothing is fused. Set by environment variables:
//
//   TEST_DEVICE_COUNT    devices, 1 to 3
//   TEST_DEVICE_ORDER    how nodes are reordered: see order.h
//   TEST_DEVICE_FUSE     0: nothing is fused
//   TEST_DEVICE_STREAM   "lazy": nothing is done until somebody waits; a number: microseconds of delay (default 100)
//   TEST_DEVICE_COUNTS   file for what was done, JSON

#include "kernels.h"
#include "memory.h"
#include "order.h"
#include "stream.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

struct settings {
    int         n_devices = 1;
    std::string order;
    bool        fuse     = true;
    bool        lazy     = false;
    int         delay_us = 100;
    std::string counts;
} config;

struct counts {
    std::atomic<int64_t> graphs { 0 };
    std::atomic<int64_t> fused[FUSION_KINDS] = {};
    std::atomic<int64_t> fused_nodes { 0 };  // a shorter pattern may fit where the longer one is cut
    std::atomic<int64_t> moved { 0 };        // nodes that graph_optimize put elsewhere
    std::atomic<int64_t> synchronizations { 0 };
    std::atomic<int64_t> reads { 0 };        // asynchronous ones
    std::atomic<int64_t> read_bytes { 0 };
    std::atomic<int64_t> unpinned { 0 };     // reads into memory that is not pinned: a GPU would make the host wait
} counted;

void counts_write() {
    if (config.counts.empty()) {
        return;
    }
    if (FILE * file = fopen(config.counts.c_str(), "w")) {
        const auto number = [](const std::atomic<int64_t> & n) { return (long long) n.load(); };
        fprintf(file, "{\"graphs\": %lld, \"topk_moe\": %lld, \"norm_mul\": %lld, \"matrix_add\": %lld, \"fused_nodes\": %lld, \"moved\": %lld, "
            "\"synchronizations\": %lld, \"reads\": %lld, \"read_bytes\": %lld, \"unpinned\": %lld}\n", number(counted.graphs),
            number(counted.fused[FUSION_TOPK_MOE]), number(counted.fused[FUSION_NORM_MUL]),
            number(counted.fused[FUSION_MATRIX_ADD]), number(counted.fused_nodes), number(counted.moved), number(counted.synchronizations),
            number(counted.reads), number(counted.read_bytes), number(counted.unpinned));
        fclose(file);
    }
}

ggml_backend_dev_t cpu_device() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

//
// memory
//

struct device_state {
    std::string name;
    ggml_backend_buffer_type buffers;
    ggml_backend_buffer_type pinned;
};

device_state * state_of(ggml_backend_dev_t device) { return (device_state *) device->context; }

const char * buffers_name(ggml_backend_buffer_type_t type) { return state_of(type->device)->name.c_str(); }

const char * pinned_name(ggml_backend_buffer_type_t) { return "Test_Host"; }

bool pinned_is_host(ggml_backend_buffer_type_t) { return true; }

size_t buffers_alignment(ggml_backend_buffer_type_t) { return 128; }

//
// stream
//

struct stream_state {
    std::shared_ptr<stream> work;
    ggml_backend_t          cpu;
    std::string             name;
};

stream_state * state_of(ggml_backend_t backend) { return (stream_state *) backend->context; }

const char * stream_name(ggml_backend_t backend) { return state_of(backend)->name.c_str(); }

void stream_free(ggml_backend_t backend) {
    stream_state * s = state_of(backend);
    s->work->wait(s->work->last());
    ggml_backend_free(s->cpu);
    delete s;
    delete backend;
    counts_write();
}

void stream_set(ggml_backend_t backend, ggml_tensor * t, const void * from, size_t offset, size_t size) {
    char * to = memory_address(t) + offset;
    std::string bytes((const char *) from, size);
    state_of(backend)->work->push([=] { memcpy(to, bytes.data(), bytes.size()); });
}

void stream_get(ggml_backend_t backend, const ggml_tensor * t, void * to, size_t offset, size_t size) {
    counted.reads++;
    counted.read_bytes += (int64_t) size;
    counted.unpinned   += !memory_is_pinned(to);
    const char * from = memory_address(t) + offset;
    state_of(backend)->work->push([=] { memcpy(to, from, size); });
}

bool stream_copy(ggml_backend_t from, ggml_backend_t to, const ggml_tensor * source, ggml_tensor * target) {
    if (!memory_holds(source) || !memory_holds(target) || from->table.free != stream_free || to->table.free != stream_free) {
        return false;
    }
    const char * a = memory_address(source);
    char *       b = memory_address(target);
    const size_t size = ggml_nbytes(source);
    const std::shared_ptr<stream> reader = state_of(to)->work;
    const stream_point before { reader, reader == state_of(from)->work ? 0 : reader->last() };
    const uint64_t number = state_of(from)->work->push([=] {
        before.wait(); // the other device may still read what was there
        memcpy(b, a, size);
    });
    if (from != to) {
        const stream_point copied { state_of(from)->work, number };
        reader->push([=] { copied.wait(); });
    }
    return true;
}

void stream_synchronize(ggml_backend_t backend) {
    counted.synchronizations++;
    const auto & work = state_of(backend)->work;
    work->wait(work->last());
}

ggml_status stream_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    counted.graphs++;
    int64_t fused[FUSION_KINDS] = {};
    const auto work = std::make_shared<kernels>(graph, config.fuse, fused);
    counted.fused_nodes += work->n_fused_nodes();
    for (int kind = 0; kind < FUSION_KINDS; kind++) {
        counted.fused[kind] += fused[kind];
    }
    ggml_backend_t cpu = state_of(backend)->cpu;
    state_of(backend)->work->push([=] { work->run(cpu); });
    return GGML_STATUS_SUCCESS;
}

void stream_event_record(ggml_backend_t backend, ggml_backend_event_t event) {
    const auto & work = state_of(backend)->work;
    *(stream_point *) event->context = { work, work->last() };
}

void stream_event_wait(ggml_backend_t backend, ggml_backend_event_t event) {
    const stream_point point = *(stream_point *) event->context;
    if (point.of != state_of(backend)->work) {
        state_of(backend)->work->push([=] { point.wait(); });
    }
}

void stream_optimize(ggml_backend_t, ggml_cgraph * graph, alloc_dependencies *) {
    counted.moved += nodes_reorder(graph, config.order);
}

ggml_guid_t stream_guid() {
    static ggml_guid guid = { 't', 'e', 's', 't', ' ', 'd', 'e', 'v', 'i', 'c', 'e' };
    return &guid;
}

//
// device
//

const char * device_name(ggml_backend_dev_t device) { return state_of(device)->name.c_str(); }

const char * device_description(ggml_backend_dev_t) { return "a device of moetrace's tests"; }

void device_memory(ggml_backend_dev_t, size_t * available, size_t * total) {
    *available = *total = (size_t) 8 << 30;
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void device_properties(ggml_backend_dev_t device, ggml_backend_dev_props * out) {
    *out = {};
    out->name        = device_name(device);
    out->description = device_description(device);
    out->type        = device_type(device);
    out->caps.async       = true;
    out->caps.events      = true;
    out->caps.host_buffer = true;
    device_memory(device, &out->memory_free, &out->memory_total);
}

ggml_backend_t device_stream_new(ggml_backend_dev_t device, const char *) {
    ggml_backend_t cpu = ggml_backend_dev_init(cpu_device(), nullptr);
    auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(cpu_device()), "ggml_backend_set_n_threads");
    set_n_threads(cpu, 1);
    const stream_table table = {
        stream_name, stream_free, stream_set, stream_get, nullptr, nullptr, stream_copy, stream_synchronize, {},
        stream_compute, stream_event_record, stream_event_wait, stream_optimize,
    };
    auto * state = new stream_state { std::make_shared<stream>(config.lazy, config.delay_us), cpu, device_name(device) };
    return new ggml_backend { stream_guid(), table, device, state };
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t device) { return &state_of(device)->buffers; }

ggml_backend_buffer_type_t device_pinned_type(ggml_backend_dev_t device) { return &state_of(device)->pinned; }

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_MAP_CUSTOM1: case GGML_OP_MAP_CUSTOM2: case GGML_OP_MAP_CUSTOM3: case GGML_OP_CUSTOM:
            return false; // functions of the host
        default:
            return ggml_backend_dev_supports_op(cpu_device(), op);
    }
}

bool device_supports_buffers(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    return type == device_buffer_type(device);
}

bool device_offloads(ggml_backend_dev_t, const ggml_tensor * op) {
    const int64_t batch = op->op == GGML_OP_MUL_MAT_ID ? op->ne[2] : op->op == GGML_OP_GET_ROWS ? 0 : op->ne[1];
    return batch >= 32;
}

ggml_backend_event_t device_event_new(ggml_backend_dev_t device) {
    return new ggml_backend_event { device, new stream_point };
}

void device_event_free(ggml_backend_dev_t, ggml_backend_event_t event) {
    delete (stream_point *) event->context;
    delete event;
}

void device_event_synchronize(ggml_backend_dev_t, ggml_backend_event_t event) {
    ((stream_point *) event->context)->wait();
}

//
// registry
//

ggml_backend_device devices[3];

const char * registry_name(ggml_backend_reg_t) { return "Test"; }

size_t registry_n_devices(ggml_backend_reg_t) { return (size_t) config.n_devices; }

ggml_backend_dev_t registry_device(ggml_backend_reg_t, size_t index) { return &devices[index]; }

const char * variable(const char * name, const char * otherwise) {
    const char * value = getenv(name);
    return value && *value ? value : otherwise;
}

// reads the environment; gives what is wrong with it
const char * settings_read() {
    config.n_devices = atoi(variable("TEST_DEVICE_COUNT", "1"));
    config.order     = variable("TEST_DEVICE_ORDER", "");
    config.fuse      = strcmp(variable("TEST_DEVICE_FUSE", "1"), "0") != 0;
    config.counts    = variable("TEST_DEVICE_COUNTS", "");
    const std::string how = variable("TEST_DEVICE_STREAM", "100");
    config.lazy     = how == "lazy";
    config.delay_us = config.lazy ? 0 : atoi(how.c_str());
    if (config.n_devices < 1 || config.n_devices > 3) {
        return "TEST_DEVICE_COUNT is not 1, 2 or 3";
    }
    return is_order(config.order) ? "" : "TEST_DEVICE_ORDER is none that there is";
}

} // namespace

const char * ggml_plugin_trouble() {
    if (strcmp(ggml_version(), PLUGIN_GGML_VERSION) != 0) {
        return "it is written for another ggml: compare ggml-plugin.h with the tables of this one";
    }
    // the tables of the CPU's device, as declared here, must say what the public functions say
    ggml_backend_dev_t cpu = cpu_device();
    const bool same = cpu && cpu->table.type(cpu) == ggml_backend_dev_type(cpu) && cpu->table.name(cpu) == ggml_backend_dev_name(cpu) &&
        cpu->table.buffer_type(cpu) == ggml_backend_dev_buffer_type(cpu) &&
        cpu->table.buffer_type(cpu)->table.is_host(cpu->table.buffer_type(cpu)) && cpu->registry->api_version == PLUGIN_API_VERSION;
    return same ? "" : "its tables are not those of this ggml";
}

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
    for (const char * trouble : { ggml_plugin_trouble(), settings_read() }) {
        if (*trouble) {
            fprintf(stderr, "the tests' device is not loaded: %s (ggml %s)\n", trouble, ggml_version());
            return nullptr;
        }
    }
    static ggml_backend_reg registry = {
        PLUGIN_API_VERSION, { registry_name, registry_n_devices, registry_device, nullptr }, nullptr,
    };
    for (int i = 0; i < config.n_devices; i++) {
        auto * state = new device_state { "Test" + std::to_string(i), {}, {} };
        state->buffers = {
            { buffers_name, memory_alloc, buffers_alignment, nullptr, nullptr, nullptr }, &devices[i], nullptr,
        };
        state->pinned = {
            { pinned_name, memory_alloc_pinned, buffers_alignment, nullptr, nullptr, pinned_is_host }, &devices[i], nullptr,
        };
        devices[i] = {
            {
                device_name, device_description, device_memory, device_type, device_properties, device_stream_new, device_buffer_type,
                device_pinned_type, nullptr, device_supports_op, device_supports_buffers, device_offloads, device_event_new, device_event_free,
                device_event_synchronize,
            },
            &registry, state,
        };
    }
    atexit(counts_write);
    return &registry;
}
