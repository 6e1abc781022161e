// A panel of the forward that is wholly on tiles: scores, softmax and mix, bite after bite of keys.
#pragma once
#include "forward_block.h"

namespace regard::LEVEL {

// Scores, softmax and mix of one panel, all on tiles. keep: as `Strip` has it, or null.
template <int NV>
void Forward::tile_panel(const Block& block, State& state, int p, const Sides& of, float* keep,
                         long k0, int n) {
    int first = 0, last = (int)tiles(n, BITE);
    if (seen) shown(p, n, first, last);
    if (keep) {
        memset(keep, 0, first * BITE * PW * sizeof(float));
        memset(keep + last * BITE * PW, 0, (KEYS - last * BITE) * PW * sizeof(float));
    }
    if (first == last) return;
    // As many at a time as stay in the nearest cache: more parts take more of it
    const int parts = sh.tiles.parts, group = parts == 1 ? KEYS / BITE : KEYS / BITE / 2;
    for (int bite = first; bite < last; bite += group) {
        int end = (int)least(bite + group, last), unmixed = bite;
        // Weights wait in `weight_parts` until they are mixed; when a top rises they are mixed first,
        // since what is mixed is multiplied by e to the power of the fall, and they stand by the old top
        auto mix = [&](int until) {
            Timed mixing(clock, MIX);
            Tiles v = of.values;
            v.data = v.at(0, unmixed);
            if (until > unmixed)
                tile_product<true, NV>(parts, false, c.v_dim, (until - unmixed) * BITE, v,
                                       weight_tiles(), state.mixed + p * sh.v_dim * PW, PW);
            unmixed = until;
        };
        score_bite<NV>(p, of, n, bite);
        for (int i = bite; i < end; i++) {
            // The next scores are on their way while vectors make weights of these
            if (i + 1 < end) score_bite<NV>(p, of, n, i + 1);
            V top[2] = {load(state.top + p * PW), load(state.top + p * PW + W)}, largest[NV];
            Weigh weigh = weigh_of(p, keep, k0, i);
            if (largest_of<NV>(state, p, weigh, largest)) mix(i);
            weigh.to = weight_parts + (i - unmixed) * BITE * PW;
            if (odd_values.count) see_odd<NV>(i * BITE, BITE, weigh.scores);
            weigh_bite<NV>(state, p, weigh, largest, keep);
            if (odd_values.count) mix_odd_bite(i * BITE, weigh.to, state.mixed + p * sh.v_dim * PW);
            if (o.row_count)
                keep_rows(block, p, weigh.scores, weigh.k0, (int)least(n - i * BITE, BITE));
            if (keep) lower_kept<NV>(state, p, top, keep + first * BITE * PW, keep + i * BITE * PW);
        }
        mix(end);
    }
}

// The scores of one bite of a tile's n keys; −inf stands for those that there are not.
template <int NV>
void Forward::score_bite(int p, const Sides& of, int n, int bite) {
    Timed scoring(clock, SCORES);
    int from = bite * BITE, count = (int)least(n - from, BITE);
    float* s = scores_of(bite);
    Tiles k = of.keys;
    k.data = k.at(from / SIDE, 0);
    tile_product<false, NV>(sh.tiles.parts, c.query.type == F16, count, c.dim, k, query_tiles(p), s,
                            PW);
    odd_scores<NV>(p, of.k, from, count, s);
    if (!folded() && after != 1.f) multiply<NV>(count, s, PW, after);
    if (seen || shaping.shaped())
        shaping.finish<NV>(p, count, s, PW, seen ? seen + from : nullptr,
                           shaping.biased ? biases + from * LANES : nullptr);
    for (long j = count; j < BITE; j++)
        for (int i = 0; i < NV; i++) store(s + j * PW + i * W, all(-INFINITY));
}
// As `mix_odd`, the weights being tiles already: of their first part, which is 0 only where they are.
inline void Forward::mix_odd_bite(int from, const uint16_t* tile, float* mixed) const {
    mix_odd(from, BITE,
            [&](int j, int lane) {
                int i = j - from;
                return from_brain(tile[lane / W * TILE + i % SIDE * DEPTH + 2 * (lane % W) + i / SIDE]);
            },
            [&](int lane, long d) { return mixed + d * PW + lane; });
}
inline Weigh Forward::weigh_of(int p, float* keep, long k0, int bite) const {
    int from = bite * BITE;
    return {scores_of(bite), k0 + from, folded() ? after : 1, nullptr,
            keep ? keep + from * PW : nullptr,
            c.dropout ? factors + from * LANES + p * PW : nullptr, o.entropy != nullptr};
}
template <int NV>
void Forward::weigh_bite(State& state, int p, const Weigh& weigh, const V* largest, bool kept) {
    Timed weighing(clock, SOFTMAX);
    bool watched = kept || c.dropout || o.entropy || o.k || o.row_count;
    with_parts(sh.tiles.parts, [&](auto split) {
        if (watched)
            weigh_on_tiles<split.count, NV, true>(state, p, weigh, largest);
        else
            weigh_on_tiles<split.count, NV, false>(state, p, weigh, largest);
    });
}

// Weights that are kept stand by the top that the tile ends with: those between `from` and `to` fall by
// how far it has risen above `top`.
template <int NV>
void Forward::lower_kept(const State& state, int p, const V* top, float* from, float* to) const {
    for (int l = 0; l < NV && from < to; l++) {
        V fall = exp(top[l] - load(state.top + p * PW + l * W));
        if (!any(fall != 1.f)) continue;
        for (float* w = from + l * W; w < to; w += PW) store(w, load(w) * fall);
    }
}

// The bites of a tile's n keys that the rows of a panel see.
inline void Forward::shown(int p, int n, int& first, int& last) const {
    auto some = [&](int bite) {
        uint64_t words = 0;
        for (int j = bite * BITE; j < least(n, (bite + 1) * BITE); j++) words |= seen[j];
        return (words >> p * PW & first_bits(PW)) != 0;
    };
    while (first < last && !some(first)) first++;
    while (last > first && !some(last - 1)) last--;
}

}  // namespace regard::LEVEL
