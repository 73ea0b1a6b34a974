// Loops over picks that numpy has no word for. Each is a function of arrays, gives what the plain numpy version in the
// tests gives, and lets go of Python's lock while it runs.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <string>
#include <sys/mman.h>
#include <system_error>
#include <thread>
#include <vector>

namespace moetrace {

namespace py = pybind11;

// A loop that newer processors do in fewer steps: made for them, too, and chosen when it is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "popcnt", "default")))
#else
#define FOR_EACH_CPU
#endif

template <typename T> using array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// An argument that is not as its function says.
inline void need(bool condition, const char * what) {
    if (!condition) {
        throw py::value_error(what);
    }
}

// Whether all are from 0 to below `end`. All are looked at: that takes fewer steps than to stop at the first that is not.
template <typename T>
bool all_below(const T * values, size_t n, int64_t end) {
    const T last = (T) std::min<int64_t>(end - 1, std::numeric_limits<T>::max());
    T out = 0;
    for (size_t i = 0; i < n; i++) {
        out |= (T) (values[i] < 0) | (T) (values[i] > last);
    }
    return out == 0;
}

// How many threads loops take that are not told: 0 for as many as there are cores. Processes that are forked off share it.
inline std::atomic<int> & default_threads() {
    static std::atomic<int> & shared = *[] {
        void * page = mmap(nullptr, sizeof(std::atomic<int>), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        return page == MAP_FAILED ? new std::atomic<int>(0) : new (page) std::atomic<int>(0);
    }();
    return shared;
}

// Runs body(i) for i in [0, n) on several threads (0: the default); make() gives each thread its scratch.
template <typename Make, typename Body>
void parallel_for(size_t n, int n_threads, Make && make, Body && body) {
    const py::gil_scoped_release unlocked;
    const size_t told   = (size_t) std::max(n_threads > 0 ? n_threads : default_threads().load(), 0);
    const size_t wanted = std::min<size_t>(n, told ? told : std::max(1u, std::thread::hardware_concurrency()));
    std::atomic<size_t> next { 0 };
    std::exception_ptr  failed;
    std::mutex          failing;
    const auto work = [&] {
        try {
            auto scratch = make();
            for (size_t i = next++; i < n; i = next++) {
                body(i, scratch);
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(failing);
            failed = std::current_exception();
            next   = n;
        }
    };
    std::vector<std::thread> threads;
    threads.reserve(wanted);
    try {
        for (size_t i = 1; i < wanted; i++) {
            threads.emplace_back(work);
        }
    } catch (const std::system_error &) { // no more can be had: those there are do it
    }
    work();
    for (auto & thread : threads) {
        thread.join();
    }
    if (failed) {
        std::rethrow_exception(failed);
    }
}

void bind_caches(py::module_ & m);
void bind_kinds(py::module_ & m);
void bind_lags(py::module_ & m);
void bind_pairs(py::module_ & m);
void bind_splits(py::module_ & m);
void bind_tops(py::module_ & m);

} // namespace moetrace
