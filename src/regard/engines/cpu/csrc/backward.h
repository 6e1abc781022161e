// The backward of a call. The work is cut by keys: an item owns tiles of 128 keys, whose gradients it alone
// writes; the gradients of the queries are gathered in one buffer a stripe and added in order, so the bits
// depend neither on threads nor on the rest of the batch.
#pragma once
#include "backward_tiles.h"

namespace regard::LEVEL {

// Makes one block's queries and gradients ready, as tiles or as floats.
static void pack_blocks(void* data) {
    SharedBackward& sh = *(SharedBackward*)data;
    const RegardCall& c = sh.call;
    const long widest = most(c.dim, c.v_dim), rows = sh.parts ? sh.lanes : 0;
    static thread_local Arena arena;
    float* line = nullptr;
    FloatRows own{};
    const bool ready = laid_out(arena, [&](Cutter& cut) {
        line = cut.cut((W + LANES) * widest);
        own = {cut.cut(rows * sh.dim), cut.cut(rows * sh.v_dim), cut.cut(rows * c.dim), cut.cut(rows * c.v_dim)};
    });
    PartClock clock;
    Timed packing(clock, PACKING);
    for (long item; ready && sh.queue->take(item);) {
        const Block block = sh.plan.block(c, item / sh.plan.blocks, item % sh.plan.blocks);
        uint64_t* odd = sh.odd + 3 * item;
        odd[0] = odd[1] = 0;
        odd[2] = !make_statistics(sh, block, sh.rows + 3 * item * LANES);
        if (!sh.parts) {
            make_floats(sh, block, sh.floats(item), odd, line);
        } else if (!pack_direct(sh, block, item)) {
            make_floats(sh, block, own, odd, line);
            with_parts(sh.parts, [&](auto of) {
                pack_floats<of.count>(sh, block, item, own, odd, line + W * widest);
            });
        }
        for (long s = 0; s < sh.stripes; s++)
            memset(sh.d_query + (s * sh.blocks + item) * sh.lanes * sh.dim, 0,
                   sh.lanes * sh.dim * sizeof(float));
    }
}

static void work_backward(void* shared) { Backward(*(SharedBackward*)shared).run(); }

// Adds the stripes' gradients of one block after another.
static void sum_rows(void* data) {
    SharedBackward& sh = *(SharedBackward*)data;
    const RegardCall& c = sh.call;
    static thread_local Arena arena;
    float* rows = arena.take(W * sh.dim);
    if (!rows) return;
    PartClock clock;
    Timed packing(clock, PACKING);
    for (long item; sh.queue->take(item);) {
        Block block = sh.plan.block(c, item / sh.plan.blocks, item % sh.plan.blocks);
        char* to = (char*)sh.back.d_query + sh.first_row(block) * c.dim * size_of(sh.back.type);
        V by = all((float)c.scale);
        for (int lane = 0; lane < block.count; lane += W) {
            for (long d = 0; d < c.dim; d += W) {
                V v[W];
                for (int i = 0; i < W; i++) {
                    v[i] = V{};
                    for (long s = 0; s < sh.stripes; s++) {
                        long panel = (s * sh.blocks + item) * sh.lanes + lane / PW * PW;
                        v[i] += load(sh.d_query + panel * sh.dim + (d + i) * PW + lane % PW);
                    }
                    v[i] *= by;
                }
                transpose(v);
                for (int i = 0; i < W; i++) store(rows + i * sh.dim + d, v[i]);
            }
            for (int i = 0; i < W && lane + i < block.count; i++)
                narrow(sh.back.type, rows + i * sh.dim, c.dim,
                       to + (lane + i) * c.dim * size_of(sh.back.type));
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
    size_t lanes = (size_t)sh.blocks * sh.lanes, floats = sh.parts ? 0 : lanes;
    size_t counts[] = {
        floats * sh.dim, floats * sh.v_dim, floats * c.dim, floats * c.v_dim, lanes * sh.dim * sh.stripes,
        (size_t)(back.d_by_offset ? sh.stripes * c.batch * c.heads * sh.offsets() : 0),
        (size_t)(sh.stripes * sh.bias_floats),
        sh.parts * lanes * sh.dim / 2, sh.parts * lanes * sh.v_dim / 2,
        sh.parts * lanes * sh.dim / 2, sh.parts * lanes * sh.v_dim / 2,
        (size_t)(sh.parts ? 3 * sh.blocks : 0),
        (size_t)sh.blocks * 6,
        (size_t)sh.blocks * 3 * LANES,
    };
    float** parts[] = {&sh.query, &sh.grad, &sh.query_lanes, &sh.grad_lanes, &sh.d_query,
                       &sh.d_by_offset, &sh.d_bias, (float**)&sh.query_tiles, (float**)&sh.grad_tiles,
                       (float**)&sh.query_row_tiles, (float**)&sh.grad_row_tiles, &sh.fits,
                       (float**)&sh.odd, &sh.rows};
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
