// What a call means: plain loops in double precision, every weight in memory.
#pragma once
#include "problem.h"

// A case with its tensors.
struct Problem {
    const Case& c;
    Random random;
    std::vector<Buffer> pool;  // the mask's tensors
    Mask mask;
    Buffer query, key, value, sinks, by_offset, grad_out, grad_lse;
    std::vector<Buffer> bias;
    Buffer key_pages, value_pages, table, lengths;

    explicit Problem(const Case& given) : c(given) {
        mask = c.mask ? c.mask(c, random, pool) : Mask{{FULL}, [](long, long, long, long) { return true; }};
        query = Buffer(c.type, {c.batch, c.heads, c.q_len, c.dim}, c.layout);
        key = Buffer(c.type, {c.batch, c.kv_heads, c.k_len, c.dim}, c.layout);
        value = Buffer(c.type, {c.batch, c.kv_heads, c.k_len, c.v_dim}, c.layout);
        grad_out = Buffer(c.type, {c.batch, c.heads, c.q_len, c.v_dim}, c.layout);
        for (Buffer* each : {&query, &key, &value, &grad_out}) each->draw(random);
        if (c.equal) query.fill(0);
        grad_lse = Buffer(F32, {c.batch, c.heads, c.q_len});
        grad_lse.draw(random);
        sinks = Buffer(F32, {c.heads});
        sinks.draw(random);
        by_offset = Buffer(F32, {c.heads, std::max(c.q_len + c.k_len - 1, 0l)});
        by_offset.draw(random);
        for (const std::vector<long>& sizes : c.bias) {
            bias.emplace_back(c.type, sizes, c.layout == SHARED ? CONTIGUOUS : c.layout);
            bias.back().draw(random);
        }
        if (c.page) into_pages();
    }

    bool shows(long b, long h, long i, long j) const {
        return mask.shows(b, h, i, j) && (!c.page || j < lengths(b, 0, 0, 0));
    }

    // The same keys and values on pages that are dealt out backwards, one of them never used. Each
    // item has fewer keys than the one before; what stands behind its last is NaN, or no page.
    void into_pages() {
        long each = (c.k_len + c.page - 1) / c.page, count = c.batch * each + 1;
        lengths = Buffer(I32, {c.batch});
        lengths.each([&](long b, long, long, long) { return std::max(c.k_len - 37 * b, 0l); });
        table = Buffer(I32, {c.batch, each});
        table.each([&](long b, long p, long, long) {
            return p * c.page < lengths(b, 0, 0, 0) ? count - 1 - (b * each + p) : -1;
        });
        for (auto [from, to, dim] : {std::tuple{&key, &key_pages, c.dim},
                                     std::tuple{&value, &value_pages, c.v_dim}}) {
            *to = Buffer(c.type, {count, c.kv_heads, c.page, dim}, c.layout);
            for (long b = 0; b < c.batch; b++)
                for (long h = 0; h < c.kv_heads; h++)
                    for (long j = 0; j < lengths(b, 0, 0, 0); j++)
                        for (long d = 0; d < dim; d++)
                            to->set(to->at((long)table(b, j / c.page, 0, 0), h, j % c.page, d),
                                    (*from)(b, h, j, d));
        }
    }
};

// Numbers in four dimensions.
struct Numbers {
    long size[4] = {};
    std::vector<double> held;
    Numbers() = default;
    Numbers(long a, long b, long c, long d = 1) : size{a, b, c, d}, held(a * b * c * d) {}
    double& operator()(long a, long b, long c, long d = 0) {
        return held[((a * size[1] + b) * size[2] + c) * size[3] + d];
    }
    double operator()(long a, long b, long c, long d = 0) const {
        return const_cast<Numbers&>(*this)(a, b, c, d);
    }
};

// 0 or 1 / (1 − p): Philox 4×32-10 of (key // 4, query, row, 0), word key % 4.
inline double dropped(double p, uint64_t seed, long row, long query, long key) {
    uint32_t x[4] = {(uint32_t)divide(key, 4), (uint32_t)query, (uint32_t)row, 0};
    uint32_t k[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)x[0] * 0xD2511F53, b = (uint64_t)x[2] * 0xCD9E8D57;
        uint32_t y[4] = {(uint32_t)(b >> 32) ^ x[1] ^ k[0], (uint32_t)b,
                         (uint32_t)(a >> 32) ^ x[3] ^ k[1], (uint32_t)a};
        memcpy(x, y, sizeof x);
        k[0] += 0x9E3779B9;
        k[1] += 0xBB67AE85;
    }
    return x[key - divide(key, 4) * 4] < std::llrint(p * 4294967296.0) ? 0 : 1 / (1 - p);
}

// Everything that the forward and the backward compute of a problem.
struct Truth {
    Numbers score, weight, out, lse, largest, sink;
    Numbers d_query, d_key, d_value, d_by_offset;
    Numbers effect;  // of each edge, on Σ grad_out · out
    std::vector<Numbers> d_bias;
    const Problem& p;
    const Case& c;

