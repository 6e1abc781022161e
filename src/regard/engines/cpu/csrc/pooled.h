// Pooled rectangles of the map: of one head, 128 × 128 cells of 2ᶻ × 2ᶻ weights exp(score − lse) each.
//
// The lse is given, so nothing outside of a rectangle is read, and its rows are worked on apart. An
// item of work is some of its rows of cells, and holds these alone: it depends on the rectangle, never
// on threads or on the other rectangles, and so do the bits. Its queries are taken some hundred at a
// time, so that each tile of keys is made ready once for all of them.
#pragma once
#include "matmul.h"
#include "parts.h"
#include "plan.h"

namespace regard::LEVEL {

constexpr long CELLS = 128;        // of a rectangle, each way
constexpr long MOST_BLOCKS = 8;    // of 64 queries, that share a tile of keys
constexpr long FAR_KEYS = 16 * KEYS;  // of which the mask is asked first whether it shows any

struct SharedPooled {
    RegardCall call;
    RegardPooled pooled;
    Shaping shaping;
    KeyTiles tiles;
    long* first;  // of each rectangle, its first item; and behind them, how many there are
    Queue* queue;
};

// How one rectangle is cut, in queries from its first row on and keys from its first column on.
struct Cut {
    RegardTile tile;
    long cell, side, item;  // queries of each

    explicit Cut(const RegardTile& tile) : tile(tile), cell(1l << tile.zoom), side(CELLS << tile.zoom) {
        item = most(cell, least(most(side / 8, LANES), MOST_BLOCKS * LANES));
    }
    long items() const { return side / item; }
    long rows() const { return item / cell; }  // of cells, of one item
    // The part of [at, at + n) that there is in a call of `length` queries or keys from `start` on.
    static long from(long start, long at) { return most(start + at, 0); }
    static long to(long start, long at, long n, long length) { return least(start + at + n, length); }
};

class Pooling {
  public:
    explicit Pooling(SharedPooled& shared)
        : sh(shared), c(shared.call), o(shared.pooled), shaping(shared.shaping) {
        static thread_local Arena arena;
        ready = laid_out(arena, [&](Cutter& cut) { lay_out(cut); });
    }

    void run() {
        TileSession session(sh.tiles.parts);
        long t = 0;
        for (long item; ready && sh.queue->take(item);) {
            while (sh.first[t + 1] <= item) t++;  // the queue only ever goes on
            Cut cut(o.tile[t]);
            // Later queries see more keys under a causal mask: longest first
            rows_of_cells(cut, t, cut.items() - 1 - (item - sh.first[t]));
        }
    }

  private:
    SharedPooled& sh;
    bool ready = false;
    const RegardCall& c;
    const RegardPooled& o;
    const Shaping& shaping;
    float *query, *line, *key, *clean, *score, *biases, *lanes, *halved, *shift;
    double* cells;  // [row][CELLS] of the item at hand
    uint16_t *query_parts, *own_keys;
    uint64_t *visible, *stack;
    float after, by;  // scores are to be multiplied by `after`; in units of `power`, by `by`
    // Of each block of queries at hand
    Block block[MOST_BLOCKS];
    bool fits[MOST_BLOCKS];     // its queries stand as parts
    bool careful[MOST_BLOCKS];  // the lse of some row is no number: hidden pairs still weigh 0
    uint64_t odd_queries[MOST_BLOCKS][PANELS];  // lanes that are not finite: 0 stands there on tiles
    Odd odd_keys;               // of the tile at hand, likewise
    long blocks;

    void lay_out(Cutter& cut) {
        query = cut.cut(MOST_BLOCKS * LANES * c.dim);
        line = cut.cut(W * c.dim);
        key = cut.cut(KEYS * c.dim);
        clean = cut.cut(KEYS * c.dim);
        score = cut.cut(KEYS * PW);
        biases = cut.cut(KEYS * LANES);
        lanes = cut.cut(KEYS * LANES);
        halved = cut.cut(KEYS * LANES);
        shift = cut.cut(MOST_BLOCKS * LANES);
        cells = (double*)cut.cut(2 * LANES * CELLS);
        visible = (uint64_t*)cut.cut(2 * KEYS);
        stack = (uint64_t*)cut.cut(2 * Shaping::words(c));
        auto halves = [&](long count) { return (uint16_t*)cut.cut((count + 1) / 2); };
        query_parts = halves(MOST_BLOCKS * PANELS * panel_parts());
        own_keys = halves(sh.tiles.size());
    }
    long panel_parts() const { return sh.tiles.parts * sh.tiles.dim * DEPTH * PW; }
    Tiles query_tiles(long i, int p) const {
        return {query_parts + (i * PANELS + p) * panel_parts(), PW / SIDE, sh.tiles.dim * DEPTH * PW};
    }
    float* query_of(long i, int p) const { return query + (i * LANES + p * PW) * c.dim; }

