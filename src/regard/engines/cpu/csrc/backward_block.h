// Blocks of rows against tiles of keys: what one pair gives the gradients. Weights are recomputed from
// each row's top and sum (Dao et al. 2022, appendix B).
#pragma once
#include <utility>

#include "backward_rows.h"
#include "beside.h"
#include "matmul.h"
#include "timed.h"
#include "weights.h"

namespace regard::LEVEL {

constexpr int HALF = KEYS / 2;  // keys of a panel whose weights are made at a time: they stay in the nearest cache

// A block of rows that sees something of the tile of keys at hand.
struct Pair {
    Block block;
    long id;     // of the block
    bool every;  // nothing of the tile is hidden
};

// So many pairs are gathered at a time. What a gradient is to get is a product whose depth are their lanes; to fetch
// and store a block of it takes longer than a step of depth does, but of two or three parts a step is 3 or 6 products.
INLINE int gathered_pairs(int parts) { return parts == 1 ? 4 : 1; }

// Weights and slopes of some pairs of neighbouring blocks, as tiles.
struct Slopes {
    Tiles weights, slopes;  // of the keys, depth the lanes of all
    Tiles columns;          // slopes, [pair][panel of lanes] of the lanes, depth the keys
    Tiles of_panel(int pair, int p, int parts) const {
        return {columns.data + (pair * LANES + p * PW) * KEYS * parts, PW / SIDE, PW * KEYS};
    }
};

// What the gradients are to get of such pairs: products on tiles, one after another, of three kinds.
struct Gathering {
    enum Kind { TO_VALUES, TO_KEYS, TO_QUERIES, KINDS };
    Stepper now;
    const Slopes* of = nullptr;
    long id = 0;                                    // of their first block
    int rows = 0, keys = 0;
    long products[KINDS] = {}, blocks[KINDS] = {};  // how many; of how many blocks, two rows of tiles, each is
    long depth[KINDS] = {};                         // … in tiles
    long begun = 0;                                 // products
    long at = 0;                                    // blocks that are done, or will be when the step in hand is

    // Blocks to be done now, if all are to be in so many times: how many steps they are.
    template <int parts>
    long share(long times) {
        long all = 0, steps = 0;
        for (int kind = 0; kind < KINDS; kind++) all += products[kind] * blocks[kind];
        const long until = at + (all - at + times - 1) / times;
        for (long kind = 0, first = 0, end; kind < KINDS; kind++, first = end) {
            end = first + products[kind] * blocks[kind];
            long here = least(until, end) - most(at, first);
            if (here > 0) steps += here * depth[kind];
        }
        at = until;
        return steps * pairs_of<parts>(false);
    }
};

class Backward {
  public:
    explicit Backward(SharedBackward& shared)
        : sh(shared), c(shared.call), back(shared.back), shaping(shared.shaping) {
        static thread_local Arena arena;
        ready = laid_out(arena, [&](Cutter& cut) { lay_out(cut); });
    }

    void run() {
        TileSession session(sh.parts);
        long owners = sh.together ? 1 : c.batch * c.kv_heads;
        for (long item; ready && sh.queue->take(item);) {
            stripe = item % sh.stripes;
            for (long tile = stripe; tile < sh.tiles; tile += sh.stripes)
                for (long i = 0; i < c.batch * c.kv_heads / owners; i++)
                    keys_of(item / sh.stripes + i, tile * KEYS);
        }
    }

