// Products on tiles. A tile multiplies bf16; numbers of more bits are split into parts x = x₀ + x₁ + …,
// each the bf16 nearest to what those before it leave (Henry, Tang and Heinecke 2019): 24 bits are three
// parts exactly, the 11 of fp16 are two. Of the products xᵢ·yⱼ those with i + j < parts count, so three
// parts take six products and lose 2⁻²³ of |x·y| at most, two take three and lose 2⁻¹⁵. Scores of fp16
// are exact to float32, as others compute them: they take all four.
//
// A tile of A holds 16 rows × 32 of the depth, a tile of B 32 of the depth × 16 columns; in both the
// numbers i and i + 16 of the depth stand side by side.
#pragma once
#include "finite.h"
#include "pairs.h"
#include "plan.h"
#include "rows.h"
#include "tile.h"

namespace regard::LEVEL {

// Whether numbers may stand as parts: all are finite, and the largest is no further than 2⁶⁰ from 1.
// Then no part overflows, and what tiles flush to 0 is less than 2⁻⁶⁶ of the largest.
struct Range {
    V largest = {};
    I outside = {};

    INLINE_MEMBER void see(V x) {
        V size = x < 0.f ? -x : x;
        outside |= ~(size <= 0x1p60f);  // NaN, too
        largest = max(size, largest);
    }
    bool fits() const {
        return !any(outside) && (any(largest >= 0x1p-60f) || !any(largest > 0.f));
    }
};
struct Unseen {  // of weights, which always fit: at most 1
    void see(V) {}
    bool fits() const { return true; }
};

// The bf16 nearest to two vectors, side by side: those of `low` in the lower halves.
INLINE N pair(V low, V high) {
#if defined(__AVX512BF16__) && WIDTH == 16
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (N)_mm512_permutexvar_epi16(_mm512_load_si512(order), both);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && WIDTH == 4
    uint16x4_t a = vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)low));
    uint16x4_t b = vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)high));
    return (N)vmovl_u16(a) | (N)vmovl_u16(b) << 16;
#else
    return nearest(low) >> 16 | nearest(high);
#endif
}

// Tiles of a matrix: those of one part stand `step` numbers from the next part's, those of one row of
// tiles `wide` tiles from the next row's.
struct Tiles {
    uint16_t* data;
    long wide, step;
    uint16_t* at(long row, long column) const { return data + (row * wide + column) * TILE; }
};
INLINE long tiles(long n, long side) { return (n + side - 1) / side; }

// One tile of each part, of 16 pairs of vectors get(i, 0) and get(i, 1).
template <int parts, bool turned, class Get, class Seen>
INLINE void pack_tile(Get get, uint16_t* to, long step, Seen& range) {
    V row[parts][W];
    UNROLL_ROWS
    for (int i = 0; i < W; i++) {
        V low = get(i, 0), high = get(i, 1);
        range.see(low);
        range.see(high);
        #pragma GCC unroll 3
        for (int part = 0; part < parts; part++) {
            N both = pair(low, high);
            row[part][i] = (V)both;
            low -= (V)(both << 16);
            high -= (V)(both & 0xffff0000u);
        }
    }
    #pragma GCC unroll 3
    for (int part = 0; part < parts; part++) {
        if (turned) transpose(row[part]);
        UNROLL_ROWS
        for (int i = 0; i < W; i++) store((float*)(to + part * step) + i * W, row[part][i]);
    }
}

// Of bf16 as they lie: what `Range` asks, of their bits.
struct BrainRange {
    I largest = {};

    INLINE_MEMBER void see(N both) {
        I low = (I)(both & 0x7fffu), high = (I)(both >> 16 & 0x7fffu);
        largest = low > largest ? low : largest;
        largest = high > largest ? high : largest;
    }
    bool fits() const {
        constexpr int32_t MOST = (127 + 60) << 7, LEAST = (127 - 60) << 7;
        return !any(largest > MOST) && (any(largest >= LEAST) || !any(largest > 0));
    }
};
// Two vectors of bf16 side by side, those at x in the lower halves.
INLINE N brain_pair(const char* x, long at_x, const char* y, long at_y) {
    return (N)wide<BF16>(x, at_x) >> 16 | (N)wide<BF16>(y, at_y);
}
template <bool turned, class Get>
INLINE void pack_brain_tile(Get get, uint16_t* to, BrainRange& range) {
    V row[W];
    UNROLL_ROWS
    for (int i = 0; i < W; i++) {
        N both = get(i);
        range.see(both);
        row[i] = (V)both;
    }
    if (turned) transpose(row);
    UNROLL_ROWS
    for (int i = 0; i < W; i++) store((float*)to + i * W, row[i]);
}
// Rows that lie one number beside the other, whole tiles wide, are packed from there, unless they do not fit.
constexpr long MOST_DIRECT = 1024;  // numbers of such a row, at most
alignas(64) static constexpr char ZEROS[MOST_DIRECT * sizeof(float)] = {};  // a row that there is not
static bool packed_direct(const RegardView& view, long dim, long unit = DEPTH) {
    return view.stride[3] == 1 && dim % unit == 0 && dim <= MOST_DIRECT;
}
// Where the rows of a tile of keys lie, the n that there are from k0 on.
static void rows_direct(const RegardView& view, const RegardCall& c, long b, long kv, long k0, int n,
                        const char** row) {
    addresses(view, c.pages, b, kv, k0, n, row);
    for (int j = n; j < KEYS; j++) row[j] = ZEROS;
}

