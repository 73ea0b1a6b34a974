// How a function of a library that is not ours is taken over.
//
// ELF: this library exports a function of the same name, which the dynamic linker finds first when the library
// is preloaded or was loaded globally before; the real one is what the caller would have reached (symbols.h).
// Mach-O: the linker replaces calls as the __interpose section says; our own calls reach the real one.
//
// A hook's body calls it as `real`.

#pragma once

#include "symbols.h"

#ifdef MOETRACE_INTERPOSE

#ifdef __APPLE__
#define MOETRACE_WEAK    __attribute__((weak_import))
#define MOETRACE_SECTION __attribute__((used, section("__DATA,__interpose")))
#else // so that this half can be compiled anywhere
#define MOETRACE_WEAK    __attribute__((weak))
#define MOETRACE_SECTION __attribute__((used, section("interpose")))
#endif

#define MOETRACE_HOOK_TAKE(ret, name, params, args, otherwise)                                              \
    extern "C" ret name params MOETRACE_WEAK;                                                               \
    MOETRACE_HOOK_BODY(ret, name, params)                                                                   \
    static ret hook_of_##name params { return hook_##name { &name, true }.run args; }                       \
    MOETRACE_SECTION static const struct {                                                                  \
        const void * replacement; const void * replacee;                                                    \
    } interpose_##name = { (const void *) &hook_of_##name, (const void *) &name };                          \
    ret hook_##name::run params

#else

#define MOETRACE_HOOK_TAKE(ret, name, params, args, otherwise)                                              \
    extern "C" __attribute__((visibility("default"))) ret name params;                                      \
    MOETRACE_HOOK_BODY(ret, name, params)                                                                   \
    extern "C" ret name params {                                                                            \
        static ::moetrace::hooked_function taken { #name };                                                 \
        const ::moetrace::callee to = taken.of(__builtin_return_address(0));                                \
        const auto real = (decltype(&name)) to.function;                                                    \
        otherwise                                                                                           \
        return hook_##name { real, to.traced }.run args;                                                    \
    }                                                                                                       \
    ret hook_##name::run params

#endif

#define MOETRACE_HOOK_BODY(ret, name, params)                                                               \
    namespace {                                                                                             \
    struct hook_##name {                                                                                    \
        decltype(&::name) real;                                                                             \
        bool traced;                                                                                        \
        ret run params;                                                                                     \
    };                                                                                                      \
    }

// Calls of the llama.cpp that is traced; those of others go on.
#define MOETRACE_HOOK(ret, name, params, args) \
    MOETRACE_HOOK_TAKE(ret, name, params, args, if (!to.traced) { return real args; })

// All calls; `traced` says which.
#define MOETRACE_HOOK_ANY(ret, name, params, args) MOETRACE_HOOK_TAKE(ret, name, params, args, )
