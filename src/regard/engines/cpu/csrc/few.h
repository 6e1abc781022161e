// Few rows, as in decoding: then lanes are dims in the products, and keys in the softmax. A tile's keys
// and values are read once, where they lie and in their own type.
#pragma once
#include "finite.h"
#include "state.h"

namespace regard::LEVEL {

constexpr int FEW = 4;  // rows: more are cheaper as lanes

// Scores and weights of few rows stand as [row][key]; past the last key, up to a whole vector, −inf.
INLINE long whole_vectors(long n) { return (n + W - 1) / W * W; }

// A number that is known when compiled.
template <int n>
struct Count {
    static constexpr int count = n;
};

// Two vectors of a row, 2 W numbers from the d-th. In bfloat16 they are taken apart as those of even and
// of odd index, which is half the work of widening one vector after another. So what queries and mixed
// values hold between `apart` and `together` is in that order.
template <int type>
INLINE void two(const char* row, long d, V* v) {
    if constexpr (type == BF16) {
        N both;
        memcpy(&both, row + 2 * d, sizeof both);
        v[0] = (V)(both << 16);
        v[1] = (V)(both & 0xffff0000u);
    } else {
        v[0] = wide<type>(row, d);
        v[1] = wide<type>(row, d + W);
    }
}
static void apart(int64_t type, long dim, float* row) {
    for (long d = 0; d + 2 * W <= dim && type == BF16; d += 2 * W) {
        float was[2 * W];
        memcpy(was, row + d, sizeof was);
        for (int i = 0; i < 2 * W; i++) row[d + i % 2 * W + i / 2] = was[i];
    }
}
// Where number d of such a row stands.
INLINE long place_apart(int64_t type, long dim, long d) {
    long first = d / (2 * W) * (2 * W), i = d - first;
    return type == BF16 && first + 2 * W <= dim ? first + i % 2 * W + i / 2 : d;
}
static void together(int64_t type, long dim, float* row) {
    for (long d = 0; d + 2 * W <= dim && type == BF16; d += 2 * W) {
        float was[2 * W];
        memcpy(was, row + d, sizeof was);
        for (int i = 0; i < 2 * W; i++) row[d + i] = was[i % 2 * W + i / 2];
    }
}

// Calls for a row that is read soon. Into the second cache: a tile's keys and values are more than the
// first holds, and what is called for there is gone again when its turn comes.
INLINE void call_for(const char* row, long bytes) {
    for (long ahead = 0; ahead < bytes; ahead += 64) __builtin_prefetch(row + ahead, 0, 2);
}

// s[r · KEYS + j] = query r · key j. query: [row][dim], taken apart; dim is a multiple of W. The values
// of a key, of so many bytes, are called for meanwhile: their turn is next.
template <int R, int type>
static void few_scores_of(long n, long dim, const char* const* key, const char* const* value, long bytes,
                          const float* query, float* s) {
    constexpr int B = 2;  // keys at a time: of more, the processor would not foresee what it reads next
    for (long j = 0; j < n; j += W) {
        V part[R][W];
        #pragma GCC unroll 8
        for (int i = 0; i < W; i += B) {
            const char* at[B];
            #pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                // Past the end the last key once more: below, −inf takes the place of its scores
                long mine = j + i + b < n ? j + i + b : n - 1;
                at[b] = key[mine];
                call_for(value[mine], bytes);
            }
            V dot[B][R][2] = {};  // two sums each: no addition waits for the one just before it
            auto add = [&](long d, auto count) __attribute__((always_inline)) {
                V x[B][2];
                #pragma GCC unroll 8
                for (int b = 0; b < B; b++)
                    if constexpr (count.count == 2)
                        two<type>(at[b], d, x[b]);
                    else
                        x[b][0] = wide<type>(at[b], d);
                #pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    #pragma GCC unroll 2
                    for (int h = 0; h < count.count; h++) {
                        V q = load(query + r * dim + d + h * W);
                        #pragma GCC unroll 8
                        for (int b = 0; b < B; b++) dot[b][r][h] += x[b][h] * q;
                    }
            };
            long d = 0;
            for (; d + 2 * W <= dim; d += 2 * W) add(d, Count<2>{});
            if (d < dim) add(d, Count<1>{});
            #pragma GCC unroll 8
            for (int b = 0; b < B; b++)
                #pragma GCC unroll 4
                for (int r = 0; r < R; r++) part[r][i + b] = dot[b][r][0] + dot[b][r][1];
        }
        #pragma GCC unroll 4
        for (int r = 0; r < R; r++) store(s + r * KEYS + j, sums(part[r]));
    }
    for (int r = 0; r < R; r++)
        for (long j = n; j < whole_vectors(n); j++) s[r * KEYS + j] = -INFINITY;
}

