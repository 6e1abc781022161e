// The products of the backward on tiles, and weights and slopes packed as they are made.
#pragma once
#include "backward_block.h"

namespace regard::LEVEL {

// One row of one tile.
template <int parts>
INLINE void put(V low, V high, const Tiles& to, long row, long column, int i) {
    float* at = (float*)to.at(row, column) + i * W;
    if constexpr (parts > 1) store(at, (V)part_of<false>(low, high));
    if constexpr (parts > 2) store(at + to.step / 2, (V)part_of<false>(low, high));
    store(at + (parts - 1) * to.step / 2, (V)part_of<true>(low, high));
}

// What one pair adds to the gradients: the same three products.
inline void Backward::gather_on_tiles(long id, int count, int n) {
    for (long p = 0; p < sh.v_dim / PW; p++)
        tile_product<true>(sh.parts, false, n, count, weight_tiles,
                           sh.row_tiles(sh.grad_row_tiles, id, sh.v_dim, p),
                           d_value + p * KEYS * PW, PW);
    for (long p = 0; p < sh.dim / PW; p++)
        tile_product<true>(sh.parts, false, n, count, slope_tiles,
                           sh.row_tiles(sh.query_row_tiles, id, sh.dim, p),
                           d_key + p * KEYS * PW, PW);
    for (int p = 0; p * PW < count; p++)
        tile_product<true>(sh.parts, false, c.dim, n, key_turned, slopes_of(p), d_query_of(id, p), PW);
}

// Weights and slopes of one panel, where all products are on tiles: half of the keys at a time, so
// that all stays in the nearest cache.
template <int NV>
void Backward::tile_panel(long id, int p, int n, bool every) {
    bool whole = c.query.type == F16, fold = after > 0;
    for (int from = 0; from < n; from += KEYS / 2) {
        int count = (int)least(n - from, KEYS / 2), bites = (int)tiles(count, BITE);
        float *s = score, *ds = slope;
        Tiles k = key_tiles, v = value_tiles;
        k.data = k.at(from / SIDE, 0);
        v.data = v.at(from / SIDE, 0);
        tile_product<false, NV>(sh.parts, whole, count, c.dim, k,
                                sh.lane_tiles(sh.query_tiles, id, sh.dim, p), s, PW);
        tile_product<false, NV>(sh.parts, whole, count, c.v_dim, v,
                                sh.lane_tiles(sh.grad_tiles, id, sh.v_dim, p), ds, PW);
        if (careful) odd_pairs<NV>(id, p, from, count, s, ds, PW);
        if (!fold) multiply<NV>(count, s, PW, after);
        if (!every) shaping.finish<NV>(p, count, s, PW, visible + from, nullptr);
        if (careful) see<NV>(p, from, count, s, PW);
        // Up to a whole bite: no weight and no slope, where products would add what stood there
        for (long j = count * PW; j < bites * BITE * PW; j += W) {
            store(s + j, all(-INFINITY));
            store(ds + j, V{});
        }
        with_parts(sh.parts, [&](auto split) {
            if (c.dropout)
                slopes_on<split.count, NV, true>(p, from, bites, fold ? after : 1);
            else
                slopes_on<split.count, NV, false>(p, from, bites, fold ? after : 1);
        });
    }
}

// Weights and slopes out of the scores and the products with the values, as tiles: as rows whose
// depth are the lanes, and slopes as columns, too, whose depth are the keys.
template <int parts, int NV, bool dropping>
void Backward::slopes_on(int p, int from, int bites, float by) {
    NoDenormals flush;
    // log2(e) is folded into scale and top where a weight keeps 8 bits, in one part. Else the difference is
    // taken first: a folded top is rounded, by more the larger it is
    V scale = all(parts == 1 ? by * LOG2E : by), high[2], weight[2], less[2];
    for (int l = 0; l < 2; l++) {
        int at = p * PW + l * W;
        high[l] = load(top + at);
        if (parts == 1) high[l] = max(high[l] * LOG2E, all(LOWEST));
        weight[l] = load(inverse + at);
        less[l] = load(delta + at);
    }
    Tiles columns = slopes_of(p);
    for (int i = 0; i < bites * SIDE; i++) {
        int j = i / SIDE * BITE + i % SIDE;
        V w[2][2] = {}, d[2][2] = {};  // of the key and of the one that is SIDE keys on, lanes
        #pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
            #pragma GCC unroll 2
            for (int l = 0; l < NV; l++) {
                long at = (j + half * SIDE) * PW + l * W;
                V x = load(score + at), y = x * scale - high[l], dw = load(slope + at);
                if (parts > 1) y *= LOG2E;
                V of = exp2<parts == 1 ? 5 : 6>(y) * weight[l];
                if (careful) of = x == -INFINITY ? V{} : of;
                w[half][l] = of;
                if (dropping) {
                    V f = load(factors + (from + j + half * SIDE) * LANES + p * PW + l * W);
                    w[half][l] *= f;
                    dw *= f;
                }
                d[half][l] = of * (dw - less[l]);
                if (careful) d[half][l] = x == -INFINITY ? V{} : d[half][l];
            }
        #pragma GCC unroll 2
        for (int l = 0; l < NV; l++)
            put<parts>(d[0][l], d[1][l], columns, (from + j) / BITE, l, j % BITE);
        #pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            long row = (from + j) / SIDE + half;
            put<parts>(w[half][0], w[half][1], weight_tiles, row, p, j % BITE);
            put<parts>(d[half][0], d[half][1], slope_tiles, row, p, j % BITE);
        }
    }
}

}  // namespace regard::LEVEL
