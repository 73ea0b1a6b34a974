// Producer and consumer of a ring, all policies and sizes: produced = read + lost, exactly; and a second reader
// that attaches again and again meanwhile. Built with -DMOETRACE_SANITIZE=thread it is the race test.
// Arguments: records per case (default 200000); `racy`: a consumer that does it wrong, which must be reported.

#include "check.h"
#include "ring.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>

using namespace moetrace;

static ring_field field_make(const char * name, const char * dtype, uint32_t n) {
    ring_field field = {};
    strncpy(field.name,  name,  sizeof(field.name) - 1);
    strncpy(field.dtype, dtype, sizeof(field.dtype) - 1);
    field.n_dims   = 1;
    field.shape[0] = n;
    field.shape[1] = field.shape[2] = 1;
    return field;
}

struct mapping {
    ring_header * header = nullptr;
    uint8_t *     data   = nullptr;
    size_t        size   = 0;

    explicit mapping(const std::string & path) {
        const int fd = open(path.c_str(), O_RDWR);
        CHECK(fd >= 0);
        struct stat st;
        CHECK(fstat(fd, &st) == 0);
        CHECK((st.st_mode & 0777) == 0600); // its owner's only
        size   = (size_t) st.st_size;
        header = (ring_header *) mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        CHECK(header != MAP_FAILED);
        CHECK(header->ready.load(std::memory_order_acquire) == 1);
        CHECK(header->file_size == size);
        data = (uint8_t *) header + header->data_offset;
    }
    ~mapping() { munmap(header, size); }
};

// every word of a record's payload repeats its serial: a torn record shows
static void record_fill(std::vector<uint64_t> & record, uint64_t serial) {
    for (auto & word : record) {
        word = serial;
    }
    record_head * head = (record_head *) record.data();
    head->kind = RECORD_ROW;
}

static bool record_whole(const std::vector<uint64_t> & record, uint64_t serial) {
    for (size_t i = sizeof(record_head)/8; i < record.size(); i++) {
        if (record[i] != serial) {
            return false;
        }
    }
    return true;
}

