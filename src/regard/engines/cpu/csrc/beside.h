// Products on tiles that are made beside the work of vectors, a dot of two tiles at a time. The processor takes
// up tiles and vectors together only where they stand close, and while a tile is stored it takes up nothing: so
// the dots are spread evenly, rather than several at once.
#pragma once
#include "parts.h"

namespace regard::LEVEL {

// One panel, as `tile_rows` makes it, a dot of two tiles at a time: rows are done in blocks of two tiles by two.
// Between blocks all is in memory.
class Stepper {
  public:
    // wide: a panel of two vectors. Inline: a struct that is read just after it was written is waited for.
    template <int parts, bool adds>
    INLINE_MEMBER void start(Tiles from_a, Tiles from_b, float* to, long row_count, long deep, bool all_pairs,
                             bool two_vectors) {
        a = from_a, b = from_b, c = to;
        rows = row_count, depth = deep;
        add = adds, whole = all_pairs, wide = two_vectors;
        row = at = 0;
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
    long steps(long until) const {  // before row `until` is reached
        until = until < rows ? until : rows;
        return row < until ? (until - row + 1) / 2 * block_depth<parts>() - at : 0;
    }

    // One tile of depth of a block, its four dots spread among `count` times the work of vectors.
    template <int parts, int count, class Work>
    INLINE_MEMBER void step(Work work) {
        const bool below = row + 1 < rows, right = wide;
        const bool first = at == 0, last = at + 1 == block_depth<parts>();
        PartPair pair{0, 0};
        float* to = c + row * SIDE * PW;
        const uint16_t *from, *with;
        if constexpr (take_turns(parts)) {
            if (first) begin_pair({0, 0}), turn = 0;
            pair = pair_of<parts>(whole, turn);
            from = x + pair.a * a.step, with = y + pair.b * b.step;
            const int alone = pairs_of<parts>(whole) - 1;
            if (turn == alone || ++turn == alone) {
                x += TILE, y += b.wide * TILE;
                if (at + 1 < alone * depth)
                    turn = 0;
                else if (at + 1 == alone * depth)
                    begin_pair({0, 0});
            }
        } else {
            if (first) left = turn = 0;
            if (left == 0) {
                begin_pair(pair_of<parts>(whole, turn++));
                left = depth;
            }
            from = x, with = y;
            x += TILE, y += b.wide * TILE;
            left--;
        }
        at = last ? 0 : at + 1;
        row += last ? 2 : 0;
        if (first) tiles_written();
        spread<0, count>(work);
        if (first) begin<0>(to);
        if (pair.load_a) tile_pass<4>(from, 64);
        if (pair.load_b) tile_load<6>(with, 64);
        tile_dot<0, 0>();
        if (last) tile_store<0>(to, PW * 4);
        spread<1, count>(work);
        if (below) {
            if (first) begin<2>(to + SIDE * PW);
            if (pair.load_a) tile_pass<5>(from + a.wide * TILE, 64);
            tile_dot<1, 0>();
            if (last) tile_store<2>(to + SIDE * PW, PW * 4);
        }
        spread<2, count>(work);
        if (right) {
            if (first) begin<1>(to + SIDE);
            if (pair.load_b) tile_load<7>(with + TILE, 64);
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
    long depth = 0;
    bool add = false, whole = false, wide = false;
    long at = 0, left = 0;  // of a block's steps; of the depth, for one pair of parts
    int turn = 0;           // which of the pairs
    const uint16_t *x = nullptr, *y = nullptr;

    INLINE_MEMBER void begin_pair(PartPair pair) {
        x = a.at(row, 0) + pair.a * a.step;
        y = b.data + pair.b * b.step;
    }
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

// Among how many times the work of vectors one step is spread: four dots, one beside each. Each number is a copy of
// the work, and of vectors in halves, as tests have them, they would take minutes to compile.
#ifdef REGARD_PLAIN_TILES
constexpr int MOST_AMONG = 1;
#else
constexpr int MOST_AMONG = 4;
#endif

// So many steps of products, spread evenly among so many times the work of vectors. next(): whose step is next.
template <int parts, class Next, class Work>
INLINE void among(long steps, long times, Next next, Work work) {
    if constexpr (BY_PAIRS) steps = 0;  // a product is made as it is begun
    const long each = steps ? times / steps : 0, over = steps ? times % steps : times;
    for (long i = 0, carried = 0; i < steps; i++) {
        carried += over;
        long count = each + (carried >= steps);
        carried -= carried >= steps ? steps : 0;
        for (; count > MOST_AMONG; count--) work();
        Stepper& product = next();
        if constexpr (MOST_AMONG == 1) {
            if (count)
                product.step<parts, 1>(work);
            else
                product.step<parts, 0>(work);
            continue;
        }
        switch (count) {
            case 0: product.step<parts, 0>(work); break;
            case 1: product.step<parts, 1>(work); break;
            case 2: product.step<parts, 2>(work); break;
            case 3: product.step<parts, 3>(work); break;
            default: product.step<parts, 4>(work);
        }
    }
    for (long i = steps ? 0 : times; i > 0; i--) work();
}

// The scores of the next keys, and what is mixed of those weighed before.
struct Beside {
    Stepper scores, mix;
    long mix_until = 0;  // how far the mix is to come this time
    long offers = 0;     // to the lists of the largest scores, the last time: so many may come the next

    template <int parts>
    long steps() const {
        return scores.steps<parts>(scores.rows) + mix.steps<parts>(mix_until);
    }
    // So many steps of it.
    template <int parts, class Work>
    INLINE_MEMBER void do_among(long steps, long times, Work work) {
        among<parts>(
            steps, times, [&]() INLINE_LAMBDA -> Stepper& { return scores.done() ? mix : scores; }, work);
    }
    // One step of it, if there is any left, beside the work of vectors.
    template <int parts, class Work>
    INLINE_MEMBER void do_one(Work work) {
        if (BY_PAIRS || !steps<parts>())
            work();
        else
            (scores.done() ? mix : scores).template step<parts, 1>(work);
    }
    // Of what is mixed, so much that it is done in so many times.
    void share_mix(long times) {
        long blocks = (mix.rows - mix.row + 1) / 2;
        mix_until = mix.row + 2 * ((blocks + times - 1) / times);
    }
    template <int parts>
    void finish_scores() {
        while (!BY_PAIRS && !scores.done()) scores.step<parts, 0>([] {});
    }
    template <int parts>
    void finish() {
        do_among<parts>(steps<parts>(), 0, [] {});
    }
};

}  // namespace regard::LEVEL
