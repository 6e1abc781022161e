// A cache's decode step (regard_evict) against its definition, on buffers of exactly their size.
#pragma once
#include <functional>
#include <vector>

#include "problem.h"

inline void test_evict(const std::function<void(const char*)>& fail) {
    Random random;
    for (int trial = 0; trial < 3000; trial++) {
        const long batch = 1 + random.below(2), kv_heads = 1 + random.below(3), slots = 1 + random.below(9);
        const long heads = random.below(2) ? kv_heads : 1, query_heads = heads * (1 + random.below(3));
        const long room = slots + random.below(3), key_size = 1 + random.below(7), value_size = 3;
        const bool by_layer = random.below(2), sums = random.below(2), sees = sums || random.below(2);
        std::vector<char> key(batch * kv_heads * room * key_size), value(batch * kv_heads * room * value_size);
        for (char& byte : key) byte = (char)random.below(100);
        for (char& byte : value) byte = (char)random.below(100);
        std::vector<int32_t> positions(batch * heads * slots);
        for (long row = 0; row < batch * heads; row++)  // each row in an order of its own
            for (long slot = 0; slot < slots; slot++) {
                int32_t* mine = &positions[row * slots];
                const long other = random.below(slot + 1);
                mine[slot] = mine[other];
                mine[other] = (int32_t)slot * 2;
            }
        std::vector<float> total(sums ? batch * heads * slots : 0), seen(sees ? batch * query_heads * slots : 0);
        for (float& one : total) one = (float)random.below(4);  // many are equal
        for (float& one : seen) one = (float)random.below(4);
        // At least one slot may go
        const long below = random.below(2 * slots - 1), from = below + 1 + random.below(2 * slots);
        const auto goes = [&](int32_t at) { return at >= below && at < from; };
        bool any = true;
        for (long row = 0; row < batch * heads; row++) {
            bool here = false;
            for (long slot = 0; slot < slots; slot++) here |= goes(positions[row * slots + slot]);
            any &= here;
        }
        const auto key_before = key, value_before = value;
        const auto positions_before = positions;
        const auto total_before = total;
        const auto rows = [&](std::vector<char>& bytes, long size) {
            return RegardRows{bytes.data(), {kv_heads * room * size, room * size, size}, size};
        };
        RegardEvict wanted = {below, from, 7777, batch, kv_heads, heads, slots, rows(key, key_size),
                              rows(value, value_size), positions.data(), sums ? total.data() : nullptr,
                              query_heads, by_layer, sees ? seen.data() : nullptr};
        if (regard_evict(&wanted) != (any ? 0 : 2)) fail("a step's answer");
        if (!any) continue;
        for (long row = 0; row < batch * heads; row++) {
            const long item = row / heads, head = row % heads, last = slots - 1;
            const long group = query_heads / heads;
            const auto worth = [&](long slot) {
                float here = 0;  // small integers: their sums are exact
                for (long h = 0; sees && h < query_heads; h++)
                    if (by_layer || h / group == head) here += seen[(item * query_heads + h) * slots + slot];
                if (sees && by_layer) here /= (float)query_heads;
                return sums ? total_before[row * slots + slot] + here : here;
            };
            long gone = -1;
            for (long slot = 0; slot < slots; slot++) {
                const int32_t at = positions_before[row * slots + slot];
                if (!goes(at)) continue;
                if (gone < 0 || worth(slot) < worth(gone) ||
                    (worth(slot) == worth(gone) && at < positions_before[row * slots + gone]))
                    gone = slot;
            }
            for (long slot = 0; slot < last; slot++) {
                const long from_slot = slot == gone ? last : slot;
                if (positions[row * slots + slot] != positions_before[row * slots + from_slot]) fail("a position");
                if (sums && total[row * slots + slot] != worth(from_slot)) fail("a total");
                for (long kv = 0; kv < kv_heads; kv++) {
                    if (heads > 1 && kv != head) continue;
                    const long here = (item * kv_heads + kv) * room;
                    const auto moved = [&](std::vector<char>& now, const std::vector<char>& then, long size) {
                        return !memcmp(&now[(here + slot) * size], &then[(here + from_slot) * size], size);
                    };
                    if (!moved(key, key_before, key_size)) fail("a key that a step moves");
                    if (!moved(value, value_before, value_size)) fail("a value that a step moves");
                }
            }
            if (sums && total[row * slots + last] != 0) fail("the free slot's total");
            if (positions[row * slots + last] != 7777) fail("the free slot's position");
        }
    }
}
