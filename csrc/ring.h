// The producer's end of the ring file. One thread at a time.

#pragma once

#include "record.h"

#include <string>
#include <vector>

namespace moetrace {

uint64_t clock_ns(); // CLOCK_MONOTONIC

uint32_t crc32(const void * data, size_t size, uint32_t crc = 0); // as zlib's

struct ring_params {
    std::vector<ring_field> fields;  // offsets are filled in by ring_writer::create
    std::string  meta;               // JSON text
    uint64_t     bytes    = 16u << 20;
    uint64_t     capacity = 0;       // records; 0: as many as fit into `bytes`
    ring_on_full on_full  = RING_BLOCK;
    uint64_t     block_ns = 10'000'000'000ull;
    bool         paused   = false;
    uint32_t     intervention = 0;
};

// lays the fields out behind the head; returns the stride, a multiple of 64
uint32_t ring_fields_layout(std::vector<ring_field> & fields);

class ring_writer {
  public:
    ring_writer() = default;
    ~ring_writer();
    ring_writer(const ring_writer &) = delete;
    ring_writer & operator=(const ring_writer &) = delete;

    // Makes the file (it must not exist), reserves its disk space and maps it.
    // On failure `error` names the call that failed, nothing is left behind, and false is returned.
    bool create(const std::string & path, const ring_params & params, std::string & error);

    // Copies one record (stride bytes, its head filled in but for the stamp) into the ring.
    // Returns false if the record is lost; the caller's counter says of what kind.
    // Under RING_BLOCK it may wait; the waiting is counted.
    bool push(const void * record);

    void close(const char * status);

    // Tells readers that nothing more comes; the mapping stays.
    void end(const char * status);

    // Lets go of the mapping without a word: it is another process's.
    void abandon();

    bool          is_open() const { return header_ != nullptr; }
    uint32_t      stride()  const { return stride_; }
    ring_header * header()        { return header_; }

    void     count(ring_counter counter, uint64_t n = 1);
    uint64_t waited() const { return header_->counters[COUNT_WAIT_NS].load(std::memory_order_relaxed); }
    bool     paused() const { return header_->paused.load(std::memory_order_relaxed) != 0; }

  private:
    bool room_wait(uint64_t head);

    ring_header * header_ = nullptr;
    uint8_t *     data_   = nullptr;
    size_t        size_   = 0;
    // as in the header, which others can write to: what a neighbour puts there must not lead a push astray
    uint64_t      capacity_ = 0;
    uint32_t      stride_   = 0;
    ring_on_full  on_full_  = RING_BLOCK;
    uint64_t      block_ns_ = 0;
    uint64_t      head_   = 0;
    uint64_t      tail_   = 0;          // the last tail seen
    uint64_t      gave_up_tail_ = ~0ull; // waiting ran out at this tail: do not wait again until it moves
};

} // namespace moetrace
