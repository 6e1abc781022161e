// Products on tiles that are made beside the work of vectors, a dot of two tiles at a time. The processor takes
// up tiles and vectors together only where they stand close, and while a tile is stored it takes up nothing: so
// the dots are spread evenly, rather than several at once.
#pragma once
#include "parts.h"

namespace regard::LEVEL {

// One panel, as `tile_rows` makes it, a dot of two tiles at a time: rows are done in blocks of two tiles by two,
// and a block goes over all of its depth, for one pair of parts after another. Between blocks all is in memory.
class Stepper {
  public:
    // wide: a panel of two vectors. Inline: a struct that is read just after it was written is waited for.
    template <int parts, bool adds>
    INLINE_MEMBER void start(Tiles from_a, Tiles from_b, float* to, long row_count, long deep, bool all_pairs,
                             bool two_vectors) {
        a = from_a, b = from_b, c = to;
        rows = row_count, depth = deep;
        add = adds, whole = all_pairs, wide = two_vectors;
        row = at_depth = 0;
        if constexpr (BY_PAIRS) {  // by vectors anyhow
            if (wide)
                tile_rows<parts, adds, 2>(whole, rows, depth, a, b, c, PW);
            else
                tile_rows<parts, adds, 1>(whole, rows, depth, a, b, c, PW);
            row = rows;
        }
    }
    long row = 0;  // the next one to be begun
    long rows = 0;
    bool done() const { return row >= rows; }
    template <int parts>
    long steps(long until) const {  // before row `until` is reached; asked between blocks
        until = until < rows ? until : rows;
        return row < until ? (until - row + 1) / 2 * block_depth<parts>() : 0;
    }

    // One tile of depth of a block, its four dots spread among `count` times the work of vectors.
    template <int parts, int count, class Work>
    INLINE_MEMBER void step(Work work) {
        const bool below = row + 1 < rows, right = wide;
        const bool first = at_depth == 0, last = at_depth + 1 == block_depth<parts>();
        if (first) left = pair = 0;
        if (left == 0) {
            left = depth;
            PartPair parted = pair_of<parts>(whole, pair++);
            x = a.at(row, 0) + parted.a * a.step;
            y = b.data + parted.b * b.step;
        }
        const uint16_t *from = x, *with = y;
        float* to = c + row * SIDE * PW;
        x += TILE;
        y += b.wide * TILE;
        left--;
        at_depth = last ? 0 : at_depth + 1;
        row += last ? 2 : 0;
        if (first) tiles_written();
        spread<0, count>(work);
        if (first) begin<0>(to);
        tile_pass<4>(from, 64);
        tile_load<6>(with, 64);
        tile_dot<0, 0>();
        if (last) tile_store<0>(to, PW * 4);
        spread<1, count>(work);
        if (below) {
            if (first) begin<2>(to + SIDE * PW);
            tile_pass<5>(from + a.wide * TILE, 64);
            tile_dot<1, 0>();
            if (last) tile_store<2>(to + SIDE * PW, PW * 4);
        }
        spread<2, count>(work);
        if (right) {
            if (first) begin<1>(to + SIDE);
            tile_load<7>(with + TILE, 64);
            tile_dot<0, 1>();
            if (last) tile_store<1>(to + SIDE, PW * 4);
        }
        spread<3, count>(work);
        if (below && right) {
            if (first) begin<3>(to + SIDE * PW + SIDE);
            tile_dot<1, 1>();
            if (last) tile_store<3>(to + SIDE * PW + SIDE, PW * 4);
        }
    }

  private:
    Tiles a{}, b{};
    float* c = nullptr;
    long depth = 0, at_depth = 0, left = 0;
    bool add = false, whole = false, wide = false;
    int pair = 0;
    const uint16_t *x = nullptr, *y = nullptr;

    template <int parts>
    long block_depth() const { return pairs_of<parts>(whole) * depth; }
    template <int at, int count, class Work>
    INLINE_MEMBER static void spread(Work work) {
        if constexpr (count * (at + 1) / 4 > count * at / 4) work();
    }
    template <int t>
    INLINE_MEMBER void begin(const float* from) const {
        if (add)
            tile_load<t>(from, PW * 4);
        else
            tile_zero<t>();
    }
};

// The scores of the next keys, and what is mixed of those weighed before.
struct Beside {
    Stepper scores, mix;
    long mix_until = 0;  // how far the mix is to come this time

    template <int parts>
    long steps() const {
        return scores.steps<parts>(scores.rows) + mix.steps<parts>(mix_until);
    }
    // All of it, spread evenly among so many times the work of vectors.
    template <int parts, class Work>
    INLINE_MEMBER void finish_among(long times, Work work) {
        const long all = steps<parts>();
        const long each = all ? times / all : 0, over = all ? times % all : times;
        for (long i = 0, carried = 0; i < all; i++) {
            carried += over;
            long count = each + (carried >= all);
            carried -= carried >= all ? all : 0;
            for (; count > 4; count--) work();  // more than one step is spread among
            Stepper& next = scores.done() ? mix : scores;
            switch (count) {
                case 0: next.step<parts, 0>(work); break;
                case 1: next.step<parts, 1>(work); break;
                case 2: next.step<parts, 2>(work); break;
                case 3: next.step<parts, 3>(work); break;
                default: next.step<parts, 4>(work);
            }
        }
        for (long i = all ? 0 : times; i > 0; i--) work();
    }
    // Of what is mixed, so much that it is done in so many times.
    void share_mix(long times) {
        long blocks = (mix.rows - mix.row + 1) / 2;
        mix_until = mix.row + 2 * ((blocks + times - 1) / times);
    }
    template <int parts>
    void finish_scores() {
        while (!scores.done()) scores.step<parts, 0>([] {});
    }
    template <int parts>
    void finish() {
        finish_among<parts>(0, [] {});
    }
};

}  // namespace regard::LEVEL