  private:
    SharedBackward& sh;
    bool ready = false;
    PartClock clock;
    const RegardCall& c;
    const RegardBackward& back;
    const Shaping& shaping;
    long stripe = 0;
    float *key, *value, *d_key, *d_value, *score, *slope, *capped, *biases, *factors;
    const float *top, *inverse, *delta;  // of the rows at hand
    float *line, *row_line;
    FloatRows own;                  // of the rows at hand, where they are not shared
    uint64_t *visible, *stack;
    Tiles key_tiles, value_tiles;   // of the keys, depth their dim
    Tiles key_turned;               // of the dims, depth the keys
    Slopes made[2];                 // of the pairs at hand, and of those before, while they are gathered
    int making = 0;                 // which of them is at hand
    int pairs = 0;                  // that it holds
    int pair_keys = 0, pair_lanes = 0;  // of how many keys each, and how many lanes in all
    long pair_end = 0;              // the block after theirs
    Gathering gathering;
    Stepper scoring, sloping;       // scores, and products with the values, of the next half panel
    long ahead = -1;                // the block whose first ones are made; they are in `score_turn`
    int score_turn = 0;
    long key_b = 0, key_kv = 0, key_first = 0;  // the keys at hand
    int key_count = 0;
    bool key_fits = false, value_fits = false;  // whether they may be parts
    bool scores_on_tiles, slopes_on_tiles;  // of the pair at hand; as the forward had it
    Odd odd_keys, odd_values;       // of the keys at hand
    Rows raw_key, raw_value, finite_key;  // as they are, and with 0 for what is not finite; or not read yet
    float* clean;
    uint64_t odd_queries, odd_grads;  // of the rows at hand
    bool careful;                   // whether any number of the pair at hand is not finite
    uint64_t shown[KEYS];           // then, which lanes see each key
    float after;                    // by which its scores are multiplied yet

    void lay_out(Cutter& cut) {
        key = cut.cut(KEYS * c.dim);
        value = cut.cut(KEYS * c.v_dim);
        d_key = cut.cut(KEYS * sh.dim);
        d_value = cut.cut(KEYS * sh.v_dim);
        score = cut.cut(KEYS * LANES);   // then the weights, dropped out
        slope = cut.cut(KEYS * LANES);   // d(loss) / d(weight), then / d(score)
        capped = cut.cut(c.softcap ? KEYS * LANES : 0);
        biases = cut.cut(KEYS * LANES);
        factors = cut.cut(c.dropout ? KEYS * LANES : 0);
        line = cut.cut(most(sh.dim, sh.v_dim));
        clean = cut.cut(KEYS * most(c.dim, c.v_dim));
        const long rows = sh.parts ? sh.lanes : 0;
        own = {cut.cut(rows * sh.dim), cut.cut(rows * sh.v_dim), cut.cut(rows * c.dim), cut.cut(rows * c.v_dim)};
        row_line = cut.cut(rows ? (W + LANES) * most(c.dim, c.v_dim) : 0);
        visible = (uint64_t*)cut.cut(2 * KEYS);
        stack = (uint64_t*)cut.cut(2 * Shaping::words(c));
        auto cut_tiles = [&](long rows, long depth) -> Tiles {
            return {(uint16_t*)cut.cut(sh.parts * rows * depth / 2), depth / DEPTH, rows * depth};
        };
        key_tiles = cut_tiles(KEYS, sh.dim);
        value_tiles = cut_tiles(KEYS, sh.v_dim);
        key_turned = cut_tiles(sh.dim, KEYS);
        for (Slopes& of : made) {
            const long lanes = gathered_pairs(sh.parts) * LANES;
            of.weights = cut_tiles(KEYS, lanes);
            of.slopes = cut_tiles(KEYS, lanes);
            of.columns = cut_tiles(lanes, KEYS);
            of.columns.wide = PW / SIDE;
        }
    }

    // The gradients of one tile of keys, from all rows that see it.
    void keys_of(long owner, long k0) {
        long b = owner / c.kv_heads, kv = owner % c.kv_heads, group = sh.plan.group;
        int n = (int)least(KEYS, c.k_len - k0);
        key_b = b, key_kv = kv, key_first = k0, key_count = n;
        {
            Timed packing(clock, PACKING);
            make_keys();
        }
        memset(d_key, 0, KEYS * sh.dim * sizeof(float));
        memset(d_value, 0, KEYS * sh.v_dim * sizeof(float));
        // The next pair is known before the one at hand is done: its scores are begun meanwhile
        const long first = (sh.plan.flat ? owner : b * c.heads + kv * group) * sh.plan.blocks;
        const long end = first + (sh.plan.flat ? 1 : group) * sh.plan.blocks;
        Pair two[2], *now = &two[0], *next = &two[1];
        ahead = -1;
        long id = first;
        for (bool more = find(*now, id, end, k0, n); more; std::swap(now, next)) {
            more = find(*next, id, end, k0, n);
            pair(*now, k0, n, more ? next : nullptr);
        }
        gather_all();
        write(d_key, owner * c.k_len + k0, n, c.dim, (float)c.scale, back.d_key);
        write(d_value, owner * c.k_len + k0, n, c.v_dim, 1, back.d_value);
    }

