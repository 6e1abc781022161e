// What the items of one backward share, and the rows of its queries and gradients made ready.
#pragma once
#include <algorithm>
#include <type_traits>

#include "finite.h"
#include "parts.h"
#include "plan.h"

namespace regard::LEVEL {

// Rows for a product stand as panels: [panel][row][PW], so that a panel's rows are neighbours (rows of
// 512 bytes would fall into the same few sets of the cache).
INLINE long padded(long dim) { return (dim + PW - 1) / PW * PW; }
static void to_panels(const float* from, long ld, long rows, long dim, float* to, long to_rows) {
    for (long d = 0; d < dim; d += PW) {
        float* panel = to + d / PW * to_rows * PW;
        long n = least(PW, dim - d);
        for (long r = 0; r < rows; r++) {
            if (n == PW) {
                store(panel + r * PW, load(from + r * ld + d));
                store(panel + r * PW + W, load(from + r * ld + d + W));
            } else {
                for (long i = 0; i < PW; i++) panel[r * PW + i] = i < n ? from[r * ld + d + i] : 0;
            }
        }
    }
}

// A block's queries and gradients in float32, as products by vectors read them: panels, in which 0 stands for what
// is not finite, and lanes [panel of lanes][dim][PW], as they are.
struct FloatRows {
    float *query, *grad, *query_lanes, *grad_lanes;
};

// What the items of one backward share.
struct SharedBackward {
    RegardCall call;
    RegardBackward back;
    Plan plan;
    Shaping shaping;
    Queue* queue;
    long dim, v_dim;             // padded to whole panels
    long tiles, stripes;         // of keys, and into how many they are dealt
    bool together;               // one item sees the whole batch: a shared bias needs its gradient
    long lanes, blocks;          // lanes of a block, at most; blocks in all
    int parts;                   // of a number on tiles; 0: nothing is multiplied on tiles
    float *query, *grad, *query_lanes, *grad_lanes;  // [block] FloatRows, where nothing is on tiles
    KeyTiles tile_rule;
    uint16_t *query_tiles, *grad_tiles;          // [block][panel of lanes] of the lanes, depth their dim
    uint16_t *query_row_tiles, *grad_row_tiles;  // [panel of dims][part][block] of the rows, depth the lanes
    float* fits;                 // [block]: 1 where all of these may stand as parts
    uint64_t* odd;               // [block]: which lanes' queries are not finite, which gradients, and whether any
                                 // statistic of a row is not. On tiles 0 stands for what is not
    float* rows;                 // [block] of each lane top, 1 / total, and out · gradient
    float* d_query;              // [stripe][block][panel of lanes][dim][PW]
    float* d_by_offset;          // [stripe][item of the batch][head][q_len + k_len − 1]
    float* d_bias;               // [stripe] of those dense biases that all keys share
    long bias_floats;

