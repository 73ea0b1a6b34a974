// The loaded ggml and llama.cpp, reached without their headers: functions by name, struct fields by
// offsets that are discovered on a graph of known values and verified on a second one.

#pragma once

#include "symbols.h"

#include <cstddef>
#include <cstdint>
#include <string>

struct ggml_tensor;
struct ggml_cgraph;
struct ggml_context;
struct ggml_backend;
struct ggml_backend_sched;
struct ggml_backend_buffer;
struct llama_context;
struct llama_model;

namespace moetrace {

struct ggml_init_params_view { // ggml_init_params, unchanged since it exists
    size_t mem_size;
    void * mem_buffer;
    bool   no_alloc;
};

using eval_callback = bool (*)(ggml_tensor * t, bool ask, void * user_data);

// operations that the tracer tells apart; compared by name, since their numbers change between releases
enum op_kind : uint8_t {
    OP_OTHER, OP_NONE, OP_MUL_MAT, OP_MUL_MAT_ID, OP_ADD, OP_ADD_ID, OP_MUL, OP_DIV, OP_SCALE, OP_SOFT_MAX,
    OP_GET_ROWS, OP_SET_ROWS, OP_ARGSORT, OP_TOP_K, OP_VIEW, OP_RESHAPE, OP_PERMUTE, OP_TRANSPOSE, OP_CONT, OP_CPY,
    OP_CLAMP, OP_UNARY, OP_ROPE, OP_REPEAT, OP_UNKNOWN = 255,
};

enum tensor_type : int32_t { // numbers of the GGUF file format: they do not change
    TYPE_F32 = 0,
    TYPE_F16 = 1,
    TYPE_I32 = 26,
    TYPE_I64 = 27,
};

struct ggml_abi {
    // Finds the functions and the layout. Returns false and says why in `error`; never aborts.
    bool attach(std::string & error);
    bool attached = false;
    std::string version; // of the loaded ggml, as far as it tells

    // --- fields of ggml_tensor
    int32_t         type(const ggml_tensor * t)     const { return field<int32_t>(t, off_type); }
    const int64_t * ne(const ggml_tensor * t)       const { return &field<const int64_t>(t, off_ne); }
    const size_t *  nb(const ggml_tensor * t)       const { return &field<const size_t>(t, off_nb); }
    int32_t         op_number(const ggml_tensor * t) const { return field<int32_t>(t, off_op); }
    ggml_tensor *   src(const ggml_tensor * t, int i) const { return (&field<ggml_tensor * const>(t, off_src))[i]; }
    ggml_tensor *   view_src(const ggml_tensor * t) const { return field<ggml_tensor *>(t, off_view_src); }
    size_t          view_offs(const ggml_tensor * t) const { return field<size_t>(t, off_view_offs); }
    void *          data(const ggml_tensor * t)     const { return field<void *>(t, off_data); }
    ggml_backend_buffer * buffer(const ggml_tensor * t) const { return field<ggml_backend_buffer *>(t, off_buffer); }
    const char *    name(const ggml_tensor * t)     const { return (const char *) t + off_name; }
    op_kind         op(const ggml_tensor * t);

    ggml_tensor * root(ggml_tensor * t) const { // what owns the memory of a view
        while (view_src(t)) {
            t = view_src(t);
        }
        return t;
    }

    // Whether the tensor's bytes are in host memory (then `data` may be read directly).
    bool is_host(const ggml_tensor * t) const;

    // Whether its numbers can be read: a type that is understood, and a shape and strides that memory can have.
    bool is_readable(const ggml_tensor * t) const;

    // bytes from the first to the last element, strides included; of a readable tensor
    size_t span(const ggml_tensor * t) const;