    // The keys and values at hand (backward_keys.h)
    void make_keys();
    bool brain_keys();
    void read_keys();
    bool find(Pair& pair, long& id, long end, long k0, int n) const;
    void need_floats(const Block& block, long id);

    // Rows that stand as [panel of dims][key][PW], multiplied by `by`, to those of a gradient.
    void write(const float* from, long row, int n, long dim, float by, void* to) {
        for (int j = 0; j < n; j++) {
            for (long d = 0; d < dim; d += W)
                store(line + d, load(from + (d / PW * KEYS + j) * PW + d % PW) * by);
            narrow(back.type, line, dim, (char*)to + (row + j) * dim * size_of(back.type));
        }
    }

    // One block of rows against one tile of keys.
    void pair(const Pair& now, long k0, int n, const Pair* next) {
        const Block& block = now.block;
        const long id = now.id, tile = n;
        const bool every = now.every;
        if (!every) {
            shaping.look(block, k0, n, visible, stack);
            while (n > 0 && !visible[n - 1]) n--;
            if (!n) return;
        }
        if (shaping.biased) shaping.bias(block, k0, n, biases);
        if (c.dropout) shaping.dropout(block, k0, n, factors);
        Timed::tile(clock);
        top = sh.rows_of(id), inverse = top + LANES, delta = inverse + LANES;
        odd_queries = sh.odd[3 * id], odd_grads = sh.odd[3 * id + 1];
        careful = odd_keys.count || odd_values.count || odd_queries || odd_grads || sh.odd[3 * id + 2];
        if (careful) memset(shown, 0, sizeof shown);
        scores_on_tiles = key_fits && sh.fit(id, 0);
        slopes_on_tiles = value_fits && sh.fit(id, 1);
        after = sh.after();
        const bool all_on_tiles = on_tiles(id);
        if (careful || !all_on_tiles) need_floats(block, id);
        if (all_on_tiles && !shaping.shaped()) {
            if (odd_grads) gather_all();
            const Slopes& mine = made[making];
            with_parts(sh.parts, [&](auto of) {
                tile_pair<of.count>(now, n, tile, next && on_tiles(next->id) ? next : nullptr);
            });
            if (odd_grads) gather_all();
            return gather_odd(n, [&](int j, int lane) { return weight_on_tiles(mine, j, lane); });
        }
        gather_all();
        // What a panel sees none of, at the end of the tile, is left out where nothing else reads it
        bool whole = every || all_on_tiles || shaping.shaped();
        int seen[PANELS], least_seen = n;
        for (int p = 0; p < block.panels; p++) {
            seen[p] = whole ? n : seen_keys(visible, p, n);
            least_seen = (int)least(least_seen, seen[p]);
            if (block.panel_rows(p) > W)
                panel<2>(id, p, seen[p], every);
            else
                panel<1>(id, p, seen[p], every);
        }
        if (shaping.biased) gather_biases(block, k0, n);
        // The cap's own slope, 1 − tanh²: `capped` holds the tanh
        if (c.softcap)
            for (long i = 0; i < (long)n * LANES; i++) {
                slope[i] *= 1 - capped[i] * capped[i];
                if (careful && !(shown[i / LANES] >> i % LANES & 1)) slope[i] = 0;
            }
        auto weight = [&](int j, int lane) { return score[j * LANES + lane]; };
        if (all_on_tiles) {
            with_parts(sh.parts, [&](auto of) {
                constexpr int parts = of.count;
                const Slopes& to = made[making];
                pack_rows<parts, Unseen>(score, LANES, n, block.count, to.weights);
                pack_rows<parts, Unseen>(slope, LANES, n, block.count, to.slopes);
                for (int p = 0; p < block.panels; p++)
                    pack_columns<parts, false, Unseen>(slope + p * PW, LANES, n, PW, to.of_panel(0, p, parts));
                add_pair<parts>(now, n);
            });
            gather_all();
            return gather_odd(n, weight);
        }
        Timed mixing(clock, MIX);
        auto gather = [&](int keys, long lane, long count) {
            columns(keys, count, score + lane, LANES, 1, own.grad + lane * PW, sh.lanes,
                    sh.v_dim, d_value, KEYS);
            columns(keys, count, slope + lane, LANES, 1, own.query + lane * PW, sh.lanes,
                    sh.dim, d_key, KEYS);
        };
        if (least_seen == n) gather(n, 0, block.count);
        for (int p = 0; p < block.panels; p++) {
            if (least_seen < n) gather(seen[p], p * PW, block.panel_rows(p));
            product<true>(c.dim, seen[p], finite_key.data, 1, finite_key.ld, slope + p * PW, LANES,
                          d_query_of(id, p), PW);
        }
        gather_odd(n, weight);
    }