    // The keys that an item of the batch has.
    long keys_of(long b) const { return c.pages.table ? c.pages.lengths[b] : c.k_len; }

    // One item: its cells, from nothing to the output.
    void rows_of_cells(const Cut& cut, long t, long item) {
        long rows = cut.rows();
        for (long i = 0; i < rows * CELLS; i++) cells[i] = 0;
        after = scale_after(c, sh.tiles.parts, shaping.query_scale());
        bool folded = after > 0 && !shaping.shaped();
        by = folded ? after * UNIT : UNIT;
        if (folded) after = 1;
        for (long at = 0; at < cut.item; at += MOST_BLOCKS * LANES) {
            long first = item * cut.item + at, n = least(MOST_BLOCKS * LANES, cut.item - at);
            start(cut, first, n);
            if (blocks) walk(cut, item * rows, block[0].segment[0].q0,
                             Cut::to(cut.tile.row, first, n, c.q_len));
        }
        float* to = o.out + (t * CELLS + item * rows) * CELLS;
        for (long i = 0; i < rows * CELLS; i++) to[i] = (float)cells[i];
    }

    // Makes ready the blocks of the queries first … first + n − 1 of the rectangle, where there are any.
    // A lane's number is that of its query in the rectangle, modulo 64: some of a block may be empty.
    void start(const Cut& cut, long first, long n) {
        blocks = 0;
        const RegardTile& tile = cut.tile;
        bool scaled = scale_after(c, sh.tiles.parts, shaping.query_scale()) == 1;
        for (long at = first; at < first + n; at += LANES) {
            long q0 = Cut::from(tile.row, at), q1 = Cut::to(tile.row, at, LANES, c.q_len);
            if (q0 >= q1) continue;
            Block& b = block[blocks];
            int lane = (int)(q0 - tile.row - at);
            b.segment[0] = {tile.batch, tile.head, q0, (int)(q1 - q0), lane};
            b.segments = 1;
            b.count = lane + (int)(q1 - q0);
            b.panels = (b.count + PW - 1) / PW;
            turn_rows(c.query, b, c.dim, scaled ? shaping.query_scale() : 1.f, line, query_of(blocks, 0));
            fits[blocks] = sh.tiles.parts && as_parts(blocks);
            careful[blocks] = find_shift(c, o.lse, b, shift + blocks * LANES);
            blocks++;
        }
    }
    bool as_parts(long i) {
        return with_parts<bool>(sh.tiles.parts, [&](auto of) {
            bool all_fit = true;
            for (int p = 0; p < block[i].panels; p++) {
                auto pack = [&](const float* x) {
                    return pack_columns<of.count, false>(x, PW, c.dim, PW, query_tiles(i, p));
                };
                bool fit = pack(query_of(i, p));
                odd_queries[i][p] = fit ? 0 : odd_lanes(query_of(i, p), c.dim);
                if (odd_queries[i][p]) {
                    memcpy(clean, query_of(i, p), c.dim * PW * sizeof(float));
                    fill_odd(clean, c.dim * PW);
                    fit = pack(clean);
                }
                all_fit &= fit;
            }
            return all_fit;
        });
    }
    bool keys_as_parts(const Rows& rows, int n) {
        return with_parts<bool>(sh.tiles.parts, [&](auto of) {
            auto pack = [&](Rows x) {
                return pack_rows<of.count>(x.data, x.ld, n, c.dim, sh.tiles.keys(own_keys));
            };
            odd_keys.count = 0;
            if (pack(rows)) return true;
            odd_keys.find(rows, n, c.dim);
            return odd_keys.count > 0 && pack(odd_keys.filled(n, c.dim, clean));
        });
    }

    // All keys of the rectangle, for the blocks at hand: the queries q0 … q1 − 1.
    void walk(const Cut& cut, long row, long q0, long q1) {
        const RegardTile& tile = cut.tile;
        long length = keys_of(tile.batch);
        if (!length) return;
        long begin = most(-tile.col, 0) / KEYS * KEYS, end = least(cut.side, length - tile.col);
        for (long far = begin; far < end; far += FAR_KEYS) {
            Answer several = {true, true};
            if (!shaping.sees_all())
                several = shaping.mask.classify({tile.batch, tile.head, q0, q1, Cut::from(tile.col, far),
                                                 Cut::to(tile.col, far, FAR_KEYS, length)});
            if (!several.some) continue;
            for (long at = far; at < least(far + FAR_KEYS, end); at += KEYS)
                keys_of_tile(cut, row, at, several.every);
        }
    }