    explicit Truth(const Problem& problem) : p(problem), c(problem.c) {
        score = weight = effect = Numbers(c.batch, c.heads, c.q_len, c.k_len);
        out = Numbers(c.batch, c.heads, c.q_len, c.v_dim);
        lse = largest = sink = Numbers(c.batch, c.heads, c.q_len);
        d_query = Numbers(c.batch, c.heads, c.q_len, c.dim);
        d_key = Numbers(c.batch, c.kv_heads, c.k_len, c.dim);
        d_value = Numbers(c.batch, c.kv_heads, c.k_len, c.v_dim);
        d_by_offset = Numbers(1, c.heads, std::max(c.q_len + c.k_len - 1, 0l));
        for (const Buffer& b : p.bias) d_bias.emplace_back(b.size[0], b.size[1], b.size[2], b.size[3]);
        for (long b = 0; b < c.batch; b++)
            for (long h = 0; h < c.heads; h++)
                for (long i = 0; i < c.q_len; i++) row(b, h, i);
    }

  private:
    double inside(double x) const { return c.softcap ? std::tanh(x / c.softcap) : 0; }

    void row(long b, long h, long i) {
        long kv = h / (c.heads / c.kv_heads);
        double high = -INFINITY, total = 0, logit = c.sinks ? p.sinks(h, 0, 0, 0) : -INFINITY;
        std::vector<double> raw(c.k_len), factor(c.k_len, 1);
        for (long j = 0; j < c.k_len; j++) {
            for (long d = 0; d < c.dim; d++) raw[j] += p.query(b, h, i, d) * p.key(b, kv, j, d);
            raw[j] *= c.scale;
            double s = c.softcap ? c.softcap * inside(raw[j]) : raw[j];
            if (c.by_offset) s += p.by_offset(h, i - j + c.k_len - 1, 0, 0);
            for (const Buffer& bias : p.bias) s += bias(b, h, i, j);
            score(b, h, i, j) = p.shows(b, h, i, j) ? s : -INFINITY;
            high = std::max(high, score(b, h, i, j));
            if (c.dropout)
                factor[j] = dropped(c.dropout, 7, b * c.heads + h, c.start() + i, c.key_start + j);
        }
        largest(b, h, i) = high;
        double top = std::max(high, logit);
        if (top == -INFINITY) {
            lse(b, h, i) = -INFINITY;
            return;
        }
        for (long j = 0; j < c.k_len; j++) total += std::exp(score(b, h, i, j) - top);
        double taken = std::exp(logit - top);
        lse(b, h, i) = top + std::log(total + taken);
        sink(b, h, i) = taken / (total + taken);
        for (long j = 0; j < c.k_len; j++) {
            double w = weight(b, h, i, j) = std::exp(score(b, h, i, j) - lse(b, h, i));
            for (long d = 0; d < c.v_dim; d++)
                out(b, h, i, d) += w * factor[j] * p.value(b, kv, j, d);
        }
        slopes(b, h, i, raw, factor);
    }

    // Of the scalar Σ grad_out · out + Σ grad_lse · lse.
    void slopes(long b, long h, long i, const std::vector<double>& raw,
                const std::vector<double>& factor) {
        long kv = h / (c.heads / c.kv_heads);
        double delta = delta_of(b, h, i), here = mixed_of(b, h, i);
        for (long j = 0; j < c.k_len; j++) {
            double w = weight(b, h, i, j), dw = 0;
            for (long d = 0; d < c.v_dim; d++) {
                dw += p.grad_out(b, h, i, d) * p.value(b, kv, j, d);
                d_value(b, kv, j, d) += w * factor[j] * p.grad_out(b, h, i, d);
            }
            double left = 1 - w, ds = w * (dw * factor[j] - delta);
            effect(b, h, i, j) = left > 1e-7 ? w * (here - dw * factor[j]) / left : -here;
            if (c.by_offset) d_by_offset(0, h, i - j + c.k_len - 1) += ds;
            for (Numbers& n : d_bias)
                n(n.size[0] > 1 ? b : 0, n.size[1] > 1 ? h : 0, n.size[2] > 1 ? i : 0,
                  n.size[3] > 1 ? j : 0) += ds;
            ds *= c.scale * (1 - inside(raw[j]) * inside(raw[j]));
            for (long d = 0; d < c.dim; d++) {
                d_query(b, h, i, d) += ds * p.key(b, kv, j, d);
                d_key(b, kv, j, d) += ds * p.query(b, h, i, d);
            }
        }
    }

  public:
    // Σ grad_out · out
    double mixed_of(long b, long h, long i) const {
        double total = 0;
        for (long d = 0; d < c.v_dim; d++) total += p.grad_out(b, h, i, d) * out(b, h, i, d);
        return total;
    }
    double delta_of(long b, long h, long i) const {
        return mixed_of(b, h, i) - p.grad_lse(b, h, i, 0);
    }
};
