// Functions of llama.cpp and ggml, by name. A process may hold several llama.cpp, each with libraries of its own: one
// of them is traced, the first that calls a hook, and what others call goes where it would have gone.

#pragma once

#include <atomic>

namespace moetrace {

// The address of an exported function of the llama.cpp that is traced; until one is, of any. This library's own exports
// are left out. Slow; keep the result. nullptr if nobody defines it.
void * symbol_find(const char * name);

struct callee {
    void * function; // what the call would have reached
    bool   traced;   // whether it is of the llama.cpp that is traced
};

// A function that a hook takes the place of. Constant-initialized: hooks may be called before any constructor ran.
class hooked_function {
  public:
    constexpr explicit hooked_function(const char * name) : name(name) {}

    // By the place that the call came from.
    callee of(void * caller);

  private:
    static constexpr int MAX_SITES = 8; // more are looked up each time

    struct call_site {
        std::atomic<void *> caller { nullptr }; // set last
        callee to { nullptr, false };
    };

    const char *     name;
    std::atomic<int> n_sites { 0 };
    call_site        sites[MAX_SITES];
};

} // namespace moetrace
