// The device's memory: what the host sees of it cannot be read or written.

#pragma once

#include "ggml-plugin.h"

ggml_backend_buffer_t memory_alloc(ggml_backend_buffer_type_t type, size_t size);

// Memory of the host that the device copies to and from by itself ("pinned").
ggml_backend_buffer_t memory_alloc_pinned(ggml_backend_buffer_type_t type, size_t size);
bool memory_is_pinned(const void * address);

// Whether a tensor lies in memory of such a device.
bool memory_holds(const ggml_tensor * t);

// Where the device itself finds a tensor's data; a buffer of plain memory around it, for the CPU backend.
char * memory_address(const ggml_tensor * t);
ggml_backend_buffer_t memory_plain_buffer(const ggml_tensor * t);