    // --- functions
    int           (*graph_n_nodes)(ggml_cgraph *) = nullptr;
    ggml_tensor * (*graph_node)(ggml_cgraph *, int) = nullptr;
    ggml_tensor * (*graph_get_tensor)(const ggml_cgraph *, const char *) = nullptr;
    void          (*set_output)(ggml_tensor *) = nullptr;
    void          (*tensor_get)(const ggml_tensor *, void *, size_t, size_t) = nullptr;
    void          (*tensor_set)(ggml_tensor *, const void *, size_t, size_t) = nullptr;
    void          (*tensor_get_async)(ggml_backend *, const ggml_tensor *, void *, size_t, size_t) = nullptr;
    bool          (*buffer_is_host)(ggml_backend_buffer *) = nullptr;
    void          (*sched_synchronize)(ggml_backend_sched *) = nullptr;
    ggml_backend* (*sched_get_tensor_backend)(ggml_backend_sched *, ggml_tensor *) = nullptr;
    int           (*sched_get_n_backends)(ggml_backend_sched *) = nullptr;
    ggml_backend* (*sched_get_backend)(ggml_backend_sched *, int) = nullptr;
    const char *  (*backend_name)(ggml_backend *) = nullptr;
    const char *  (*op_name)(int32_t) = nullptr;

    // --- functions that build tensors, and place them
    ggml_context * (*init)(ggml_init_params_view) = nullptr;
    void           (*free)(ggml_context *) = nullptr;
    size_t         (*tensor_overhead)() = nullptr;
    ggml_tensor *  (*new_tensor_4d)(ggml_context *, int32_t type, int64_t, int64_t, int64_t, int64_t) = nullptr;
    ggml_tensor *  (*view_1d)(ggml_context *, ggml_tensor *, int64_t, size_t) = nullptr;
    int            (*tensor_alloc)(ggml_backend_buffer *, ggml_tensor *, void *) = nullptr;
    void           (*buffer_free)(ggml_backend_buffer *) = nullptr;

    // --- memory that devices copy into by themselves; any of these may be missing
    void *        (*backend_get_device)(ggml_backend *) = nullptr;
    void *        (*dev_host_buffer_type)(void * device) = nullptr;
    ggml_backend_buffer * (*buft_alloc_buffer)(void * type, size_t) = nullptr;
    void *        (*buffer_get_base)(ggml_backend_buffer *) = nullptr;

    // --- functions that move tensors; can_place() says whether they are there
    void *        (*buffer_get_type)(ggml_backend_buffer *) = nullptr;
    void          (*buffer_clear)(ggml_backend_buffer *, uint8_t) = nullptr;
    size_t        (*buft_get_alloc_size)(void * type, const ggml_tensor *) = nullptr;
    size_t        (*buft_get_alignment)(void * type) = nullptr;
    int           (*view_init)(ggml_tensor *) = nullptr;
    bool can_place() const {
        return buffer_get_type && buffer_clear && buft_get_alloc_size && buft_get_alignment && view_init && buft_alloc_buffer && buffer_get_base;
    }
    void unplace(ggml_tensor * t) const { field<void *>(t, off_data) = nullptr; field<void *>(t, off_buffer) = nullptr; }

    // --- functions that add nodes to a graph; can_build() says whether they are there
    void           (*build_forward_expand)(ggml_cgraph *, ggml_tensor *) = nullptr;
    ggml_tensor *  (*build_forward_select)(ggml_cgraph *, ggml_tensor **, int n, int chosen) = nullptr; // since 2026
    int            (*graph_size)(ggml_cgraph *) = nullptr;
    bool can_build() const { return build_forward_expand && graph_size; }
    void set_src(ggml_tensor * t, int i, ggml_tensor * src) const { (&field<ggml_tensor *>(t, off_src))[i] = src; }
    void set_name(ggml_tensor * t, const char * name) const; // at most 15 characters

    // offsets, for the probe's report
    size_t off_type = 0, off_buffer = 0, off_ne = 0, off_nb = 0, off_op = 0, off_flags = 0, off_src = 0,
           off_view_src = 0, off_view_offs = 0, off_data = 0, off_name = 0, tensor_size = 0;

  private:
    template <typename T> static T & field(const ggml_tensor * t, size_t offset) {
        return *(T *) ((char *) t + offset);
    }
    struct layout_probe;
    bool functions_find(std::string & error);
    bool layout_discover(std::string & error);

    op_kind kinds[256]; // by number, found when first seen; atomic, since threads may see one first together
};

} // namespace moetrace
