// Few rows, as in decoding: then lanes are dims. A tile's keys and values are read once, as whole
// vectors, and the work is what reading them from memory takes.
#pragma once
#include "simd.h"

namespace regard::LEVEL {

constexpr int FEW = 4;  // rows: more are cheaper as lanes

// s[j · PW + r] = query r · key j. query: [row][dim]; dim is a multiple of W.
template <int R>
static void few_scores_of(long n, long dim, const float* k, long ld, const float* query, float* s) {
    for (long j = 0; j < n; j += W) {
        V part[R][W];
        #pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
            const float* key = k + (j + i < n ? j + i : n - 1) * ld;
            V dot[R] = {};
            for (long d = 0; d < dim; d += W) {
                V x = load(key + d);
                #pragma GCC unroll 4
                for (int r = 0; r < R; r++) dot[r] += x * load(query + r * dim + d);
            }
            #pragma GCC unroll 4
            for (int r = 0; r < R; r++) part[r][i] = dot[r];
        }
        #pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            V score = sums(part[r]);
            for (int i = 0; i < W && j + i < n; i++) s[(j + i) * PW + r] = score[i];
        }
    }
}

// mixed[d · PW + r] += Σⱼ s[j · PW + r] · v[j][d].
template <int R>
static void few_mix_of(long n, long dim, const float* v, long ld, const float* s, float* mixed) {
    constexpr int C = R == 1 ? 8 : R == 2 ? 4 : 2;  // vectors of dims at a time
    for (long d = 0; d < dim; d += C * W) {
        int vectors = (int)(dim - d < C * W ? (dim - d) / W : C);
        V total[R][C] = {};
        auto add = [&](int count) __attribute__((always_inline)) {
            for (long j = 0; j < n; j++) {
                #pragma GCC unroll 8
                for (int c = 0; c < count; c++) {
                    V x = load(v + j * ld + d + c * W);
                    #pragma GCC unroll 4
                    for (int r = 0; r < R; r++) total[r][c] += x * all(s[j * PW + r]);
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

static void few_scores(int rows, long n, long dim, const float* k, long ld, const float* query, float* s) {
    switch (rows) {
        case 1: return few_scores_of<1>(n, dim, k, ld, query, s);
        case 2: return few_scores_of<2>(n, dim, k, ld, query, s);
        case 3: return few_scores_of<3>(n, dim, k, ld, query, s);
        default: return few_scores_of<4>(n, dim, k, ld, query, s);
    }
}
static void few_mix(int rows, long n, long dim, const float* v, long ld, const float* s, float* mixed) {
    switch (rows) {
        case 1: return few_mix_of<1>(n, dim, v, ld, s, mixed);
        case 2: return few_mix_of<2>(n, dim, v, ld, s, mixed);
        case 3: return few_mix_of<3>(n, dim, v, ld, s, mixed);
        default: return few_mix_of<4>(n, dim, v, ld, s, mixed);
    }
}

}  // namespace regard::LEVEL
