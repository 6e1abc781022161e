// The backward: weights are recomputed from each row's largest score and sum (Dao et al. 2022,
// appendix B). The work is cut by keys: an item owns tiles of 128 keys, whose gradients it alone
// writes; the gradients of the queries are gathered in one buffer a stripe and added in order, so the
// bits depend neither on threads nor on the rest of the batch.
#pragma once
#include "matmul.h"
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
    float* d_query;              // [stripe][block] panels of its rows
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

// Copies one block's queries and gradients: as rows, and as lanes.
static void pack_blocks(void* data) {
    SharedBackward& sh = *(SharedBackward*)data;
    const RegardCall& c = sh.call;
    long widest = most(c.dim, c.v_dim);
    static thread_local Arena arena;
    float *line = arena.take(W * widest + LANES * widest + 16), *rows = line + W * widest;
    if (!line) return;
    for (long item; sh.queue->take(item);) {
        Block block = sh.plan.block(c, item / sh.plan.blocks, item % sh.plan.blocks);
        float *query_lanes = sh.query_lanes + item * sh.lanes * c.dim;
        float *grad_lanes = sh.grad_lanes + item * sh.lanes * c.v_dim;
        turn_rows(c.query, block, c.dim, sh.after_of(block) != 1.f ? 1.f : sh.shaping.query_scale(),
                  line, query_lanes);
        turn_rows(sh.back.grad_out, block, c.v_dim, 1, line, grad_lanes);
        auto panels = [&](const RegardView& view, long dim, long wide, float* to) {
            for (int i = 0; i < block.segments; i++) {
                const Segment& s = block.segment[i];
                for (int r = 0; r < s.count; r++)
                    widen(view.type, address(view, s.b, s.h, s.q0 + r), view.stride[3], dim,
                          rows + (s.lane + r) * dim);
            }
            to_panels(rows, dim, block.count, dim, to + item * sh.lanes * wide, sh.lanes);
        };
        panels(c.query, c.dim, sh.dim, sh.query);
        panels(sh.back.grad_out, c.v_dim, sh.v_dim, sh.grad);
        if (sh.parts)
            with_parts(sh.parts, [&](auto of) {
                constexpr int parts = of.count;
                float* fits = sh.fits + 3 * item;
                fits[0] = fits[1] = fits[2] = 1;
                auto pack = [&](const float* x, long depth, Tiles to, float& fit) {
                    if (!pack_columns<parts, false>(x, PW, depth, PW, to)) fit = 0;
                };
                const float* query = sh.query + item * sh.lanes * sh.dim;
                const float* grad = sh.grad + item * sh.lanes * sh.v_dim;
                for (int p = 0; p < block.panels; p++) {
                    pack(query_lanes + p * PW * c.dim, c.dim,
                         sh.lane_tiles(sh.query_tiles, item, sh.dim, p), fits[0]);
                    pack(grad_lanes + p * PW * c.v_dim, c.v_dim,
                         sh.lane_tiles(sh.grad_tiles, item, sh.v_dim, p), fits[1]);
                }
                for (long p = 0; p < sh.dim / PW; p++)
                    pack(query + p * sh.lanes * PW, block.count,
                         sh.row_tiles(sh.query_row_tiles, item, sh.dim, p), fits[2]);
                for (long p = 0; p < sh.v_dim / PW; p++)
                    pack(grad + p * sh.lanes * PW, block.count,
                         sh.row_tiles(sh.grad_row_tiles, item, sh.v_dim, p), fits[2]);
            });
        for (long s = 0; s < sh.stripes; s++)
            memset(sh.d_query + (s * sh.blocks + item) * sh.lanes * sh.dim, 0,
                   sh.lanes * sh.dim * sizeof(float));
    }
}