    long offsets() const { return call.q_len + call.k_len - 1; }
    long first_row(const Block& b) const {
        return (b.segment[0].b * call.heads + b.segment[0].h) * call.q_len + b.segment[0].q0;
    }
    // Whether a block's queries (0), its gradients (1), or both as rows (2) may stand as parts
    bool fit(long id, int which) const { return parts && fits[3 * id + which] != 0; }
    // By what the scores are multiplied after their product: queries of 16 bits are exact in their parts, and
    // stay as they are
    float after() const { return parts && call.query.type != F32 ? shaping.query_scale() : 1; }
    float before() const { return parts && call.query.type != F32 ? 1 : shaping.query_scale(); }
    const float* rows_of(long id) const { return rows + 3 * id * LANES; }
    FloatRows floats(long id) const {
        return {query + id * lanes * dim, grad + id * lanes * v_dim, query_lanes + id * lanes * call.dim,
                grad_lanes + id * lanes * call.v_dim};
    }
    // Panel p of one block, of those tiles whose depth is `dim` (padded), or the lanes of this block and of
    // those after it
    Tiles lane_tiles(uint16_t* of, long id, long dim, int p) const {
        return {of + (id * lanes + p * PW) * dim * parts, PW / SIDE, dim * PW};
    }
    Tiles row_tiles(uint16_t* of, long id, long p) const {
        return {of + (p * parts * blocks + id) * lanes * PW, PW / SIDE, blocks * lanes * PW};
    }
};

// One block's rows in float32. odd: which lanes' queries are not finite, and which gradients. line: (W + LANES) · the
// larger dim floats of scratch.
static void make_floats(const SharedBackward& sh, const Block& block, const FloatRows& to, uint64_t* odd,
                        float* line) {
    const RegardCall& c = sh.call;
    float* rows = line + W * most(c.dim, c.v_dim);
    turn_rows(c.query, block, c.dim, sh.before(), line, to.query_lanes);
    turn_rows(sh.back.grad_out, block, c.v_dim, 1, line, to.grad_lanes);
    auto panels = [&](const RegardView& view, long dim, float* panel) {
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            for (int r = 0; r < s.count; r++)
                widen(view.type, address(view, s.b, s.h, s.q0 + r), view.stride[3], dim,
                      rows + (s.lane + r) * dim);
        }
        to_panels(rows, dim, block.count, dim, panel, sh.lanes);
    };
    panels(c.query, c.dim, to.query);
    panels(sh.back.grad_out, c.v_dim, to.grad);
    odd[0] = odd[1] = 0;
    for (int p = 0; p < block.panels; p++) {
        odd[0] |= odd_lanes(to.query_lanes + p * PW * c.dim, c.dim) << p * PW;
        odd[1] |= odd_lanes(to.grad_lanes + p * PW * c.v_dim, c.v_dim) << p * PW;
    }
    if (odd[0]) fill_odd(to.query, sh.lanes * sh.dim);
    if (odd[1]) fill_odd(to.grad, sh.lanes * sh.v_dim);
}

// The same rows as tiles. rows: LANES · the larger dim floats of scratch.
template <int parts>
static void pack_floats(const SharedBackward& sh, const Block& block, long id, const FloatRows& of,
                        const uint64_t* odd, float* rows) {
    const RegardCall& c = sh.call;
    float* fits = sh.fits + 3 * id;
    fits[0] = fits[1] = fits[2] = 1;
    auto pack = [&](const float* x, long depth, Tiles to, float& fit) {
        if (!pack_columns<parts, false>(x, PW, depth, PW, to)) fit = 0;
    };
    auto pack_lanes = [&](const float* x, uint64_t odd_ones, long depth, Tiles to, float& fit) {
        if (odd_ones) {  // 0 stands there for what is not finite
            memcpy(rows, x, depth * PW * sizeof(float));
            fill_odd(rows, depth * PW);
            x = rows;
        }
        pack(x, depth, to, fit);
    };
    for (int p = 0; p < block.panels; p++) {
        pack_lanes(of.query_lanes + p * PW * c.dim, odd[0] >> p * PW, c.dim,
                   sh.lane_tiles(sh.query_tiles, id, sh.dim, p), fits[0]);
        pack_lanes(of.grad_lanes + p * PW * c.v_dim, odd[1] >> p * PW, c.v_dim,
                   sh.lane_tiles(sh.grad_tiles, id, sh.v_dim, p), fits[1]);
    }
    for (long p = 0; p < sh.dim / PW; p++)
        pack(of.query + p * sh.lanes * PW, block.count, sh.row_tiles(sh.query_row_tiles, id, p), fits[2]);
    for (long p = 0; p < sh.v_dim / PW; p++)
        pack(of.grad + p * sh.lanes * PW, block.count, sh.row_tiles(sh.grad_row_tiles, id, p), fits[2]);
}

