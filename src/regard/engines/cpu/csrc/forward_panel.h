// A panel of the forward by vectors, of rows or of few rows; its products on tiles where they may be.
#pragma once
#include "forward_block.h"

namespace regard::LEVEL {

// Scores, softmax and mix of one panel: NV vectors of rows against n keys.
template <int NV>
inline void Forward::panel(const Block& block, State& state, int p, const Sides& of, float* s, long k0,
                           int n, bool every) {
    if (few) return few_rows(block, state, s, k0, n, every);
    scores_of_panel<NV>(p, of, s, n, every);
    if (odd_values.count) see_odd<NV>(0, n, s);
    if (o.row_count) keep_rows(block, p, s, k0, n);
    const float* weights = s;
    {
        Timed weighing(clock, SOFTMAX);
        softmax<NV>(state, p, s, k0, n, o.entropy);
        if (c.dropout) weights = drop(p, n, s);
    }
    float* mixed = state.mixed + p * sh.v_dim * PW;
    mix_panel<NV>(of, weights, n, mixed);
    if (odd_values.count)
        mix_odd(0, n, [&](int j, int lane) { return weights[j * PW + lane]; },
                [&](int lane, long d) { return mixed + d * PW + lane; });
}
template <int NV>
inline void Forward::scores_of_panel(int p, const Sides& of, float* s, int n, bool every) {
    Timed scoring(clock, SCORES);
    if (of.keys.data) {
        tile_product<false, NV>(sh.tiles.parts, c.query.type == F16, n, c.dim, of.keys,
                                query_tiles(p), s, PW);
        odd_scores<NV>(p, of.k, 0, n, s);
    } else
        product<false, NV>(n, c.dim, of.k.data, of.k.ld, 1, query + p * c.dim * PW, PW, s, PW);
    if (after != 1.f) multiply<NV>(n, s, PW, after);
    if (!every || shaping.shaped())
        shaping.finish<NV>(p, n, s, PW, seen, shaping.biased ? biases : nullptr);
}
template <int NV>
inline void Forward::mix_panel(const Sides& of, const float* weights, int n, float* mixed) {
    Timed mixing(clock, MIX);
    if (!of.values.data)
        return product<true, NV>(c.v_dim, n, of.v.data, 1, of.v.ld, weights, PW, mixed, PW);
    with_parts(sh.tiles.parts, [&](auto split) {
        pack_columns<split.count, false, Unseen>(weights, PW, n, NV * W, weight_tiles());
    });
    tile_product<true, NV>(sh.tiles.parts, false, c.v_dim, n, of.values, weight_tiles(), mixed, PW);
}

inline const float* Forward::drop(int p, int n, const float* s) {
    for (int j = 0; j < n; j++)
        for (int i = 0; i < PW; i++)
            dropped[j * PW + i] = s[j * PW + i] * factors[j * LANES + p * PW + i];
    return dropped;
}

// The same of few rows. Their scores leave [row][key] only where something looks at lanes: what
// shapes scores, and observers.
inline void Forward::few_rows(const Block& block, State& state, float* s, long k0, int n, bool every) {
    bool plain = every && !shaping.shaped() && !c.dropout;
    {
        Timed scoring(clock, SCORES);
        few_keys.scores(c, block.count, n, query_rows, few_scores);
    }
    if (!plain || o.k || o.row_count) to_lanes(block.count, n, few_scores, s);
    if (!every || shaping.shaped())
        shaping.finish<1>(0, n, s, PW, seen, shaping.biased ? biases : nullptr);
    if (o.row_count) keep_rows(block, 0, s, k0, n);
    if (odd_values.count) {
        if (plain) to_lanes(block.count, n, few_scores, s);
        see_odd<1>(0, n, s);
    }
    {
        Timed weighing(clock, SOFTMAX);
        if (plain)
            few_softmax(state, block.count, few_scores, s, k0, n, o.entropy);
        else
            softmax<1>(state, 0, s, k0, n, o.entropy);
    }
    if (!plain)
        from_lanes(block.count, n, c.dropout ? drop(0, n, s) : s, few_scores);
    else if (plan.columns)
        to_lanes(block.count, n, few_scores, s);
    Timed mixing(clock, MIX);
    few_keys.mix(c, n, few_scores, state);
    if (odd_values.count)
        mix_odd(0, n, [&](int j, int lane) { return few_scores[lane * KEYS + j]; },
                [&](int lane, long d) {
                    return state.mixed + lane * state.v_dim + place_apart(c.value.type, c.v_dim, d);
                });
}

}  // namespace regard::LEVEL