// mixed[r · ld + d] += Σⱼ s[r · KEYS + j] · v[j][d], taken apart. Sums stay in registers over all keys, so
// the fewer rows, the more vectors of dims at a time: eight sums of one row, or of two four each. The
// keys of the next tile, `coming` of so many bytes, are called for meanwhile: memory is never idle.
template <int R, int type>
static void few_mix_of(long n, long dim, const char* const* value, const char* const* next, long coming,
                       long bytes, const float* s, float* mixed, long ld) {
    auto add = [&](long d, auto count) __attribute__((always_inline)) {
        constexpr int C = count.count;  // vectors of dims at a time
        V total[R][C];
        #pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            #pragma GCC unroll 8
            for (int c = 0; c < C; c++) total[r][c] = load(mixed + r * ld + d + c * W);
        long called = d == 0 ? coming : 0;
        for (long j = 0; j < n; j++) {
            if (j < called) call_for(next[j], bytes);
            #pragma GCC unroll 8
            for (int c = 0; c < C; c += 2) {
                V x[2];
                if constexpr (C == 1)
                    x[0] = wide<type>(value[j], d);
                else
                    two<type>(value[j], d + c * W, x);
                #pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    #pragma GCC unroll 2
                    for (int h = 0; h < 2 && h < C; h++) total[r][c + h] += x[h] * all(s[r * KEYS + j]);
            }
        }
        #pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            #pragma GCC unroll 8
            for (int c = 0; c < C; c++) store(mixed + r * ld + d + c * W, total[r][c]);
        return C * W;
    };
    for (long d = 0; d < dim;) {
        long left = (dim - d) / W;
        if (R == 1 && left >= 8)
            d += add(d, Count<8>{});
        else if (R <= 2 && left >= 4)
            d += add(d, Count<4>{});
        else if (left >= 2)
            d += add(d, Count<2>{});
        else
            d += add(d, Count<1>{});
    }
}

// then(Count<rows>{}, Count<type>{}): both are known when compiled, as loops over them must be unrolled
// for their sums to stand in registers.
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

// A tile's keys and values, and the keys after them, by the addresses of their rows.
struct FewKeys {
    const char *key[KEYS], *value[KEYS], *next[KEYS];
    int coming;

    // The n from `first` on, of those before `end`.
    void find(const RegardCall& c, long b, long kv, long first, int n, long end) {
        coming = (int)least(n, end - first - n);
        addresses(c.key, c.pages, b, kv, first + n, coming, next);
        addresses(c.key, c.pages, b, kv, first, n, key);
        addresses(c.value, c.pages, b, kv, first, n, value);
    }
    // Puts 0 for what is not finite of the odd values: they are read from there. scratch: KEYS · v_dim floats.
    void fill(const RegardCall& c, const Odd& odd, float* scratch) {
        for (int i = 0; i < odd.count; i++) {
            char* to = (char*)(scratch + i * c.v_dim);
            fill_odd_row(c.value.type, value[odd.key[i]], c.v_dim, to);
            value[odd.key[i]] = to;
        }
    }
    void scores(const RegardCall& c, int rows, int n, const float* query, float* s) const {
        long bytes = c.v_dim * size_of(c.value.type);
        with_rows(rows, c.key.type, [&](auto r, auto type) {
            few_scores_of<r.count, type.count>(n, c.dim, key, value, bytes, query, s);
        });
    }
    void mix(const RegardCall& c, int n, const float* s, State& state) const {
        long bytes = c.dim * size_of(c.key.type);
        with_rows(state.few, c.value.type, [&](auto r, auto type) {
            few_mix_of<r.count, type.count>(n, c.v_dim, value, next, coming, bytes, s, state.mixed,
                                            state.v_dim);
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