class Backward {
  public:
    explicit Backward(SharedBackward& shared)
        : sh(shared), c(shared.call), back(shared.back), shaping(shared.shaping) {
        static thread_local Arena arena;
        Cutter measure{nullptr}, cut{nullptr};
        lay_out(measure);
        cut.data = arena.take(measure.used);
        ready = cut.data != nullptr;
        lay_out(cut);
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
    float *key, *value, *key_panels, *d_key, *d_value, *score, *slope, *capped, *biases, *factors;
    float *top, *inverse, *delta;
    uint64_t *visible, *stack;
    Tiles key_tiles, value_tiles;   // of the keys, depth their dim
    Tiles key_row_tiles;            // [panel of dims] of the dims, depth the keys
    Tiles weight_tiles, slope_tiles;  // of the keys, depth the lanes
    Tiles slope_turned;             // of the lanes, depth the keys
    bool key_fits, value_fits;      // whether the keys at hand may be parts
    bool scores_on_tiles, slopes_on_tiles;  // of the pair at hand; as the forward had it
    float after;                    // by which its scores are multiplied yet

    void lay_out(Cutter& cut) {
        key = cut.cut(KEYS * c.dim);
        value = cut.cut(KEYS * c.v_dim);
        key_panels = cut.cut(KEYS * sh.dim);
        d_key = cut.cut(KEYS * sh.dim);
        d_value = cut.cut(KEYS * sh.v_dim);
        score = cut.cut(KEYS * LANES);   // then the weights, dropped out
        slope = cut.cut(KEYS * LANES);   // d(loss) / d(weight), then / d(score)
        capped = cut.cut(c.softcap ? KEYS * LANES : 0);
        biases = cut.cut(KEYS * LANES);
        factors = cut.cut(c.dropout ? KEYS * LANES : 0);
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
        key_row_tiles = cut_tiles(KEYS, sh.dim);
        weight_tiles = cut_tiles(KEYS, LANES);
        slope_tiles = cut_tiles(KEYS, LANES);
        slope_turned = cut_tiles(LANES, KEYS);
    }

    // The gradients of one tile of keys, from all rows that see it.
    void keys_of(long owner, long k0) {
        long b = owner / c.kv_heads, kv = owner % c.kv_heads, group = sh.plan.group;
        int n = (int)least(KEYS, c.k_len - k0);
        Rows k = rows_of(c.key, c.pages, b, kv, k0, n, c.dim, key);
        Rows v = rows_of(c.value, c.pages, b, kv, k0, n, c.v_dim, value);
        to_panels(k.data, k.ld, n, c.dim, key_panels, KEYS);
        if (sh.parts)
            with_parts(sh.parts, [&](auto of) {
                constexpr int parts = of.count;
                key_fits = pack_rows<parts>(k.data, k.ld, n, c.dim, key_tiles);
                value_fits = pack_rows<parts>(v.data, v.ld, n, c.v_dim, value_tiles);
                for (long p = 0; p < sh.dim / PW; p++)
                    pack_columns<parts, false, Unseen>(key_panels + p * KEYS * PW, PW, n, PW,
                                                       key_rows(p));
            });
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
        for (int j = 0; j < n; j++) {
            long row = owner * c.k_len + k0 + j;
            for (long d = 0; d < c.dim; d++)
                back.d_key[row * c.dim + d] = d_key[(d / PW * KEYS + j) * PW + d % PW] * (float)c.scale;
            for (long d = 0; d < c.v_dim; d++)
                back.d_value[row * c.v_dim + d] = d_value[(d / PW * KEYS + j) * PW + d % PW];
        }
    }

    // One block of rows against one tile of keys.
    void pair(const Block& block, long id, Rows k, Rows v, long k0, int n, bool every) {
        if (!every) shaping.look(block, k0, n, visible, stack);
        if (shaping.biased) shaping.bias(block, k0, n, biases);
        if (c.dropout) shaping.dropout(block, k0, n, factors);
        long row = sh.first_row(block);
        for (int i = 0; i < LANES; i++) {
            bool there = i < block.count;
            float total = there ? back.stats[2 * (row + i) + 1] : 0;
            top[i] = there ? back.stats[2 * (row + i)] : 0;
            inverse[i] = total == 0 ? 0 : 1 / total;
            delta[i] = there ? back.delta[row + i] : 0;
        }
        const float* q = sh.query_lanes + id * sh.lanes * c.dim;
        const float* g = sh.grad_lanes + id * sh.lanes * c.v_dim;
        const float* fits = sh.fits + 3 * id;
        scores_on_tiles = sh.served(block) && key_fits && fits[0] != 0;
        slopes_on_tiles = sh.served(block) && value_fits && fits[1] != 0;
        after = sh.after_of(block);
        for (int p = 0; p < block.panels; p++) {
            if (block.panel_rows(p) > W)
                panel<2>(id, p, k, v, q, g, n, every);
            else
                panel<1>(id, p, k, v, q, g, n, every);
        }
        if (shaping.biased) gather_biases(block, k0, n);
        if (c.softcap)
            for (long i = 0; i < (long)n * LANES; i++) slope[i] *= 1 - capped[i] * capped[i];
        if (scores_on_tiles && slopes_on_tiles && fits[2] != 0)
            return gather_on_tiles(id, block.count, n);
        long at = id * sh.lanes;
        columns(n, block.count, score, LANES, 1, sh.grad + at * sh.v_dim, sh.lanes, sh.v_dim, d_value,
                KEYS);
        columns(n, block.count, slope, LANES, 1, sh.query + at * sh.dim, sh.lanes, sh.dim, d_key, KEYS);
        columns(block.count, n, slope, 1, LANES, key_panels, KEYS, sh.dim,
                sh.d_query + (stripe * sh.blocks * sh.lanes + at) * sh.dim, sh.lanes);
    }

    // C (rows × dim) += A (rows × depth) B (depth × dim), B and C in panels.
    static void columns(long rows, long depth, const float* a, long rs, long ks, const float* b,
                        long b_rows, long dim, float* to, long to_rows) {
        for (long p = 0; p < dim / PW; p++)
            product<true>(rows, depth, a, rs, ks, b + p * b_rows * PW, PW, to + p * to_rows * PW, PW);
    }

    // What one pair adds to the gradients: the same three products.
    void gather_on_tiles(long id, int count, int n) {
        with_parts(sh.parts, [&](auto of) {
            constexpr int parts = of.count;
            pack_rows<parts, Unseen>(score, LANES, n, count, weight_tiles);
            pack_rows<parts, Unseen>(slope, LANES, n, count, slope_tiles);
            pack_columns<parts, true, Unseen>(slope, LANES, n, count, slope_turned);
        });
        for (long p = 0; p < sh.v_dim / PW; p++)
            tile_product<true>(sh.parts, false, n, count, weight_tiles,
                               sh.row_tiles(sh.grad_row_tiles, id, sh.v_dim, p),
                               d_value + p * KEYS * PW, PW);
        float* d_query = sh.d_query + (stripe * sh.blocks + id) * sh.lanes * sh.dim;
        for (long p = 0; p < sh.dim / PW; p++) {
            tile_product<true>(sh.parts, false, n, count, slope_tiles,
                               sh.row_tiles(sh.query_row_tiles, id, sh.dim, p),
                               d_key + p * KEYS * PW, PW);
            tile_product<true>(sh.parts, false, count, n, slope_turned, key_rows(p),
                               d_query + p * sh.lanes * PW, PW);
        }
    }
    Tiles key_rows(long p) const {
        return {key_row_tiles.data + p * PW * KEYS * sh.parts, PW / SIDE, PW * KEYS};
    }

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
        if (after != 1.f) multiply<NV>(n, s, LANES, after);
        if (!every || shaping.shaped())
            shaping.finish<NV>(p, n, s, LANES, every ? nullptr : visible,
                               shaping.biased ? biases : nullptr, c.softcap ? capped + p * PW : nullptr);
        #pragma GCC unroll 2
        for (int i = 0; i < NV; i++) {
            V high = load(top + p * PW + i * W), by = load(inverse + p * PW + i * W);
            V less = load(delta + p * PW + i * W);
            for (int j = 0; j < n; j++) {
                long at = j * LANES + i * W;
                V w = exp(load(s + at) - high) * by, dw = load(ds + at), dropped = w;
                if (c.dropout) {
                    V f = load(factors + at + p * PW);
                    dropped = w * f;
                    dw *= f;
                }
                store(s + at, dropped);
                store(ds + at, w * (dw - less));
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

static void work_backward(void* shared) { Backward(*(SharedBackward*)shared).run(); }

// Adds the stripes' gradients of one block after another.
static void sum_rows(void* data) {
    SharedBackward& sh = *(SharedBackward*)data;
    const RegardCall& c = sh.call;
    for (long item; sh.queue->take(item);) {
        Block block = sh.plan.block(c, item / sh.plan.blocks, item % sh.plan.blocks);
        float* to = sh.back.d_query + sh.first_row(block) * c.dim;
        V by = all((float)c.scale);
        for (long d = 0; d < c.dim; d += W)
            for (int r = 0; r < block.count; r++) {
                V total = {};
                for (long s = 0; s < sh.stripes; s++)
                    total += load(sh.d_query + (s * sh.blocks + item) * sh.lanes * sh.dim +
                                  (d / PW * sh.lanes + r) * PW + d % PW);
                total *= by;
                memcpy(to + r * c.dim + d, &total, least(W, c.dim - d) * sizeof(float));
            }
    }
}

// 0, or 1: out of memory.
static int backward(const RegardCall& call, const RegardBackward& back) {
    SharedBackward sh{};
    sh.call = call;
    sh.back = back;
    const RegardCall& c = sh.call;
    sh.plan = Plan(c, nullptr);
    sh.shaping = Shaping(c);
    sh.dim = padded(c.dim);
    sh.v_dim = padded(c.v_dim);
    sh.tiles = (c.k_len + KEYS - 1) / KEYS;
    sh.stripes = least(sh.tiles, most(1, 16 / c.kv_heads));
    sh.lanes = sh.plan.block(c, 0, 0).lanes();
    for (long d = 0; d < c.bias_count; d++) {
        const RegardView& view = back.d_bias[d];
        if (!view.data) continue;
        if (!view.stride[3]) sh.bias_floats += back.bias_floats[d];
        bool by_item = c.batch == 1 || view.stride[0], by_head = c.heads == 1 || view.stride[1];
        sh.together |= !by_item || !by_head;
    }
    sh.blocks = sh.plan.owners * sh.plan.blocks;
    sh.tile_rule = KeyTiles(c);
    if (sh.tile_rule.serve(sh.plan, sh.plan.block(c, 0, 0))) sh.parts = sh.tile_rule.parts;
    size_t lanes = (size_t)sh.blocks * sh.lanes;
    size_t counts[] = {
        lanes * sh.dim, lanes * sh.v_dim, lanes * c.dim, lanes * c.v_dim, lanes * sh.dim * sh.stripes,
        (size_t)(back.d_by_offset ? sh.stripes * c.batch * c.heads * sh.offsets() : 0),
        (size_t)(sh.stripes * sh.bias_floats),
        sh.parts * lanes * sh.dim / 2, sh.parts * lanes * sh.v_dim / 2,
        sh.parts * lanes * sh.dim / 2, sh.parts * lanes * sh.v_dim / 2,
        (size_t)(sh.parts ? 3 * sh.blocks : 0),
    };
    float** parts[] = {&sh.query, &sh.grad, &sh.query_lanes, &sh.grad_lanes, &sh.d_query,
                       &sh.d_by_offset, &sh.d_bias, (float**)&sh.query_tiles, (float**)&sh.grad_tiles,
                       (float**)&sh.query_row_tiles, (float**)&sh.grad_row_tiles, &sh.fits};
    constexpr int count = sizeof parts / sizeof *parts;
    static thread_local Arena arena;
    Cutter measure{nullptr}, cut{nullptr};
    for (int i = 0; i < count; i++) measure.cut(counts[i]);
    cut.data = arena.take(measure.used + 16);
    if (!cut.data) return 1;
    for (int i = 0; i < count; i++) *parts[i] = cut.cut(counts[i]);
    memset(sh.d_by_offset, 0, counts[5] * sizeof(float));
    memset(sh.d_bias, 0, counts[6] * sizeof(float));

    bool done = true;
    auto run = [&](long items, void (*work)(void*)) {
        Queue queue(items);
        sh.queue = &queue;
        run_team(least(c.threads, items), work, &sh);
        done &= queue.empty();
    };
    run(sh.blocks, pack_blocks);
    run((sh.together ? 1 : c.batch * c.kv_heads) * sh.stripes, work_backward);
    run(sh.blocks, sum_rows);
    if (back.d_by_offset)
        for (long s = 0; s < sh.stripes; s++)
            for (long b = 0; b < c.batch; b++)
                for (long i = 0; i < c.heads * sh.offsets(); i++)
                    back.d_by_offset[i] +=
                        sh.d_by_offset[(s * c.batch + b) * c.heads * sh.offsets() + i];
    for (long s = 0; s < sh.stripes; s++) {
        const float* from = sh.d_bias + s * sh.bias_floats;
        for (long d = 0; d < c.bias_count; d++) {
            if (!back.d_bias[d].data || back.d_bias[d].stride[3]) continue;
            for (long i = 0; i < back.bias_floats[d]; i++) ((float*)back.d_bias[d].data)[i] += from[i];
            from += back.bias_floats[d];
        }
    }
    arena.trim();
    return done ? 0 : 1;
}

}  // namespace regard::LEVEL
