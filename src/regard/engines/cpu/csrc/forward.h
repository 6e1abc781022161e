// The forward of a call: what its blocks share is laid out, keys and values are made ready once where
// many blocks read them, and a team of threads takes the blocks.
#pragma once
#include "forward_panel.h"
#include "forward_rows.h"
#include "forward_tiles.h"

namespace regard::LEVEL {

// Keys and values as float32, once for all, where many blocks would convert them again and again.
struct Packing {
    const RegardCall* call;
    float *key, *value;
    Queue* queue;

    static void work(void* data) {
        const Packing& p = *(Packing*)data;
        const RegardCall& c = *p.call;
        long tiles = (c.k_len + KEYS - 1) / KEYS;
        for (long item; p.queue->take(item);) {
            long k0 = item % tiles * KEYS, head = item / tiles;
            long b = head / c.kv_heads, h = head % c.kv_heads;
            long end = c.pages.table ? c.pages.lengths[b] : c.k_len;
            int n = (int)most(0, least(KEYS, end - k0));
            copy(c.key, c, b, h, k0, n, c.dim, p.key + (head * c.k_len + k0) * c.dim);
            copy(c.value, c, b, h, k0, n, c.v_dim, p.value + (head * c.k_len + k0) * c.v_dim);
        }
    }
    static void copy(const RegardView& v, const RegardCall& c, long b, long h, long k0, int n,
                     long dim, float* to) {
        Rows rows = rows_of(v, c.pages, b, h, k0, n, dim, to);
        if (rows.data == to) return;
        for (int i = 0; i < n; i++) memcpy(to + i * dim, rows.data + i * rows.ld, dim * 4);
    }
};

// Keys and values as tiles, likewise.
static void pack_keys(void* shared) {
    Shared& sh = *(Shared*)shared;
    const RegardCall& c = sh.call;
    static thread_local Arena arena;
    float* keys = arena.take(KEYS * (c.dim + c.v_dim + most(c.dim, c.v_dim)) + 16);
    if (!keys) return;
    float *values = keys + KEYS * c.dim, *scratch = values + KEYS * c.v_dim;
    long count = (c.k_len + KEYS - 1) / KEYS;
    for (long item; sh.queue->take(item);) {
        long k0 = item % count * KEYS, b = item / count / c.kv_heads, kv = item / count % c.kv_heads;
        int n = (int)least(KEYS, (c.pages.table ? c.pages.lengths[b] : c.k_len) - k0);
        if (n <= 0) continue;
        if (sh.tiles.pack_brains(c, b, kv, k0, n, sh.packed_tile(b, kv, item % count))) continue;
        Rows k = rows_of(c.key, c.pages, b, kv, k0, n, c.dim, keys);
        Rows v = rows_of(c.value, c.pages, b, kv, k0, n, c.v_dim, values);
        sh.tiles.pack(c, k, v, n, sh.packed_tile(b, kv, item % count), scratch);
    }
}

static void work_forward(void* shared) { Forward(*(Shared*)shared).run(); }

static void sum_columns(void* data) {
    Shared& sh = *(Shared*)data;
    for (long item; sh.queue->take(item);) {
        long b = item / sh.call.heads, h = item % sh.call.heads;
        Columns first = sh.column(b, h, 0);
        for (long s = 1; !sh.plan.flat && s < sh.plan.stripes; s++)
            first.add(sh.column(b, h, s), sh.call, sh.observe, s, sh.plan.stripes);
        first.write(sh.call, sh.observe, b, h);
    }
}

// How many threads the work is worth: waking one takes as long as some hundred thousand products.
static long worth(const RegardCall& c) {
    return 1 + c.batch * c.heads * c.q_len * c.k_len * (c.dim + c.v_dim) / (1 << 18);
}

// 0, or 1: out of memory.
static int forward(const RegardCall& given) {
    Shared sh{};
    sh.call = given;
    RegardCall& c = sh.call;
    if (given.observe) sh.observe = *given.observe;
    const RegardObserve& o = sh.observe;
    sh.plan = Plan(c, given.observe);
    Plan& plan = sh.plan;
    static thread_local Arena copies;
    bool ready = c.key.type == F32 && c.key.stride[3] == 1 && c.value.stride[3] == 1;
    sh.tiles = KeyTiles(c);
    sh.v_dim = sh.tiles.parts ? sh.tiles.v_dim * SIDE : c.v_dim;
    long key_tiles = c.batch * c.kv_heads * ((c.k_len + KEYS - 1) / KEYS);
    bool on_tiles = sh.tiles.serve(plan, plan.block(c, 0, 0));
    if (plan.shared_keys() && on_tiles) {
        sh.packed = (uint16_t*)copies.take(key_tiles * sh.tiles.size() / 2);
        if (!sh.packed) return 1;
        Queue queue(key_tiles);
        sh.queue = &queue;
        run_team(least(least(c.threads, queue.count), worth(c)), pack_keys, &sh);
        if (!queue.empty()) return 1;
    } else if (plan.shared_keys() && !ready) {
        long rows = c.batch * c.kv_heads * c.k_len;
        float* packed = copies.take((size_t)rows * (c.dim + c.v_dim));
        if (!packed) return 1;
        Queue queue(key_tiles);
        Packing packing{&given, packed, packed + rows * c.dim, &queue};
        run_team(least(c.threads, queue.count), Packing::work, &packing);
        c.key = {packing.key, F32, {c.kv_heads * c.k_len * c.dim, c.k_len * c.dim, c.dim, 1}};
        c.value = {packing.value, F32, {c.kv_heads * c.k_len * c.v_dim, c.k_len * c.v_dim, c.v_dim, 1}};
        if (c.pages.table) c.pages.size = 0;  // the copies lie in order; the lengths still hold
    }
    sh.shaping = Shaping(c);
    long lanes = plan.block(c, 0, 0).lanes();
    size_t column_count = 0, partial_count = 0, strip_count = 0;
    if (plan.columns) {
        sh.column_floats = Columns::floats(c, o);
        column_count = c.batch * c.heads * (plan.flat ? 1 : plan.stripes) * sh.column_floats;
    }
    if (plan.chunks > 1) {
        sh.partial_floats =
            (State::floats((int)lanes, sh.v_dim, (int)o.k, sh.few(plan.block(c, 0, 0))) + 15) / 16 * 16;
        partial_count = plan.owners * plan.blocks * plan.chunks * sh.partial_floats;
        if (plan.columns) {
            sh.strip_floats = (Strip::floats(c.k_len, (int)lanes) + 15) / 16 * 16;
            strip_count = plan.owners * plan.blocks * sh.strip_floats;
        }
    }
    long counters = plan.chunks > 1 ? plan.owners * plan.blocks : 0;
    auto lay_out = [&](Cutter& cut) {
        sh.columns = cut.cut(column_count);
        sh.partial = cut.cut(partial_count);
        sh.strips = cut.cut(strip_count);
        sh.left = (std::atomic<int>*)cut.cut(counters);
    };
    static thread_local Arena arena;
    bool done = laid_out(arena, lay_out);
    if (done) {
        long stripes = plan.flat ? 1 : plan.stripes;
        for (long i = 0; plan.columns && i < c.batch * c.heads; i++) {
            // The first is where all of them are added
            memset(sh.columns + i * stripes * sh.column_floats, 0, sh.column_floats * sizeof(float));
            for (long s = 1; s < stripes; s++)
                sh.column(i / c.heads, i % c.heads, s).clear(c, o, s, stripes);
        }
        for (long i = 0; i < counters; i++) new (&sh.left[i]) std::atomic<int>((int)plan.chunks);
        Queue queue(plan.items());
        sh.queue = &queue;
        run_team(least(least(c.threads, queue.count), worth(c)), work_forward, &sh);
        done = queue.empty();
        if (done && plan.columns) {
            Queue heads(c.batch * c.heads);
            sh.queue = &heads;
            run_team(least(c.threads, heads.count), sum_columns, &sh);
        }
    }
    arena.trim();
    copies.trim();
    return done ? 0 : 1;
}

}  // namespace regard::LEVEL
