#include "stream.h"

#include <chrono>

stream::stream(bool lazy, int delay_us) : lazy(lazy), delay_us(delay_us), worker([this] { run(); }) {}

stream::~stream() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        ended = true;
    }
    changed.notify_all();
    worker.join();
}

uint64_t stream::push(std::function<void()> work) {
    uint64_t number;
    {
        std::lock_guard<std::mutex> lock(mutex);
        queue.push_back(std::move(work));
        number = ++n_pushed;
    }
    changed.notify_all();
    return number;
}

uint64_t stream::last() {
    std::lock_guard<std::mutex> lock(mutex);
    return n_pushed;
}

void stream::wait(uint64_t number) {
    std::unique_lock<std::mutex> lock(mutex);
    if (number > n_wanted) {
        n_wanted = number;
        changed.notify_all();
    }
    changed.wait(lock, [&] { return n_done >= number; });
}

void stream::run() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
        changed.wait(lock, [&] { return ended || (!queue.empty() && (!lazy || n_done < n_wanted)); });
        if (queue.empty()) {
            return;
        }
        std::function<void()> work = std::move(queue.front());
        queue.pop_front();
        lock.unlock();
        if (delay_us > 0) {
            std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
        }
        work();
        lock.lock();
        n_done++;
        changed.notify_all();
    }
}
