// What a backend hands to ggml when it is loaded by GGML_BACKEND_PATH. The public headers do not declare these tables;
// they are those of the pinned release, and ggml_plugin_trouble() refuses any other.

#pragma once

#include "ggml-backend.h"
#include "ggml.h"

constexpr int PLUGIN_API_VERSION = 2;
#ifndef PLUGIN_GGML_VERSION
#define PLUGIN_GGML_VERSION "0.25.3"
#endif

// Tables of functions. An entry that may be null is marked so; "unused" ones are always null here.

struct buffer_type_table {
    const char *          (*name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (*alloc)(ggml_backend_buffer_type_t, size_t size);
    size_t                (*alignment)(ggml_backend_buffer_type_t);
    size_t                (*max_size)(ggml_backend_buffer_type_t);                       // may be null: no limit
    size_t                (*tensor_size)(ggml_backend_buffer_type_t, const ggml_tensor *); // may be null: ggml_nbytes
    bool                  (*is_host)(ggml_backend_buffer_type_t);                        // may be null: false
};

struct ggml_backend_buffer_type {
    buffer_type_table  table;
    ggml_backend_dev_t device;
    void *             context;
};

struct buffer_table {
    void        (*free)(ggml_backend_buffer_t);
    void *      (*base)(ggml_backend_buffer_t);
    ggml_status (*init_tensor)(ggml_backend_buffer_t, ggml_tensor *); // unused
    void        (*fill)(ggml_backend_buffer_t, ggml_tensor *, uint8_t value, size_t offset, size_t size);
    void        (*set)(ggml_backend_buffer_t, ggml_tensor *, const void * from, size_t offset, size_t size);
    void        (*get)(ggml_backend_buffer_t, const ggml_tensor *, void * to, size_t offset, size_t size);
    void        (*set_2d)(); // unused
    void        (*get_2d)(); // unused
    bool        (*copy)(ggml_backend_buffer_t, const ggml_tensor * from, ggml_tensor * to);
    void        (*clear)(ggml_backend_buffer_t, uint8_t value);
    void        (*reset)(ggml_backend_buffer_t); // unused
};

struct ggml_backend_buffer {
    buffer_table               table;
    ggml_backend_buffer_type_t type;
    void *                     context;
    size_t                     size;
    int                        usage;
};

struct alloc_dependencies { // keeps a tensor's memory until a node was computed
    void (*add)(void * data, ggml_tensor * tensor, ggml_tensor * until);
    void * data;
};

struct stream_table {
    const char * (*name)(ggml_backend_t);
    void         (*free)(ggml_backend_t);
    void         (*set_async)(ggml_backend_t, ggml_tensor *, const void * from, size_t offset, size_t size);
    void         (*get_async)(ggml_backend_t, const ggml_tensor *, void * to, size_t offset, size_t size);
    void         (*set_2d_async)(); // unused
    void         (*get_2d_async)(); // unused
    bool         (*copy_async)(ggml_backend_t from, ggml_backend_t to, const ggml_tensor *, ggml_tensor *);
    void         (*synchronize)(ggml_backend_t);
    void         (*plans[4])(); // unused
    ggml_status  (*compute)(ggml_backend_t, ggml_cgraph *);
    void         (*event_record)(ggml_backend_t, ggml_backend_event_t);
    void         (*event_wait)(ggml_backend_t, ggml_backend_event_t);
    void         (*optimize)(ggml_backend_t, ggml_cgraph *, alloc_dependencies *);
};

struct ggml_backend {
    ggml_guid_t        guid;
    stream_table       table;
    ggml_backend_dev_t device;
    void *             context;
};

struct ggml_backend_event {
    ggml_backend_dev_t device;
    void *             context;
};

struct device_table {
    const char *               (*name)(ggml_backend_dev_t);
    const char *               (*description)(ggml_backend_dev_t);
    void                       (*memory)(ggml_backend_dev_t, size_t * available, size_t * total);
    enum ggml_backend_dev_type (*type)(ggml_backend_dev_t);
    void                       (*properties)(ggml_backend_dev_t, ggml_backend_dev_props *);
    ggml_backend_t             (*stream_new)(ggml_backend_dev_t, const char * parameters);
    ggml_backend_buffer_type_t (*buffer_type)(ggml_backend_dev_t);
    ggml_backend_buffer_type_t (*host_buffer_type)(ggml_backend_dev_t); // may be null
    ggml_backend_buffer_t      (*buffer_from_host)(ggml_backend_dev_t, void *, size_t, size_t); // unused
    bool                       (*supports_op)(ggml_backend_dev_t, const ggml_tensor *);
    bool                       (*supports_buffers)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    bool                       (*offloads)(ggml_backend_dev_t, const ggml_tensor *);
    ggml_backend_event_t       (*event_new)(ggml_backend_dev_t);
    void                       (*event_free)(ggml_backend_dev_t, ggml_backend_event_t);
    void                       (*event_synchronize)(ggml_backend_dev_t, ggml_backend_event_t);
};

struct ggml_backend_device {
    device_table       table;
    ggml_backend_reg_t registry;
    void *             context;
};

struct registry_table {
    const char *       (*name)(ggml_backend_reg_t);
    size_t             (*n_devices)(ggml_backend_reg_t);
    ggml_backend_dev_t (*device)(ggml_backend_reg_t, size_t index);
    void *             (*symbol)(ggml_backend_reg_t, const char * name); // may be null
};

struct ggml_backend_reg {
    int            api_version;
    registry_table table;
    void *         context;
};

// exported by libggml-base, declared in no public header
extern "C" {
ggml_backend_buffer_t ggml_backend_buffer_init(ggml_backend_buffer_type_t, buffer_table, void * context, size_t size);
bool ggml_can_fuse_subgraph_ext(const ggml_cgraph *, const int * nodes, int n_nodes, const ggml_op * ops,
    const int * outputs, int n_outputs);
}

// Why this ggml is another one than the tables above are of; empty if it is not.
const char * ggml_plugin_trouble();
