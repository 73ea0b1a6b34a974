// How a function of a library that is not ours is taken over.
//
// ELF: this library exports a function of the same name, which the dynamic linker finds first when the library
// is preloaded or was loaded globally before; the real one is looked up by name.
// Mach-O: the linker replaces calls as the __interpose section says; our own calls reach the real one.

#pragma once

#include "ggml-abi.h"

#ifdef MOETRACE_INTERPOSE

#ifdef __APPLE__
#define MOETRACE_WEAK    __attribute__((weak_import))
#define MOETRACE_SECTION __attribute__((used, section("__DATA,__interpose")))
#else // so that this half can be compiled anywhere
#define MOETRACE_WEAK    __attribute__((weak))
#define MOETRACE_SECTION __attribute__((used, section("interpose")))
#endif

#define MOETRACE_HOOK(ret, name, params, ...)                                                           \
    extern "C" ret name params MOETRACE_WEAK;                                                               \
    static auto real_##name() { return &name; }                                                          \
    static ret hook_##name params;                                                                       \
    MOETRACE_SECTION static const struct {                                                               \
        const void * replacement; const void * replacee;                                                 \
    } interpose_##name = { (const void *) &hook_##name, (const void *) &name };                          \
    static ret hook_##name params

#else

#define MOETRACE_HOOK(ret, name, params, ...)                                                           \
    extern "C" __attribute__((visibility("default"))) ret name params;                                   \
    static auto real_##name() {                                                                          \
        static const auto function = (decltype(&name)) ::moetrace::symbol_find(#name);                   \
        return function;                                                                                 \
    }                                                                                                    \
    extern "C" ret name params

#endif
