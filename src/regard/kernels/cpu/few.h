// Few rows, as in decoding: then lanes are dims in the products, and keys in the softmax. A tile's keys
// and values are read once, where they lie and in their own type.
#pragma once
#include "rows.h"

namespace regard::LEVEL {

constexpr int FEW = 4;  // rows: more are cheaper as lanes

// Scores and weights of few rows stand as [row][key]; past the last key, up to a whole vector, −inf.
INLINE long whole_vectors(long n) { return (n + W - 1) / W * W; }

// s[r · KEYS + j] = query r · key j. query: [row][dim]; dim is a multiple of W. The values of a key, of
// so many bytes, are called for meanwhile: their turn is next.
template <int R, int type>
static void few_scores_of(long n, long dim, const char* const* key, const char* const* value, long bytes,
                          const float* query, float* s) {
    constexpr int many = R == 1 ? 8 : R == 2 ? 4 : 2, B = many < W ? many : W;  // keys at a time
    for (long j = 0; j < n; j += W) {
        V part[R][W];
        #pragma GCC unroll 8
        for (int i = 0; i < W; i += B) {
            const char* at[B];
            #pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                long mine = j + i + b < n ? j + i + b : n - 1;
                at[b] = key[mine];
                for (long ahead = 0; ahead < bytes; ahead += 64) __builtin_prefetch(value[mine] + ahead);
            }
            V dot[B][R] = {};
            for (long d = 0; d < dim; d += W) {
                V x[B];
                #pragma GCC unroll 8
                for (int b = 0; b < B; b++) x[b] = wide<type>(at[b], d);
                #pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    V q = load(query + r * dim + d);
                    #pragma GCC unroll 8
                    for (int b = 0; b < B; b++) dot[b][r] += x[b] * q;
                }
            }
            #pragma GCC unroll 8
            for (int b = 0; b < B; b++)
                #pragma GCC unroll 4
                for (int r = 0; r < R; r++) part[r][i + b] = dot[b][r];
        }
        #pragma GCC unroll 4
        for (int r = 0; r < R; r++) store(s + r * KEYS + j, sums(part[r]));
    }
    for (int r = 0; r < R; r++)
        for (long j = n; j < whole_vectors(n); j++) s[r * KEYS + j] = -INFINITY;
}

// mixed[d · PW + r] += Σⱼ s[r · KEYS + j] · v[j][d].
template <int R, int type>
static void few_mix_of(long n, long dim, const char* const* value, const float* s, float* mixed) {
    constexpr int C = R == 1 ? 8 : R == 2 ? 4 : 2;  // vectors of dims at a time
    for (long d = 0; d < dim; d += C * W) {
        int vectors = (int)(dim - d < C * W ? (dim - d) / W : C);
        V total[R][C] = {};
        auto add = [&](int count) __attribute__((always_inline)) {
            for (long j = 0; j < n; j++) {
                #pragma GCC unroll 8
                for (int c = 0; c < count; c++) {
                    V x = wide<type>(value[j], d + c * W);
                    #pragma GCC unroll 4
                    for (int r = 0; r < R; r++) total[r][c] += x * all(s[r * KEYS + j]);
                }
            }
        };
        if (vectors == C)
            add(C);
        else
            add(vectors);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < vectors; c++)
                for (int i = 0; i < W; i++) mixed[(d + c * W + i) * PW + r] += total[r][c][i];
    }
}

// then(Count<rows>{}, Count<type>{})
template <int n>
struct Count {
    static constexpr int count = n;
};
template <class Then>
INLINE void with_rows(int rows, int64_t type, Then then) {
    auto typed = [&](auto r) __attribute__((always_inline)) {
        if (type == F32) return then(r, Count<F32>{});
        if (type == BF16) return then(r, Count<BF16>{});
        then(r, Count<F16>{});
    };
    if (rows == 1) return typed(Count<1>{});
    if (rows == 2) return typed(Count<2>{});
    if (rows == 3) return typed(Count<3>{});
    typed(Count<4>{});
}

// A tile's keys and values, by the addresses of their rows.
struct FewKeys {
    const char *key[KEYS], *value[KEYS];

    void find(const RegardCall& c, long b, long kv, long first, int n) {
        addresses(c.key, c.pages, b, kv, first, n, key);
        addresses(c.value, c.pages, b, kv, first, n, value);
    }
    void scores(const RegardCall& c, int rows, int n, const float* query, float* s) const {
        long bytes = c.v_dim * size_of(c.value.type);
        with_rows(rows, c.key.type, [&](auto r, auto type) {
            few_scores_of<r.count, type.count>(n, c.dim, key, value, bytes, query, s);
        });
    }
    void mix(const RegardCall& c, int rows, int n, const float* s, float* mixed) const {
        with_rows(rows, c.value.type, [&](auto r, auto type) {
            few_mix_of<r.count, type.count>(n, c.v_dim, value, s, mixed);
        });
    }
};

// [row][key] as [key][lane], the lanes beyond the rows −inf; and back.
static void to_lanes(int rows, int n, const float* s, float* to) {
    for (int j = 0; j < n; j++) {
        store(to + j * PW, all(-INFINITY));
        for (int r = 0; r < rows; r++) to[j * PW + r] = s[r * KEYS + j];
    }
}
static void from_lanes(int rows, int n, const float* lanes, float* s) {
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < n; j++) s[r * KEYS + j] = lanes[j * PW + r];
}

}  // namespace regard::LEVEL