template <int parts, int type>
static bool pack_direct(const SharedBackward& sh, const Block& block, long id, const RegardView& view, long dim,
                        float by, uint16_t* as_lanes, uint16_t* as_rows) {
    constexpr bool brains = parts == 1 && type == BF16;  // exact, and not multiplied
    constexpr long SIZE = type == F32 ? 4 : 2;
    static_assert(brains || type == F32);
    const char* row[LANES];
    for (int i = block.count; i < block.panels * PW; i++) row[i] = ZEROS;
    for (int i = 0; i < block.segments; i++) {
        const Segment& s = block.segment[i];
        for (int r = 0; r < s.count; r++) row[s.lane + r] = address(view, s.b, s.h, s.q0 + r);
    }
    std::conditional_t<brains, BrainRange, Range> range;
    // i, half → the row and its first number
    auto tile = [&](auto turned, auto from, uint16_t* to, long step) INLINE_LAMBDA {
        if constexpr (brains) {
            pack_brain_tile<turned.value>(
                [&](int i) INLINE_LAMBDA { return brain_pair(from(i, 0), 0, from(i, 1), 0); }, to, range);
        } else {
            V x[2][W];  // turned before they are split: each part would have to be
            for (int half = 0; half < 2; half++) {
                UNROLL_ROWS
                for (int i = 0; i < W; i++) x[half][i] = wide<type>(from(i, half), 0) * by;
                if (turned.value) transpose(x[half]);
            }
            pack_tile<parts, false>([&](int i, int half) INLINE_LAMBDA { return x[half][i]; }, to, step, range);
        }
    };
    for (int p = 0; p < block.panels; p++) {
        const Tiles lanes = sh.lane_tiles(as_lanes, id, dim, p);
        for (long d = 0; d < dim; d += DEPTH)
            for (int l = 0; l < PW; l += SIDE)
                tile(std::true_type{},
                     [&](int i, int half) INLINE_LAMBDA { return row[p * PW + l + i] + (d + half * SIDE) * SIZE; },
                     lanes.at(d / DEPTH, l / SIDE), lanes.step);
    }
    by = 1;  // as rows, queries are what the gradient of a key is made of
    for (long p = 0; p < dim / PW; p++) {
        const Tiles rows = sh.row_tiles(as_rows, id, p);
        for (int lane = 0; lane < block.panels * PW; lane += DEPTH)
            for (int l = 0; l < PW; l += SIDE)
                tile(std::false_type{},
                     [&](int i, int half) INLINE_LAMBDA {
                         return row[lane + i + half * SIDE] + (p * PW + l) * SIZE;
                     },
                     rows.at(lane / DEPTH, l / SIDE), rows.step);
    }
    return range.fits();
}

// A block's queries and gradients as tiles from where they lie; false if they are another way, or do not fit.
static bool pack_direct(const SharedBackward& sh, const Block& block, long id) {
    const RegardCall& c = sh.call;
    const RegardView &query = c.query, &grad = sh.back.grad_out;
    if (query.type != grad.type || !packed_direct(query, c.dim) || !packed_direct(grad, c.v_dim)) return false;
    auto both = [&](auto pack) {
        return pack(query, c.dim, sh.before(), sh.query_tiles, sh.query_row_tiles) &&
               pack(grad, c.v_dim, 1, sh.grad_tiles, sh.grad_row_tiles);
    };
    auto of_parts = [&](auto parts, auto type) {
        return both([&](const RegardView& view, long dim, float by, uint16_t* lanes, uint16_t* rows) {
            return pack_direct<parts.count, type.value>(sh, block, id, view, dim, by, lanes, rows);
        });
    };
    bool fits = false;
    if (query.type == BF16 && sh.parts == 1) fits = of_parts(Parts<1>{}, std::integral_constant<int, BF16>{});
    if (query.type == F32)
        fits = with_parts<bool>(sh.parts, [&](auto of) { return of_parts(of, std::integral_constant<int, F32>{}); });
    if (fits) std::fill_n(sh.fits + 3 * id, 3, 1.f);
    return fits;
}

// Tops, inverse totals and deltas of one block's lanes, of which none is what it has no row for.
static bool make_statistics(const SharedBackward& sh, const Block& block, float* to) {
    const long row = sh.first_row(block);
    for (int i = 0; i < LANES; i++) {
        bool there = i < block.count;
        float total = there ? sh.back.stats[2 * (row + i) + 1] : 0;
        to[i] = there ? sh.back.stats[2 * (row + i)] : 0;
        to[LANES + i] = total == 0 ? 0 : 1 / total;  // 0: an empty row, or none, has no weights
        to[2 * LANES + i] = there ? sh.back.delta[row + i] : 0;
    }
    return all_finite(to, 3 * LANES);
}

}  // namespace regard::LEVEL
