// C (+)= A B, where the columns of B and C are lanes: one panel of two vectors at a time.
//
// Every product of attention has this form: the scores (keys × queries), the mix of the values
// (dims × queries), and all of the backward. A is read by broadcast with any strides, so neither
// keys nor values need packing.
#pragma once
#include "simd.h"

namespace regard::LEVEL {

// Rows of C held in registers: with two vectors each, they fill the register file.
constexpr int ROWS = W == 16 ? 12 : 6;

// One block of R rows. A(r, k) = a[r · rs + k · ks]; B's row k at b + k · ldb; C's row r at
// c + r · ldc. GCC keeps the accumulators in registers only where every index is a constant.
template <int R, bool add, int NV>
INLINE void block(const float* a, long rs, long ks, const float* b, long ldb, long depth, float* c,
                  long ldc) {
    V low[R], high[R];
    #pragma GCC unroll 12
    for (int r = 0; r < R; r++) low[r] = high[r] = V{};
    // Every third row has a pointer; the two after it are reached by the address' own arithmetic
    const float* bases[(R + 2) / 3];
    #pragma GCC unroll 4
    for (int i = 0; i < (R + 2) / 3; i++) bases[i] = a + 3 * i * rs;
    for (long k = 0; k < depth; k++) {
        V b0 = load(b), b1 = NV > 1 ? load(b + W) : V{};
        #pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            V broadcast = all(bases[r / 3][r % 3 * rs]);
            low[r] += broadcast * b0;
            if (NV > 1) high[r] += broadcast * b1;
        }
        #pragma GCC unroll 4
        for (int i = 0; i < (R + 2) / 3; i++) bases[i] += ks;
        b += ldb;
    }
    #pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        // Added in the end: the sum of this block alone rounds less than one carried along
        store(c + r * ldc, add ? load(c + r * ldc) + low[r] : low[r]);
        if (NV > 1) store(c + r * ldc + W, add ? load(c + r * ldc + W) + high[r] : high[r]);
    }
}

template <int R, bool add, int NV>
static void last_rows(int rows, const float* a, long rs, long ks, const float* b, long ldb,
                      long depth, float* c, long ldc) {
    if constexpr (R > 0) {
        if (rows == R) return block<R, add, NV>(a, rs, ks, b, ldb, depth, c, ldc);
        last_rows<R - 1, add, NV>(rows, a, rs, ks, b, ldb, depth, c, ldc);
    }
}

// One panel: C (rows × panel) (+)= A (rows × depth) B (depth × panel).
template <bool add, int NV = 2>
static void product(long rows, long depth, const float* a, long rs, long ks, const float* b,
                    long ldb, float* c, long ldc) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * rs, c += ROWS * ldc)
        block<ROWS, add, NV>(a, rs, ks, b, ldb, depth, c, ldc);
    last_rows<ROWS - 1, add, NV>((int)rows, a, rs, ks, b, ldb, depth, c, ldc);
}

}  // namespace regard::LEVEL
