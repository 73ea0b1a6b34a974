// A ggml of our own making: its tensors are laid out, and its functions answer, as a test wants. It is a shared
// library, so that the tracer finds its functions as it finds those of the real one.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

// what a function may get wrong; one bit each in fake_ggml::lies
enum fake_lie : uint32_t {
    LIE_TYPE_NAME    = 1u << 0,
    LIE_GET_NAME     = 1u << 1,  // points elsewhere
    LIE_OP_NAME      = 1u << 2,  // one operation goes by another's name
    LIE_OP_NULL      = 1u << 3,  // operations have no names
    LIE_INIT         = 1u << 4,  // gives no context
    LIE_NEW_TENSOR   = 1u << 5,  // gives none after a while
    LIE_VIEW         = 1u << 6,  // a view does not say whose it is
    LIE_VIEW_OFFSET  = 1u << 7,
    LIE_SOURCES      = 1u << 8,  // in another order
    LIE_SET_OUTPUT   = 1u << 9,  // changes nothing
    LIE_SET_OUTPUT_2 = 1u << 10, // changes two words
    LIE_SET_INPUT    = 1u << 11, // replaces the mark instead of adding to it
    LIE_BUFFER       = 1u << 12, // there is none
    LIE_ALLOC        = 1u << 13, // places nothing
    LIE_GET_DATA     = 1u << 14,
    LIE_HOST         = 1u << 15, // host memory is said to be elsewhere
    LIE_SET_DATA     = 1u << 16, // writes nothing
    LIE_STRIDES      = 1u << 17,
    LIE_OVERHEAD     = 1u << 18, // tensors are said to be larger than they are
    LIE_NODES        = 1u << 19, // operations give no tensor
    LIE_ALL          = (1u << 20) - 1,
};

struct __attribute__((visibility("default"))) fake_ggml {
    // the layout of a tensor
    size_t size = 336;
    size_t type = 0, buffer = 8, ne = 16, nb = 48, op = 80, flags = 148, src = 152, view_src = 232, view_offs = 240,
           data = 248, name = 256;
    uint8_t  noise = 0;      // what the bytes of a new tensor are that no field takes
    uint32_t lies  = 0;
    int      n_tensors = 64; // LIE_NEW_TENSOR: so many, then none
    int      first_op = 1;   // operations are numbered from here

    void *   memory = nullptr; // of every llama context
    bool     reads  = false;   // tensors are read where they lie; otherwise they are zeros

    // the graph that the graph functions tell of
    std::vector<void *> nodes;

    template <typename T> T & at(void * t, size_t offset) const { return *(T *) ((char *) t + offset); }
    void fill(void * t, int32_t type, const int64_t * ne) const; // a new tensor, contiguous
};

__attribute__((visibility("default"))) fake_ggml & fake();

// operations in the order of their numbers
constexpr const char * FAKE_OPS[] = {
    "MUL_MAT", "MUL_MAT_ID", "ADD", "ADD_ID", "MUL", "DIV", "SCALE", "SOFT_MAX", "GET_ROWS", "SET_ROWS", "ARGSORT",
    "TOP_K", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "CONT", "CPY", "CLAMP", "UNARY", "ROPE", "REPEAT",
};
constexpr int FAKE_N_OPS = (int) (sizeof(FAKE_OPS)/sizeof(FAKE_OPS[0]));
