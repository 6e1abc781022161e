// What keys receive under a log-sum-exp that is given: of each key the sum over queries of
// exp(score − lse), and how many queries see it.
//
// Nothing of a row is looked for, so an item of work owns keys, not queries, and alone writes what these
// get: beside the call it holds a block of queries and its own keys, whatever the call's lengths. A key's
// sum goes over the blocks of queries in their order, whatever the threads, or the keys beside it.
#pragma once
#include "matmul.h"
#include "plan.h"

namespace regard::LEVEL {

constexpr long MOST_TILES = 8;  // of keys, that share a block of queries made ready

struct SharedColumns {
    RegardCall call;
    RegardColumns columns;
    Shaping shaping;
    long tiles, items;  // tiles of keys of one item; items of one head
    Queue* queue;
};

class ColumnSums {
  public:
    explicit ColumnSums(SharedColumns& shared)
        : sh(shared), c(shared.call), to(shared.columns.received), shaping(shared.shaping) {
        static thread_local Arena arena;
        ready = laid_out(arena, [&](Cutter& cut) { lay_out(cut); });
    }

    void run() {
        // Earlier keys are seen by more queries under a causal mask: longest first
        long heads = c.batch * c.heads;
        for (long item; ready && sh.queue->take(item);) keys_of(item % heads, item / heads);
    }

  private:
    SharedColumns& sh;
    bool ready = false;
    const RegardCall& c;
    const RegardReceived& to;
    const Shaping& shaping;
    float *query, *line, *key, *score, *biases, *shift, *total;
    double* sum;      // of the item's keys
    int32_t* count;   // likewise
    uint64_t *visible, *stack;
    bool careful;     // of the block at hand: its lanes are not all rows whose lse is a number

    void lay_out(Cutter& cut) {
        query = cut.cut(LANES * c.dim);
        line = cut.cut(W * c.dim);
        key = cut.cut(sh.tiles * KEYS * c.dim);
        score = cut.cut(KEYS * PW);
        biases = cut.cut(KEYS * LANES);
        shift = cut.cut(LANES);
        total = cut.cut(KEYS);
        sum = (double*)cut.cut(2 * sh.tiles * KEYS);
        count = (int32_t*)cut.cut(sh.tiles * KEYS);
        visible = (uint64_t*)cut.cut(2 * KEYS);
        stack = (uint64_t*)cut.cut(2 * Shaping::words(c));
    }

    void keys_of(long owner, long index) {
        long b = owner / c.heads, h = owner % c.heads, first = index * sh.tiles * KEYS;
        long n = least(sh.tiles * KEYS, c.k_len - first);
        long there = c.pages.table ? c.pages.lengths[b] : c.k_len;  // keys that the item has
        long end = least(first + n, there);
        for (long j = 0; j < n; j++) sum[j] = 0, count[j] = 0;
        Rows rows[MOST_TILES];
        for (long k0 = first, t = 0; k0 < end; k0 += KEYS, t++)
            rows[t] = rows_of(c.key, c.pages, b, h / (c.heads / c.kv_heads), k0,
                              (int)least(KEYS, end - k0), c.dim, key + t * KEYS * c.dim);
        for (long q0 = to.first; first < end && q0 < to.last; q0 += LANES) {
            Block block;
            block.count = (int)least(LANES, to.last - q0);
            block.segment[0] = {b, h, q0, block.count, 0};
            block.segments = 1;
            block.panels = (block.count + PW - 1) / PW;
            Answer several = shaping.classify(block, first, end);
            if (!several.some) continue;
            turn_rows(c.query, block, c.dim, shaping.query_scale(), line, query);
            careful = find_shift(c, sh.columns.lse, block, shift) || block.count % PW;
            for (long k0 = first, t = 0; k0 < end; k0 += KEYS, t++) {
                int some = (int)least(KEYS, end - k0);
                Answer a = several.every ? several : shaping.classify(block, k0, k0 + some);
                if (a.some) tile(block, rows[t], k0, some, a.every, k0 - first);
            }
        }
        long at = (b * c.heads + h) * c.k_len + first;
        for (long j = 0; j < n; j++) to.sum[at + j] = (float)sum[j];
        if (to.count) memcpy(to.count + at, count, n * sizeof *count);
    }

    // at: of its first key in the item.
    void tile(const Block& block, const Rows& rows, long k0, int n, bool every, long at) {
        if (!every) shaping.look(block, k0, n, visible, stack);
        if (shaping.biased) shaping.bias(block, k0, n, biases);
        memset(total, 0, KEYS * sizeof(float));
        for (int p = 0; p < block.panels; p++) {
            product<false>(n, c.dim, rows.data, rows.ld, 1, query + p * c.dim * PW, PW, score, PW);
            if (!every || shaping.shaped())
                shaping.finish<2>(p, n, score, PW, every ? nullptr : visible,
                                  shaping.biased ? biases : nullptr);
            careful ? add_up<true>(p, n, block.count) : add_up<false>(p, n, block.count);
        }
        uint64_t mine = first_bits(block.count);
        for (int j = 0; j < n; j++) {
            sum[at + j] += total[j];
            count[at + j] += every ? block.count : __builtin_popcountll(visible[j] & mine);
        }
    }

    // total[j] += what the lanes of a panel give key j.
    template <bool careful>
    void add_up(int p, int n, int rows) {
        NoDenormals flush;
        V less[2] = {load(shift + p * PW), load(shift + p * PW + W)}, unit = all(UNIT);
        uint64_t held = first_bits(rows) >> p * PW;
        I mine[2] = {lanes_of(held), lanes_of(held >> W)};
        for (int j = 0; j < n; j += W) {
            V part[W];
            // Past the last key lies scratch, whose sums are not kept
            #pragma GCC unroll 16
            for (int i = 0; i < W; i++) {
                part[i] = V{};
                #pragma GCC unroll 2
                for (int v = 0; v < 2; v++) {
                    V s = load(score + (j + i) * PW + v * W), e = power(s * unit - less[v]);
                    if (careful) e = mine[v] & (s != -INFINITY) ? e : V{};
                    part[i] += e;
                }
            }
            store(total + j, load(total + j) + sums(part));
        }
    }
};

static void work_columns(void* shared) { ColumnSums(*(SharedColumns*)shared).run(); }

// 0, or 1: out of memory.
static int columns(const RegardCall& call, const RegardColumns& wanted) {
    SharedColumns sh{call, wanted, {}, 0, 0, nullptr};
    sh.call.v_dim = 0;  // values are not read
    sh.shaping = Shaping(sh.call);
    long tiles = (call.k_len + KEYS - 1) / KEYS, heads = call.batch * call.heads;
    sh.tiles = most(1, least(MOST_TILES, tiles * heads / 64));  // work for many threads comes first
    sh.items = (tiles + sh.tiles - 1) / sh.tiles;
    Queue queue(heads * sh.items);
    sh.queue = &queue;
    run_team(least(call.threads, queue.count), work_columns, &sh);
    return queue.empty() ? 0 : 1;
}

}  // namespace regard::LEVEL
