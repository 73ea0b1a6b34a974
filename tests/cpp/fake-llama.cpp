// A llama.cpp of which a process can hold several: each call leaves the NUMBER of the library that served it.

#include <cstdlib>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void ggml_init() {}

EXPORT void ggml_backend_sched_synchronize(int * who) {
    *who = NUMBER;
}

EXPORT int ggml_backend_sched_graph_compute_async(int * who, void *) {
    *who = NUMBER;
    return NUMBER;
}

EXPORT int use() {
    int who = 0;
    ggml_backend_sched_synchronize(&who);
    int computed = 0;
    return ggml_backend_sched_graph_compute_async(&computed, nullptr) == computed && computed == who ? who : 0;
}
