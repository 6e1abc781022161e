// Scores on tiles become weights, which the next product reads as tiles of B: the softmax of a panel
// and the packing in one pass, a bite of keys at a time.
//
// For some 250 cycles after an instruction on tiles the processor multiplies vectors at half its rate.
// So a bite's scores are made while vectors are busy with the bite before, which hides them; values are
// mixed a whole tile at a time.
#pragma once
#include "parts.h"
#include "softmax.h"

namespace regard::LEVEL {

constexpr int BITE = DEPTH;  // keys whose weights are one tile deep
// By how much a row's largest score may exceed its top. To raise one takes a walk over all that is mixed
// so far, and the next product, which loads that again, waits for its stores: without slack at nearly
// each tile, with it once or twice a row. Nothing is lost: weights of up to e⁸ have as many digits as
// those of at most 1, and out, lse and the gradients only ever see weights over their sum.
constexpr float SLACK = 8;

// Two vectors of weights as a pair of bf16, one part after another: what is left of them goes on. All
// parts but the last are cut off rather than rounded, which leaves less for the vectors to do, and three
// of them still hold all 24 bits.
template <bool last>
INLINE N part_of(V& low, V& high) {
    if constexpr (last) return pair(low, high);
    N a = (N)low & 0xffff0000u, b = (N)high & 0xffff0000u;
    low -= (V)a;
    high -= (V)b;
    return a >> 16 | b;
}

// What the softmax of one panel and one bite of keys reads and leaves, besides the state.
struct Weigh {
    float* scores;           // [key][PW]; are to be multiplied by `by`: watched, they are in the end
    long k0;                 // the first key; −inf stands for those that there are not
    float by;
    uint16_t* to;            // tiles of B
    float* kept;             // [key][PW] gets the weights; or null
    const float* factors;    // [key][LANES] of the dropout; or null
    bool entropy;
};

// The largest score of each lane. Whether one lies too far above its top, which is to rise then.
template <int NV>
static bool largest_of(const State& state, int p, const Weigh& of, V* largest) {
    bool beyond = false;
    #pragma GCC unroll 2
    for (int l = 0; l < NV; l++) {
        V a[4];
        #pragma GCC unroll 4
        for (int i = 0; i < 4; i++) a[i] = all(-INFINITY);
        for (long j = 0; j < BITE; j += 4)
            #pragma GCC unroll 4
            for (int i = 0; i < 4; i++) a[i] = max(load(of.scores + (j + i) * PW + l * W), a[i]);
        largest[l] = max(max(a[0], a[1]), max(a[2], a[3])) * of.by;
        beyond |= any(largest[l] > load(state.top + p * PW + l * W) + SLACK);
    }
    return beyond;
}

// What was weighed before is mixed by now if a top rises.
template <int parts, int NV, bool watched>
static void weigh_on_tiles(State& state, int p, const Weigh& of, const V* largest) {
    const float* s = of.scores;
    V high[NV], fall[NV], less[NV], total[NV] = {}, spread[NV] = {};
    V by = all(parts == 1 ? of.by * LOG2E : of.by);
    bool moved = false;
    #pragma GCC unroll 2
    for (int l = 0; l < NV; l++) {
        moved |= rise(state, p * PW + l * W, largest[l], watched && of.entropy, high[l], fall[l],
                      SLACK);
        // Where no key is seen yet, the top is so low that it would become −inf
        less[l] = parts == 1 ? max(high[l] * LOG2E, all(LOWEST)) : high[l];
    }
    if (moved) state.fade<NV>(p, fall);
    NoDenormals flush;
    #pragma GCC unroll 2
    for (int i = 0; i < SIDE; i++)
        #pragma GCC unroll 2
        for (int l = 0; l < NV; l++) {
            V w[2];
            #pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                long at = (i + half * SIDE) * PW + l * W;
                V y = load(s + at) * by - less[l];
                if (parts > 1) y *= LOG2E;
                w[half] = exp2<parts == 1 ? 5 : 6>(y);
                if (watched) {
                    if (of.entropy) spread[l] += w[half] * max(all(-200.f), y * (1 / LOG2E));
                    if (of.kept) store(of.kept + at, w[half]);
                }
            }
            total[l] += w[0] + w[1];
            if (watched && of.factors)
                for (int half = 0; half < 2; half++)
                    w[half] *= load(of.factors + (i + half * SIDE) * LANES + l * W);
            float* to = (float*)(of.to + l * TILE) + i * W;
            if constexpr (parts > 1) store(to, (V)part_of<false>(w[0], w[1]));
            if constexpr (parts > 2) store(to + KEYS * PW / 2, (V)part_of<false>(w[0], w[1]));
            store(to + (parts - 1) * KEYS * PW / 2, (V)part_of<true>(w[0], w[1]));
        }
    for (int l = 0; l < NV; l++) {
        int at = p * PW + l * W;
        store(state.total + at, load(state.total + at) + total[l]);
        if (watched && of.entropy) store(state.spread + at, load(state.spread + at) + spread[l]);
    }
    if (!watched) return;
    if (of.by != 1.f) multiply<NV>(BITE, of.scores, PW, of.by);
    for (int l = 0; l < NV && state.k; l++)
        state.offer_all(p * PW + l * W, s + l * W, BITE, of.k0, largest[l]);
}

}  // namespace regard::LEVEL
