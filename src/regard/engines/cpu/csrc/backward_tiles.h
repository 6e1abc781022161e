// The backward's pairs that are wholly on tiles. While the weights and slopes of half a panel are made by
// vectors, tiles multiply the scores of the next half and gather what the pair before gives the gradients.
#pragma once
#include "backward_keys.h"

namespace regard::LEVEL {

// A pair is made, and stands with those before.
template <int parts>
void Backward::add_pair(const Pair& now, int n) {
    pairs++;
    pair_keys = n;
    pair_end = now.id + 1;
    pair_lanes += now.block.count;
    if (pairs == gathered_pairs(parts) || now.block.count < LANES) begin_gathering<parts>();
}
// The pairs that are made are to be gathered from now on; those before them are.
template <int parts>
void Backward::begin_gathering() {
    finish_gathering<parts>();
    Gathering& g = gathering;
    g.of = &made[making];
    g.id = pair_end - pairs, g.rows = pair_lanes, g.keys = pair_keys;
    auto is = [&](int kind, long products, long rows, long depth) {
        g.products[kind] = products, g.blocks[kind] = tiles(tiles(rows, SIDE), 2);
        g.depth[kind] = tiles(depth, DEPTH);
    };
    is(Gathering::TO_VALUES, sh.v_dim / PW, g.keys, g.rows);
    is(Gathering::TO_KEYS, sh.dim / PW, g.keys, g.rows);
    is(Gathering::TO_QUERIES, tiles(g.rows, PW), c.dim, g.keys);
    g.begun = g.at = 0;
    making ^= 1;
    pairs = pair_lanes = 0;
    if constexpr (BY_PAIRS) {  // at once
        while (g.begun < g.products[0] + g.products[1] + g.products[2]) begin_product<parts>();
        g.share<parts>(1);
    }
}
template <int parts>
void Backward::begin_product() {
    Gathering& g = gathering;
    long i = g.begun++, rows = tiles(g.keys, SIDE), depth = tiles(g.rows, DEPTH);
    if (i < g.products[Gathering::TO_VALUES])
        return g.now.start<parts, true>(g.of->weights, sh.row_tiles(sh.grad_row_tiles, g.id, i),
                                        d_value + i * KEYS * PW, rows, depth, false, true);
    i -= g.products[Gathering::TO_VALUES];
    if (i < g.products[Gathering::TO_KEYS])
        return g.now.start<parts, true>(g.of->slopes, sh.row_tiles(sh.query_row_tiles, g.id, i),
                                        d_key + i * KEYS * PW, rows, depth, false, true);
    i -= g.products[Gathering::TO_KEYS];
    const long pair = i / PANELS;
    const int p = (int)(i % PANELS);
    g.now.start<parts, true>(key_turned, g.of->of_panel((int)pair, p, parts), d_query_of(g.id + pair, p),
                             tiles(c.dim, SIDE), tiles(g.keys, DEPTH), false, g.rows - i * PW > W);
}
// So many steps of scores, slopes, and what is gathered, among so many times some work.
template <int parts, class Work>
INLINE_MEMBER void Backward::step_among(long gathered, long times, Work work) {
    long steps = scoring.steps<parts>(scoring.rows) + sloping.steps<parts>(sloping.rows) + gathered;
    among<parts>(
        steps, times,
        [&]() INLINE_LAMBDA -> Stepper& {
            if (!scoring.done()) return scoring;
            if (!sloping.done()) return sloping;
            if (gathering.now.done()) begin_product<parts>();
            return gathering.now;
        },
        work);
}
template <int parts>
void Backward::finish_gathering() {
    if (!gathering.of) return;
    Timed mixing(clock, MIX);
    step_among<parts>(gathering.share<parts>(1), 0, [] {});
    gathering.of = nullptr;
}
// All that was made is in the gradients.
inline void Backward::gather_all() {
    if (!sh.parts) return;
    with_parts(sh.parts, [&](auto of) {
        if (pairs) begin_gathering<of.count>();
        finish_gathering<of.count>();
    });
}

// Scores, and products with the values, of half a panel and at most n keys from `from` on are next.
template <int parts>
void Backward::begin_scores(const Block& block, long id, int p, int from, int n) {
    const bool whole = c.query.type == F16, wide = block.panel_rows(p) > W;
    const long rows = tiles(least(n - from, HALF), SIDE);
    score_turn ^= 1;
    ahead = id;
    Tiles k = key_tiles, v = value_tiles;
    k.data = k.at(from / SIDE, 0);
    v.data = v.at(from / SIDE, 0);
    scoring.start<parts, false>(k, sh.lane_tiles(sh.query_tiles, id, sh.dim, p), half_scores(), rows,
                                tiles(c.dim, DEPTH), whole, wide);
    sloping.start<parts, false>(v, sh.lane_tiles(sh.grad_tiles, id, sh.v_dim, p), half_slopes(), rows,
                                tiles(c.v_dim, DEPTH), whole, wide);
}

// next: the pair that comes after, if it is on tiles, too; `tile`: how many keys there are for it.
template <int parts>
void Backward::tile_pair(const Pair& now, int n, int tile, const Pair* next) {
    if (pairs && (pair_end != now.id || pair_keys != n)) begin_gathering<parts>();
    if (ahead != now.id) {
        begin_scores<parts>(now.block, now.id, 0, 0, n);
        Timed scores(clock, SCORES);
        step_among<parts>(0, 0, [] {});
    }
    long left = (gathered_pairs(parts) - pairs) * now.block.panels * tiles(n, HALF);
    for (int p = 0; p < now.block.panels; p++)
        for (int from = 0; from < n; from += HALF, left--) {
            float *s = half_scores(), *ds = half_slopes();
            if (from + HALF < n)
                begin_scores<parts>(now.block, now.id, p, from + HALF, n);
            else if (p + 1 < now.block.panels)
                begin_scores<parts>(now.block, now.id, p + 1, 0, n);
            else if (next)
                begin_scores<parts>(next->block, next->id, 0, 0, tile);
            Timed weighing(clock, SOFTMAX);
            if (now.block.panel_rows(p) > W)
                half_panel<parts, 2>(now, p, from, (int)least(n - from, HALF), s, ds, left);
            else
                half_panel<parts, 1>(now, p, from, (int)least(n - from, HALF), s, ds, left);
        }
    add_pair<parts>(now, n);
}

// left: in so many halves, with this one, what was made before is to be gathered.
template <int parts, int NV>
void Backward::half_panel(const Pair& now, int p, int from, int count, float* s, float* ds, long left) {
    const bool fold = after > 0;
    if (careful) odd_pairs<NV>(p, from, count, s, ds, PW);
    if (!fold) multiply<NV>(count, s, PW, after);
    if (!now.every) shaping.finish<NV>(p, count, s, PW, visible + from, nullptr);
    if (careful) see<NV>(p, from, count, s, PW);
    // Up to a whole bite: no weight and no slope, where products would add what stood there
    const int bites = (int)tiles(count, BITE);
    for (long j = count * PW; j < bites * BITE * PW; j += W) {
        store(s + j, all(-INFINITY));
        store(ds + j, V{});
    }
    const float by = fold ? after : 1;
    const long gathered = gathering.of ? gathering.share<parts>(left) : 0;
    if (c.dropout || careful)
        slopes_on<parts, NV, false>(p, from, bites, by, s, ds, gathered);
    else
        slopes_on<parts, NV, true>(p, from, bites, by, s, ds, gathered);
}

// Weights and slopes out of the scores and the products with the values, as tiles: as rows whose
// depth are the lanes, and slopes as columns, too, whose depth are the keys. plain: no dropout, not careful.
template <int parts, int NV, bool plain>
void Backward::slopes_on(int p, int from, int bites, float by, const float* s, const float* ds, long gathered) {
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
    const Exp2Table by_table;
    const Slopes& to = made[making];
    const Tiles columns = to.of_panel(pairs, p, parts);
    V above[2] = {};  // slopes of the key that stands beside the one at hand, SIDE before it
    const long column = pairs * PANELS + p;
    long turn = 0;
    step_among<parts>(gathered, bites * BITE, [&]() INLINE_LAMBDA {
        const long i = turn / 2 % SIDE, tile = turn / BITE * 2 + turn % 2, j = tile * SIDE + i;
        V w[2] = {}, d[2] = {};
        #pragma GCC unroll 2
        for (int l = 0; l < NV; l++) {
            const long at = j * PW + l * W;
            V x = load(s + at), y = x * scale - high[l], dw = load(ds + at);
            if (parts > 1) y *= LOG2E;
            V of = (parts == 1 ? by_table(y) : exp2<6>(y)) * weight[l];
            if (!plain && careful) of = x == -INFINITY ? V{} : of;
            w[l] = of;
            if (!plain && c.dropout) {
                V f = load(factors + (from + j) * LANES + p * PW + l * W);
                w[l] *= f;
                dw *= f;
            }
            d[l] = of * (dw - less[l]);
            if (!plain && careful) d[l] = x == -INFINITY ? V{} : d[l];
        }
        const long row = from / SIDE + tile;
        put<parts>(w[0], w[1], (float*)to.weights.at(row, column) + i * W, to.weights.step);
        put<parts>(d[0], d[1], (float*)to.slopes.at(row, column) + i * W, to.slopes.step);
        #pragma GCC unroll 2
        for (int l = 0; l < 2; l++) {
            if (turn % 2)
                put<parts>(above[l], d[l], (float*)columns.at(row / 2, l) + i * W, columns.step);
            else
                above[l] = d[l];
        }
        turn++;
    });
}

}  // namespace regard::LEVEL