// Rows of bf16 as tiles of A, for dim a multiple of DEPTH.
static bool pack_brain_rows(const char* const* row, long dim, Tiles to) {
    BrainRange range;
    for (long r = 0; r < KEYS; r += SIDE)
        for (long d = 0; d < dim; d += DEPTH)
            pack_brain_tile<false>(
                [&](int i) INLINE_LAMBDA { return brain_pair(row[r + i], d, row[r + i], d + SIDE); },
                to.at(r / SIDE, d / DEPTH), range);
    return range.fits();
}
// … as tiles of A whose rows are the dims, a multiple of SIDE.
static bool pack_brain_columns(const char* const* row, long dim, Tiles to) {
    BrainRange range;
    for (long r = 0; r < KEYS; r += DEPTH)
        for (long d = 0; d < dim; d += SIDE)
            pack_brain_tile<true>(
                [&](int i) INLINE_LAMBDA { return brain_pair(row[r + i], d, row[r + i + SIDE], d); },
                to.at(d / SIDE, r / DEPTH), range);
    return range.fits();
}

// x[row · ld + depth] as tiles of A. All of these answer whether the numbers may stand as parts.
template <int parts, class Seen = Range>
static bool pack_rows(const float* x, long ld, long rows, long depth, Tiles to) {
    Seen range;
    for (long r = 0; r < rows; r += SIDE)
        for (long d = 0; d < depth; d += DEPTH)
            pack_tile<parts, false>(
                [&](int i, int half) __attribute__((always_inline)) {
                    long at = d + half * SIDE;
                    return r + i < rows ? load_some(x + (r + i) * ld + at, depth - at) : V{};
                },
                to.at(r / SIDE, d / DEPTH), to.step, range);
    return range.fits();
}

// x[depth · ld + column] as tiles of B or, turned, of A, whose rows the columns then are.
template <int parts, bool turned, class Seen = Range>
static bool pack_columns(const float* x, long ld, long depth, long columns, Tiles to) {
    Seen range;
    for (long d = 0; d < depth; d += DEPTH)
        for (long c = 0; c < columns; c += SIDE)
            pack_tile<parts, turned>(
                [&](int i, int half) __attribute__((always_inline)) {
                    long at = d + i + half * SIDE;
                    return at < depth ? load_some(x + at * ld + c, columns - c) : V{};
                },
                turned ? to.at(c / SIDE, d / DEPTH) : to.at(d / DEPTH, c / SIDE), to.step, range);
    return range.fits();
}

// then(Parts<n>{}), for a number of parts that is known only when running; nothing for none of them, which is what
// levels without tiles have: so that they compile nothing that is done on tiles.
template <int n>
struct Parts {
    static constexpr int count = n;
};
template <class Answer = void, class Then>
INLINE Answer with_parts([[maybe_unused]] int parts, [[maybe_unused]] Then then) {
    if constexpr (HAS_TILES) {
        if (parts == 1) return then(Parts<1>{});
        if (parts == 2) return then(Parts<2>{});
        if (parts == 3) return then(Parts<3>{});
    }
    return Answer();
}

// The products of two parts: first those that are small, as that rounds least, and last that of the first parts,
// which has all the digits; unless `whole`, without those whose parts lie furthest. One after another goes over all
// of the depth. Of three parts the small ones take turns at each step of depth instead, in an order in which each
// shares a tile with the one before, which is loaded once.
struct PartPair {
    int8_t a, b;
    bool load_a = true, load_b = true;
};
template <int parts>
constexpr int pairs_of(bool whole) {
    return whole ? parts * parts : parts * (parts + 1) / 2;
}
template <int parts>
INLINE PartPair pair_of(bool whole, int n) {
    static constexpr PartPair two[] = {{1, 1}, {0, 1}, {1, 0}, {0, 0}};
    static constexpr PartPair three[] = {{0, 2}, {0, 1, false, true}, {1, 1, true, false}, {1, 0, false, true},
                                         {2, 0, true, false}, {0, 0}};
    static constexpr PartPair three_whole[] = {
        {2, 2}, {1, 2, true, false}, {0, 2, true, false}, {0, 1, false, true}, {1, 1, true, false},
        {2, 1, true, false}, {2, 0, false, true}, {1, 0, true, false}, {0, 0}};
    if constexpr (parts == 1) return {0, 0};
    if constexpr (parts == 2) return two[n + !whole];
    return whole ? three_whole[n] : three[n];
}
constexpr bool take_turns(int parts) { return parts == 3; }