    // One tile of keys, `at` keys from the rectangle's first column; all: the mask shows all of it.
    void keys_of_tile(const Cut& cut, long row, long at, bool all) {
        const RegardTile& tile = cut.tile;
        long k0 = Cut::from(tile.col, at), kv = tile.head / (c.heads / c.kv_heads);
        int n = (int)(Cut::to(tile.col, at, KEYS, keys_of(tile.batch)) - k0);
        int left = (int)(k0 - tile.col - at);  // keys of the tile that there are not
        Rows rows{};
        bool as_tiles = false;
        for (long i = 0; i < blocks; i++) {
            Answer a = {true, true};
            if (!all) a = shaping.classify(block[i], k0, k0 + n);
            if (!a.some) continue;
            if (!rows.data) {
                rows = rows_of(c.key, c.pages, tile.batch, kv, k0, n, c.dim, key);
                as_tiles = sh.tiles.parts && keys_as_parts(rows, n);
            }
            if (!a.every) shaping.look(block[i], k0, n, visible, stack);
            if (shaping.biased) shaping.bias(block[i], k0, n, biases);
            for (int p = 0; p < block[i].panels; p++) {
                if (block[i].panel_rows(p) > W)
                    panel<2>(i, p, rows, as_tiles && fits[i], n, a.every);
                else
                    panel<1>(i, p, rows, as_tiles && fits[i], n, a.every);
                if (o.is_max)
                    careful[i] ? largest<true>(cut, i, p, left, n) : largest<false>(cut, i, p, left, n);
                else
                    careful[i] ? sums_of<true>(cut, i, p, left, n) : sums_of<false>(cut, i, p, left, n);
            }
            add(cut, block[i], row, at, left, n);
        }
    }

    // score[key][PW] of one panel, in units of `by`; −∞ where hidden.
    template <int NV>
    void panel(long i, int p, const Rows& rows, bool as_tiles, int n, bool every) {
        if (as_tiles) {
            tile_product<false, NV>(sh.tiles.parts, c.query.type == F16, n, c.dim,
                                    sh.tiles.keys(own_keys), query_tiles(i, p), score, PW);
            if (odd_keys.count || odd_queries[i][p])
                odd_products(odd_keys, rows, odd_queries[i][p], query_of(i, p), c.dim, 0, n, NV * W,
                             score, PW);
        } else
            product<false, NV>(n, c.dim, rows.data, rows.ld, 1, query_of(i, p), PW, score, PW);
        if (after != 1.f) multiply<NV>(n, score, PW, after);
        if (!every || shaping.shaped())
            shaping.finish<NV>(p, n, score, PW, every ? nullptr : visible,
                               shaping.biased ? biases : nullptr);
    }

    // then(group, from, to): the n keys by the columns of cells that they lie in, counted from the
    // tile's first. left: how many keys of the first are not there.
    template <class Then>
    static INLINE_MEMBER void by_columns(const Cut& cut, int left, int n, Then then) {
        int size = (int)least(cut.cell, KEYS);
        for (int j = 0; j < n;) {
            int group = (left + j) / size, next = (int)least(n, (group + 1) * size - left);
            then(group, j, next);
            j = next;
        }
    }

    // lanes[group][lane]: the sum of the weights of each lane. What a panel's second vector holds where
    // there are no rows is not read.
    template <bool careful>
    void sums_of(const Cut& cut, long i, int p, int left, int n) {
        NoDenormals flush;
        const float* shifts = shift + i * LANES + p * PW;
        V less[2] = {load(shifts), load(shifts + W)}, unit = all(by);
        by_columns(cut, left, n, [&](int group, int from, int to) INLINE_LAMBDA {
            V total[2] = {};
            for (int some = from; some < to; some += 16) {  // in short sums, which round less
                V part[2] = {};
                int end = (int)least(to, some + 16);
                #pragma GCC unroll 2
                for (int j = some; j < end; j++)
                    #pragma GCC unroll 2
                    for (int v = 0; v < 2; v++) {
                        V s = load(score + j * PW + v * W), e = power(s * unit - less[v]);
                        part[v] += careful ? (s == -INFINITY ? V{} : e) : e;
                    }
                for (int v = 0; v < 2; v++) total[v] += part[v];
            }
            for (int v = 0; v < 2; v++) store(lanes + group * LANES + p * PW + v * W, total[v]);
        });
    }

