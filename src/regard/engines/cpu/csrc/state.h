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

    // Whether scores of one vector of lanes, of which these are the largest, are to be offered.
    bool takes(int c, V largest) const {
        return k && beats(largest, load(value + (long)(k - 1) * lanes + c));
    }
    // Offers the scores s[j · PW] · by of n ≤ KEYS keys to NV vectors of lanes: few at a time while their lists
    // are not full, as each that is taken makes it harder for the next. run(offer): does one offer, and what is to
    // be done beside it. How many there were.
    template <int NV, class Run>
    INLINE_MEMBER long offer_all(int c, const float* s, int n, long k0, float by, Run run) {
        int at_once = any(load(value + (long)(k - 1) * lanes + c) == -INFINITY) ? 16 : 64;
        long times = 0;
        for (int from = 0; from < n; from += at_once, s += at_once * PW, k0 += at_once) {
            Better better[NV];
            for (int i = 0; i < NV; i++) better[i] = better_of(c + i * W, s + i * W, least(at_once, n - from), by);
            for (int i = 0; i < NV; i++) {
                if (!better[i].some()) continue;
                switch (k) {  // a list of these lengths is held in registers meanwhile
                    case 1: times += offer_some<1>(c + i * W, s + i * W, k0, better[i], by, run); break;
                    case 4: times += offer_some<4>(c + i * W, s + i * W, k0, better[i], by, run); break;
                    case 8: times += offer_some<8>(c + i * W, s + i * W, k0, better[i], by, run); break;
                    default: times += offer_some<0>(c + i * W, s + i * W, k0, better[i], by, run);
                }
            }
        }
        return times;
    }
    void offer_all(int c, const float* s, int n, long k0) {
        offer_all<1>(c, s, n, k0, 1, [](auto offer) { offer(); });
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

    // Of each lane, which of 64 keys have more than its k-th: bit j % 32 of j / 32.
    struct Better {
        I early, late;

        INLINE_MEMBER bool some() const { return any((early | late) != 0); }
        // Of each lane the number of the first, which is taken away; negative: there is none.
        INLINE_MEMBER I take() {
            I bit = lowest(early), later = bit != 0 ? I{} : lowest(late);
            early ^= bit, late ^= later;
            return number_of(bit | later) + (later != 0 ? I{} + 32 : I{});
        }
    };
    INLINE_MEMBER Better better_of(int c, const float* s, long n, float by) const {
        Better found = {};
        V last = load(value + (long)(k - 1) * lanes + c);
        auto ask = [&](I& bits, int bit, int j) INLINE_LAMBDA {
            bits = mark(bits, (int32_t)(1u << bit), load(s + j * PW) * by, last);
        };
        if (n == 64) {
            #pragma GCC unroll 32
            for (int j = 0; j < 32; j++) ask(found.early, j, j), ask(found.late, j, j + 32);
        } else {
            for (int j = 0; j < n; j++) ask(j < 32 ? found.early : found.late, j % 32, j);
        }
        return found;
    }

    // Of each lane, one of its `better` scores after the other goes to its place in the list, whatever those of
    // the other lanes are: ties stay with the lower key, which came first; NaN stands above all, so that it
    // surfaces. K: the list's length; 0: k, in memory.
    template <int K, class Run>
    INLINE_MEMBER long offer_some(int c, const float* s, long k0, Better better, float by, Run run) {
        constexpr int held = K ? K : 1;
        V score[held];
        I key[held];
        auto at = [&](auto* list, int t) { return (float*)list + (long)t * lanes + c; };
        #pragma GCC unroll 8
        for (int t = 0; t < K; t++) {
            score[t] = load(at(value, t));
            key[t] = (I)load(at(index, t));
        }
        long times = 0;
        auto offer = [&]() INLINE_LAMBDA {
            I j = better.take(), id = j + (int32_t)k0;
            V x = gather(s, j, PW, all(-INFINITY)) * by;
            // From the last place on, so that what it asks of one does not wait for another's answer
            auto place = [&](V& its, I& key, V before, I key_before, I& behind) INLINE_LAMBDA {
                I next = x <= before;
                its = behind ? its : next ? x : before;
                key = behind ? key : next ? id : key_before;
                behind = next;
            };
            if constexpr (K) {
                I behind = x <= score[K - 1];
                #pragma GCC unroll 8
                for (int t = K - 1; t > 0; t--) place(score[t], key[t], score[t - 1], key[t - 1], behind);
                score[0] = behind ? score[0] : x;
                key[0] = behind ? key[0] : id;
            } else {
                V its = load(at(value, k - 1));
                I mine = (I)load(at(index, k - 1)), behind = x <= its;
                for (int t = k - 1; t > 0; t--) {
                    V before = load(at(value, t - 1));
                    I key_before = (I)load(at(index, t - 1));
                    place(its, mine, before, key_before, behind);
                    store(at(value, t), its);
                    store(at(index, t), (V)mine);
                    its = before, mine = key_before;
                }
                store(at(value, 0), behind ? its : x);
                store(at(index, 0), (V)(behind ? mine : id));
            }
        };
        for (; better.some(); times++) run(offer);
        #pragma GCC unroll 8
        for (int t = 0; t < K; t++) {
            store(at(value, t), score[t]);
            store(at(index, t), (V)key[t]);
        }
        return times;
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
