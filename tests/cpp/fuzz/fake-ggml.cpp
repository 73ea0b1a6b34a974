#include "fake-ggml.h"

#include <cstdlib>
#include <cstring>

fake_ggml & fake() {
    static fake_ggml state;
    return state;
}

static bool lies(uint32_t lie) {
    return fake().lies & lie;
}

static size_t type_size(int32_t type) {
    return type == 1 ? 2 : type == 27 ? 8 : 4;
}

void fake_ggml::fill(void * t, int32_t number, const int64_t * shape) const {
    memset(t, noise, size);
    memset((char *) t + name, 0, 64);
    at<int32_t>(t, type)  = number;
    at<int32_t>(t, op)    = 0;
    at<int32_t>(t, flags) = 0;
    for (void * word : { (char *) t + buffer, (char *) t + view_src, (char *) t + view_offs, (char *) t + data }) {
        memset(word, 0, 8);
    }
    memset((char *) t + src, 0, 80);
    size_t step = type_size(number);
    for (int d = 0; d < 4; d++) {
        at<int64_t>(t, ne + 8*(size_t) d) = shape[d];
        at<size_t>(t, nb + 8*(size_t) d)  = step + ((lies & LIE_STRIDES) && d == 1 ? 4 : 0);
        step *= (size_t) shape[d];
    }
}

namespace {

struct context { // lives in the caller's memory, as ggml's objects do
    char * next;
    char * end;
    int    left;
};

thread_local context current; // threads build graphs at once

struct init_params {
    size_t mem_size;
    void * mem_buffer;
    bool   no_alloc;
};

constexpr size_t OBJECT = 32;

void * tensor_make(int32_t type, const int64_t * ne) {
    fake_ggml & f = fake();
    if (current.left-- <= 0 || (size_t) (current.end - current.next) < OBJECT + f.size) {
        return nullptr;
    }
    void * t = current.next + OBJECT;
    current.next += OBJECT + f.size;
    f.fill(t, type, ne);
    return t;
}

void * node_make(const char * op, std::initializer_list<void *> sources) {
    fake_ggml & f = fake();
    const int64_t ne[4] = { 4, 3, 1, 1 };
    void * t = lies(LIE_NODES) ? nullptr : tensor_make(0, ne);
    if (!t) {
        return nullptr;
    }
    for (int i = 0; i < FAKE_N_OPS; i++) {
        if (strcmp(FAKE_OPS[i], op) == 0) {
            f.at<int32_t>(t, f.op) = f.first_op + i;
        }
    }
    size_t i = 0;
    for (void * source : sources) {
        const size_t place = lies(LIE_SOURCES) ? sources.size() - 1 - i : i;
        f.at<void *>(t, f.src + 8*place) = source;
        i++;
    }
    return t;
}

} // namespace

#define API extern "C" __attribute__((visibility("default")))

