#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

namespace {

struct memory {
    char * seen;  // addresses that the host gets; touching them ends the process
    char * real;  // the same pages, for the device
    size_t bytes;
    ggml_backend_buffer_t plain;
};

memory * memory_of(ggml_backend_buffer_t buffer) {
    return (memory *) buffer->context;
}

void buffer_free(ggml_backend_buffer_t buffer) {
    memory * m = memory_of(buffer);
    ggml_backend_buffer_free(m->plain);
    munmap(m->seen, m->bytes);
    munmap(m->real, m->bytes);
    delete m;
}

void * buffer_base(ggml_backend_buffer_t buffer) {
    return memory_of(buffer)->seen;
}

void buffer_fill(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset(memory_address(t) + offset, value, size);
}

void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * from, size_t offset, size_t size) {
    memcpy(memory_address(t) + offset, from, size);
}

// as on a GPU, this does not wait for what is being computed
void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * to, size_t offset, size_t size) {
    memcpy(to, memory_address(t) + offset, size);
}

bool buffer_copy(ggml_backend_buffer_t, const ggml_tensor * from, ggml_tensor * to) {
    if (!memory_holds(from)) {
        return false;
    }
    memcpy(memory_address(to), memory_address(from), ggml_nbytes(from));
    return true;
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    memset(memory_of(buffer)->real, value, memory_of(buffer)->bytes);
}

ggml_backend_buffer_t buffer_of(const ggml_tensor * t) {
    return t->view_src ? t->view_src->buffer : t->buffer;
}

std::mutex pinned_mutex;
std::map<const char *, size_t> pinned; // start -> bytes

void pinned_free(ggml_backend_buffer_t buffer) {
    char * start = (char *) buffer->table.base(buffer);
    {
        std::lock_guard<std::mutex> lock(pinned_mutex);
        pinned.erase(start);
    }
    free(start);
}

} // namespace

ggml_backend_buffer_t memory_alloc_pinned(ggml_backend_buffer_type_t type, size_t size) {
    const size_t bytes = (size + 127) / 128 * 128;
    char * start = (char *) aligned_alloc(128, bytes ? bytes : 128);
    if (!start) {
        return nullptr;
    }
    ggml_backend_buffer_t buffer = ggml_backend_cpu_buffer_from_ptr(start, size);
    buffer->type       = type;
    buffer->table.free = pinned_free;
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[start] = bytes;
    return buffer;
}

bool memory_is_pinned(const void * address) {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    auto it = pinned.upper_bound((const char *) address);
    return it != pinned.begin() && (const char *) address < std::prev(it)->first + std::prev(it)->second;
}

ggml_backend_buffer_t memory_alloc(ggml_backend_buffer_type_t type, size_t size) {
    const size_t page  = (size_t) sysconf(_SC_PAGESIZE);
    const size_t bytes = ((size ? size : 1) + page - 1) / page * page;
    const int file = memfd_create("test-device", 0);
    if (file < 0 || ftruncate(file, (off_t) bytes) != 0) {
        return nullptr;
    }
    void * real = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    void * seen = mmap(nullptr, bytes, PROT_NONE, MAP_SHARED, file, 0);
    close(file);
    if (real == MAP_FAILED || seen == MAP_FAILED) {
        return nullptr;
    }
    memset(real, 0xFF, bytes); // NaN, and no id of an expert
    memory * m = new memory { (char *) seen, (char *) real, bytes, ggml_backend_cpu_buffer_from_ptr(real, bytes) };
    const buffer_table table = {
        buffer_free, buffer_base, nullptr, buffer_fill, buffer_set, buffer_get, nullptr, nullptr, buffer_copy, buffer_clear, nullptr,
    };
    return ggml_backend_buffer_init(type, table, m, size);
}

bool memory_holds(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = buffer_of(t);
    return buffer && buffer->table.free == buffer_free;
}

char * memory_address(const ggml_tensor * t) {
    memory * m = memory_of(buffer_of(t));
    return m->real + ((char *) t->data - m->seen);
}

ggml_backend_buffer_t memory_plain_buffer(const ggml_tensor * t) {
    return memory_of(buffer_of(t))->plain;
}
