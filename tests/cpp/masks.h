// Masks by their programs and, beside each, by what it means.
#pragma once
#include "problem.h"

using Drawn = std::function<Mask(const Case&, Random&, std::vector<Buffer>&)>;

// A leaf of numbers alone; `shows` is asked with positions.
inline Drawn leaf(std::vector<int64_t> code, std::function<bool(long query, long key)> shows) {
    return [=](const Case& c, Random&, std::vector<Buffer>&) {
        long query = c.start(), key = c.key_start;
        return Mask{code, [=](long, long, long i, long j) { return shows(query + i, key + j); }};
    };
}
inline Drawn full() { return leaf({FULL}, [](long, long) { return true; }); }
inline Drawn causal() { return leaf({CAUSAL}, [](long q, long k) { return k <= q; }); }
inline Drawn window(long n, long ahead = 0) {
    return leaf({WINDOW, n, ahead}, [=](long q, long k) { return k > q - n && k <= q + ahead; });
}
inline Drawn first(long n) { return leaf({FIRST, n}, [=](long, long k) { return k < n; }); }
inline Drawn step(long n) { return leaf({STEP, n}, [=](long q, long k) { return (q - k) % n == 0; }); }
inline Drawn chunk(long n) {
    return leaf({CHUNK, n}, [=](long q, long k) { return divide(q, n) == divide(k, n); });
}
inline Drawn phase(long n, long lo, long hi) {
    return leaf({PHASE, n, lo, hi}, [=](long, long k) {
        long rest = k - divide(k, n) * n;
        return rest >= lo && rest < hi;
    });
}
inline Drawn queries(long lo, long hi) {
    return leaf({QUERIES, lo, hi}, [=](long q, long) { return q >= lo && q < hi; });
}

// A leaf of tensors: `make` draws them, `shows` reads them back.
inline int64_t keep(std::vector<Buffer>& pool, Buffer buffer, bool by_item = true) {
    buffer.by_item = by_item;
    pool.push_back(std::move(buffer));
    return (int64_t)pool.size() - 1;
}
inline Buffer flags(Random& random, std::vector<long> sizes, Layout layout = CONTIGUOUS) {
    Buffer buffer(U8, std::move(sizes), layout);
    for (long i = 0; i < buffer.count; i++) buffer.set(i, random.below(3) > 0);
    return buffer;
}