// record number `tail`, copied if it is whole: nothing was written to it meanwhile
static bool record_copy(const uint8_t * slot, uint64_t tail, std::vector<uint64_t> & record) {
    const auto * src = (const std::atomic<uint64_t> *) slot;
    const bool before = src[0].load(std::memory_order_acquire) == tail + 1;
    for (size_t i = 1; i < record.size(); i++) {
        record[i] = src[i].load(std::memory_order_relaxed);
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    return src[0].load(std::memory_order_relaxed) == tail + 1 && before;
}

// attaches, looks at the latest records, and lets go, until `done`; gives how many whole ones it saw
static uint64_t spectate(const std::string & path, const std::atomic<bool> & done) {
    uint64_t n_seen = 0;
    bool over = false;
    while (!over) {
        mapping map(path);
        const uint64_t room = std::min<uint64_t>(map.header->capacity, 64);
        std::vector<uint64_t> record(map.header->stride/8);
        for (int look = 0; look < 20 && !over; look++) {
            over = done; // and once more
            const uint64_t head = map.header->head.load(std::memory_order_acquire);
            for (uint64_t n = head > room ? head - room : 0; n < head; n++) {
                if (record_copy(map.data + (n % map.header->capacity)*map.header->stride, n, record)) {
                    CHECK(record_whole(record, ((record_head *) record.data())->serial));
                    n_seen++;
                }
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
    CHECK(n_seen > 0);
    return n_seen;
}

static void run(const std::string & path, ring_on_full policy, uint64_t capacity, uint64_t n_records, bool racy) {
    ring_params params;
    params.fields   = { field_make("state", "|u1", 7), field_make("weights", "<f4", 30) };
    params.capacity = capacity;
    params.on_full  = policy;
    params.block_ns = 60'000'000'000ull;
    ring_writer writer;
    std::string error;
    CHECK(writer.create(path, params, error));
    CHECK(!ring_writer().create(path, params, error) && !error.empty()); // never over an existing file

    // the producer's own mapping: a sanitizer knows memory by its address
    struct { ring_header * header; uint8_t * data; } map = { writer.header(), (uint8_t *) writer.header() + writer.header()->data_offset };
    const uint32_t stride = map.header->stride;
    CHECK(stride % 64 == 0 && map.header->capacity == capacity);
    map.header->reader_pid.store((uint32_t) getpid());
    map.header->reader_beat_ns.store(clock_ns());

    uint64_t n_lost = 0;
    std::atomic<bool> done { false };
    std::thread producer([&] {
        std::vector<uint64_t> record(stride/8);
        for (uint64_t serial = 0; serial < n_records; serial++) {
            record_fill(record, serial);
            ((record_head *) record.data())->serial = serial;
            n_lost += !writer.push(record.data());
            if (policy != RING_BLOCK && serial % 256 == 0) {
                std::this_thread::yield(); // so that the reader gets something to see
            }
        }
        done = true;
    });

    uint64_t n_seen = 0;
    std::thread spectator([&] { n_seen = spectate(path, done); });

    uint64_t n_read = 0, n_overwritten = 0, tail = 0, last = ~0ull;
    std::vector<uint64_t> record(stride/8);
    while (true) {
        const bool over = done;
        const uint64_t head = map.header->head.load(racy ? std::memory_order_relaxed : std::memory_order_acquire);
        if (head == tail) {
            if (over) {
                break;
            }
            std::this_thread::yield();
            continue;
        }
        if (policy == RING_OVERWRITE && head - tail > capacity) {
            n_overwritten += head - capacity - tail;
            tail = head - capacity;
        }
        for (; tail < head; tail++) {
            const uint8_t * slot = map.data + (tail % capacity)*stride;
            if (policy != RING_OVERWRITE) {
                memcpy(record.data(), slot, stride); // in place, as numpy reads it: nobody writes there
            } else if (!record_copy(slot, tail, record)) {
                n_overwritten++;
                continue;
            }
            const uint64_t serial = ((record_head *) record.data())->serial;
            CHECK(record_whole(record, serial));
            CHECK(last == ~0ull || serial > last);
            last = serial;
            n_read++;
        }
        map.header->tail.store(tail, std::memory_order_release);
        map.header->reader_beat_ns.store(clock_ns(), std::memory_order_relaxed);
    }
    producer.join();
    spectator.join();
    CHECK(n_read + n_lost + n_overwritten == n_records);
    CHECK(policy != RING_BLOCK || n_lost == 0);
    CHECK(policy == RING_OVERWRITE || n_overwritten == 0);
    CHECK(policy != RING_OVERWRITE || n_lost == 0);
    printf("policy %u, %llu records of room: %llu produced = %llu read + %llu lost + %llu overwritten; a second reader saw %llu\n", policy,
        (unsigned long long) capacity, (unsigned long long) n_records, (unsigned long long) n_read,
        (unsigned long long) n_lost, (unsigned long long) n_overwritten, (unsigned long long) n_seen);
    fflush(stdout);
    writer.close("");
    unlink(path.c_str());
}

static void test_dead_reader(const std::string & path) {
    ring_params params;
    params.fields   = { field_make("state", "|u1", 1) };
    params.capacity = 2;
    params.block_ns = 50'000'000;
    ring_writer writer;
    std::string error;
    CHECK(writer.create(path, params, error));
    std::vector<uint64_t> record(writer.stride()/8);
    CHECK(writer.push(record.data()) && writer.push(record.data()));
    const uint64_t start = clock_ns();
    for (int i = 0; i < 1000; i++) {
        CHECK(!writer.push(record.data())); // waits once, then never again until the reader moves
    }
    const uint64_t waited = clock_ns() - start;
    CHECK(waited >= 50'000'000 && waited < 5'000'000'000);
    mapping map(path);
    map.header->tail.store(1);
    CHECK(writer.push(record.data()));
    writer.close("gone");
    CHECK(map.header->closed.load() == 1 && strcmp(map.header->status, "gone") == 0);
    unlink(path.c_str());
}

int main(int argc, char ** argv) {
    const uint64_t n = argc > 1 ? strtoull(argv[1], nullptr, 10) : 100'000;
    const bool racy = argc > 2 && strcmp(argv[2], "racy") == 0;
    char folder[] = "/tmp/moetrace-ring-XXXXXX";
    CHECK(mkdtemp(folder));
    const std::string path = std::string(folder) + "/ring";
    CHECK(crc32("123456789", 9) == 0xCBF43926u); // the check value of CRC-32
    for (ring_on_full policy : { RING_BLOCK, RING_DROP, RING_OVERWRITE }) {
        for (uint64_t bytes : { 2*256, 64 << 10, 16 << 20 }) {
            run(path, policy, bytes/256, n, racy);
        }
    }
    test_dead_reader(path);
    ring_params huge;
    huge.fields = { field_make("logits", "<f4", 1u << 30) };
    std::string error;
    CHECK(!ring_writer().create(path, huge, error) && error.find("1 GiB") != std::string::npos);
    CHECK(!ring_writer().create(std::string(folder) + "/none/ring", {}, error));
    CHECK(symlink("/tmp/elsewhere", path.c_str()) == 0);
    CHECK(!ring_writer().create(path, {}, error)); // never through a planted link
    unlink(path.c_str());
    rmdir(folder);
    return 0;
}
