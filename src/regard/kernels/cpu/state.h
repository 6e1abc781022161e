// What a block of rows carries from tile to tile: the online softmax (Milakov and Gimelshein 2018),
// the mixed values, and what observers keep of each row. One lane a row; everything is vertical.
#pragma once
#include "scores.h"

namespace regard::LEVEL {

struct State {
    int lanes, k;
    long v_dim;
    float *top;      // the largest score so far; a sink counts
    float *total;    // Σ exp(score − top), the sink's share included
    float *spread;   // Σ p · ln p of the same p, for the entropy
    float *visible;  // the largest score of a key
    float *value;    // [k][lanes] the largest scores, descending
    int32_t *index;  // [k][lanes] their keys; −1 none
    float *mixed;    // [panel][v_dim][PW] Σ p · v

    static long floats(int lanes, long v_dim, int k) { return lanes * (4 + 2l * k + v_dim); }

    State() = default;
    State(float* at, int lanes, long v_dim, int k) : lanes(lanes), k(k), v_dim(v_dim) {
        top = at;
        total = top + lanes;
        spread = total + lanes;
        visible = spread + lanes;
        value = visible + lanes;
        index = (int32_t*)(value + (long)k * lanes);
        mixed = (float*)index + (long)k * lanes;
    }

    void clear() {
        for (int i = 0; i < lanes; i++) {
            top[i] = LOWEST;
            total[i] = spread[i] = 0;
            visible[i] = -INFINITY;
        }
        for (long i = 0; i < (long)k * lanes; i++) {
            value[i] = -INFINITY;
            index[i] = -1;
        }
        memset(mixed, 0, (size_t)lanes * v_dim * sizeof(float));
    }

    // The lane starts from its head's sink: a score without a key.
    void sink(int lane, float logit) {
        top[lane] = logit == -INFINITY ? LOWEST : logit;
        total[lane] = logit == -INFINITY ? 0.f : 1.f;
    }

    // Offers score s of a key to the lanes' k largest. Ties stay with the lower key, which came
    // first; NaN stands above all, so that it surfaces.
    void offer(int c, V s, int32_t key) {
        I id = I{} + key;
        for (int t = 0; t < k; t++) {
            float* v = value + (long)t * lanes + c;
            float* i = (float*)index + (long)t * lanes + c;
            V other = load(v);
            I held = (I)load(i), behind = s <= other;
            store(v, behind ? other : s);
            store(i, (V)(behind ? held : id));
            s = behind ? s : other;
            id = behind ? id : held;
        }
    }

    // Offers the scores s[j · PW] of n keys to one vector of lanes: only those that beat the k-th.
    void offer_all(int c, const float* s, int n, long k0, V largest) {
        V last = load(value + (long)(k - 1) * lanes + c);
        if (!any((I)(largest > last) | (largest != largest))) return;
        for (int j = 0; j < n; j += 4) {
            int m = n - j < 4 ? n - j : 4;
            I some = I{};
            for (int u = 0; u < m; u++) some |= ~(load(s + (j + u) * PW) <= last);
            if (!any(some)) continue;
            for (int u = 0; u < m; u++) {
                V x = load(s + (j + u) * PW);
                if (!any(~(x <= last))) continue;
                offer(c, x, (int32_t)(k0 + j + u));
                last = load(value + (long)(k - 1) * lanes + c);
            }
        }
    }

    // Joins the state of later keys.
    void join(const State& later) {
        for (int c = 0; c < lanes; c += W) {
            V mine = load(top + c), theirs = load(later.top + c);
            V high = max(mine, theirs);
            V a = exp(mine - high), b = exp(theirs - high);
            V la = load(total + c), lb = load(later.total + c);
            // ln p of each side falls by how far its top rose
            V ea = load(spread + c) + shift(mine - high, la);
            V eb = load(later.spread + c) + shift(theirs - high, lb);
            store(spread + c, a * ea + b * eb);
            store(total + c, a * la + b * lb);
            store(top + c, high);
            store(visible + c, max(load(visible + c), load(later.visible + c)));
            int p = c / PW, half = c % PW;
            for (long d = 0; d < v_dim; d++) {
                float* x = mixed + (p * v_dim + d) * PW + half;
                store(x, a * load(x) + b * load(later.mixed + (p * v_dim + d) * PW + half));
            }
            for (int t = 0; t < k; t++) {
                for (int i = 0; i < W; i++) {
                    int32_t key = later.index[(long)t * lanes + c + i];
                    if (key >= 0) insert(c + i, later.value[(long)t * lanes + c + i], key);
                }
            }
        }
    }

    static inline V shift(V rise, V sum) {
        rise = max(all(-200.f), rise);  // e^−200 weighs nothing; −inf · 0 would be NaN
        return sum == 0.f ? V{} : rise * sum;
    }

  private:
    void insert(int lane, float s, int32_t key) {
        for (int t = 0; t < k; t++) {
            float& v = value[(long)t * lanes + lane];
            int32_t& i = index[(long)t * lanes + lane];
            if (s <= v) continue;
            float other = v;
            int32_t held = i;
            v = s;
            i = key;
            s = other;
            key = held;
        }
    }
};

}  // namespace regard::LEVEL
