// What happens to the scores of one tile before the softmax: softcap, biases, mask, and dropout's
// factors; and the rows in flight, a block of at most 64 lanes.
#pragma once
#include "rows.h"

namespace regard::LEVEL {

// A block: rows of one head, or, where queries are few, all queries of several heads that share
// their keys (grouped-query attention), so that keys are read once for them.
struct Block {
    Segment segment[LANES];
    int segments, count, panels;

    int lanes() const { return panels * PW; }
    int panel_rows(int p) const { return least(count - p * PW, PW); }
};

// How many of a tile's first n keys there are up to the last one that any row of panel p sees. visible[j]:
// the lanes that see key j.
INLINE int seen_keys(const uint64_t* visible, int p, int n) {
    while (n > 0 && !(visible[n - 1] & first_bits(PW) << p * PW)) n--;
    return n;
}

// Philox 4×32-10 (dropout.py): the words of the counter (group, query, row, 0).
INLINE void philox(uint32_t group, uint32_t query, uint32_t row, uint64_t seed, uint32_t* word) {
    uint32_t a = group, b = query, c = row, d = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t first = (uint64_t)a * 0xD2511F53u, second = (uint64_t)c * 0xCD9E8D57u;
        a = (uint32_t)(second >> 32) ^ b ^ k0;
        b = (uint32_t)second;
        c = (uint32_t)(first >> 32) ^ d ^ k1;
        d = (uint32_t)first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    word[0] = a;
    word[1] = b;
    word[2] = c;
    word[3] = d;
}

// Everything that is added to, or taken from, the scores of a call.
class Shaping {
  public:
    Shaping() = default;
    explicit Shaping(const RegardCall& call) : call(&call), mask(call) {
        biased = call.by_offset || call.bias_count;
    }

    bool biased;

    // With what q is scaled: under a softcap, scores come out in units of the cap.
    float query_scale() const {
        return (float)(call->softcap ? call->scale / call->softcap : call->scale);
    }

    // Words of scratch of `look`.
    static long words(const RegardCall& call) { return Mask::scratch(call); }

    Answer classify(const Block& block, long k0, long k1) const {
        Answer a = {false, true};
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            Answer b = mask.classify({s.b, s.h, s.q0, s.q0 + s.count, k0, k1});
            a = {a.some || b.some, a.every && b.every};
        }
        return a;
    }

    bool sees_all() const { return mask.is_full(); }

    // visible[j]: the lanes that see key k0 + j.
    void look(const Block& block, long k0, int n, uint64_t* visible, uint64_t* stack) const {
        for (int j = 0; j < n; j++) visible[j] = 0;
        for (int i = 0; i < block.segments; i++)
            mask.visible(block.segment[i], k0, n, visible, stack);
    }

    // tile[j · 64 + lane]: the sum of the biases.
    void bias(const Block& block, long k0, int n, float* tile) const {
        memset(tile, 0, (size_t)n * LANES * sizeof(float));
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            if (call->by_offset) {
                const float* mine = call->by_offset + s.h * (call->q_len + call->k_len - 1);
                for (int j = 0; j < n; j++) {
                    const float* x = mine + s.q0 - (k0 + j) + call->k_len - 1;
                    float* to = tile + j * LANES + s.lane;
                    for (int r = 0; r < s.count; r++) to[r] += x[r];
                }
            }
            for (long d = 0; d < call->bias_count; d++) {
                const RegardView& v = call->bias[d];
                float line[KEYS];
                for (int r = 0; r < s.count; r++) {
                    long offset = s.b * v.stride[0] + s.h * v.stride[1] +
                                  (s.q0 + r) * v.stride[2] + k0 * v.stride[3];
                    widen(v.type, (const char*)v.data + offset * (v.type == F32 ? 4 : 2),
                          v.stride[3], n, line);
                    for (int j = 0; j < n; j++) tile[j * LANES + s.lane + r] += line[j];
                }
            }
        }
    }

    // tile[j · 64 + lane]: 0, or 1 / (1 − p); 0 where there is no row or no key.
    void dropout(const Block& block, long k0, int n, float* tile) const {
        memset(tile, 0, KEYS * LANES * sizeof(float));
        uint64_t bar = (uint64_t)llrint(call->dropout * 4294967296.0);
        float keep = (float)(1 / (1 - call->dropout));
        long first = k0 + call->key_start;
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            uint32_t row = (uint32_t)(s.b * call->heads + s.h);
            for (long group = floor_div(first, 4); group * 4 < first + n; group++)
                for (int r = 0; r < s.count; r++) {
                    uint32_t word[4];
                    philox((uint32_t)group, (uint32_t)(s.q0 + r + call->query_start), row,
                           (uint64_t)call->seed, word);
                    for (int w = 0; w < 4; w++) {
                        long j = group * 4 + w - first;
                        if (j >= 0 && j < n)
                            tile[j * LANES + s.lane + r] = word[w] >= bar ? keep : 0.f;
                    }
                }
        }
    }

    // Finishes the scores s[j · ld + lane] of panel p: softcap, biases, −inf where hidden. `capped`, if
    // given, takes the tanh of the softcap, which the backward needs.
    template <int NV>
    void finish(int p, int n, float* s, long ld, const uint64_t* visible, const float* biases,
                float* capped = nullptr) const {
        float cap = (float)call->softcap;
        for (int j = 0; j < n; j++) {
            #pragma GCC unroll 2
            for (int c = 0; c < NV; c++) {
                V x = load(s + j * ld + c * W);
                if (cap != 0.f) {
                    x = tanh(x);
                    if (capped) store(capped + j * ld + c * W, x);
                    x *= cap;
                }
                if (biases) x += load(biases + j * LANES + p * PW + c * W);
                if (visible)
                    x = lanes_of(visible[j] >> (p * PW + c * W)) ? x : all(-INFINITY);
                store(s + j * ld + c * W, x);
            }
        }
    }
    bool shaped() const { return call->softcap != 0 || biased; }

    const RegardCall* call;
    Mask mask;
};

}  // namespace regard::LEVEL