    // What gradients that are not finite give the values of the keys that their rows see.
    template <class Weight>
    void gather_odd(int n, Weight weight) {
        const float* g = own.grad_lanes;
        for (int lane = 0; lane < LANES && odd_grads >> lane; lane++) {
            if (!(odd_grads >> lane & 1)) continue;
            for (long d = 0; d < c.v_dim; d++) {
                float x = g[(lane / PW * c.v_dim + d) * PW + lane % PW];
                if (x - x == 0) continue;
                for (int j = 0; j < n; j++)
                    if (shown[j] >> lane & 1)
                        d_value[(d / PW * KEYS + j) * PW + d % PW] += weight(j, lane) * x;
            }
        }
    }
    float weight_on_tiles(const Slopes& of, int j, int lane) const {  // the first part, of its first pair
        const uint16_t* tile = of.weights.at(j / SIDE, lane / PW);
        return from_brain(tile[j % SIDE * DEPTH + 2 * (lane % W) + lane % PW / W]);
    }

    // On tiles, scores and slopes of what is not finite: of the n keys from `from` on.
    template <int NV>
    void odd_pairs(int p, int from, int n, float* s, float* ds, long ld) const {
        const float *q = own.query_lanes + p * PW * c.dim, *g = own.grad_lanes + p * PW * c.v_dim;
        if (s) odd_products(odd_keys, raw_key, odd_queries >> p * PW, q, c.dim, from, n, NV * W, s, ld);
        if (ds) odd_products(odd_values, raw_value, odd_grads >> p * PW, g, c.v_dim, from, n, NV * W, ds, ld);
    }
    // Which of the panel's lanes see each key.
    template <int NV>
    void see(int p, int from, int n, const float* s, long ld) {
        for (int j = 0; j < n; j++) shown[from + j] |= shown_lanes(s + j * ld, NV * W) << p * PW;
    }
    float* d_query_of(long id, int p) const {
        return sh.d_query + ((stripe * sh.blocks + id) * sh.lanes + p * PW) * sh.dim;
    }
    bool on_tiles(long id) const {
        return key_fits && value_fits && sh.fit(id, 0) && sh.fit(id, 1) && sh.fit(id, 2);
    }
    float* half_scores() const { return score + score_turn * HALF * PW; }
    float* half_slopes() const { return slope + score_turn * HALF * PW; }

    // C (rows × dim) += A (rows × depth) B (depth × dim), B and C in panels.
    static void columns(long rows, long depth, const float* a, long rs, long ks, const float* b,
                        long b_rows, long dim, float* to, long to_rows) {
        for (long p = 0; p < dim / PW; p++)
            product<true>(rows, depth, a, rs, ks, b + p * b_rows * PW, PW, to + p * to_rows * PW, PW);
    }

    // Pairs that are wholly on tiles (backward_tiles.h)
    template <int parts>
    void add_pair(const Pair& now, int n);
    template <int parts>
    void begin_gathering();
    template <int parts>
    void begin_product();
    template <int parts, class Work>
    void step_among(long gathered, long times, Work work);
    template <int parts>
    void finish_gathering();
    void gather_all();
    template <int parts>
    void begin_scores(const Block& block, long id, int p, int from, int n);
    template <int parts>
    void tile_pair(const Pair& now, int n, int tile, const Pair* next);
    template <int parts, int NV>
    void half_panel(const Pair& now, int p, int from, int count, float* s, float* ds, long left);
    template <int parts, int NV, bool plain>
    void slopes_on(int p, int from, int bites, float by, const float* s, const float* ds, long gathered);