inline Drawn padding(bool shared = false) {
    return [=](const Case& c, Random& random, std::vector<Buffer>& pool) {
        int64_t t = keep(pool, flags(random, {shared ? 1 : c.batch, c.k_len}));
        return Mask{{PADDING, t}, [&pool, t](long b, long, long, long j) {
            return pool[t](b, j, 0, 0) != 0;
        }};
    };
}
// Lengths of the items, at the right
inline Drawn left_padding(std::vector<long> lengths) {
    return [=](const Case& c, Random&, std::vector<Buffer>& pool) {
        Buffer keeps(U8, {c.batch, c.k_len});
        keeps.each([&](long b, long k, long, long) { return k >= c.k_len - lengths[b]; });
        int64_t t = keep(pool, std::move(keeps));
        return Mask{{PADDING, t}, [&pool, t](long b, long, long, long j) {
            return pool[t](b, j, 0, 0) != 0;
        }};
    };
}
inline Drawn documents(bool shared = false) {
    return [=](const Case& c, Random& random, std::vector<Buffer>& pool) {
        int64_t t[2];
        for (int side = 0; side < 2; side++) {
            Buffer ids(I32, {shared ? 1 : c.batch, side ? c.k_len : c.q_len});
            ids.each([&](long, long i, long, long) { return i / 40 - (random.below(9) == 0); });
            t[side] = keep(pool, std::move(ids));
        }
        return Mask{{DOCUMENTS, t[0], t[1]}, [&pool, q = t[0], k = t[1]](long b, long, long i, long j) {
            return pool[q](b, i, 0, 0) == pool[k](b, j, 0, 0) && pool[q](b, i, 0, 0) >= 0;
        }};
    };
}
inline Drawn edges(std::vector<std::pair<long, long>> pairs) {
    return [=](const Case& c, Random&, std::vector<Buffer>& pool) {
        Buffer held(I64, {(long)pairs.size(), 2});
        held.each([&](long n, long side, long, long) { return side ? pairs[n].second : pairs[n].first; });
        int64_t t = keep(pool, std::move(held), false);
        long query = c.start(), key = c.key_start;
        return Mask{{EDGES, t}, [=](long, long, long i, long j) {
            for (auto [q, k] : pairs)
                if (q == query + i && k == key + j) return true;
            return false;
        }};
    };
}
inline Drawn heads(std::vector<long> shown) {
    return [=](const Case& c, Random&, std::vector<Buffer>& pool) {
        Buffer mine(U8, {c.heads});
        mine.fill(0);
        for (long h : shown) mine.set(h, 1);
        int64_t t = keep(pool, std::move(mine), false);
        return Mask{{HEADS, t}, [&pool, t](long, long h, long, long) {
            return pool[t](h, 0, 0, 0) != 0;
        }};
    };
}
// broadcast: which of the four sizes are 1
inline Drawn dense(std::vector<bool> broadcast, Layout layout = CONTIGUOUS) {
    return [=](const Case& c, Random& random, std::vector<Buffer>& pool) {
        std::vector<long> sizes = {c.batch, c.heads, c.q_len, c.k_len};
        for (int d = 0; d < 4; d++) sizes[d] = broadcast[d] ? 1 : sizes[d];
        int64_t t = keep(pool, flags(random, sizes, layout));
        return Mask{{DENSE, t}, [&pool, t](long b, long h, long i, long j) {
            return pool[t](b, h, i, j) != 0;
        }};
    };
}
// A predicate, in cells of 64 × 64: empty, full, or a row of bits
inline Drawn tiles(bool by_head) {
    return [=](const Case& c, Random& random, std::vector<Buffer>& pool) {
        long rows = (c.q_len + 63) / 64, cols = (c.k_len + 63) / 64;
        Buffer cells(I32, {1, by_head ? c.heads : 1, rows, cols});
        long mixed = 0;
        cells.each([&](long, long, long, long) {
            long kind = random.below(4);
            return kind < 2 ? -1 - kind : mixed++;
        });
        Buffer bits(U8, {mixed, 64, 8});
        for (long i = 0; i < bits.count; i++) bits.data<uint8_t>()[i] = (uint8_t)random.next();
        int64_t t = keep(pool, std::move(cells)), u = keep(pool, std::move(bits), false);
        return Mask{{TILES, t, u}, [&pool, t, u](long b, long h, long i, long j) {
            long cell = (long)pool[t](b, h, i / 64, j / 64);
            return cell == -1 ||
                   (cell >= 0 && ((long)pool[u](cell, i % 64, j % 64 / 8, 0) >> (j % 8) & 1));
        }};
    };
}
inline Drawn blocks(long size) {
    return [=](const Case& c, Random& random, std::vector<Buffer>& pool) {
        long query = c.start(), key = c.key_start;
        long row = divide(query, size), col = divide(key, size);
        long rows = divide(query + c.q_len - 1, size) - row + 1;
        long cols = divide(key + c.k_len - 1, size) - col + 1;
        int64_t t = keep(pool, flags(random, {1, c.heads, rows, cols}));
        return Mask{{BLOCKS, t, size, row, col}, [=, &pool](long b, long h, long i, long j) {
            return pool[t](b, h, divide(query + i, size) - row, divide(key + j, size) - col) != 0;
        }};
    };
}

inline Drawn joined(Drawn a, Drawn b, Op op) {
    return [=](const Case& c, Random& random, std::vector<Buffer>& pool) {
        Mask left = a(c, random, pool), right = b(c, random, pool);
        std::vector<int64_t> code = left.code;
        code.insert(code.end(), right.code.begin(), right.code.end());
        code.push_back(op);
        return Mask{code, [=, l = left.shows, r = right.shows](long b, long h, long i, long j) {
            return op == AND ? l(b, h, i, j) && r(b, h, i, j) : l(b, h, i, j) || r(b, h, i, j);
        }};
    };
}
inline Drawn operator&(Drawn a, Drawn b) { return joined(a, b, AND); }
inline Drawn operator|(Drawn a, Drawn b) { return joined(a, b, OR); }
inline Drawn operator~(Drawn a) {
    return [=](const Case& c, Random& random, std::vector<Buffer>& pool) {
        Mask mask = a(c, random, pool);
        mask.code.push_back(NOT);
        return Mask{mask.code, [s = mask.shows](long b, long h, long i, long j) {
            return !s(b, h, i, j);
        }};
    };
}
