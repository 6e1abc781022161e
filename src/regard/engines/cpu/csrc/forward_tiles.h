// A panel of the forward that is wholly on tiles: scores, softmax and mix, bite after bite of keys.
#pragma once
#include "forward_block.h"

namespace regard::LEVEL {

// Scores, softmax and mix of one panel, all on tiles. keep: as `Strip` has it, or null. While the weights of
// a bite are made, tiles multiply the scores of the next one and mix the values of bites before.
template <int parts, int NV>
void Forward::tile_panel(const Block& block, State& state, int p, const Sides& of, float* keep,
                         long k0, int n) {
    int first = 0, last = (int)tiles(n, BITE);
    if (seen) shown(p, n, first, last);
    if (keep) {
        memset(keep, 0, first * BITE * PW * sizeof(float));
        memset(keep + last * BITE * PW, 0, (KEYS - last * BITE) * PW * sizeof(float));
    }
    if (first == last) return;
    NoDenormals flush;  // here, as to set it stops the processor from looking ahead
    // As many are mixed at a time as stay in the nearest cache: more parts take more of it
    constexpr int group = parts == 1 ? KEYS / BITE : KEYS / BITE / 2;
    Tiles keys = of.keys;
    auto score = [&](int bite) {
        keys.data = of.keys.at(bite * BITE / SIDE, 0);
        begin_scores<parts>(keys, p, NV, n - bite * BITE);
    };
    if (ahead != of.keys.at(first * BITE / SIDE, 0) || ahead_panel != p) score(first);
    for (int bite = first; bite < last; bite += group) {
        int end = (int)least(bite + group, last), unmixed = bite;
        Tiles weights = next_weights();
        auto mix = [&](int until) {
            Tiles values = of.values, from = weights;
            values.data = values.at(0, unmixed);
            from.data = from.at(unmixed - bite, 0);
            beside.mix.start<parts, true>(values, from, state.mixed + p * sh.v_dim * PW,
                                          until > unmixed ? sh.tiles.v_dim : 0, until - unmixed, false, NV > 1);
            unmixed = until;
        };
        for (int i = bite, bites; i < end; i += bites) {
            bites = (int)least(BITES, end - i);
            Weigh weigh = weigh_of(p, keep, k0, i, bites);
            weigh.to = weights.at(i - bite, 0);
            {
                Timed scoring(clock, SCORES);
                beside.finish_scores<parts>();
                shape_bites<NV>(p, of, n, i, weigh);
            }
            if (i + bites < last)
                score(i + bites);
            else
                score_ahead<parts>(block, p, of, k0, n);
            beside.share_mix((end - i + BITES - 1) / BITES);
            V top[2] = {load(state.top + p * PW), load(state.top + p * PW + W)};
            I beyond[NV];
            if (odd_values.count) see_odd<NV>(i * BITE, bites * BITE, weigh.scores);
            if (i == first) set_tops<NV>(state, p, weigh);
            if (!weigh_bites<parts, NV>(state, p, weigh, false, beyond)) {
                // What was weighed stands by the tops of then: it is mixed first
                drain<parts>();
                mix(i);
                drain<parts>();
                raise_tops<NV>(state, p, weigh, beyond);
                weigh_bites<parts, NV>(state, p, weigh, true, beyond);
            }
            for (int b = 0; odd_values.count && b < bites; b++)
                mix_odd_bite((i + b) * BITE, weigh.to + b * BITE * PW, state.mixed + p * sh.v_dim * PW);
            if (o.row_count)
                keep_rows(block, p, weigh.scores, weigh.k0, (int)least(n - i * BITE, bites * BITE), weigh.by);
            if (keep) lower_kept<NV>(state, p, top, keep + first * BITE * PW, keep + i * BITE * PW);
        }
        mix(end);
    }
}

// All that is to be mixed yet, and the scores that are to be made.
template <int parts>
void Forward::drain() {
    Timed mixing(clock, MIX);
    beside.share_mix(1);
    beside.finish<parts>();
}
inline void Forward::drain_tiles() {
    if (on_tiles) with_parts(sh.tiles.parts, [&](auto of) { drain<of.count>(); });
}

// The scores of the first of so many keys against a panel, to be in `scores_turn` when they are done.
template <int parts>
INLINE_MEMBER void Forward::begin_scores(const Tiles& keys, int p, int vectors, long count) {
    turn ^= 1;
    ahead = keys.data;
    ahead_panel = p;
    beside.scores.start<parts, false>(keys, query_tiles(p), scores_turn(), tiles(least(count, BITES * BITE), SIDE),
                                      sh.tiles.dim, c.query.type == F16, vectors > 1);
}
// A panel ends: what most likely comes next are the first bites of the next panel, or of the next tile.
template <int parts>
void Forward::score_ahead(const Block& block, int p, const Sides& of, long k0, int n) {
    Tiles keys = of.keys;
    auto width = [&](int panel) { return block.panel_rows(panel) > W ? 2 : 1; };
    if (p + 1 < block.panels) {
        int first = 0, end = (int)tiles(n, BITE);
        if (seen) shown(p + 1, n, first, end);
        if (first == end) return;
        keys.data = keys.at(first * BITE / SIDE, 0);
        begin_scores<parts>(keys, p + 1, width(p + 1), n - first * BITE);
    } else if (sh.packed && k0 + n < last) {
        keys.data += sh.tiles.size();
        begin_scores<parts>(keys, 0, width(0), last - k0 - n);
    }
}

// Where the weights of the next bites go, while those of the bites before wait to be mixed.
inline Tiles Forward::next_weights() {
    weights_turn ^= 1;
    Tiles weights = weight_tiles();
    weights.data += weights_turn * sh.tiles.parts * KEYS * PW;
    return weights;
}

// What happens to the scores of some bites of a tile's n keys; −inf stands for those that there are not.
template <int NV>
void Forward::shape_bites(int p, const Sides& of, int n, int bite, const Weigh& weigh) {
    int from = bite * BITE, count = (int)least(n - from, weigh.bites * BITE);
    float* s = weigh.scores;
    odd_scores<NV>(p, of.k, from, count, s);
    if (!folded() && after != 1.f) multiply<NV>(count, s, PW, after);
    if (seen || shaping.shaped())
        shaping.finish<NV>(p, count, s, PW, seen ? seen + from : nullptr,
                           shaping.biased ? biases + from * LANES : nullptr);
    for (long j = count; j < weigh.bites * BITE; j++)
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
inline Weigh Forward::weigh_of(int p, float* keep, long k0, int bite, int bites) const {
    int from = bite * BITE;
    return {bites, scores_turn(), k0 + from, folded() ? after : 1, nullptr,
            keep ? keep + from * PW : nullptr,
            c.dropout ? factors + from * LANES + p * PW : nullptr, o.entropy != nullptr,
            o.max_score != nullptr};
}
template <int parts, int NV>
bool Forward::weigh_bites(State& state, int p, const Weigh& weigh, bool settled, I* beyond) {
    Timed weighing(clock, SOFTMAX);
    bool watched = weigh.kept || c.dropout || weigh.entropy || weigh.largest || o.row_count;
    return watched ? weigh_on_tiles<parts, NV, true>(state, p, weigh, beside, settled, beyond)
                   : weigh_on_tiles<parts, NV, false>(state, p, weigh, beside, settled, beyond);
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
