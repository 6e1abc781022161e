// What the forward leaves of a block whose keys are done: out, lse, and what observers keep.
#pragma once
#include "forward_block.h"

namespace regard::LEVEL {

inline void Forward::finish(const Block& block, State& state, Strip& strip, long stripe) {
    for (int i = 0; i < block.lanes(); i++)
        scale[i] = i >= block.count || state.total[i] == 0 ? 0 : 1 / state.total[i];
    if (o.k) weigh_top(state);
    for (int i = 0; i < block.segments; i++) write(block.segment[i], state);
    if (o.row_count)
        each_kept(block, [&](const Segment&, int lane, float* row) {
            V top = all(state.top[lane]), by = all(scale[lane]);
            for (long j = 0; j < c.k_len; j += W) {
                V x = all(-INFINITY);
                long n = least(W, c.k_len - j);
                memcpy(&x, row + j, n * sizeof(float));
                x = exp(x - top) * by;
                memcpy(row + j, &x, n * sizeof(float));
            }
        });
    Timed observing(clock, OBSERVERS);
    if (plan.columns)
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            Weighing(c, o, strip, state, scale, weighing)
                .segment(s, keys_of(s.b), sh.column(s.b, s.h, stripe));
        }
}

// Out, lse, and what observers keep of each row.
inline void Forward::write(const Segment& s, const State& state) {
    for (int r = 0; r < s.count; r++) {
        int lane = s.lane + r;
        long row = (s.b * c.heads + s.h) * c.q_len + s.q0 + r;
        double top = state.top[lane], total = state.total[lane];
        if (c.stats) {
            c.stats[2 * row] = state.top[lane];
            c.stats[2 * row + 1] = state.total[lane];
        }
        c.lse[row] = total == 0 ? -INFINITY : (float)(top + ::log(total));
        float taken = 0;
        if (c.sinks && total != 0)
            taken = (float)(::exp(c.sinks[s.h] - top) / total);
        if (o.max_score) o.max_score[row] = state.visible[lane];
        if (o.entropy) {
            // −Σ p ln p with p = exp(score − top) / total, over the keys: less what a sink took
            double mass = 1 - (double)taken, spread = state.spread[lane] / total;
            if (taken > 0) spread -= taken * (c.sinks[s.h] - top);
            o.entropy[row] = total == 0 ? 0 : (float)(mass * ::log(total) - spread);
        }
        if (o.k) keep_top(state, lane, row, (float)(c.sinks ? 1 - (double)taken : total != 0), taken);
    }
    write_mixed(s, state);
}

// The scores that are listed become weights. A row that holds a NaN has none: it surfaces in all of them.
inline void Forward::weigh_top(State& state) const {
    for (int at = 0; at < state.lanes; at += W) {
        V top = load(state.top + at), by = load(scale + at), total = load(state.total + at);
        for (int t = 0; t < o.k; t++) {
            float* x = state.value + (long)t * state.lanes + at;
            store(x, total == total ? exp(load(x) - top) * by : total);
        }
    }
}
inline void Forward::keep_top(const State& state, int lane, long row, float mass, float taken) {
    float listed = 0;
    for (int t = 0; t < o.k; t++) {
        int32_t key = state.index[(long)t * state.lanes + lane];
        float weight = state.value[(long)t * state.lanes + lane];
        o.index[row * o.k + t] = key < 0 ? -1 : key + (int32_t)c.key_start;
        o.top[row * o.k + t] = weight;
        listed += weight;
    }
    float rest = mass - listed;
    o.rest[row] = rest < 0 ? 0 : rest;
    o.sink[row] = taken;
}

// The mixed values [dim][lane], turned into rows and divided by the rows' sums.
inline void Forward::write_mixed(const Segment& s, const State& state) {
    for (int lane = s.lane; lane < s.lane + s.count && few; lane++) {
        float* row = state.mixed + lane * state.v_dim;
        V total = all(state.total[lane]), inverse = all(scale[lane]);
        for (long d = 0; d < c.v_dim; d += W) store(row + d, divided(load(row + d), total, inverse));
        together(c.value.type, c.v_dim, row);
        narrow(c.out.type, row, c.v_dim, (char*)address(c.out, s.b, s.h, s.q0 + lane - s.lane));
    }
    if (few) return;
    for (int lane = s.lane / W * W; lane < s.lane + s.count; lane += W) {
        const float* from = state.mixed + lane / PW * state.v_dim * PW + lane % PW;
        V total = load(state.total + lane), inverse = load(scale + lane);
        for (long d = 0; d < c.v_dim; d += W) {
            V v[W];
            #pragma GCC unroll 16
            for (int i = 0; i < W; i++)
                v[i] = d + i < c.v_dim ? divided(load(from + (d + i) * PW), total, inverse) : V{};
            transpose(v);
            #pragma GCC unroll 16
            for (int i = 0; i < W; i++) store(turned + i * (c.v_dim + W) + d, v[i]);
        }
        for (int i = 0; i < W; i++) {
            int r = lane + i - s.lane;
            if (r < 0 || r >= s.count) continue;
            char* to = (char*)address(c.out, s.b, s.h, s.q0 + r);
            narrow(c.out.type, turned + i * (c.v_dim + W), c.v_dim, to);
        }
    }
}

}  // namespace regard::LEVEL
