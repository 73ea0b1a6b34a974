#include "ring.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace moetrace {

static constexpr uint64_t MAX_RING_BYTES = 1ull << 40;
static constexpr uint64_t READER_DEAD_NS = 2'000'000'000ull; // no sign of life for so long

static uint64_t clock_read(clockid_t id) {
    timespec ts;
    clock_gettime(id, &ts);
    return (uint64_t) ts.tv_sec*1'000'000'000ull + (uint64_t) ts.tv_nsec;
}

uint64_t clock_ns() {
    return clock_read(CLOCK_MONOTONIC);
}

uint32_t crc32(const void * data, size_t size, uint32_t crc) {
    const uint8_t * bytes = (const uint8_t *) data;
    crc = ~crc;
    for (size_t i = 0; i < size; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ (0xEDB88320u & (0u - (crc & 1u)));
        }
    }
    return ~crc;
}

static uint32_t dtype_size(const char * dtype) {
    return (uint32_t) (dtype[2] - '0'); // "|u1", "<f4", "<i8": checked by the callers' choice of codes
}

uint32_t ring_fields_layout(std::vector<ring_field> & fields) {
    uint64_t offset = sizeof(record_head);
    for (auto & field : fields) {
        offset = (offset + 7) & ~7ull;
        field.offset = (uint32_t) offset;
        uint64_t size = dtype_size(field.dtype);
        for (uint32_t d = 0; d < field.n_dims; d++) {
            size *= field.shape[d];
        }
        offset += size;
        if (offset > (1u << 30)) {
            return 0; // a record of a gigabyte is a mistake
        }
    }
    return (uint32_t) ((offset + 63) & ~63ull);
}

ring_writer::~ring_writer() {
    close("");
}

bool ring_writer::create(const std::string & path, const ring_params & params, std::string & error) {
    std::vector<ring_field> fields = params.fields;
    const uint32_t stride = ring_fields_layout(fields);
    if (stride == 0) {
        error = "a record would take more than 1 GiB; choose fewer layers or channels";
        return false;
    }

    const uint64_t fields_offset = sizeof(ring_header);
    const uint64_t meta_offset   = fields_offset + fields.size()*sizeof(ring_field);
    const uint64_t data_offset   = (meta_offset + params.meta.size() + 4095) & ~4095ull;
    const uint64_t capacity      = params.capacity ? params.capacity : std::max<uint64_t>(params.bytes/stride, 2);
    if (capacity > MAX_RING_BYTES/stride) {
        error = "the ring would take more than 1 TiB";
        return false;
    }
    const uint64_t size = data_offset + capacity*stride;

    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) {
        error = "open: " + std::string(strerror(errno));
        return false;
    }
    // reserve the space now: a hole would turn a full disk into a SIGBUS in the host
#ifdef __APPLE__
    int failed = ftruncate(fd, (off_t) size) == 0 ? 0 : errno;
#else
    int failed;
    do {
        failed = posix_fallocate(fd, 0, (off_t) size);
    } while (failed == EINTR);
#endif
    void * base = MAP_FAILED;
    if (failed) {
        error = "reserve " + std::to_string(size) + " bytes: " + strerror(failed);
    } else {
        base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (base == MAP_FAILED) {
            error = "mmap: " + std::string(strerror(errno));
        }
    }
    ::close(fd);
    if (base == MAP_FAILED) {
        unlink(path.c_str());
        return false;
    }
    memset(base, 0, size); // touch every page now, not on the hot path

    ring_header * h = (ring_header *) base;
    memcpy(h->magic, RING_MAGIC, sizeof(h->magic));
    h->version_major = RING_VERSION_MAJOR;
    h->version_minor = RING_VERSION_MINOR;
    h->header_size   = sizeof(ring_header);
    h->file_size     = size;
    h->data_offset   = data_offset;
    h->capacity      = capacity;
    h->stride        = stride;
    h->n_fields      = (uint32_t) fields.size();
    h->fields_offset = (uint32_t) fields_offset;
    h->meta_offset   = (uint32_t) meta_offset;
    h->meta_size     = (uint32_t) params.meta.size();
    h->on_full       = params.on_full;
    h->block_ns      = params.block_ns;
    h->epoch_ns      = (int64_t) (clock_read(CLOCK_REALTIME) - clock_ns());
    h->host_pid      = (uint32_t) getpid();
    h->paused.store(params.paused ? 1 : 0, std::memory_order_relaxed);
    h->intervention.store(params.intervention, std::memory_order_relaxed);

    uint8_t * bytes = (uint8_t *) base;
    if (!fields.empty()) {
        memcpy(bytes + fields_offset, fields.data(), fields.size()*sizeof(ring_field));
    }
    memcpy(bytes + meta_offset, params.meta.data(), params.meta.size());
    h->crc = crc32(bytes, offsetof(ring_header, crc));
    h->crc = crc32(bytes + fields_offset, meta_offset + params.meta.size() - fields_offset, h->crc);
    h->ready.store(1, std::memory_order_release);

    header_ = h;
    data_   = bytes + data_offset;
    size_   = size;
    capacity_ = capacity;
    stride_   = stride;
    on_full_  = params.on_full;
    block_ns_ = params.block_ns;
    head_   = 0;
    tail_   = 0;
    gave_up_tail_ = ~0ull;
    return true;
}

