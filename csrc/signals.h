// Which signals reached this process, and whether a process or the terminal sent them.

#pragma once

#include <csignal>
#include <utility>
#include <vector>

namespace moetrace {

// Takes over signals while it lives; one at a time.
class signal_watch {
  public:
    explicit signal_watch(const std::vector<int> & numbers);
    ~signal_watch();
    signal_watch(const signal_watch &) = delete;
    signal_watch & operator=(const signal_watch &) = delete;

    // Those since the last call: number, and whether the kernel sent it (a terminal's Ctrl-C goes to its whole group).
    std::vector<std::pair<int, bool>> take();
    void close();

  private:
    std::vector<std::pair<int, struct sigaction>> before;
};

} // namespace moetrace