    // The same of the largest: that of the largest score, as a row has one lse.
    template <bool careful>
    void largest(const Cut& cut, long i, int p, int left, int n) {
        NoDenormals flush;
        const float* shifts = shift + i * LANES + p * PW;
        by_columns(cut, left, n, [&](int group, int from, int to) INLINE_LAMBDA {
            for (int v = 0; v < 2; v++) {
                V top = all(-INFINITY);
                I odd = {};
                for (int j = from; j < to; j++) {
                    V s = load(score + j * PW + v * W);
                    top = max(s, top);
                    odd |= s != s;
                }
                V e = power(top * by - load(shifts + v * W));
                if (careful) e = top == -INFINITY ? V{} : e;
                store(lanes + group * LANES + p * PW + v * W, odd ? all(NAN) : e);
            }
        });
    }

    // Pools the lanes of a block and adds them to the item's cells. row: its first row of cells.
    void add(const Cut& cut, const Block& b, long row, long at, int left, int n) {
        const Segment& s = b.segment[0];
        long size = least(cut.cell, KEYS);
        int first = (int)(left / size), count = (int)((left + n - 1) / size) + 1 - first;
        float *from = lanes + first * LANES, *to = halved;
        if (s.count < LANES)
            for (int g = 0; g < count; g++)
                for (int l = 0; l < LANES; l++)
                    if (l < s.lane || l >= b.count) from[g * LANES + l] = 0;
        int length = LANES, steps = (int)least(cut.tile.zoom, 6);
        for (int step = 0; step < steps; step++, length /= 2) {
            if (o.is_max)
                halve<true>(from, to, count * length / 2);
            else
                halve<false>(from, to, count * length / 2);
            float* was = from;
            from = to, to = was;
        }
        long r0 = ((s.q0 - s.lane - cut.tile.row) >> cut.tile.zoom) - row, column = at >> cut.tile.zoom;
        for (int r = 0; r < length; r++)
            for (int g = 0; g < count; g++) {
                double& cell = cells[(r0 + r) * CELLS + column + first + g];
                double x = from[g * length + r];
                if (!o.is_max)
                    cell += x;
                else if (cell == cell && !(x <= cell))  // NaN stays
                    cell = x;
            }
    }
    // Each two neighbours become one. Weights are not below 0, so that they compare as their bits do,
    // and NaN, without its sign, stands above all.
    template <bool largest>
    static void halve(const float* __restrict from, float* __restrict to, int n) {
        for (int i = 0; i < n; i++) {
            if (!largest) {
                to[i] = from[2 * i] + from[2 * i + 1];
                continue;
            }
            uint32_t a, b;
            memcpy(&a, from + 2 * i, 4);
            memcpy(&b, from + 2 * i + 1, 4);
            a &= 0x7fffffffu, b &= 0x7fffffffu;
            a = a > b ? a : b;
            memcpy(to + i, &a, 4);
        }
    }
};

static void work_pooled(void* shared) { Pooling(*(SharedPooled*)shared).run(); }

// 0, or 1: out of memory.
static int pooled(const RegardCall& call, const RegardPooled& wanted) {
    static thread_local Arena arena;
    long* first = (long*)arena.take(2 * (wanted.count + 1));
    if (!first) return 1;
    SharedPooled sh{call, wanted, {}, {}, first, nullptr};
    sh.call.v_dim = 0;  // values are not read
    sh.shaping = Shaping(sh.call);
    sh.tiles = KeyTiles(sh.call);
    double products = 0;
    first[0] = 0;
    for (long t = 0; t < wanted.count; t++) {
        Cut cut(wanted.tile[t]);
        first[t + 1] = first[t] + cut.items();
        products += (double)least(cut.side, call.q_len) * least(cut.side, call.k_len) * call.dim;
    }
    Queue queue(first[wanted.count]);
    sh.queue = &queue;
    // Waking a thread takes as long as some hundred thousand products (forward.h)
    long worth = products < 0x1p40 ? 1 + (long)products / (1 << 18) : call.threads;
    run_team(least(least(call.threads, queue.count), worth), work_pooled, &sh);
    return queue.empty() ? 0 : 1;
}

}  // namespace regard::LEVEL
