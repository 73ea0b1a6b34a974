// The layout of the ring file: what the host writes and every reader maps.
//
// One ring file belongs to one llama context, and to those of the same model that follow it in the process. It holds a header of fixed size and then
// `capacity` records of `stride` bytes. docs/format.md describes the same layout in prose;
// moetrace/trace/record.py mirrors it and a test holds the two against each other.
//
//   offset 0                ring_header        (constants, counters, control words)
//          fields_offset    ring_field[n_fields]
//          meta_offset      JSON text, meta_size bytes
//          data_offset      record 0, record 1, ... (data_offset + i*stride)
//
// All numbers are little-endian. Nothing here depends on Python, ggml or llama.cpp.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace moetrace {

constexpr char     RING_MAGIC[8]      = { 'M', 'O', 'E', 'T', 'R', 'I', 'N', 'G' };
constexpr uint16_t RING_VERSION_MAJOR = 1; // a reader refuses a newer major version
constexpr uint16_t RING_VERSION_MINOR = 2; // a newer minor version only adds

// what the producer does when the reader has not kept up
enum ring_on_full : uint32_t {
    RING_BLOCK     = 0, // wait, at most block_ns in a row, then lose the new record and count it
    RING_DROP      = 1, // lose the new record and count it
    RING_OVERWRITE = 2, // lose the oldest record and count it
};

enum record_kind : uint16_t {
    RECORD_ROW   = 0, // one token's way through the model
    RECORD_EVENT = 1, // something that happened to a sequence between two rows
    RECORD_ATTENTION = 2, // a piece of one row's attention in one layer; comes before its row
};

// record_head of an attention record: serial is its row's; the field `attention` holds arg0 values
//   token        layer (llama.cpp's number)
//   position     position of the first key; -1: the keys are in the order of KV cells
//   sequence     number of keys
//   n_sequences  number of heads
//   row          how many values of (heads x keys, keys innermost) come before these
constexpr uint32_t ATTENTION_PIECE = 1024; // values in a piece, at most

enum record_flag : uint32_t {
    ROW_OUTPUT             = 1u << 0, // llama.cpp was asked for this token's logits or embedding
    ROW_EMBEDDING_INPUT    = 1u << 1, // the input was a vector, so token is -1
    ROW_ENCODE             = 1u << 2, // computed by an encoder (no KV cache)
    ROW_INTERVENED         = 1u << 3, // an intervention was in force for this token
    ROW_SEQUENCE_UNCERTAIN = 1u << 4, // two sequences fit this row equally well
    ROW_UNIDENTIFIED       = 1u << 5, // no batch entry fits this row: sequence is -1
    ROW_TRIAL              = 1u << 6, // a batch that llama.cpp runs for itself (warm-up, memory trial): no request
    ROW_GENERATED          = 1u << 7, // the host sampled from the position before this one: its token was generated
};

// record_head.token of an event
enum event_code : int32_t {
    EVENT_SEQ_RM    = 1, // positions [position, arg0) of the sequence were removed (arg0 < 0: to the end)
    EVENT_SEQ_ADD   = 2, // positions [position, arg0) were shifted by arg1
    EVENT_SEQ_CP    = 3, // positions [position, arg0) were copied to sequence arg1
    EVENT_SEQ_KEEP  = 4, // every other sequence was removed
    EVENT_SEQ_DIV   = 5, // positions [position, arg0) were divided by arg1
    EVENT_CLEAR     = 6, // the whole memory was cleared (sequence -1)
    EVENT_RESTORE   = 7, // the state of the sequence was loaded from elsewhere (arg0: bytes, saturated)
    EVENT_LAUNCH    = 8, // llama-server gave the slot a new task or ended its last one; arg1: how many of them the slot has had
    EVENT_PAUSE     = 9, // recording was switched off; arg0 rows have gone unrecorded when it comes on again
    EVENT_RESUME    = 10,
    EVENT_FAILED    = 11, // a ubatch failed after its routing was recorded
    EVENT_INTERVENE = 12, // intervention number arg1 is in force from here on; 0: none
    EVENT_CONTEXT   = 13, // another llama context of the same model goes on here: its memory is empty
};

// state of one (token, layer)
enum row_state : uint8_t {
    STATE_LOST         = 0, // computed, but not recorded
    STATE_PRESENT      = 1,
    STATE_NOT_COMPUTED = 2, // llama.cpp left this row out (the last layer keeps output rows only)
};

// first 64 bytes of every record
struct record_head {
    std::atomic<uint64_t> stamp; // 1 + number of the record in the ring since its start; 0 while it is written
    uint64_t serial;      // row: its number, lost ones counted; event: number of the next row
    int64_t  time_ns;     // CLOCK_MONOTONIC, when its ubatch (or the event) began
    uint32_t step;        // number of the ubatch
    uint32_t batch;       // number of the llama_decode / llama_encode / llama_process call
    int32_t  token;       // token id; -1 for a vector input; event: event_code
    int32_t  position;    // position in its sequence; event: p0
    int32_t  sequence;    // first sequence id (llama-server: slot); -1 unknown
    uint16_t kind;        // record_kind
    uint16_t n_sequences; // how many sequences share the token
    uint32_t flags;       // record_flag
    uint32_t row;         // row within the ubatch; event: its number since the ring began, lost ones counted
    int32_t  arg0;        // row: how many LAUNCHes its sequence has had, lost ones counted; event: see event_code
    int32_t  arg1;        // row: how many events came before it, lost ones counted (its lower 32 bits); event: see event_code
};
static_assert(sizeof(record_head) == 64, "record_head is part of the file format");

