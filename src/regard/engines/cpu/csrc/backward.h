// The backward of a call. The work is cut by keys: an item owns tiles of 128 keys, whose gradients it alone
// writes; the gradients of the queries are gathered in one buffer a stripe and added in order, so the bits
// depend neither on threads nor on the rest of the batch.
#pragma once
#include "backward_tiles.h"

namespace regard::LEVEL {

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
        uint64_t* odd = sh.odd + 2 * item;
        odd[0] = odd[1] = 0;
        for (int p = 0; p < block.panels; p++) {
            odd[0] |= odd_lanes(query_lanes + p * PW * c.dim, c.dim) << p * PW;
            odd[1] |= odd_lanes(grad_lanes + p * PW * c.v_dim, c.v_dim) << p * PW;
        }
        if (odd[0]) fill_odd(sh.query + item * sh.lanes * sh.dim, sh.lanes * sh.dim);
        if (odd[1]) fill_odd(sh.grad + item * sh.lanes * sh.v_dim, sh.lanes * sh.v_dim);
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
                auto pack_lanes = [&](const float* x, uint64_t odd, long depth, Tiles to, float& fit) {
                    if (odd) {  // 0 stands there for what is not finite
                        memcpy(rows, x, depth * PW * sizeof(float));
                        fill_odd(rows, depth * PW);
                        x = rows;
                    }
                    pack(x, depth, to, fit);
                };
                for (int p = 0; p < block.panels; p++) {
                    pack_lanes(query_lanes + p * PW * c.dim, odd[0] >> p * PW, c.dim,
                               sh.lane_tiles(sh.query_tiles, item, sh.dim, p), fits[0]);
                    pack_lanes(grad_lanes + p * PW * c.v_dim, odd[1] >> p * PW, c.v_dim,
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

static void work_backward(void* shared) { Backward(*(SharedBackward*)shared).run(); }

// Adds the stripes' gradients of one block after another.
static void sum_rows(void* data) {
    SharedBackward& sh = *(SharedBackward*)data;
    const RegardCall& c = sh.call;
    static thread_local Arena arena;
    float* rows = arena.take(W * sh.dim);
    if (!rows) return;
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
    size_t lanes = (size_t)sh.blocks * sh.lanes;
    size_t counts[] = {
        lanes * sh.dim, lanes * sh.v_dim, lanes * c.dim, lanes * c.v_dim, lanes * sh.dim * sh.stripes,
        (size_t)(back.d_by_offset ? sh.stripes * c.batch * c.heads * sh.offsets() : 0),
        (size_t)(sh.stripes * sh.bias_floats),
        sh.parts * lanes * sh.dim / 2, sh.parts * lanes * sh.v_dim / 2,
        sh.parts * lanes * sh.dim / 2, sh.parts * lanes * sh.v_dim / 2,
        (size_t)(sh.parts ? 3 * sh.blocks : 0),
        (size_t)sh.blocks * 4,
    };
    float** parts[] = {&sh.query, &sh.grad, &sh.query_lanes, &sh.grad_lanes, &sh.d_query,
                       &sh.d_by_offset, &sh.d_bias, (float**)&sh.query_tiles, (float**)&sh.grad_tiles,
                       (float**)&sh.query_row_tiles, (float**)&sh.grad_row_tiles, &sh.fits,
                       (float**)&sh.odd};
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
