// What a cache does after a decode step where one slot is too many: next to nothing, so that its cost
// is that of being asked. Written for one thread and every instruction set.
#include <cstring>
#include <new>
#include <vector>

#include "abi.h"

namespace regard {

// Slot `last` moves to slot `gone` in one item's and kv head's rows.
static void move(const RegardRows& rows, int64_t item, int64_t head, int64_t last, int64_t gone) {
    char* here = rows.data + item * rows.stride[0] + head * rows.stride[1];
    memcpy(here + gone * rows.stride[2], here + last * rows.stride[2], rows.bytes);
}

// Adds what the query heads first … last − 1 of an item gave to each slot, one head after another.
static void add(const RegardEvict& e, int64_t item, int64_t first, int64_t last, float* sum) {
    for (int64_t head = first; head < last; head++) {
        const float* given = e.seen + (item * e.query_heads + head) * e.slots;
        for (int64_t slot = 0; slot < e.slots; slot++) sum[slot] = head == first ? given[slot] : sum[slot] + given[slot];
    }
}

// The slot that goes: of least worth, of equals the earliest position; −1: none may.
static int64_t least(const RegardEvict& e, const int32_t* position, const float* worth) {
    int64_t found = -1;
    for (int64_t slot = 0; slot < e.slots; slot++) {
        const int32_t at = position[slot];
        if (at < e.keep_below || at >= e.keep_from) continue;
        const bool equal = found >= 0 && worth[slot] == worth[found];
        if (found < 0 || worth[slot] < worth[found] || (equal && at < position[found])) found = slot;
    }
    return found;
}

static int evict(const RegardEvict& e) {
    const int64_t last = e.slots - 1, group = e.kv_heads / e.heads, queries = e.query_heads / e.heads;
    std::vector<float> worth(e.slots);
    for (int64_t row = 0; row < e.batch * e.heads; row++) {
        const int64_t item = row / e.heads, head = row % e.heads;
        if (e.seen && !e.by_layer) add(e, item, head * queries, (head + 1) * queries, worth.data());
        if (e.seen && e.by_layer && head == 0) {
            add(e, item, 0, e.query_heads, worth.data());
            for (float& one : worth) one /= (float)e.query_heads;
        }
        int32_t* position = e.positions + row * e.slots;
        float* total = e.total ? e.total + row * e.slots : nullptr;
        for (int64_t slot = 0; total && slot < e.slots; slot++) total[slot] += worth[slot];
        const int64_t gone = least(e, position, total ? total : worth.data());
        if (gone < 0) return 2;
        position[gone] = position[last];
        position[last] = (int32_t)e.next;
        if (total) {
            total[gone] = total[last];
            total[last] = 0;
        }
        for (int64_t kv = head * group; gone != last && kv < (head + 1) * group; kv++) {
            move(e.key, item, kv, last, gone);
            move(e.value, item, kv, last, gone);
        }
    }
    return 0;
}

}  // namespace regard

extern "C" int regard_evict(const RegardEvict* wanted) {
    try {
        return regard::evict(*wanted);
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
