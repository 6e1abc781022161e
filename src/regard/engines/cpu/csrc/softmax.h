// The online softmax (Milakov and Gimelshein 2018): a tile's scores become weights relative to the
// largest so far, and the state of their rows goes on.
#pragma once
#include "few.h"
#include "state.h"

namespace regard::LEVEL {

// Raises the tops of the W lanes at `at` to `high`. Whether any was lower; fall: what sums so far are
// multiplied by. Those of the state are.
INLINE bool raise(State& state, int at, V high, bool entropy, V& fall) {
    V was = load(state.top + at);
    fall = all(1);
    if (!any(high != was)) return false;
    store(state.top + at, high);
    fall = exp(was - high);
    V total = load(state.total + at);
    if (entropy)
        store(state.spread + at, fall * (load(state.spread + at) + State::shift(was - high, total)));
    store(state.total + at, fall * total);
    return true;
}
// The same to the scores `a`, where those are larger. high: the tops now.
INLINE bool rise(State& state, int at, V a, bool entropy, V& high, V& fall) {
    store(state.visible + at, max(a, load(state.visible + at)));
    V was = load(state.top + at);
    high = a > was ? a : was;
    return raise(state, at, high, entropy, fall);
}

// Of panel p, NV vectors of lanes: s[key][PW], scores and then weights.
template <int NV, bool entropy>
static void softmax_of(State& state, int p, float* s, long k0, int n) {
    V high[NV], fall[NV];
    bool moved = false;
    #pragma GCC unroll 2
    for (int i = 0; i < NV; i++) {
        int at = p * PW + i * W;
        V a = all(-INFINITY), b = a;
        for (int j = 0; j + 1 < n; j += 2) {
            a = max(load(s + j * PW + i * W), a);
            b = max(load(s + (j + 1) * PW + i * W), b);
        }
        if (n & 1) a = max(load(s + (n - 1) * PW + i * W), a);
        a = max(a, b);
        if (state.takes(at, a)) state.offer_all(at, s + i * W, n, k0);
        moved |= rise(state, at, a, entropy, high[i], fall[i]);
    }
    if (moved) state.fade<NV>(p, fall);
    V total[NV] = {}, spread[NV] = {};
    NoDenormals flush;
    for (int from = 0; from < n; from += 16) {  // in short sums, which round less
        V part[NV] = {};
        int to = (int)least(n, from + 16);
        #pragma GCC unroll 2
        for (int j = from; j < to; j++) {
            #pragma GCC unroll 2
            for (int i = 0; i < NV; i++) {
                V t = load(s + j * PW + i * W) - high[i];
                V e = exp_flushed(t);
                if (entropy) spread[i] += e * max(all(-200.f), t);
                part[i] += e;
                store(s + j * PW + i * W, e);
            }
        }
        for (int i = 0; i < NV; i++) total[i] += part[i];
    }
    for (int i = 0; i < NV; i++) {
        int at = p * PW + i * W;
        store(state.total + at, load(state.total + at) + total[i]);
        if (entropy) store(state.spread + at, load(state.spread + at) + spread[i]);
    }
}

template <int NV>
static void softmax(State& state, int p, float* s, long k0, int n, bool entropy) {
    if (entropy)
        softmax_of<NV, true>(state, p, s, k0, n);
    else
        softmax_of<NV, false>(state, p, s, k0, n);
}

// Of few rows: s[row][KEYS]. lanes: the same as [key][PW], for the k largest; unread if none are kept.
static void few_softmax(State& state, int rows, float* s, const float* lanes, long k0, int n,
                        bool entropy) {
    V a = all(-INFINITY);
    for (int r = 0; r < rows; r++) {
        V found = all(-INFINITY);
        for (int j = 0; j < n; j += W) found = max(load(s + r * KEYS + j), found);
        float largest = -INFINITY;
        for (int i = 0; i < W; i++) largest = found[i] > largest ? found[i] : largest;
        a[r] = largest;
    }
    if (state.takes(0, a)) state.offer_all(0, lanes, n, k0);
    V high, fall;
    if (rise(state, 0, a, entropy, high, fall)) state.fade<1>(0, &fall);
    V total = {}, spread = {};
    for (int r = 0; r < rows; r++) {
        V part = {}, part_spread = {}, top = all(high[r]);
        for (int j = 0; j < n; j += W) {
            V t = load(s + r * KEYS + j) - top, e = exp(t);
            part_spread += e * max(all(-200.f), t);
            part += e;
            store(s + r * KEYS + j, e);
        }
        total[r] = sum(part);
        spread[r] = sum(part_spread);
    }
    store(state.total, load(state.total) + total);
    if (entropy) store(state.spread, load(state.spread) + spread);
}

}  // namespace regard::LEVEL
