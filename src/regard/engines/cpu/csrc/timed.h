// Where the cycles of forward and backward go, for `regard bench --parts`. Built with the CMake option REGARD_PARTS;
// without it nothing of this is left.
#pragma once
#include "abi.h"

#if defined(REGARD_PARTS)
#include <atomic>
#if defined(__x86_64__)
#include <x86intrin.h>
#else
#include <chrono>
#endif
#endif

namespace regard {

enum Part { TILES, PACKING, SCORES, SOFTMAX, MIX, OBSERVERS, REST, PART_COUNT };  // TILES: their number

#if defined(REGARD_PARTS)

extern std::atomic<int64_t> part_cycles[PART_COUNT];  // of all threads (dispatch.cpp)

inline int64_t cycles_now() {
#if defined(__x86_64__)
    return (int64_t)__rdtsc();
#else
    return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

// A thread is always in one part: to enter another stops the clock of the one around it.
struct PartClock {
    int64_t spent[PART_COUNT] = {}, since = cycles_now();
    Part now = REST;

    void enter(Part part) {
        int64_t time = cycles_now();
        spent[now] += time - since;
        since = time;
        now = part;
    }
    ~PartClock() {
        enter(REST);
        for (int i = 0; i < PART_COUNT; i++) part_cycles[i] += spent[i];
    }
};
struct Timed {
    PartClock& clock;
    Part outer;
    Timed(PartClock& clock, Part part) : clock(clock), outer(clock.now) { clock.enter(part); }
    ~Timed() { clock.enter(outer); }
    static void tile(PartClock& clock) { clock.spent[TILES]++; }
};

#else

struct PartClock {};
struct Timed {
    Timed(PartClock&, Part) {}
    ~Timed() {}  // so that one that is never read draws no warning
    static void tile(PartClock&) {}
};

#endif

}  // namespace regard
