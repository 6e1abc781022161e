// The results of one call, and the call of a problem as the library reads it.
#pragma once
#include <algorithm>

#include "fail.h"
#include "naive.h"

// All the numbers of one call's results, NaN where the kernels have not written.
struct Results {
    const Case& c;
    long rows, count;
    Buffer out, lse, stats, index, top, rest, sink, entropy, largest, kept, delta, here;
    Buffer received[2], seen[2], maps[3], past, future;
    Buffer d_query, d_key, d_value, d_by_offset, cut, effect, cut_weight;
    std::vector<Buffer> d_bias;
    std::vector<int64_t> wanted = {0}, edges = {0, 1, 2, 5, 60};
    RegardReceived received_asked[2];
    RegardMap map_asked[3];
    RegardDistances distances_asked;

    Results(const Case& c, long batch) : c(c), rows(batch * c.heads * c.q_len) {
        if (c.q_len > 3) wanted = {1, c.q_len - 1};
        count = (long)wanted.size();
        auto row = [&](long last = 1) { return std::vector<long>{batch, c.heads, c.q_len, last}; };
        out = Buffer(c.type, row(c.v_dim));
        for (Buffer* each : {&lse, &rest, &sink, &entropy, &largest, &delta, &here}) *each = Buffer(F32, row());
        stats = Buffer(F32, row(2));
        top = Buffer(F32, row(c.top));
        index = Buffer(I32, row(c.top));
        kept = Buffer(F32, {batch, c.heads, count, c.k_len});
        kept.fill(-INFINITY);  // keys that no row of a tile sees are not written
        for (int i = 0; i < 2; i++) {
            received[i] = Buffer(F32, {batch, c.heads, c.k_len});
            seen[i] = Buffer(I32, {batch, c.heads, c.k_len});
            received_asked[i] = {i ? std::min(3l, c.q_len) : 0, i ? std::min(20l, c.q_len) : c.q_len,
                                 received[i].data<float>(), seen[i].data<int32_t>()};
        }
        for (int i = 0; i < 3; i++) {
            long row_size = i == 1 ? 4 : 128, col_size = i == 0 ? 16 : 8;
            auto cells = [](long start, long length, long size) {
                return divide(start + length - 1, size) - divide(start, size) + 1;
            };
            long rows = cells(c.start(), c.q_len, row_size), cols = cells(c.key_start, c.k_len, col_size);
            maps[i] = Buffer(F32, {batch, c.heads, rows, cols});
            map_asked[i] = {divide(c.start(), row_size), row_size, rows,
                            divide(c.key_start, col_size), col_size, cols, i == 2,
                            maps[i].data<float>()};
        }
        long bins = (long)edges.size();
        past = Buffer(F32, {batch, c.heads, bins});
        future = Buffer(F32, {batch, c.heads, bins});
        distances_asked = {bins, edges.data(), past.data<float>(), future.data<float>()};
        d_query = Buffer(F32, row(c.dim));
        d_key = Buffer(F32, {batch, c.kv_heads, c.k_len, c.dim});
        d_value = Buffer(F32, {batch, c.kv_heads, c.k_len, c.v_dim});
        d_by_offset = Buffer(F32, {c.heads, std::max(c.q_len + c.k_len - 1, 0l)});
        d_by_offset.fill(0);
        cut = Buffer(I32, row(c.top));
        effect = Buffer(F32, row(c.top));
        cut_weight = Buffer(F32, row(c.top));
        for (const std::vector<long>& sizes : c.bias) d_bias.emplace_back(F32, sizes).fill(0);
    }

    RegardObserve observe() const {
        return {c.top, index.data<int32_t>(), top.data<float>(), rest.data<float>(),
                sink.data<float>(), entropy.data<float>(), largest.data<float>(),
                2, 3, 1, count, received_asked, map_asked, &distances_asked,
                wanted.data(), kept.data<float>()};
    }

    std::vector<const Buffer*> of_rows() const { return {&out, &lse, &stats}; }
    std::vector<const Buffer*> observed() const {
        return {&index, &top, &rest, &sink, &entropy, &largest, &kept, &received[0], &received[1],
                &seen[0], &seen[1], &maps[0], &maps[1], &maps[2], &past, &future};
    }
    std::vector<const Buffer*> gradients() const {
        std::vector<const Buffer*> all = {&d_query, &d_key, &d_value, &d_by_offset,
                                          &cut, &effect, &cut_weight};
        for (const Buffer& b : d_bias) all.push_back(&b);
        return all;
    }
};

