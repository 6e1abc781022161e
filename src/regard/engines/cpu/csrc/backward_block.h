// Blocks of rows against tiles of keys: what one pair gives the gradients. Weights are recomputed from
// each row's top and sum (Dao et al. 2022, appendix B).
#pragma once
#include "finite.h"
#include "matmul.h"
#include "parts.h"
#include "plan.h"
#include "weights.h"

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
    float *query, *grad;         // [block] panels of its rows
    float *query_lanes, *grad_lanes;  // [block][panel of lanes][dim][PW]
    int parts;                   // of a number on tiles; 0: nothing is multiplied on tiles
    KeyTiles tile_rule;
    uint16_t *query_tiles, *grad_tiles;          // [block][panel of lanes] of the lanes, depth their dim
    uint16_t *query_row_tiles, *grad_row_tiles;  // [block][panel of dims] of the rows, depth the lanes
    float* fits;                 // [block]: 1 where all of these may stand as parts
    uint64_t* odd;               // [block]: which lanes' queries are not finite, and which gradients. In
                                 // `query`, `grad` and on tiles 0 stands for what is not
    float* d_query;              // [stripe][block][panel of lanes][dim][PW]
    float* d_by_offset;          // [stripe][item of the batch][head][q_len + k_len − 1]
    float* d_bias;               // [stripe] of those dense biases that all keys share
    long bias_floats;

    long offsets() const { return call.q_len + call.k_len - 1; }
    long first_row(const Block& b) const {
        return (b.segment[0].b * call.heads + b.segment[0].h) * call.q_len + b.segment[0].q0;
    }
    bool served(const Block& b) const { return parts && tile_rule.serve(plan, b); }
    // By what the scores of a block are multiplied after their product, as in the forward
    float after_of(const Block& b) const {
        return scale_after(call, served(b) ? parts : 0, shaping.query_scale());
    }
    // Panel p of one block, of those tiles whose depth is `dim` (padded), or the block's lanes
    Tiles lane_tiles(uint16_t* of, long id, long dim, int p) const {
        return {of + (id * lanes + p * PW) * dim * parts, PW / SIDE, dim * PW};
    }
    Tiles row_tiles(uint16_t* of, long id, long dim, long p) const {
        return {of + (id * dim + p * PW) * lanes * parts, PW / SIDE, lanes * PW};
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
    const RegardCall& c;
    const RegardBackward& back;
    const Shaping& shaping;
    long stripe = 0;
    float *key, *value, *d_key, *d_value, *score, *slope, *capped, *biases, *factors;
    float *top, *inverse, *delta, *line;
    uint64_t *visible, *stack;
    Tiles key_tiles, value_tiles;   // of the keys, depth their dim
    Tiles key_turned;               // of the dims, depth the keys
    Tiles weight_tiles, slope_tiles;  // of the keys, depth the lanes
    Tiles slope_columns;            // [panel of lanes] of the lanes, depth the keys
    bool key_fits, value_fits;      // whether the keys at hand may be parts
    bool scores_on_tiles, slopes_on_tiles;  // of the pair at hand; as the forward had it
    Odd odd_keys, odd_values;       // of the keys at hand
    Rows raw_key, raw_value, finite_key;  // … as they are, and with 0 for what is not finite
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
        top = cut.cut(LANES);
        inverse = cut.cut(LANES);
        delta = cut.cut(LANES);
        visible = (uint64_t*)cut.cut(2 * KEYS);
        stack = (uint64_t*)cut.cut(2 * Shaping::words(c));
        auto cut_tiles = [&](long rows, long depth) -> Tiles {
            return {(uint16_t*)cut.cut(sh.parts * rows * depth / 2), depth / DEPTH, rows * depth};
        };
        key_tiles = cut_tiles(KEYS, sh.dim);
        value_tiles = cut_tiles(KEYS, sh.v_dim);
        key_turned = cut_tiles(sh.dim, KEYS);
        weight_tiles = cut_tiles(KEYS, LANES);
        slope_tiles = cut_tiles(KEYS, LANES);
        slope_columns = cut_tiles(LANES, KEYS);
        slope_columns.wide = PW / SIDE;
    }

    // The gradients of one tile of keys, from all rows that see it.
    void keys_of(long owner, long k0) {
        long b = owner / c.kv_heads, kv = owner % c.kv_heads, group = sh.plan.group;
        int n = (int)least(KEYS, c.k_len - k0);
        Rows k = rows_of(c.key, c.pages, b, kv, k0, n, c.dim, key);
        Rows v = rows_of(c.value, c.pages, b, kv, k0, n, c.v_dim, value);
        odd_keys.find(k, n, c.dim);
        odd_values.find(v, n, c.v_dim);
        if (sh.parts)
            with_parts(sh.parts, [&](auto of) {
                constexpr int parts = of.count;
                Rows x = odd_values.filled(n, c.v_dim, clean);
                value_fits = pack_rows<parts>(x.data, x.ld, n, c.v_dim, value_tiles);
                x = odd_keys.filled(n, c.dim, clean);
                key_fits = pack_rows<parts>(x.data, x.ld, n, c.dim, key_tiles);
                pack_columns<parts, true, Unseen>(x.data, x.ld, n, c.dim, key_turned);
            });
        finite_key = odd_keys.filled(n, c.dim, clean);
        raw_key = k, raw_value = v;
        memset(d_key, 0, KEYS * sh.dim * sizeof(float));
        memset(d_value, 0, KEYS * sh.v_dim * sizeof(float));
        for (long g = 0; g < (sh.plan.flat ? 1 : group); g++) {
            long mine = sh.plan.flat ? owner : b * c.heads + kv * group + g;
            for (long index = 0; index < sh.plan.blocks; index++) {
                Block block = sh.plan.block(c, mine, index);
                Answer a = shaping.classify(block, k0, k0 + n);
                if (a.some) pair(block, mine * sh.plan.blocks + index, k, v, k0, n, a.every);
            }
        }
        write(d_key, owner * c.k_len + k0, n, c.dim, (float)c.scale, back.d_key);
        write(d_value, owner * c.k_len + k0, n, c.v_dim, 1, back.d_value);
    }

    // Rows that stand as [panel of dims][key][PW], multiplied by `by`, to those of a gradient.
    void write(const float* from, long row, int n, long dim, float by, void* to) {
        for (int j = 0; j < n; j++) {
            for (long d = 0; d < dim; d += W)
                store(line + d, load(from + (d / PW * KEYS + j) * PW + d % PW) * by);
            narrow(back.type, line, dim, (char*)to + (row + j) * dim * size_of(back.type));
        }
    }

    // One block of rows against one tile of keys.
    void pair(const Block& block, long id, Rows k, Rows v, long k0, int n, bool every) {
        if (!every) {
            shaping.look(block, k0, n, visible, stack);
            while (n > 0 && !visible[n - 1]) n--;
            if (!n) return;
        }
        if (shaping.biased) shaping.bias(block, k0, n, biases);
        if (c.dropout) shaping.dropout(block, k0, n, factors);
        long row = sh.first_row(block);
        for (int i = 0; i < LANES; i++) {
            bool there = i < block.count;
            float total = there ? back.stats[2 * (row + i) + 1] : 0;
            top[i] = there ? back.stats[2 * (row + i)] : 0;
            inverse[i] = total == 0 ? 0 : 1 / total;  // 0: an empty row, or none, has no weights
            delta[i] = there ? back.delta[row + i] : 0;
        }
        const float* q = sh.query_lanes + id * sh.lanes * c.dim;
        const float* g = sh.grad_lanes + id * sh.lanes * c.v_dim;
        odd_queries = sh.odd[2 * id], odd_grads = sh.odd[2 * id + 1];
        careful = odd_keys.count || odd_values.count || odd_queries || odd_grads ||
                  !all_finite(top, LANES) || !all_finite(inverse, LANES) || !all_finite(delta, LANES);
        if (careful) memset(shown, 0, sizeof shown);
        const float* fits = sh.fits + 3 * id;
        scores_on_tiles = sh.served(block) && key_fits && fits[0] != 0;
        slopes_on_tiles = sh.served(block) && value_fits && fits[1] != 0;
        after = sh.after_of(block);
        bool all_on_tiles = scores_on_tiles && slopes_on_tiles && fits[2] != 0;
        if (all_on_tiles && !shaping.shaped()) {
            for (int p = 0; p < block.panels; p++) {
                if (block.panel_rows(p) > W)
                    tile_panel<2>(id, p, n, every);
                else
                    tile_panel<1>(id, p, n, every);
            }
            gather_on_tiles(id, block.count, n);
            return gather_odd(g, n, [&](int j, int lane) { return weight_on_tiles(j, lane); });
        }
        // What a panel sees none of, at the end of the tile, is left out where nothing else reads it
        bool whole = every || all_on_tiles || shaping.shaped();
        int seen[PANELS], least_seen = n;
        for (int p = 0; p < block.panels; p++) {
            seen[p] = whole ? n : seen_keys(visible, p, n);
            least_seen = (int)least(least_seen, seen[p]);
            if (block.panel_rows(p) > W)
                panel<2>(id, p, k, v, q, g, seen[p], every);
            else
                panel<1>(id, p, k, v, q, g, seen[p], every);
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
                pack_rows<parts, Unseen>(score, LANES, n, block.count, weight_tiles);
                pack_rows<parts, Unseen>(slope, LANES, n, block.count, slope_tiles);
                for (int p = 0; p < block.panels; p++)
                    pack_columns<parts, false, Unseen>(slope + p * PW, LANES, n, PW, slopes_of(p));
            });
            gather_on_tiles(id, block.count, n);
            return gather_odd(g, n, weight);
        }
        long at = id * sh.lanes;
        auto gather = [&](int keys, long lane, long count) {
            columns(keys, count, score + lane, LANES, 1, sh.grad + at * sh.v_dim + lane * PW, sh.lanes,
                    sh.v_dim, d_value, KEYS);
            columns(keys, count, slope + lane, LANES, 1, sh.query + at * sh.dim + lane * PW, sh.lanes,
                    sh.dim, d_key, KEYS);
        };
        if (least_seen == n) gather(n, 0, block.count);
        for (int p = 0; p < block.panels; p++) {
            if (least_seen < n) gather(seen[p], p * PW, block.panel_rows(p));
            product<true>(c.dim, seen[p], finite_key.data, 1, finite_key.ld, slope + p * PW, LANES,
                          d_query_of(id, p), PW);
        }
        gather_odd(g, n, weight);
    }

    // What gradients that are not finite give the values of the keys that their rows see.
    template <class Weight>
    void gather_odd(const float* g, int n, Weight weight) {
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
    float weight_on_tiles(int j, int lane) const {  // the first part
        const uint16_t* tile = weight_tiles.at(j / SIDE, lane / PW);
        return from_brain(tile[j % SIDE * DEPTH + 2 * (lane % W) + lane % PW / W]);
    }

    // On tiles, scores and slopes of what is not finite: of the n keys from `from` on.
    template <int NV>
    void odd_pairs(long id, int p, int from, int n, float* s, float* ds, long ld) const {
        const float* q = sh.query_lanes + (id * sh.lanes + p * PW) * c.dim;
        const float* g = sh.grad_lanes + (id * sh.lanes + p * PW) * c.v_dim;
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
    Tiles slopes_of(int p) const {
        return {slope_columns.data + p * PW * KEYS * sh.parts, PW / SIDE, PW * KEYS};
    }

    // C (rows × dim) += A (rows × depth) B (depth × dim), B and C in panels.
    static void columns(long rows, long depth, const float* a, long rs, long ks, const float* b,
                        long b_rows, long dim, float* to, long to_rows) {
        for (long p = 0; p < dim / PW; p++)
            product<true>(rows, depth, a, rs, ks, b + p * b_rows * PW, PW, to + p * to_rows * PW, PW);
    }

    // Pairs that are wholly on tiles (backward_tiles.h)
    void gather_on_tiles(long id, int count, int n);
    template <int NV>
    void tile_panel(long id, int p, int n, bool every);
    template <int parts, int NV, bool dropping>
    void slopes_on(int p, int from, int bites, float by);

    // Weights and slopes of one panel, as [key][lane].
    template <int NV>
    void panel(long id, int p, Rows k, Rows v, const float* q, const float* g, int n, bool every) {
        float *s = score + p * PW, *ds = slope + p * PW;
        bool whole = c.query.type == F16;
        if (scores_on_tiles)
            tile_product<false, NV>(sh.parts, whole, n, c.dim, key_tiles,
                                    sh.lane_tiles(sh.query_tiles, id, sh.dim, p), s, LANES);
        else
            product<false, NV>(n, c.dim, k.data, k.ld, 1, q + p * c.dim * PW, PW, s, LANES);
        if (slopes_on_tiles)
            tile_product<false, NV>(sh.parts, whole, n, c.v_dim, value_tiles,
                                    sh.lane_tiles(sh.grad_tiles, id, sh.v_dim, p), ds, LANES);
        else
            product<false, NV>(n, c.v_dim, v.data, v.ld, 1, g + p * c.v_dim * PW, PW, ds, LANES);
        if (careful)
            odd_pairs<NV>(id, p, 0, n, scores_on_tiles ? s : nullptr, slopes_on_tiles ? ds : nullptr,
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
