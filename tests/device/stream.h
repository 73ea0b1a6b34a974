// A queue of work that one thread does in order, later.

#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

class stream {
public:
    // A lazy stream begins only when somebody waits for it; another one delays each piece of work.
    stream(bool lazy, int delay_us);
    ~stream(); // does what is left

    stream(const stream &) = delete;
    stream & operator=(const stream &) = delete;

    uint64_t push(std::function<void()> work); // gives its number
    uint64_t last();                           // number of the last piece of work
    void     wait(uint64_t number);            // until that and everything before it is done

private:
    void run();

    const bool lazy;
    const int  delay_us;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> queue;
    uint64_t n_pushed = 0;
    uint64_t n_done   = 0;
    uint64_t n_wanted = 0;
    bool     ended    = false;
    std::thread worker;
};

// A point in a stream's work.
struct stream_point {
    std::shared_ptr<stream> of;
    uint64_t                number = 0;

    void wait() const {
        if (of) {
            of->wait(number);
        }
    }
};
