// Threads. Work is a function that every thread of a team runs once; it takes its items from a
// counter that they share.
#pragma once
#include <atomic>

namespace regard {

void run_team(long threads, void (*work)(void*), void* data);

// Items 0 … count − 1, one at a time to whoever asks.
struct Queue {
    std::atomic<long> next{0};
    long count;
    explicit Queue(long count) : count(count) {}
    bool take(long& item) { return (item = next.fetch_add(1, std::memory_order_relaxed)) < count; }
    // Whether all were taken: a thread without memory takes none, and leaves them to the others.
    bool empty() const { return next.load() >= count; }
};

}  // namespace regard