    // Weights and slopes of one panel, as [key][lane].
    template <int NV>
    void panel(long id, int p, int n, bool every) {
        const Rows &k = raw_key, &v = raw_value;
        const float *q = own.query_lanes + p * PW * c.dim, *g = own.grad_lanes + p * PW * c.v_dim;
        float *s = score + p * PW, *ds = slope + p * PW;
        bool whole = c.query.type == F16;
        {
            Timed scoring(clock, SCORES);
            if (scores_on_tiles)
                tile_product<false, NV>(sh.parts, whole, n, c.dim, key_tiles,
                                        sh.lane_tiles(sh.query_tiles, id, sh.dim, p), s, LANES);
            else
                product<false, NV>(n, c.dim, k.data, k.ld, 1, q, PW, s, LANES);
            if (slopes_on_tiles)
                tile_product<false, NV>(sh.parts, whole, n, c.v_dim, value_tiles,
                                        sh.lane_tiles(sh.grad_tiles, id, sh.v_dim, p), ds, LANES);
            else
                product<false, NV>(n, c.v_dim, v.data, v.ld, 1, g, PW, ds, LANES);
        }
        Timed weighing(clock, SOFTMAX);
        if (careful)
            odd_pairs<NV>(p, 0, n, scores_on_tiles ? s : nullptr, slopes_on_tiles ? ds : nullptr,
                          LANES);
        if (after != 1.f) multiply<NV>(n, s, LANES, after);
        if (!every || shaping.shaped())
            shaping.finish<NV>(p, n, s, LANES, every ? nullptr : visible,
                               shaping.biased ? biases : nullptr, c.softcap ? capped + p * PW : nullptr);
        if (careful) see<NV>(p, 0, n, s, LANES);
        #pragma GCC unroll 2
        for (int i = 0; i < NV; i++) {
            V high = load(top + p * PW + i * W), by = load(inverse + p * PW + i * W);
            V less = load(delta + p * PW + i * W);
            for (int j = 0; j < n; j++) {
                long at = j * LANES + i * W;
                V x = load(s + at), w = exp(x - high) * by, dw = load(ds + at);
                // A hidden pair has neither weight nor slope, whatever the other numbers are
                if (careful) w = x == -INFINITY ? V{} : w;
                V dropped = w;
                if (c.dropout) {
                    V f = load(factors + at + p * PW);
                    dropped = w * f;
                    dw *= f;
                }
                store(s + at, dropped);
                V by_score = w * (dw - less);  // softmax's Jacobian; less = Σ w dw of the row = out · grad
                if (careful) by_score = x == -INFINITY ? V{} : by_score;
                store(ds + at, by_score);
            }
        }
    }

    void gather_biases(const Block& block, long k0, int n) {
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            if (back.d_by_offset) {
                long at = ((stripe * c.batch + s.b) * c.heads + s.h) * sh.offsets();
                for (int j = 0; j < n; j++) {
                    float* to = sh.d_by_offset + at + s.q0 - (k0 + j) + c.k_len - 1;
                    const float* ds = slope + j * LANES + s.lane;
                    for (int r = 0; r < s.count; r++) to[r] += ds[r];
                }
            }
            float* shared = sh.d_bias + stripe * sh.bias_floats;
            for (long d = 0; d < c.bias_count; d++) {
                const RegardView& view = back.d_bias[d];
                if (!view.data) continue;
                // What all keys share is added to by every stripe: each has its own, summed later
                float* to = view.stride[3] ? (float*)view.data : shared;
                if (!view.stride[3]) shared += back.bias_floats[d];
                to += s.b * view.stride[0] + s.h * view.stride[1];
                for (int r = 0; r < s.count; r++)
                    for (int j = 0; j < n; j++)
                        to[(s.q0 + r) * view.stride[2] + (k0 + j) * view.stride[3]] +=
                            slope[j * LANES + s.lane + r];
            }
        }
    }
};

}  // namespace regard::LEVEL