// one column of the payload that follows the head
struct ring_field {
    char     name[40];  // zero-terminated
    char     dtype[8];  // numpy code, zero-terminated: "|u1", "<u2", "<f4", ...
    uint32_t offset;    // from the start of the record
    uint32_t n_dims;    // 1 to 3
    uint32_t shape[3];  // per token, outermost first; unused dims are 1
    uint32_t reserved;
};
static_assert(sizeof(ring_field) == 72, "ring_field is part of the file format");

// counters, in the order of ring_header.counters; all only ever grow
enum ring_counter : uint32_t {
    COUNT_ROWS_PRODUCED,      // rows that the model computed while recording was on (each once)
    COUNT_ROWS_COMMITTED,     // of these, written to the ring
    COUNT_ROWS_LOST_FULL,     // lost: no room (drop policy, or the bounded wait ran out)
    COUNT_ROWS_LOST_ERROR,    // lost: the tracer could not read the graph
    COUNT_ROWS_OVERWRITTEN,   // committed, then overwritten before they were read
    COUNT_EVENTS_COMMITTED,
    COUNT_EVENTS_LOST,
    COUNT_EVENTS_OVERWRITTEN,
    COUNT_ROWS_WARMUP,        // not recorded: llama.cpp's warm-up runs every expert
    COUNT_ROWS_PAUSED,        // not recorded: recording was off
    COUNT_ROWS_UNROUTED,      // not recorded: their graph routes no expert
    COUNT_ROWS_UNIDENTIFIED,  // recorded without a sequence
    COUNT_GRAPHS,             // graphs computed
    COUNT_BATCHES,
    COUNT_WAIT_NS,            // time spent waiting for the reader
    COUNT_HOOK_NS,            // time spent in the tracer's own code while recording, waiting excluded
    COUNT_SYNC_NS,            // of that, time in which the backend was made to finish
    COUNT_ATTENTION_LOST,     // attention chunks that found no room
    COUNT_ROWS_INTERVENED,    // computed with an intervention in force, recorded or not
    COUNT_GRAPHS_UNREAD,      // of earlier tracers: graphs that were not announced, and whose rows were lost; now 0
    COUNT_CONTEXTS,           // llama contexts that wrote here, one after the other
    COUNT_CONTEXTS_FREED,     // of these, freed: as many as there were, and nobody computes (a server that sleeps)
    COUNT_SYNCS,              // how often the tracer itself made the devices finish
    COUNT_COPIES,             // copies from devices, of tensors or of many that lie side by side
    COUNT_COPIED_BYTES,
    COUNT_GRAPHS_ELSEWHERE,   // graphs of another llama.cpp in the process: not recorded, at least so many
    COUNT_N,
};

struct ring_header {
    // constants, written once before `ready` is set
    char     magic[8];
    uint16_t version_major;
    uint16_t version_minor;
    uint32_t header_size;    // sizeof(ring_header)
    uint64_t file_size;
    uint64_t data_offset;
    uint64_t capacity;       // records
    uint32_t stride;         // bytes per record, a multiple of 64
    uint32_t n_fields;
    uint32_t fields_offset;
    uint32_t meta_offset;
    uint32_t meta_size;
    uint32_t on_full;        // ring_on_full
    uint64_t block_ns;       // longest wait of the block policy
    int64_t  epoch_ns;       // CLOCK_REALTIME minus CLOCK_MONOTONIC when the ring was made
    uint32_t host_pid;
    uint32_t crc;            // CRC-32 (zlib) of the bytes before this one, the fields and the meta text
    uint32_t reserved0[6];

    // producer
    alignas(64) std::atomic<uint64_t> head;  // records committed since the start
    std::atomic<uint32_t> ready;             // 1 once the header may be read
    std::atomic<uint32_t> closed;            // 1 once nothing more comes: the process ends, or the tracer stopped or gave up
    char status[112];                        // why the tracer gave up, zero-terminated; empty if it did not

    alignas(64) std::atomic<uint64_t> counters[32]; // ring_counter

    // consumer
    alignas(64) std::atomic<uint64_t> tail;  // records released by the reader
    std::atomic<uint64_t> reader_beat_ns;    // CLOCK_MONOTONIC of the reader's last sign of life
    std::atomic<uint32_t> reader_pid;        // 0: nobody reads

    // control, written by `moetrace start|stop|intervene` and read by the host before each graph
    alignas(64) std::atomic<uint32_t> paused;
    std::atomic<uint32_t> intervention;         // number of the wanted one (csrc/intervene.h); 0: none
    // the host's answer to it
    std::atomic<uint32_t> intervention_active;  // number of the one in force
    std::atomic<uint32_t> intervention_refused; // number of the last one that was refused; set after the reason
    char intervention_why[48];                  // the reason, zero-terminated
};
static_assert(sizeof(ring_header) == 640, "ring_header is part of the file format");
static_assert(sizeof(std::atomic<uint64_t>) == 8 && sizeof(std::atomic<uint32_t>) == 4,
    "atomics must be plain words in the file");

} // namespace moetrace