void ring_writer::count(ring_counter counter, uint64_t n) {
    // single producer: no read-modify-write is needed
    auto & word = header_->counters[counter];
    word.store(word.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
}

// whether the record may be written; waits for the reader as the policy says
bool ring_writer::room_wait(uint64_t head) {
    if (head - tail_ < capacity_) {
        return true;
    }
    tail_ = header_->tail.load(std::memory_order_acquire);
    if (head - tail_ < capacity_) {
        return true;
    }
    if (on_full_ == RING_DROP || gave_up_tail_ == tail_) {
        return false;
    }

    const uint64_t start = clock_ns();
    uint64_t now   = start;
    bool     room  = false;
    for (int i = 0; now - start < block_ns_; i++) {
        if (i < 64) {
            sched_yield();
        } else {
            const timespec pause = { 0, 100'000 };
            nanosleep(&pause, nullptr);
        }
        now   = clock_ns();
        tail_ = header_->tail.load(std::memory_order_acquire);
        room  = head - tail_ < capacity_;
        if (room) {
            break;
        }
        const uint64_t beat = header_->reader_beat_ns.load(std::memory_order_relaxed);
        if (header_->reader_pid.load(std::memory_order_relaxed) != 0 && now > beat && now - beat > READER_DEAD_NS) {
            break;
        }
    }
    count(COUNT_WAIT_NS, now - start);
    if (!room) {
        gave_up_tail_ = tail_;
    }
    return room;
}

bool ring_writer::push(const void * record) {
    const uint64_t head = head_;
    record_head *  slot = (record_head *) (data_ + (head % capacity_)*stride_);

    if (on_full_ == RING_OVERWRITE) {
        if (head - tail_ >= capacity_) {
            tail_ = header_->tail.load(std::memory_order_acquire);
            if (head - tail_ >= capacity_) {
                count(slot->kind == RECORD_ROW ? COUNT_ROWS_OVERWRITTEN : COUNT_EVENTS_OVERWRITTEN);
            }
        }
    } else if (!room_wait(head)) {
        return false;
    }

    // word by word and atomically: under overwrite a reader may copy this very record
    slot->stamp.store(0, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    auto *       dst = (std::atomic<uint64_t> *) slot;
    const auto * src = (const uint64_t *) record;
    for (uint32_t i = 1; i < stride_/8; i++) {
        dst[i].store(src[i], std::memory_order_relaxed);
    }
    slot->stamp.store(head + 1, std::memory_order_release);
    head_ = head + 1;
    header_->head.store(head_, std::memory_order_release);
    return true;
}

void ring_writer::end(const char * status) {
    if (header_ && !header_->closed.load(std::memory_order_relaxed)) { // the first reason stays
        strncpy(header_->status, status, sizeof(header_->status) - 1);
        header_->closed.store(1, std::memory_order_release);
    }
}

void ring_writer::abandon() {
    if (header_) {
        munmap(header_, size_);
        header_ = nullptr;
    }
}

void ring_writer::close(const char * status) {
    end(status);
    abandon();
}

} // namespace moetrace
