// How a call is cut into work, and the memory that the work is done in.
#pragma once
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif
// A cache line between two parts of an arena, which AddressSanitizer lets nobody touch (tests/cpp).
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FENCE 16
#else
#define FENCE 0
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)(at))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)(at))
#endif

#include "scores.h"
#include "team.h"

namespace regard::LEVEL {

// Floats of this thread. They outlive the call, as fresh pages cost more than short calls; large
// buffers ask for huge pages, and `trim` gives them back.
struct Arena {
    float* data = nullptr;
    size_t size = 0;
    static constexpr size_t HUGE_PAGE = 1 << 21, KEPT = 16 << 20;

    ~Arena() { free(data); }
    float* take(size_t floats) {
        ASAN_UNPOISON_MEMORY_REGION(data, size * sizeof(float));
        if (floats > size) {
            free(data);
            size_t bytes = floats * sizeof(float), unit = bytes < 2 * HUGE_PAGE ? 64 : HUGE_PAGE;
            bytes = (bytes + unit - 1) / unit * unit;
            data = (float*)aligned_alloc(unit, bytes);
            size = data ? floats : 0;
#if defined(__linux__)
            if (data && unit == HUGE_PAGE) madvise(data, bytes, MADV_HUGEPAGE);
#endif
        }
        return data;
    }
    void trim() {
        if (size <= KEPT) return;
        free(data);
        data = nullptr;
        size = 0;
    }
};

// Hands out parts of a buffer, each beginning on a cache line; measures first where data is null.
struct Cutter {
    float* data;
    size_t used = 0;
    float* cut(size_t floats) {
        float* part = data ? data + used : nullptr;
        used += (floats + 15) / 16 * 16 + FENCE;
        if (FENCE && data)
            ASAN_POISON_MEMORY_REGION(part + floats, (data + used - part - floats) * sizeof(float));
        return part;
    }
};

// Cuts what lay_out(cut) names out of an arena; false if there is no memory for it.
template <class LayOut>
static bool laid_out(Arena& arena, LayOut lay_out) {
    Cutter measure{nullptr};
    lay_out(measure);
    Cutter cut{arena.take(measure.used + 16)};  // never nothing, for which there would be no address
    lay_out(cut);
    return cut.data != nullptr;
}

// How a call is cut into items of work. It depends on the sizes of one item of the batch alone, never
// on threads: so do the bits.
struct Plan {
    bool flat;          // a block holds all queries of several heads, rather than 64 queries of one
    long group, heads_per_block;
    long owners;        // a head of an item of the batch; flat: a kv head of one
    long blocks;        // of each owner
    long stripes;       // into which these are dealt
    long chunk;         // keys of one
    long chunks;        // into which a flat block's keys are cut
    bool columns;       // whether column statistics are gathered
    Plan() = default;
    Plan(const RegardCall& c, const RegardObserve* o) {
        group = c.heads / c.kv_heads;
        flat = c.q_len <= LANES;
        heads_per_block = flat ? least(group, LANES / c.q_len) : 1;
        owners = c.batch * (flat ? c.kv_heads : c.heads);
        blocks = flat ? (group + heads_per_block - 1) / heads_per_block
                      : (c.q_len + LANES - 1) / LANES;
        columns = o && (o->received_count || o->map_count || o->distances_count);
        stripes = columns && !flat ? least(blocks, most(1, 64 / c.heads)) : blocks;
        // Many heads are work enough for many threads, so that theirs may be longer
        chunk = 4 * KEYS * most(1, least(4, c.kv_heads * blocks / 8));
        chunks = flat && c.k_len > 2 * chunk ? (c.k_len + chunk - 1) / chunk : 1;
    }
    long items() const { return owners * stripes * chunks; }
    // Whether what is made of keys and values for one block serves others.
    bool shared_keys() const { return sharing() > 1; }
    long sharing() const { return blocks * (flat ? 1 : group); }  // how many blocks read the same keys
    long chunk_keys(const RegardCall& c) const { return chunks == 1 ? c.k_len : chunk; }

    Block block(const RegardCall& c, long owner, long index) const {
        Block b;
        long per = flat ? c.kv_heads : c.heads, item = owner / per, head = owner % per;
        if (!flat) {
            long q0 = index * LANES;
            int count = (int)least(LANES, c.q_len - q0);
            b.segment[0] = {item, head, q0, count, 0};
            b.segments = 1;
            b.count = count;
        } else {
            b.segments = (int)least(heads_per_block, group - index * heads_per_block);
            for (int i = 0; i < b.segments; i++)
                b.segment[i] = {item, head * group + index * heads_per_block + i, 0, (int)c.q_len,
                                (int)(i * c.q_len)};
            b.count = b.segments * (int)c.q_len;
        }
        b.panels = (b.count + PW - 1) / PW;
        return b;
    }
};

// shift[lane]: what is taken from UNIT times the scores of the rows of a block of one head, whose lse are
// given. A row that sees nothing has none of them; one whose lse is infinite has no weights that are
// numbers. Whether there is one whose shift is no number: hidden pairs still weigh 0.
static bool find_shift(const RegardCall& c, const float* lse, const Block& block, float* shift) {
    const Segment& s = block.segment[0];
    const float* mine = lse + (s.b * c.heads + s.h) * c.q_len + s.q0;
    bool careful = false;
    for (int l = 0; l < LANES; l++) {
        float x = l < s.lane || l >= block.count ? 0 : mine[l - s.lane];
        if (x == -INFINITY) x = 0;
        careful |= x - x != 0;
        shift[l] = x == INFINITY ? NAN : (float)((double)x * UNIT);
    }
    return careful;
}

// Rows of queries (or of gradients) as lanes: to[panel][dim][PW], multiplied by `scale`; lanes without
// a row are 0. line: W · dim floats of scratch.
static void turn_rows(const RegardView& view, const Block& block, long dim, float scale, float* line,
                      float* to) {
    V by = all(scale);
    for (int lane = 0; lane < block.lanes(); lane += W) {
        const float* row[W];
        for (int i = 0; i < W; i++) {
            row[i] = nullptr;
            for (int s = 0; s < block.segments && lane + i < block.count; s++) {
                const Segment& g = block.segment[s];
                if (lane + i < g.lane || lane + i >= g.lane + g.count) continue;
                const char* from = address(view, g.b, g.h, g.q0 + lane + i - g.lane);
                row[i] = (const float*)from;
                if (view.type != F32 || (view.stride[3] != 1 && dim > 1)) {
                    row[i] = line + i * dim;
                    widen(view.type, from, view.stride[3], dim, line + i * dim);
                }
                break;
            }
            if (row[i]) continue;
            memset(line + i * dim, 0, dim * sizeof(float));
            row[i] = line + i * dim;
        }
        float* panel = to + lane / PW * dim * PW + lane % PW;
        for (long d = 0; d < dim; d += W) {
            V v[W];
            long n = least(W, dim - d);
            if (n < W) {
                for (int i = 0; i < W; i++) v[i] = load_some(row[i] + d, n);
                transpose(v);
                for (int i = 0; i < n; i++) store(panel + (d + i) * PW, v[i] * by);
                continue;
            }
            #pragma GCC unroll 16
            for (int i = 0; i < W; i++) v[i] = load(row[i] + d);
            transpose(v);
            #pragma GCC unroll 16
            for (int i = 0; i < W; i++) store(panel + (d + i) * PW, v[i] * by);
        }
    }
}

}  // namespace regard::LEVEL
