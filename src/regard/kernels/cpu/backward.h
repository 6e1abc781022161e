// The backward: weights are recomputed from each row's largest score and sum (Dao et al. 2022,
// appendix B). The work is cut by keys: an item owns tiles of 128 keys, whose gradients it alone
// writes; the gradients of the queries are gathered in one buffer a stripe and added in order, so the
// bits depend neither on threads nor on the rest of the batch.
#pragma once
#include "matmul.h"
#include "plan.h"

namespace regard::LEVEL {

INLINE long padded(long dim) { return (dim + W - 1) / W * W; }

// What the items of one backward share.
struct SharedBackward {
    RegardCall call;
    RegardBackward back;
    Plan plan;
    Shaping shaping;
    Queue* queue;
    long dim, v_dim;             // padded to whole vectors
    long tiles, stripes;         // of keys, and into how many they are dealt
    bool together;               // one item sees the whole batch: a shared bias needs its gradient
    long lanes;                  // of a block, at most
    float *query, *grad;         // [row][padded dim] of all rows
    float *query_lanes, *grad_lanes;  // [block][panel][dim][PW]
    float* d_query;              // [stripe][row][padded dim]
    float* d_by_offset;          // [stripe][item of the batch][head][q_len + k_len − 1]
    float* d_bias;               // [stripe] of those dense biases that all keys share
    long bias_floats;

    long rows() const { return call.batch * call.heads * call.q_len; }
    long offsets() const { return call.q_len + call.k_len - 1; }
    long first_row(const Block& b) const {
        return (b.segment[0].b * call.heads + b.segment[0].h) * call.q_len + b.segment[0].q0;
    }
};

// Copies one block's queries and gradients: as rows, and as lanes.
static void pack_blocks(void* data) {
    SharedBackward& sh = *(SharedBackward*)data;
    const RegardCall& c = sh.call;
    static thread_local Arena arena;
    float* line = arena.take(W * most(c.dim, c.v_dim) + 16);
    for (long item; sh.queue->take(item);) {
        Block block = sh.plan.block(c, item / sh.plan.blocks, item % sh.plan.blocks);
        turn_rows(c.query, block, c.dim, sh.shaping.query_scale(), line,
                  sh.query_lanes + item * sh.lanes * c.dim);
        turn_rows(sh.back.grad_out, block, c.v_dim, 1, line,
                  sh.grad_lanes + item * sh.lanes * c.v_dim);
        long row = sh.first_row(block);
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            for (int r = 0; r < s.count; r++, row++) {
                widen(c.query.type, address(c.query, s.b, s.h, s.q0 + r), c.query.stride[3], c.dim,
                      sh.query + row * sh.dim);
                widen(sh.back.grad_out.type, address(sh.back.grad_out, s.b, s.h, s.q0 + r),
                      sh.back.grad_out.stride[3], c.v_dim, sh.grad + row * sh.v_dim);
            }
        }
    }
}

class Backward {
  public:
    explicit Backward(SharedBackward& shared)
        : sh(shared), c(shared.call), back(shared.back), shaping(shared.shaping) {
        Cutter measure{nullptr};
        lay_out(measure);
        static thread_local Arena arena;
        Cutter cutter{arena.take(measure.used)};
        lay_out(cutter);
    }

    void run() {
        long owners = sh.together ? 1 : c.batch * c.kv_heads;
        for (long item; sh.queue->take(item);) {
            stripe = item % sh.stripes;
            for (long tile = stripe; tile < sh.tiles; tile += sh.stripes)
                for (long i = 0; i < c.batch * c.kv_heads / owners; i++)
                    keys_of(item / sh.stripes + i, tile * KEYS);
        }
    }

  private:
    SharedBackward& sh;
    const RegardCall& c;
    const RegardBackward& back;
    const Shaping& shaping;
    long stripe = 0;
    float *key, *value, *d_key, *d_value, *score, *weight, *slope, *capped, *biases, *factors;
    float *top, *inverse, *delta;
    uint64_t *visible, *stack;

    void lay_out(Cutter& cut) {
        key = cut.cut(KEYS * sh.dim);
        value = cut.cut(KEYS * sh.v_dim);
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
    }

    // Copies rows so that they are whole vectors; in place where they are already.
    Rows whole(const RegardView& view, long b, long h, long k0, int n, long dim, long ld, float* to) {
        if (dim == ld) return rows_of(view, c.pages, b, h, k0, n, dim, to);
        Rows rows = rows_of(view, c.pages, b, h, k0, n, dim, score);  // free until the scores come
        for (int i = 0; i < n; i++) {
            memcpy(to + i * ld, rows.data + i * rows.ld, dim * sizeof(float));
            memset(to + i * ld + dim, 0, (ld - dim) * sizeof(float));
        }
        return {to, ld};
    }

