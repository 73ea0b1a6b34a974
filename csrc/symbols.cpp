#include "symbols.h"

#include <dlfcn.h>
#include <string>
#include <vector>

#ifdef __APPLE__
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif

namespace moetrace {

// Every llama.cpp has one ggml, and this function of it, which no hook takes.
static constexpr char ANCHOR[] = "ggml_init";

// that of the llama.cpp that is traced
static std::atomic<void *> traced_anchor { nullptr };

static const void * own_base() {
    static const void * base = [] {
        Dl_info info;
        return dladdr((void *) &symbol_find, &info) ? info.dli_fbase : nullptr;
    }();
    return base;
}

static void * not_own(void * address) {
    Dl_info info;
    return address && dladdr(address, &info) && info.dli_fbase == own_base() ? nullptr : address;
}

static void * symbol_next(const char * name) {
    return not_own(dlsym(RTLD_NEXT, name));
}

// What a loaded object reaches under this name: its own, or that of a library it needs.
static void * symbol_in(const char * path, const char * name, int flags = 0) {
    void * handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD | flags);
    if (!handle) {
        return nullptr;
    }
    void * address = not_own(dlsym(handle, name));
    dlclose(handle); // NOLOAD: the object stays loaded
    return address;
}

static std::vector<std::string> loaded_objects() {
    std::vector<std::string> paths;
#ifdef __APPLE__
    for (uint32_t i = 0; i < _dyld_image_count(); i++) {
        paths.push_back(_dyld_get_image_name(i));
    }
#else
    // collected first: dlopen under the iteration's lock could deadlock
    dl_iterate_phdr([](dl_phdr_info * info, size_t, void * out) {
        if (info->dlpi_name && *info->dlpi_name) {
            ((std::vector<std::string> *) out)->push_back(info->dlpi_name);
        }
        return 0;
    }, &paths);
#endif
    return paths;
}

// Whether the object that has this function is of the llama.cpp that is traced.
static bool is_traced(void * address) {
    void * anchor = traced_anchor.load(std::memory_order_acquire);
    Dl_info info;
    if (!anchor || !dladdr(address, &info) || !info.dli_fname) {
        return true;
    }
    void * its = symbol_in(info.dli_fname, ANCHOR);
    return (its ? its : symbol_next(ANCHOR)) == anchor; // the program itself cannot be opened: it sees what comes next
}

void * symbol_find(const char * name) {
    // a preloaded library sees the real one as the next; one loaded by Python does not
    void * address = symbol_next(name);
    if (address && is_traced(address)) {
        return address;
    }
    for (const auto & path : loaded_objects()) {
        address = symbol_in(path.c_str(), name);
        if (address && is_traced(address)) {
            return address;
        }
    }
    return nullptr;
}

static callee callee_find(const char * name, void * caller) {
    Dl_info info;
    void * function = nullptr;
    void * anchor   = nullptr;
    if (dladdr(caller, &info) && info.dli_fname && info.dli_fbase != own_base()) {
        // what is remembered of a call must stay true: the caller is never unloaded
        function = symbol_in(info.dli_fname, name, RTLD_NODELETE);
        anchor   = function ? symbol_in(info.dli_fname, ANCHOR) : nullptr;
    }
    if (!function) { // the program itself, or who was given our address: libffi, for one
        function = symbol_next(name);
        anchor   = function ? symbol_next(ANCHOR) : nullptr;
    }
    if (!function) {
        return { symbol_find(name), true };
    }
    void * traced = nullptr;
    if (!anchor || traced_anchor.compare_exchange_strong(traced, anchor)) {
        return { function, true };
    }
    return { function, traced == anchor };
}

callee hooked_function::of(void * caller) {
    for (const auto & site : sites) {
        if (site.caller.load(std::memory_order_acquire) == caller) {
            return site.to;
        }
    }
    try {
        const callee found = callee_find(name, caller);
        if (n_sites.load(std::memory_order_relaxed) < MAX_SITES) {
            const int i = n_sites.fetch_add(1, std::memory_order_relaxed);
            if (i < MAX_SITES) {
                sites[i].to = found;
                sites[i].caller.store(caller, std::memory_order_release);
            }
        }
        return found;
    } catch (...) { // no memory
        return { symbol_next(name), false };
    }
}

} // namespace moetrace
