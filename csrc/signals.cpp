#include "signals.h"

#include <atomic>
#include <stdexcept>

namespace moetrace {

static constexpr int MAX_SIGNAL = 65;

static std::atomic<uint32_t> n_got[MAX_SIGNAL][2];
static std::atomic<bool>     watching { false };

static void signal_note(int number, siginfo_t * info, void *) {
    const bool by_kernel = info && info->si_pid == 0; // kill() and its like name the sender
    n_got[number][by_kernel].fetch_add(1, std::memory_order_relaxed);
}

signal_watch::signal_watch(const std::vector<int> & numbers) {
    for (const int number : numbers) {
        if (number < 1 || number >= MAX_SIGNAL) {
            throw std::invalid_argument("no such signal");
        }
    }
    if (watching.exchange(true)) {
        throw std::runtime_error("signals are watched already");
    }
    for (const int number : numbers) {
        n_got[number][0] = n_got[number][1] = 0;
        struct sigaction action = {}, old = {};
        action.sa_sigaction = signal_note;
        action.sa_flags     = SA_SIGINFO | SA_RESTART;
        sigemptyset(&action.sa_mask);
        if (sigaction(number, &action, &old) == 0) {
            before.emplace_back(number, old);
        }
    }
}

signal_watch::~signal_watch() {
    close();
}

std::vector<std::pair<int, bool>> signal_watch::take() {
    std::vector<std::pair<int, bool>> got;
    for (const auto & [number, old] : before) {
        for (const bool by_kernel : { false, true }) {
            for (uint32_t n = n_got[number][by_kernel].exchange(0); n > 0; n--) {
                got.emplace_back(number, by_kernel);
            }
        }
    }
    return got;
}

void signal_watch::close() {
    if (before.empty()) {
        return;
    }
    for (const auto & [number, old] : before) {
        sigaction(number, &old, nullptr);
    }
    before.clear();
    watching = false;
}

} // namespace moetrace