// then(x, y): the tiles of A and B of each product of two parts, from the row of tiles `row` on.
template <int parts, class Then>
INLINE void each_product(bool whole, const Tiles& a, long row, const Tiles& b, Then then) {
    for (int n = 0; n < pairs_of<parts>(whole); n++) {
        PartPair pair = pair_of<parts>(whole, n);
        then(a.at(row, 0) + pair.a * a.step, b.data + pair.b * b.step);
    }
}

// One row of tiles of C, as `tile_block`, by vectors.
template <int parts, bool add, int NV>
INLINE void pair_block(bool whole, long depth, const Tiles& a, long row, const Tiles& b, float* c,
                       long ldc) {
    constexpr int R = SIDE < 16 ? SIDE : SIDE / 2;  // with two vectors each, enough to wait for none of them
    for (int from = 0; from < SIDE; from += R, c += R * ldc) {
        V sum[R][NV] = {};
        each_product<parts>(whole, a, row, b, [&](const uint16_t* x, const uint16_t* y) INLINE_LAMBDA {
            pair_rows<R, NV>(depth, x + from * DEPTH, y, b.wide * TILE, sum);
        });
        #pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            #pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                float* at = c + r * ldc + v * W;
                store(at, add ? load(at) + sum[r][v] : sum[r][v]);
            }
    }
}

// One block: R × NV tiles of C, `depth` tiles of A and B deep.
template <int parts, bool add, int R, int NV>
INLINE void tile_block(bool whole, long depth, const Tiles& a, long row, const Tiles& b,
                       float* c, long ldc) {
    long bytes = ldc * 4;
    float* below = c + SIDE * ldc;
    if (add) {
        tile_load<0>(c, bytes);
        if (NV > 1) tile_load<1>(c + SIDE, bytes);
        if (R > 1) tile_load<2>(below, bytes);
        if (R > 1 && NV > 1) tile_load<3>(below + SIDE, bytes);
    } else {
        tile_zero<0>();
        if (NV > 1) tile_zero<1>();
        if (R > 1) tile_zero<2>();
        if (R > 1 && NV > 1) tile_zero<3>();
    }
    auto step = [&](const PartPair& pair, long at) INLINE_LAMBDA {
        const uint16_t *x = a.at(row, at) + pair.a * a.step, *y = b.at(at, 0) + pair.b * b.step;
        if (pair.load_a) {
            tile_pass<4>(x, 64);
            if (R > 1) tile_pass<5>(x + a.wide * TILE, 64);
        }
        if (pair.load_b) {
            tile_load<6>(y, 64);
            if (NV > 1) tile_load<7>(y + TILE, 64);
        }
        tile_dot<0, 0>();
        if (R > 1) tile_dot<1, 0>();
        if (NV > 1) tile_dot<0, 1>();
        if (R > 1 && NV > 1) tile_dot<1, 1>();
    };
    const int pairs = pairs_of<parts>(whole), turns = take_turns(parts) ? pairs - 1 : 0;
    for (long at = 0; turns && at < depth; at++)
        for (int n = 0; n < turns; n++) step(pair_of<parts>(whole, n), at);
    for (int n = turns; n < pairs; n++)
        for (long at = 0; at < depth; at++) step(pair_of<parts>(whole, n), at);
    tile_store<0>(c, bytes);
    if (NV > 1) tile_store<1>(c + SIDE, bytes);
    if (R > 1) tile_store<2>(below, bytes);
    if (R > 1 && NV > 1) tile_store<3>(below + SIDE, bytes);
}

