// Effect: of each row, the k edges whose removal would change a differentiated scalar most. One pass
// over the tiles, with the weights p from the forward's stats and dp = grad · v beside them.
#pragma once
#include "matmul.h"
#include "plan.h"

namespace regard::LEVEL {

struct SharedEffect {
    RegardCall call;
    RegardEffect effect;
    Plan plan;
    Shaping shaping;
    Queue* queue;
};

class EffectPass {
  public:
    explicit EffectPass(SharedEffect& shared)
        : sh(shared), c(shared.call), e(shared.effect), shaping(shared.shaping) {
        static thread_local Arena arena;
        ready = laid_out(arena, [&](Cutter& cut) { lay_out(cut); });
    }

    void run() {
        for (long item; ready && sh.queue->take(item);) {
            long index = sh.plan.blocks - 1 - item % sh.plan.blocks;
            Block block = sh.plan.block(c, item / sh.plan.blocks, index);
            start(block);
            for (long k0 = 0; k0 < c.k_len; k0 += KEYS) {
                int n = (int)least(KEYS, c.k_len - k0);
                Answer a = shaping.classify(block, k0, k0 + n);
                if (a.some) tile(block, k0, n, a.every);
            }
            write(block);
        }
    }

  private:
    SharedEffect& sh;
    bool ready = false;
    const RegardCall& c;
    const RegardEffect& e;
    const Shaping& shaping;
    float *query, *grad, *line, *key, *value, *score, *slope, *biases, *factors;
    float *top, *inverse, *delta;
    float *size, *signed_size, *weight;  // [k][lane], the largest first
    int32_t* index;
    uint64_t *visible, *stack;

    void lay_out(Cutter& cut) {
        query = cut.cut(LANES * c.dim);
        grad = cut.cut(LANES * c.v_dim);
        line = cut.cut(W * most(c.dim, c.v_dim));
        key = cut.cut(KEYS * c.dim);
        value = cut.cut(KEYS * c.v_dim);
        score = cut.cut(KEYS * PW);
        slope = cut.cut(KEYS * PW);
        biases = cut.cut(KEYS * LANES);
        factors = cut.cut(c.dropout ? KEYS * LANES : 0);
        top = cut.cut(LANES);
        inverse = cut.cut(LANES);
        delta = cut.cut(LANES);
        size = cut.cut(e.k * LANES);
        signed_size = cut.cut(e.k * LANES);
        weight = cut.cut(e.k * LANES);
        index = (int32_t*)cut.cut(e.k * LANES);
        visible = (uint64_t*)cut.cut(2 * KEYS);
        stack = (uint64_t*)cut.cut(2 * Shaping::words(c));
    }

    long row_of(const Segment& s) const { return (s.b * c.heads + s.h) * c.q_len + s.q0; }

    void start(const Block& block) {
        turn_rows(c.query, block, c.dim, shaping.query_scale(), line, query);
        turn_rows(e.grad_out, block, c.v_dim, 1, line, grad);
        for (int i = 0; i < LANES; i++) top[i] = inverse[i] = delta[i] = 0;
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            for (int r = 0; r < s.count; r++) {
                const float* stats = e.stats + 2 * (row_of(s) + r);
                top[s.lane + r] = stats[0];
                inverse[s.lane + r] = stats[1] == 0 ? 0 : 1 / stats[1];
                delta[s.lane + r] = e.delta[row_of(s) + r];
            }
        }
        for (long i = 0; i < e.k * LANES; i++) {
            size[i] = -INFINITY;
            signed_size[i] = weight[i] = 0;
            index[i] = -1;
        }
    }

    void tile(const Block& block, long k0, int n, bool every) {
        const Segment& first = block.segment[0];
        long kv = first.h / sh.plan.group;
        if (!every) shaping.look(block, k0, n, visible, stack);
        if (shaping.biased) shaping.bias(block, k0, n, biases);
        if (c.dropout) shaping.dropout(block, k0, n, factors);
        Rows k = rows_of(c.key, c.pages, first.b, kv, k0, n, c.dim, key);
        Rows v = rows_of(c.value, c.pages, first.b, kv, k0, n, c.v_dim, value);
        for (int p = 0; p < block.panels; p++) {
            product<false>(n, c.dim, k.data, k.ld, 1, query + p * c.dim * PW, PW, score, PW);
            product<false>(n, c.v_dim, v.data, v.ld, 1, grad + p * c.v_dim * PW, PW, slope, PW);
            if (!every || shaping.shaped())
                shaping.finish<2>(p, n, score, PW, every ? nullptr : visible,
                                  shaping.biased ? biases : nullptr);
            for (int i = 0; i < 2; i++) rank(p * PW + i * W, i * W, k0, n);
        }
    }

    // Removing key j leaves the other weights p / (1 − pⱼ): the scalar changes by
    // −pⱼ (dpⱼ − D) / (1 − pⱼ); of the only key of a row, by −D.
    void rank(int lane, int at, long k0, int n) {
        V high = load(top + lane), by = load(inverse + lane), here = load(delta + lane);
        V last = load(size + (e.k - 1) * LANES + lane);
        for (int j = 0; j < n; j++) {
            V s = load(score + j * PW + at), dp = load(slope + j * PW + at);
            if (c.dropout) dp *= load(factors + j * LANES + lane);
            V p = exp(s - high) * by;
            // A row's sum of 1 is that of one key; here its score may be a rounding off (few.h)
            V left = ((by == 1.f) & (p > .5f)) ? V{} : 1.f - p;
            V change = left > 0.f ? p * (here - dp) / left : -here;
            V large = change < 0.f ? -change : change;
            I shown = (s > -INFINITY) | (s != s);
            large = shown ? large : all(-INFINITY);
            if (!any(~(large <= last))) continue;
            insert(lane, large, change, p, (int32_t)(k0 + j));
            last = load(size + (e.k - 1) * LANES + lane);
        }
    }

    void insert(int lane, V large, V change, V p, int32_t key_index) {
        I id = I{} + key_index;
        for (long t = 0; t < e.k; t++) {
            long at = t * LANES + lane;
            V held = load(size + at), held_change = load(signed_size + at), held_p = load(weight + at);
            I held_id = (I)load((float*)index + at), behind = large <= held;
            store(size + at, behind ? held : large);
            store(signed_size + at, behind ? held_change : change);
            store(weight + at, behind ? held_p : p);
            store((float*)index + at, (V)(behind ? held_id : id));
            large = behind ? large : held;
            change = behind ? change : held_change;
            p = behind ? p : held_p;
            id = behind ? id : held_id;
        }
    }

    void write(const Block& block) {
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            for (int r = 0; r < s.count; r++)
                for (long t = 0; t < e.k; t++) {
                    long from = t * LANES + s.lane + r, to = (row_of(s) + r) * e.k + t;
                    e.index[to] = index[from] < 0 ? -1 : index[from] + (int32_t)c.key_start;
                    e.effect[to] = signed_size[from];
                    e.weight[to] = weight[from];
                }
        }
    }
};

static void work_effect(void* shared) { EffectPass(*(SharedEffect*)shared).run(); }

static int effect(const RegardCall& call, const RegardEffect& wanted) {
    SharedEffect sh{call, wanted, Plan(call, nullptr), Shaping(call), nullptr};
    Queue queue(sh.plan.owners * sh.plan.blocks);
    sh.queue = &queue;
    run_team(least(call.threads, queue.count), work_effect, &sh);
    return queue.empty() ? 0 : 1;
}

}  // namespace regard::LEVEL
