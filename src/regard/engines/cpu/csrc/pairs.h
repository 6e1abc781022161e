// The product on what is laid out as tiles, without their registers: AVX512_BF16 and ARM's BFDOT multiply
// pairs of bf16, two products a lane. A pair of A is read by broadcast, a row of B are the pairs of W lanes.
//
// Worth it where such an instruction takes no longer than an FMA: on AMD's processors (Zen 4: 0.72
// cycles both), not on Intel's (1.85 against 0.48), which have AMX for it.
#pragma once
#include "tile.h"

namespace regard::LEVEL {

// sum + a₁ b₁ + a₀ b₀ of each lane, as `vdpbf16ps` rounds; denormals are 0, going in and coming out.
#if defined(__AVX512BF16__) && WIDTH == 16
INLINE V dot_pairs(V sum, N a, N b) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#define PAIR_ROWS INLINE
struct PairsFlushing {};  // the instruction does
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && WIDTH == 4
// … but for what is added, which BFDOT rounds to odd, unless the processor is told otherwise.
INLINE V dot_pairs(V sum, N a, N b) {
    return (V)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#define PAIR_ROWS INLINE
struct PairsFlushing {};  // the instruction does
#else
INLINE V dot_pairs(V sum, N a, N b) {
    V high = sum + (V)(a & 0xffff0000u) * (V)(b & 0xffff0000u);
    return high + (V)(a << 16) * (V)(b << 16);
}
#define PAIR_ROWS NO_INLINE
typedef Flushing PairsFlushing;
#endif

// R rows of A against NV columns of tiles of B, added up from where they begin to `sum`.
template <int R, int NV>
PAIR_ROWS void pair_rows(long depth, const uint16_t* a, const uint16_t* b, long b_row, V (*sum)[NV]) {
    [[maybe_unused]] const PairsFlushing denormals;
    for (long k = 0; k < depth; k++, a += TILE, b += b_row)
        #pragma GCC unroll 2
        for (int j = 0; j < SIDE; j++) {
            N column[NV];
            #pragma GCC unroll 2
            for (int v = 0; v < NV; v++) memcpy(&column[v], b + v * TILE + j * DEPTH, sizeof(N));
            #pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                uint32_t pair;
                memcpy(&pair, a + r * DEPTH + 2 * j, sizeof pair);
                #pragma GCC unroll 2
                for (int v = 0; v < NV; v++) sum[r][v] = dot_pairs(sum[r][v], N{} + pair, column[v]);
            }
        }
}

}  // namespace regard::LEVEL
