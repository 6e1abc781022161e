// What keys receive under a given lse (regard_columns) against the weights themselves: of all queries and
// of some; the bits whatever the threads, and what stands in hidden keys.
#pragma once
#include <cmath>
#include <vector>

#include "naive.h"
#include "pooled.h"

struct ReceivedByKeys {
    std::vector<float> sum;
    std::vector<int32_t> count;
};

// In buffers of exactly their size.
inline ReceivedByKeys receive(const RegardCall& call, const Buffer& lse, long first, long last, Failing fail) {
    const size_t size = call.batch * call.heads * call.k_len;
    ReceivedByKeys got{std::vector<float>(size, NAN), std::vector<int32_t>(size, -1)};
    const RegardColumns wanted = {lse.data<float>(), {first, last, got.sum.data(), got.count.data()}};
    if (regard_columns(&call, &wanted)) fail("no memory for columns");
    return got;
}

inline void test_columns(RegardCall call, RegardCall spoiled, const Truth& truth, Closeness close, Failing fail) {
    const Case& c = truth.c;
    if (!c.batch || !c.k_len) return;
    Buffer lse(F32, {c.batch, c.heads, c.q_len});
    for (long i = 0; i < lse.count; i++) lse.set(i, truth.lse.held[i]);
    const long spans[][2] = {{0, c.q_len}, {std::min(3l, c.q_len), std::min(20l, c.q_len)}, {0, 0}};
    for (const auto& [first, last] : spans) {
        call.threads = 1;
        const ReceivedByKeys one = receive(call, lse, first, last, fail);
        call.threads = 3;
        for (const RegardCall& other : {call, spoiled}) {
            const ReceivedByKeys again = receive(other, lse, first, last, fail);
            if (memcmp(one.sum.data(), again.sum.data(), one.sum.size() * 4)) fail("threads, or hidden keys, change a column");
            if (one.count != again.count) fail("threads, or hidden keys, change a column's count");
        }
        for (long b = 0, n = 0; b < c.batch; b++)
            for (long h = 0; h < c.heads; h++)
                for (long j = 0; j < c.k_len; j++, n++) {
                    double sum = 0, count = 0;
                    for (long i = first; i < last; i++) {
                        sum += truth.weight(b, h, i, j);
                        count += truth.p.shows(b, h, i, j);
                    }
                    close("a column", one.sum[n], sum, 5e-5);
                    close("a column's count", one.count[n], count, 0);
                }
    }
}