    // The gradients of one tile of keys, from all rows that see it.
    void keys_of(long owner, long k0) {
        long b = owner / c.kv_heads, kv = owner % c.kv_heads, group = sh.plan.group;
        int n = (int)least(KEYS, c.k_len - k0);
        Rows k = whole(c.key, b, kv, k0, n, c.dim, sh.dim, key);
        Rows v = whole(c.value, b, kv, k0, n, c.v_dim, sh.v_dim, value);
        memset(d_key, 0, n * sh.dim * sizeof(float));
        memset(d_value, 0, n * sh.v_dim * sizeof(float));
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
                back.d_key[row * c.dim + d] = d_key[j * sh.dim + d] * (float)c.scale;
            memcpy(back.d_value + row * c.v_dim, d_value + j * sh.v_dim, c.v_dim * sizeof(float));
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
        for (int p = 0; p < block.panels; p++) {
            if (block.panel_rows(p) > W)
                panel<2>(p, k, v, q, g, n, every);
            else
                panel<1>(p, k, v, q, g, n, every);
        }
        if (shaping.biased) gather_biases(block, k0, n);
        if (c.softcap)
            for (long i = 0; i < (long)n * LANES; i++) slope[i] *= 1 - capped[i] * capped[i];
        const float* rows = sh.query + row * sh.dim;
        columns(n, block.count, score, LANES, 1, sh.grad + row * sh.v_dim, sh.v_dim, sh.v_dim, d_value);
        columns(n, block.count, slope, LANES, 1, rows, sh.dim, sh.dim, d_key);
        columns(block.count, n, slope, 1, LANES, k.data, k.ld, sh.dim,
                sh.d_query + (stripe * sh.rows() + row) * sh.dim);
    }

    // C (rows × dim) += A (rows × depth) B (depth × dim), C's rows contiguous.
    static void columns(long rows, long depth, const float* a, long rs, long ks, const float* b,
                        long ldb, long dim, float* to) {
        long d = 0;
        for (; d + PW <= dim; d += PW) product<true, 2>(rows, depth, a, rs, ks, b + d, ldb, to + d, dim);
        if (d < dim) product<true, 1>(rows, depth, a, rs, ks, b + d, ldb, to + d, dim);
    }

    // Weights and slopes of one panel, as [key][lane].
    template <int NV>
    void panel(int p, Rows k, Rows v, const float* q, const float* g, int n, bool every) {
        float *s = score + p * PW, *ds = slope + p * PW;
        product<false, NV>(n, c.dim, k.data, k.ld, 1, q + p * c.dim * PW, PW, s, LANES);
        product<false, NV>(n, c.v_dim, v.data, v.ld, 1, g + p * c.v_dim * PW, PW, ds, LANES);
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

// Adds the stripes' gradients of one row after another.
static void sum_rows(void* data) {
    SharedBackward& sh = *(SharedBackward*)data;
    const RegardCall& c = sh.call;
    for (long item; sh.queue->take(item);) {
        long last = least((item + 1) * KEYS, sh.rows());
        for (long row = item * KEYS; row < last; row++)
            for (long d = 0; d < c.dim; d++) {
                float total = 0;
                for (long s = 0; s < sh.stripes; s++)
                    total += sh.d_query[(s * sh.rows() + row) * sh.dim + d];
                sh.back.d_query[row * c.dim + d] = total * (float)c.scale;
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
    sh.stripes = least(sh.tiles, most(1, 32 / c.kv_heads));
    sh.lanes = sh.plan.block(c, 0, 0).lanes();
    for (long d = 0; d < c.bias_count; d++) {
        const RegardView& view = back.d_bias[d];
        if (!view.data) continue;
        if (!view.stride[3]) sh.bias_floats += back.bias_floats[d];
        bool by_item = c.batch == 1 || view.stride[0], by_head = c.heads == 1 || view.stride[1];
        sh.together |= !by_item || !by_head;
    }
    long blocks = sh.plan.owners * sh.plan.blocks;
    size_t counts[] = {
        (size_t)(sh.rows() * sh.dim), (size_t)(sh.rows() * sh.v_dim),
        (size_t)(blocks * sh.lanes * c.dim), (size_t)(blocks * sh.lanes * c.v_dim),
        (size_t)(sh.stripes * sh.rows() * sh.dim),
        (size_t)(back.d_by_offset ? sh.stripes * c.batch * c.heads * sh.offsets() : 0),
        (size_t)(sh.stripes * sh.bias_floats),
    };
    size_t total = 0;
    for (size_t count : counts) total += (count + 15) / 16 * 16;
    float* all_of_it = (float*)calloc(total + 1, sizeof(float));
    if (!all_of_it) return 1;
    Cutter cut{all_of_it};
    float** parts[] = {&sh.query, &sh.grad, &sh.query_lanes, &sh.grad_lanes, &sh.d_query,
                       &sh.d_by_offset, &sh.d_bias};
    for (int i = 0; i < 7; i++) *parts[i] = cut.cut(counts[i]);

    auto run = [&](long items, void (*work)(void*)) {
        Queue queue(items);
        sh.queue = &queue;
        run_team(least(c.threads, items), work, &sh);
    };
    run(blocks, pack_blocks);
    run((sh.together ? 1 : c.batch * c.kv_heads) * sh.stripes, work_backward);
    run((sh.rows() + KEYS - 1) / KEYS, sum_rows);
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
    free(all_of_it);
    return 0;
}

}  // namespace regard::LEVEL
