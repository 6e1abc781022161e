// What a block of rows carries from tile to tile: the online softmax (Milakov and Gimelshein 2018),
// the mixed values, and what observers keep of each row. One lane a row; everything is vertical.
#pragma once
#include "scores.h"

namespace regard::LEVEL {

struct State {
    int lanes, k, few;
    long v_dim;
    float *top;      // what weights are relative to: the largest score so far, a sink included, or less
                     // than it by what the HEAVIEST of weights.h allows
    float *total;    // Σ exp(score − top), the sink's share included
    float *spread;   // Σ p · ln p of the same p, for the entropy
    float *visible;  // the largest score of a key
    float *value;    // [k][lanes] the largest scores, descending
    int32_t *index;  // [k][lanes] their keys; −1 none
    float *mixed;    // [panel][v_dim][PW] Σ p · v; of few rows, as many as that, [row][v_dim]

    static long floats(int lanes, long v_dim, int k, int few = 0) {
        return lanes * (4 + 2l * k) + (few ? few : lanes) * v_dim;
    }

    State() = default;
    State(float* at, int lanes, long v_dim, int k, int few = 0)
        : lanes(lanes), k(k), few(few), v_dim(v_dim) {
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
        memset(mixed, 0, (few ? few : lanes) * v_dim * sizeof(float));
    }

    // Multiplies what is mixed in panel p, NV vectors of lanes.
    template <int NV>
    void fade(int p, const V* by) {
        for (int r = 0; r < few; r++) fade_row(r, by[0][r]);
        float* x = mixed + p * v_dim * PW;
        for (long d = 0; d < v_dim && !few; d++)
            for (int i = 0; i < NV; i++) store(x + d * PW + i * W, by[i] * load(x + d * PW + i * W));
    }

    // The lane starts from its head's sink: a score without a key.
    void sink(int lane, float logit) {
        top[lane] = logit == -INFINITY ? LOWEST : logit;
        total[lane] = logit == -INFINITY ? 0.f : 1.f;
    }

    // Offers the scores s[j · PW] · by of n ≤ KEYS keys to one vector of lanes: only those that beat the k-th.
    // run(times, offer): has `offer` done so often. How often.
    template <class Run>
    INLINE_MEMBER long offer_all(int c, const float* s, int n, long k0, V largest, float by, Run run) {
        V last = load(value + (long)(k - 1) * lanes + c);
        if (!any((I)(largest > last) | (largest != largest))) return run(0, [] {}), 0;
        uint64_t better[KEYS / 64];
        long times = 0;
        for (int word = 0; word < KEYS / 64; word++) {
            uint64_t bits = 0;
            const float* from = s + word * 64 * PW;
            int m = n - word * 64 < 64 ? n - word * 64 : 64;
            for (int j = 0; j < m; j++) bits |= (uint64_t)beats(load(from + j * PW) * by, last) << j;
            better[word] = bits;
            times += __builtin_popcountll(bits);
        }
        switch (k) {  // a list of these lengths is held in registers meanwhile
            case 1: offer_some<1>(c, s, k0, better, by, times, run); break;
            case 4: offer_some<4>(c, s, k0, better, by, times, run); break;
            case 8: offer_some<8>(c, s, k0, better, by, times, run); break;
            default: offer_some<0>(c, s, k0, better, by, times, run);
        }
        return times;
    }
    void offer_all(int c, const float* s, int n, long k0, V largest) {
        offer_all(c, s, n, k0, largest, 1, [](long times, auto offer) {
            for (; times > 0; times--) offer();
        });
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
            for (int r = 0; r < few && c == 0; r++) {
                float* x = mixed + r * v_dim;
                const float* y = later.mixed + r * v_dim;
                for (long d = 0; d < v_dim; d += W) store(x + d, load(x + d) * a[r] + load(y + d) * b[r]);
            }
            for (long d = 0; d < v_dim && !few; d++) {
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
    void fade_row(int r, float by) {
        for (long d = 0; d < v_dim && by != 1.f; d += W)
            store(mixed + r * v_dim + d, load(mixed + r * v_dim + d) * by);
    }

    // The scores of a lane go down its list: ties stay with the lower key, which came first; NaN stands
    // above all, so that it surfaces. K: the list's length; 0: k, in memory.
    template <int K, class Run>
    INLINE_MEMBER void offer_some(int c, const float* s, long k0, const uint64_t* better, float by, long times,
                                  Run run) {
        constexpr int held = K ? K : 1;
        V score[held];
        I key[held];
        auto at = [&](auto* list, int t) { return (float*)list + (long)t * lanes + c; };
        #pragma GCC unroll 8
        for (int t = 0; t < K; t++) {
            score[t] = load(at(value, t));
            key[t] = (I)load(at(index, t));
        }
        int word = 0;
        uint64_t left = better[0];
        run(times, [&]() INLINE_LAMBDA {
            while (!left) left = better[++word];
            int j = word * 64 + __builtin_ctzll(left);
            left &= left - 1;
            V x = load(s + j * PW) * by;
            I id = I{} + (int32_t)(k0 + j);
            auto offer = [&](V& other, I& its) INLINE_LAMBDA {
                I behind = x <= other;
                V gone = behind ? x : other;
                I goes = behind ? id : its;
                other = behind ? other : x;
                its = behind ? its : id;
                x = gone;
                id = goes;
            };
            #pragma GCC unroll 8
            for (int t = 0; t < K; t++) offer(score[t], key[t]);
            for (int t = 0; K == 0 && t < k; t++) {
                V other = load(at(value, t));
                I its = (I)load(at(index, t));
                offer(other, its);
                store(at(value, t), other);
                store(at(index, t), (V)its);
            }
        });
        #pragma GCC unroll 8
        for (int t = 0; t < K; t++) {
            store(at(value, t), score[t]);
            store(at(index, t), (V)key[t]);
        }
    }
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
