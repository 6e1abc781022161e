// Scores on tiles become weights, which the next product reads as tiles of B: the softmax of a panel
// and the packing in one pass, a bite of keys at a time, with products on tiles beside it.
#pragma once
#include "beside.h"
#include "softmax.h"

namespace regard::LEVEL {

constexpr int BITE = DEPTH;  // keys whose weights are one tile deep
constexpr int BITES = 2;     // at most so many at a time: enough work of vectors for the products beside it
// What the weights of some bites may come to in a row before its top rises. The largest score need not be known
// first then, and to raise a top takes a walk over all that is mixed so far: without slack at nearly each step,
// with it once or twice a row. Weights of up to e⁸ have as many digits as those of at most 1, and out, lse and
// the gradients only ever see weights over their sum; but the entropy is what two numbers of that size differ
// by, so no more slack than that. One of e⁴ at least is among those that come to more: a top that rises to the
// largest score does not at once rise again.
constexpr float HEAVIEST = BITES * BITE * 54.6f;

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

// One row of one tile of each part, which stand `step` numbers from each other.
template <int parts>
INLINE void put(V low, V high, float* to, long step) {
    if constexpr (parts > 1) store(to, (V)part_of<false>(low, high));
    if constexpr (parts > 2) store(to + step / 2, (V)part_of<false>(low, high));
    store(to + (parts - 1) * step / 2, (V)part_of<true>(low, high));
}

// What the softmax of one panel and some bites of keys reads and leaves, besides the state.
struct Weigh {
    int bites;
    float* scores;           // [key][PW]; are to be multiplied by `by`
    long k0;                 // the first key; −inf stands for those that there are not
    float by;
    uint16_t* to;            // tiles of B
    float* kept;             // [key][PW] gets the weights; or null
    const float* factors;    // [key][LANES] of the dropout; or null
    bool entropy, largest;   // whether the state keeps that of each row
};

// The largest score of each lane.
template <int NV>
static void largest_of(const Weigh& of, V* largest) {
    #pragma GCC unroll 2
    for (int l = 0; l < NV; l++) {
        V a[4];
        #pragma GCC unroll 4
        for (int i = 0; i < 4; i++) a[i] = all(-INFINITY);
        for (long j = 0; j < of.bites * BITE; j += 4)
            #pragma GCC unroll 4
            for (int i = 0; i < 4; i++) a[i] = max(load(of.scores + (j + i) * PW + l * W), a[i]);
        largest[l] = max(max(a[0], a[1]), max(a[2], a[3])) * of.by;
    }
}

// Gives the lanes that have no top yet their largest scores.
template <int NV>
static void set_tops(State& state, int p, const Weigh& of) {
    I unset[NV];
    bool some = false;
    for (int l = 0; l < NV; l++) {
        unset[l] = load(state.top + p * PW + l * W) == LOWEST;
        some |= any(unset[l]);
    }
    if (!some) return;
    V largest[NV];
    largest_of<NV>(of, largest);
    for (int l = 0; l < NV; l++) {
        float* top = state.top + p * PW + l * W;
        store(top, unset[l] ? max(largest[l], all(LOWEST)) : load(top));
    }
}

// Raises the tops of these lanes to their largest scores. What was weighed before is mixed by now.
template <int NV>
static void raise_tops(State& state, int p, const Weigh& of, const I* lanes) {
    V largest[NV], fall[NV];
    largest_of<NV>(of, largest);
    bool moved = false;
    for (int l = 0; l < NV; l++) {
        int at = p * PW + l * W;
        V was = load(state.top + at);
        V high = lanes[l] & (largest[l] > was) ? largest[l] : was;
        moved |= raise(state, at, high, of.entropy, fall[l]);
    }
    if (moved) state.fade<NV>(p, fall);
}

// Where a row's weights come to more than HEAVIEST (or to NaN) this says so in `beyond` and leaves the state as
// it is, unless the tops are `settled`.
template <int parts, int NV, bool watched>
static bool weigh_on_tiles(State& state, int p, const Weigh& of, Beside& beside, bool settled, I* beyond) {
    const float* s = of.scores;
    V top[NV], total[NV] = {}, spread[NV] = {}, largest[NV], by = all(of.by);
    for (int l = 0; l < NV; l++) {
        top[l] = load(state.top + p * PW + l * W);
        largest[l] = all(-INFINITY);
    }
    const Exp2Table by_table;
    long row = 0, steps = beside.steps<parts>();
    if (state.k) steps = steps * of.bites * SIDE / (of.bites * SIDE + beside.offers);
    beside.do_among<parts>(steps, of.bites * SIDE, [&]() INLINE_LAMBDA {
        const long i = row % SIDE, j = row / SIDE * BITE + i;  // among a tile's rows, and among the keys
        #pragma GCC unroll 2
        for (int l = 0; l < NV; l++) {
            V w[2];
            #pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                long at = (j + half * SIDE) * PW + l * W;
                V x = load(s + at), y = (x * by - top[l]) * LOG2E;  // in this order: scores may be large
                w[half] = parts == 1 ? by_table(y) : exp2<6>(y);
                if (watched) {
                    if (of.largest) largest[l] = max(x, largest[l]);
                    if (of.entropy) spread[l] += w[half] * max(all(-200.f), y * (1 / LOG2E));
                    if (of.kept) store(of.kept + at, w[half]);
                }
            }
            total[l] += w[0] + w[1];
            if (watched && of.factors)
                for (int half = 0; half < 2; half++)
                    w[half] *= load(of.factors + (j + half * SIDE) * LANES + l * W);
            float* to = (float*)(of.to + row / SIDE * BITE * PW + l * TILE) + i * W;
            put<parts>(w[0], w[1], to, KEYS * PW);
        }
        row++;
    });
    bool some = false;
    for (int l = 0; l < NV; l++) {
        beyond[l] = ~(total[l] <= HEAVIEST);
        some |= any(beyond[l]);
    }
    if (some && !settled) return false;
    for (int l = 0; l < NV; l++) {
        int at = p * PW + l * W;
        store(state.total + at, load(state.total + at) + total[l]);
        if (watched && of.entropy) store(state.spread + at, load(state.spread + at) + spread[l]);
    }
    if (watched && of.largest)
        for (int l = 0; l < NV; l++) {
            float* most = state.visible + p * PW + l * W;
            store(most, max(largest[l] * by, load(most)));
        }
    if (state.k) {
        beside.offers = state.offer_all<NV>(
            p * PW, s, of.bites * BITE, of.k0, of.by,
            [&](auto offer) INLINE_LAMBDA { beside.do_one<parts>(offer); });
        beside.do_among<parts>(beside.steps<parts>(), 0, [] {});
    }
    return true;
}

}  // namespace regard::LEVEL