// The call of a problem as the library reads it; of one item, if given, moved there.
struct Prepared {
    RegardCall call{};
    std::vector<RegardView> bias, mask;
    std::vector<int64_t> mask_sizes, bias_floats;
    std::vector<RegardView> d_bias;
    RegardObserve observe;
    RegardBackward back{};
    RegardEffect effect{};

    Prepared(const Problem& p, Results& r, const Truth& truth, int level, long threads,
             bool observing, long item = -1) {
        const Case& c = p.c;
        long first = std::max(item, 0l);
        auto moved = [&](const Buffer& b) {
            RegardView view = b.view();
            if (b.by_item) view.data = (char*)view.data + first * b.stride[0] * Buffer::width(b.type);
            return view;
        };
        call.batch = item < 0 ? c.batch : 1;
        call.heads = c.heads;
        call.kv_heads = c.kv_heads;
        call.q_len = c.q_len;
        call.k_len = c.k_len;
        call.dim = c.dim;
        call.v_dim = c.v_dim;
        call.query_start = c.start();
        call.key_start = c.key_start;
        call.scale = c.scale;
        call.softcap = c.softcap;
        call.dropout = c.dropout;
        call.seed = 7;
        call.threads = threads;
        call.level = level;
        call.parts = 3;  // whatever the type: then level amx is as exact as the others
        call.query = moved(p.query);
        call.key = moved(p.key);
        call.value = moved(p.value);
        if (c.page) {
            call.key = p.key_pages.view();
            call.value = p.value_pages.view();
            call.pages = {p.table.data<int32_t>() + first * p.table.size[1], p.table.size[1], c.page,
                          p.lengths.data<int32_t>() + first};
        }
        call.out = r.out.view();
        call.lse = r.lse.data<float>();
        call.stats = r.stats.data<float>();
        call.sinks = c.sinks ? p.sinks.data<float>() : nullptr;
        call.by_offset = c.by_offset ? p.by_offset.data<float>() : nullptr;
        for (const Buffer& b : p.bias) bias.push_back(moved(b));
        call.bias_count = (int64_t)bias.size();
        call.bias = bias.data();
        call.code = p.mask.code.data();
        call.code_count = (int64_t)p.mask.code.size();
        for (const Buffer& b : p.pool) {
            mask.push_back(moved(b));
            mask_sizes.push_back(b.size[0]);
        }
        call.mask = mask.data();
        call.mask_sizes = mask_sizes.data();
        observe = r.observe();
        call.observe = observing ? &observe : nullptr;
        if (item >= 0) return;
        for (const Buffer& b : r.d_bias) {
            d_bias.push_back(b.view());
            bias_floats.push_back(b.count);
        }
        for (long i = 0; i < r.rows; i++) {
            long b = i / (c.heads * c.q_len), h = i / c.q_len % c.heads;
            r.delta.set(i, truth.delta_of(b, h, i % c.q_len));
            r.here.set(i, truth.mixed_of(b, h, i % c.q_len));
        }
        back.grad_out = p.grad_out.view();
        back.stats = r.stats.data<float>();
        back.delta = r.delta.data<float>();
        back.d_query = r.d_query.data<float>();
        back.d_key = r.d_key.data<float>();
        back.d_value = r.d_value.data<float>();
        back.d_by_offset = c.by_offset ? r.d_by_offset.data<float>() : nullptr;
        back.d_bias = d_bias.data();
        back.bias_floats = bias_floats.data();
        effect = {p.grad_out.view(), r.stats.data<float>(), r.here.data<float>(), c.top,
                  r.cut.data<int32_t>(), r.effect.data<float>(), r.cut_weight.data<float>()};
    }

    void run(bool backward) {
        if (int code = regard_forward(&call)) fail(regard_error(code));
        if (!backward) return;
        if (int code = regard_backward(&call, &back)) fail(regard_error(code));
        if (int code = regard_effect(&call, &effect)) fail(regard_error(code));
    }
};
