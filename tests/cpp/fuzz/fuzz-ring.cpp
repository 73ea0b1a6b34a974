// The ring's producer while a neighbour writes nonsense into its header, and a reader beside it: no record is
// torn, nothing is written elsewhere, and no push waits longer than it may.

#include "input.h"
#include "ring.h"

#include <cstdlib>
#include <cstring>
#include <unistd.h>
#include <vector>

using namespace moetrace;

static std::string ring_path() {
    static const std::string path = [] {
        const char * folder = getenv("TMPDIR");
        return std::string(folder && *folder ? folder : "/tmp") + "/moetrace-fuzz-" + std::to_string(getpid());
    }();
    return path;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz_input in { data, size };
    ring_params params;
    const size_t n_fields = (size_t) in.below(4);
    for (size_t i = 0; i < n_fields; i++) {
        static constexpr const char * DTYPES[] = { "|u1", "<u2", "<f4", "<i8" };
        ring_field field = {};
        field.name[0] = (char) ('a' + i);
        strcpy(field.dtype, DTYPES[in.below(4)]);
        field.n_dims = 1 + (uint32_t) in.below(3);
        for (uint32_t d = 0; d < 3; d++) {
            field.shape[d] = d < field.n_dims ? (uint32_t) in.number() : 1;
        }
        params.fields.push_back(field);
    }
    params.meta     = in.text((size_t) in.below(32));
    params.capacity = in.bit() ? 1 + in.below(16) : 0;
    params.bytes    = in.below(65536);
    params.on_full  = (ring_on_full) in.below(3);
    params.block_ns = in.below(2000);

    ring_writer writer;
    std::string error;
    const std::string path = ring_path();
    unlink(path.c_str());
    const uint32_t stride = ring_fields_layout(params.fields);
    if (stride > (1u << 16)) {
        return 0; // it would be made, and take its time
    }
    if (!writer.create(path, params, error)) {
        CHECK(!error.empty() && access(path.c_str(), F_OK) != 0);
        return 0;
    }
    ring_header * header = writer.header();
    CHECK(writer.stride() == stride && stride % 64 == 0);
    const uint64_t capacity = header->capacity;
    uint8_t * const first = (uint8_t *) header + header->data_offset;

    std::vector<uint64_t> record(stride/8);
    uint64_t pushed = 0;
    while (in.left) {
        switch (in.below(6)) {
            case 0: case 1: {
                for (auto & word : record) {
                    word = pushed + 1;
                }
                ((record_head *) record.data())->kind = RECORD_ROW;
                const uint64_t head = header->head.load();
                if (writer.push(record.data())) {
                    CHECK(header->head.load() == head + 1);
                    CHECK(memcmp(first + head % capacity*stride + 64, record.data() + 8, stride - 64) == 0);
                    pushed++;
                }
                break;
            }
            case 2: // an honest reader
                header->tail.store(header->head.load());
                header->reader_beat_ns.store(clock_ns());
                break;
            case 3: // a reader that lies
                header->tail.store(in.number());
                header->reader_pid.store((uint32_t) in.number());
                header->reader_beat_ns.store(in.number());
                break;
            case 4:
                header->paused.store((uint32_t) in.number());
                writer.paused();
                break;
            default: { // somebody writes into what the producer alone should: not the head, which says where it is
                const size_t at = (size_t) in.below(offsetof(ring_header, head));
                ((uint8_t *) header)[at] = in.byte();
                break;
            }
        }
    }
    writer.close("the end");
    unlink(path.c_str());
    return 0;
}