// One panel: C (rows × panel) (+)= A (rows × depth) B (depth × panel), rows and depth in tiles.
template <int parts, bool add, int NV>
static void tile_rows(bool whole, long rows, long depth, const Tiles& a, const Tiles& b, float* c, long ldc) {
    tiles_written();
    long row = 0;
    if constexpr (BY_PAIRS) {
        for (; row < rows; row++)
            pair_block<parts, add, NV>(whole, depth, a, row, b, c + row * SIDE * ldc, ldc);
    } else {
        for (; row + 1 < rows; row += 2)
            tile_block<parts, add, 2, NV>(whole, depth, a, row, b, c + row * SIDE * ldc, ldc);
        if (row < rows)
            tile_block<parts, add, 1, NV>(whole, depth, a, row, b, c + row * SIDE * ldc, ldc);
    }
}
// The same, as `product` of matmul.h. Rows of C are written up to whole tiles. whole: no product of two
// parts is left out.
template <bool add, int NV = 2>
static void tile_product(int parts, bool whole, long rows, long depth, const Tiles& a, const Tiles& b,
                         float* c, long ldc) {
    with_parts(parts, [&](auto of) {
        tile_rows<of.count, add, NV>(whole, tiles(rows, SIDE), tiles(depth, DEPTH), a, b, c, ldc);
    });
}

// By what scores are multiplied after their product. Queries of 16 bits are exact in their parts, and
// stay so: only a power of two is multiplied into them.
INLINE float scale_after(const RegardCall& c, int parts, float scale) {
    int exponent;
    return parts && c.query.type != F32 && frexpf(scale, &exponent) != .5f ? scale : 1;
}
template <int NV>
static void multiply(long n, float* s, long ld, float by) {
    for (long j = 0; j < n; j++)
        for (int i = 0; i < NV; i++) store(s + j * ld + i * W, load(s + j * ld + i * W) * by);
}

// A tile of keys and their values: tiles [part][key][dim], [part][v_dim][key], whether each of the two
// fits, and whether it holds numbers that are not finite, for which 0 stands there.
struct KeyTiles {
    int parts = 0;      // into which a number is split; 0: nothing is multiplied on tiles
    long dim = 0, v_dim = 0;  // in tiles

    KeyTiles() = default;
    explicit KeyTiles(const RegardCall& c)
        : parts(HAS_TILES && c.dim ? (int)c.parts : 0), dim(tiles(c.dim, DEPTH)), v_dim(tiles(c.v_dim, SIDE)) {}

    // Whether a block's products are on tiles: then in the backward, too, so that weights are the same.
    // Three parts are so much work to make that several blocks must share them.
    bool serve(const Plan& plan, const Block& block) const {
        if (parts == 3) return plan.sharing() > 2;
        return parts && (plan.shared_keys() || block.count > parts * W);
    }
    long key_size() const { return parts * dim * DEPTH * KEYS; }
    long value_size() const { return parts * v_dim * SIDE * KEYS; }
    long size() const { return parts ? key_size() + value_size() + DEPTH : 0; }  // numbers of bf16
    Tiles keys(uint16_t* at) const { return {at, dim, dim * DEPTH * KEYS}; }
    Tiles values(uint16_t* at) const { return {at + key_size(), KEYS / DEPTH, v_dim * SIDE * KEYS}; }
    uint16_t* fits(uint16_t* at) const { return at + key_size() + value_size(); }

    // Keys and values of bf16 from where they lie; false if they are another way, or do not fit.
    bool pack_brains(const RegardCall& c, long b, long kv, long k0, int n, uint16_t* at) const {
        if (parts != 1 || c.key.type != BF16 || c.value.type != BF16 || !packed_direct(c.key, c.dim) ||
            !packed_direct(c.value, c.v_dim, SIDE))
            return false;
        const char* row[KEYS];
        memset(fits(at), 0, DEPTH * sizeof(uint16_t));
        rows_direct(c.key, c, b, kv, k0, n, row);
        fits(at)[0] = pack_brain_rows(row, c.dim, keys(at));
        rows_direct(c.value, c, b, kv, k0, n, row);
        fits(at)[1] = pack_brain_columns(row, c.v_dim, values(at));
        return fits(at)[0] && fits(at)[1];
    }

    // scratch: KEYS · the larger dim floats.
    void pack(const RegardCall& c, Rows k, Rows v, int n, uint16_t* at, float* scratch) const {
        with_parts(parts, [&](auto of) {
            auto finitely = [&](Rows rows, long dim, int which, auto as_tiles) {
                fits(at)[which] = as_tiles(rows);
                fits(at)[which + 2] = 0;
                if (fits(at)[which]) return;
                Odd odd;
                odd.find(rows, n, dim);
                fits(at)[which + 2] = odd.count > 0;
                if (odd.count) fits(at)[which] = as_tiles(odd.filled(n, dim, scratch));
            };
            finitely(k, c.dim, 0, [&](Rows x) {
                return pack_rows<of.count>(x.data, x.ld, n, c.dim, keys(at));
            });
            finitely(v, c.v_dim, 1, [&](Rows x) {
                return pack_columns<of.count, true>(x.data, x.ld, n, c.v_dim, values(at));
            });
        });
    }
};

}  // namespace regard::LEVEL