API void * ggml_init(init_params params) {
    current = { (char *) params.mem_buffer, (char *) params.mem_buffer + params.mem_size,
        lies(LIE_NEW_TENSOR) ? fake().n_tensors : 1 << 20 };
    return lies(LIE_INIT) ? nullptr : &current;
}
API void   ggml_free(void *) {}
API size_t ggml_tensor_overhead() { return OBJECT + fake().size + (lies(LIE_OVERHEAD) ? 64 : 0); }
API void * ggml_new_tensor_4d(void *, int32_t type, int64_t a, int64_t b, int64_t c, int64_t d) {
    const int64_t ne[4] = { a, b, c, d };
    return tensor_make(type, ne);
}
API void * ggml_view_1d(void *, void * of, int64_t, size_t offset) {
    fake_ggml & f = fake();
    void * t = node_make("VIEW", { of });
    if (t) {
        void * root = f.at<void *>(of, f.view_src);
        f.at<void *>(t, f.view_src)  = lies(LIE_VIEW) ? nullptr : root ? root : of;
        f.at<size_t>(t, f.view_offs) = f.at<size_t>(of, f.view_offs) + offset + (lies(LIE_VIEW_OFFSET) ? 8 : 0);
    }
    return t;
}
API void * ggml_mul_mat_id(void *, void * a, void * b, void * c) { return node_make("MUL_MAT_ID", { a, b, c }); }
API void * ggml_mul_mat(void *, void * a, void * b)  { return node_make("MUL_MAT", { a, b }); }
API void * ggml_add(void *, void * a, void * b)      { return node_make("ADD", { a, b }); }
API void * ggml_get_rows(void *, void * a, void * b) { return node_make("GET_ROWS", { a, b }); }
API void * ggml_soft_max(void *, void * a)           { return node_make("SOFT_MAX", { a }); }
API void * ggml_set_name(void * t, const char * name) {
    strncpy((char *) t + fake().name, name, 63);
    return t;
}
API const char * ggml_get_name(const void * t) {
    return (const char *) t + fake().name + (lies(LIE_GET_NAME) ? 8 : 0);
}
API const char * ggml_op_desc(const void *) { return ""; }
API const char * ggml_op_name(int32_t op) {
    if (lies(LIE_OP_NULL)) {
        return nullptr;
    }
    const int i = op - fake().first_op + (lies(LIE_OP_NAME) && op ? 1 : 0);
    return op == 0 ? "NONE" : i >= 0 && i < FAKE_N_OPS ? FAKE_OPS[i] : nullptr;
}
API const char * ggml_type_name(int32_t type) {
    if (lies(LIE_TYPE_NAME)) {
        return type == 0 ? nullptr : "f32";
    }
    return type == 0 ? "f32" : type == 1 ? "f16" : type == 26 ? "i32" : type == 27 ? "i64" : "q4_0";
}
API void ggml_set_output(void * t) {
    fake_ggml & f = fake();
    if (!lies(LIE_SET_OUTPUT)) {
        __atomic_fetch_or(&f.at<int32_t>(t, f.flags), 2, __ATOMIC_RELAXED); // hosts of one test share a graph
    }
    if (lies(LIE_SET_OUTPUT_2)) {
        f.at<char>(t, f.size - 1)++;
    }
}
API void ggml_set_input(void * t) {
    fake_ggml & f = fake();
    f.at<int32_t>(t, f.flags) = (lies(LIE_SET_INPUT) ? 0 : f.at<int32_t>(t, f.flags)) | 1;
}
API void * ggml_backend_cpu_buffer_from_ptr(void *, size_t) { static char buffer[16]; return lies(LIE_BUFFER) ? nullptr : buffer; }
API void   ggml_backend_buffer_free(void *) {}
API int    ggml_backend_tensor_alloc(void * buffer, void * t, void * at) {
    fake_ggml & f = fake();
    if (!lies(LIE_ALLOC)) {
        f.at<void *>(t, f.buffer) = buffer;
        f.at<void *>(t, f.data)   = at;
    }
    return 0;
}
API void * ggml_get_data(const void * t) {
    return lies(LIE_GET_DATA) ? nullptr : fake().at<void *>((void *) t, fake().data);
}
API bool ggml_backend_buffer_is_host(void *) { return !lies(LIE_HOST); }
API void ggml_backend_tensor_set(void * t, const void * from, size_t offset, size_t size) {
    if (!lies(LIE_SET_DATA)) {
        memcpy(fake().at<char *>(t, fake().data) + offset, from, size);
    }
}
API void ggml_backend_tensor_get(const void * t, void * to, size_t offset, size_t size) {
    memset(to, 0, size);
    if (fake().reads) {
        memcpy(to, fake().at<char *>((void *) t, fake().data) + offset, size);
    }
}
API void ggml_backend_tensor_get_async(void *, const void *, void * to, size_t, size_t size) { memset(to, 0, size); }
API void ggml_backend_sched_synchronize(void *) {}
API void * ggml_backend_sched_get_tensor_backend(void *, void *) { return nullptr; }
API int    ggml_backend_sched_get_n_backends(void *) { return 1; }
API void * ggml_backend_sched_get_backend(void *, int) { return nullptr; }
API const char * ggml_backend_name(void *) { return "CPU"; }
API const char * ggml_version() { return "fake"; }

API void * llama_get_memory(const void *) { return fake().memory; }

API int    ggml_graph_n_nodes(void *) { return (int) fake().nodes.size(); }
API void * ggml_graph_node(void *, int i) { return fake().nodes[(size_t) i]; }
API void * ggml_graph_get_tensor(const void *, const char * name) {
    for (void * t : fake().nodes) {
        if (strcmp((const char *) t + fake().name, name) == 0) {
            return t;
        }
    }
    return nullptr;
}
