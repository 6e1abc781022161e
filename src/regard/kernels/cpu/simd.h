// Vectors of W floats by the compiler's own extension, and the few functions on them that softmax
// needs. Every instruction set compiles this file into a namespace of its own.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

namespace regard::LEVEL {

constexpr int W = WIDTH;            // floats in a vector
constexpr int PW = 2 * W;           // lanes of a panel: two vectors
constexpr int LANES = 64;           // rows of scores in flight: one bit each in a mask word
constexpr int PANELS = LANES / PW;
constexpr int KEYS = 128;           // keys of a tile

typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t N __attribute__((vector_size(W * 4)));
typedef float Loose __attribute__((vector_size(W * 4), aligned(4), may_alias));

template <int... i>
struct Ints {};
template <int n, int... i>
struct CountTo : CountTo<n - 1, n - 1, i...> {};
template <int... i>
struct CountTo<0, i...> {
    typedef Ints<i...> type;
};
typedef CountTo<W>::type Lanes;  // Ints<0, …, W − 1>

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LOWEST = -3.402823466e38f;

INLINE V all(float x) { return x - V{}; }
INLINE V load(const float* p) { return *(const Loose*)p; }
INLINE void store(float* p, V v) { *(Loose*)p = v; }
// Of a NaN and a number, the second operand
INLINE V max(V a, V b) { return a > b ? a : b; }
// Whether any lane of a comparison is true. The compiler would test lane by lane.
INLINE bool any(I mask) {
#if defined(__AVX512F__) && WIDTH == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX__) && WIDTH == 8
    return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__) && WIDTH == 4
    return _mm_movemask_ps((__m128)mask) != 0;
#else
    uint32_t some = 0;
    for (int i = 0; i < W; i++) some |= (uint32_t)mask[i];
    return some != 0;
#endif
}
INLINE float sum(V v) {
    float total = 0;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
}
INLINE V iota() {
    V v;
    for (int i = 0; i < W; i++) v[i] = (float)i;
    return v;
}

// eˣ for x ≤ 88. Below −88 it is exactly 0: hidden pairs weigh nothing. NaN stays NaN: its exponent
// is multiplied in, not added to the bits.
INLINE V exp(V x) {
    x = max(all(-88.03f), x);
    const V magic = all(12582912.f + 127.f);  // rounds to an integer, and adds the exponent's bias
    V whole = x * LOG2E + magic;
    V part = x * LOG2E - (whole - magic);  // fused: exact where it matters, near 0
    V p = all(1.535336199e-4f);  // a minimax fit of 2ˣ on [−½, ½]: 2e-9
    p = p * part + 1.339887457e-3f;
    p = p * part + 9.618437359e-3f;
    p = p * part + 5.550332471e-2f;
    p = p * part + 2.402264791e-1f;
    p = p * part + 6.931472029e-1f;
    p = p * part + 1.f;
    return p * (V)((I)whole << 23);
}

// tanh to the last bits: a polynomial near 0 (Cephes), exponentials elsewhere.
INLINE V tanh(V x) {
    V size = x < 0.f ? -x : x;
    V z = x * x;
    V p = all(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    V near = x + x * z * p;
    V e = exp((size < 20.f ? size : x != x ? x : all(20.f)) * 2.f);
    V far = 1.f - 2.f / (e + 1.f);
    far = x < 0.f ? -far : far;
    return size < .625f ? near : far;
}

// All ones in the lanes whose bit is set in the W lowest bits.
INLINE I lanes_of(uint64_t bits) {
    I one;
    for (int i = 0; i < W; i++) one[i] = 1 << i;
    return ((I{} + (int32_t)(uint32_t)bits) & one) != 0;
}

// Shuffles with indices known when compiled: SHUFFLE(a, b, i → index into a, then b).
template <class Pick, int... i>
INLINE V shuffle(V a, V b, Pick, Ints<i...>) {
    return __builtin_shufflevector(a, b, Pick::at(i)...);
}
template <int n>
struct FoldLow {
    static constexpr int at(int i) { return i % n < n / 2 ? i : W + i - n / 2; }
};
template <int n>
struct FoldHigh {
    static constexpr int at(int i) { return FoldLow<n>::at(i) + n / 2; }
};
template <int s>
struct SwapLow {
    static constexpr int at(int i) { return i & s ? W + i - s : i; }
};
template <int s>
struct SwapHigh {
    static constexpr int at(int i) { return i & s ? W + i : i + s; }
};

// The sums of v[0] … v[W − 1], as one vector: neighbours are folded until one is left.
template <int n = W>
INLINE V sums(V* v) {
    if constexpr (n == 1) {
        return v[0];
    } else {
        #pragma GCC unroll 8
        for (int i = 0; i < n / 2; i++)
            v[i] = shuffle(v[i], v[i + n / 2], FoldLow<n>{}, Lanes{}) +
                   shuffle(v[i], v[i + n / 2], FoldHigh<n>{}, Lanes{});
        return sums<n / 2>(v);
    }
}

// Transposes W vectors in place, by halves.
template <int s = W / 2>
INLINE void transpose(V* v) {
    if constexpr (s > 0) {
        #pragma GCC unroll 16
        for (int i = 0; i < W; i++)
            if (!(i & s)) {
                V a = v[i], b = v[i + s];
                v[i] = shuffle(a, b, SwapLow<s>{}, Lanes{});
                v[i + s] = shuffle(a, b, SwapHigh<s>{}, Lanes{});
            }
        transpose<s / 2>(v);
    }
}

}  // namespace regard::LEVEL
