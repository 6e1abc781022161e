// Vectors of W floats by the compiler's own extension, and the few functions on them that softmax
// needs. Every instruction set compiles this file into a namespace of its own.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER
#define NO_INLINE static __attribute__((noinline))
#define INLINE_LAMBDA __attribute__((always_inline))
// A loop over the rows of a tile, whose vectors stay in registers; where vectors are halves of others, as tests have
// them, that would only take minutes to compile.
#if WIDTH == 16 && !defined(__AVX512F__)
#define UNROLL_ROWS _Pragma("GCC unroll 1")
#else
#define UNROLL_ROWS _Pragma("GCC unroll 16")
#endif

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
// The first n of W numbers, the others 0.
INLINE V load_some(const float* p, long n) {
    if (n >= W) return load(p);
    V v = {};
    if (n > 0) memcpy(&v, p, n * sizeof(float));
    return v;
}

// Of a NaN and a number, the second operand. The compiler would compare, then blend.
INLINE V max(V a, V b) {
#if defined(__AVX512F__) && WIDTH == 16
    return (V)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}
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
// Whether any lane of x is larger than that of y, or NaN.
INLINE bool beats(V x, V y) {
#if defined(__AVX512F__) && WIDTH == 16
    return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_NLE_UQ) != 0;
#else
    return any(~(x <= y));
#endif
}
// bits, and this one in the lanes where x is larger than y, or NaN.
INLINE I mark(I bits, int32_t bit, V x, V y) {
#if defined(__AVX512F__) && WIDTH == 16
    __mmask16 larger = _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_NLE_UQ);
    return (I)_mm512_mask_or_epi32((__m512i)bits, larger, (__m512i)bits, _mm512_set1_epi32(bit));
#else
    return bits | (~(x <= y) & bit);
#endif
}
INLINE I lowest(I bits) { return bits & (I)-(N)bits; }
// Of each lane the number of its one bit; below −32 where it has none.
INLINE I number_of(I bit) { return ((I)__builtin_convertvector(bit, V) >> 23 & 0xff) - 127; }
// Of each lane x[at · step + lane]; `other` where `at` is negative.
INLINE V gather(const float* x, I at, int step, V other) {
#if defined(__AVX512F__) && WIDTH == 16
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i from = _mm512_add_epi32(_mm512_mullo_epi32((__m512i)at, _mm512_set1_epi32(step)), lane);
    __mmask16 some = _mm512_cmpge_epi32_mask((__m512i)at, _mm512_setzero_si512());
    return (V)_mm512_mask_i32gather_ps((__m512)other, some, from, x, 4);
#else
    for (int i = 0; i < W; i++)
        if (at[i] >= 0) other[i] = x[(long)at[i] * step + i];
    return other;
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

// The largest relative errors of the functions below, measured over every 61st float and held to by
// tests/cpp/functions.cpp. They grow with x where x · log₂e is rounded: of a softmax such weights are small.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr double EXP_ERROR = 1e-7, EXP_ERROR_BY_SIZE = 1.4e-8;  // log₂e itself is rounded
#else
constexpr double EXP_ERROR = 1.5e-7, EXP_ERROR_BY_SIZE = 7.2e-8;  // … and the product
#endif
#if defined(__AVX512DQ__) && WIDTH == 16
constexpr double EXP2_ERROR = 1e-7, EXP2_ERROR_BY_SIZE = 0, EXP2_ERROR_SHORT = 1e-7,
                 EXP2_ERROR_TABLE = 2e-7;
constexpr double FLUSHED_ERROR = 1.2e-7, FLUSHED_ERROR_BY_SIZE = 7.3e-8;
#else
constexpr double EXP2_ERROR = 1.5e-7, EXP2_ERROR_BY_SIZE = 6e-8, EXP2_ERROR_SHORT = 0,
                 EXP2_ERROR_TABLE = 0;
constexpr double FLUSHED_ERROR = EXP_ERROR, FLUSHED_ERROR_BY_SIZE = EXP_ERROR_BY_SIZE;
#endif
constexpr double TANH_ERROR = 1.7e-7;  // everywhere

// eˣ for x ≤ 88; beyond, what it gives means nothing. Below −88 it is exactly 0: hidden pairs weigh nothing. NaN stays NaN: its exponent
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

// 2ʸ; of −inf it is exactly 0, and NaN stays NaN. degree: of a minimax fit of 2ˣ on [0, 1):
// 6 errs by 2e-9, 5 by 8e-8 (EXP2_ERROR_SHORT, rounding included).
template <int degree>
INLINE V exp2(V y) {
#if defined(__AVX512DQ__) && WIDTH == 16
    constexpr int FLOOR = 1;
    V part = (V)_mm512_maskz_reduce_ps((__mmask16)-1, (__m512)y, FLOOR), p;  // of −inf it is 0
    if constexpr (degree == 6) {
        p = all(2.161292662e-4f);
        p = p * part + 1.246784323e-3f;
        p = p * part + 9.675451898e-3f;
        p = p * part + 5.548528046e-2f;
        p = p * part + 2.402293056e-1f;
        p = p * part + 6.931470444e-1f;
    } else {
        p = all(1.867131253e-3f);
        p = p * part + 9.017027663e-3f;
        p = p * part + 5.579991518e-2f;
        p = p * part + 2.401644495e-1f;
        p = p * part + 6.931513119e-1f;
    }
    p = p * part + 1.f;
    return (V)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)p, (__m512)y);
#else
    V x = y * (1 / LOG2E);
    return exp(x > 89.f ? all(89.f) : x);  // ∞ from there on
#endif
}

#if defined(__AVX512DQ__) && WIDTH == 16
// 2ʸ likewise, from a table of 32 and a minimax fit of two terms (7e-8): half as many products as `exp2`, which
// is what counts beside tiles (beside.h).
class Exp2Table {
  public:
    Exp2Table() : low(load(power)), high(load(power + W)) {}
    INLINE_MEMBER V operator()(V y) const {
        constexpr int FLOOR_OF_32ND = 5 << 4 | 1;
        V part = (V)_mm512_maskz_reduce_ps((__mmask16)-1, (__m512)y, FLOOR_OF_32ND);
        V index = y - part + 0x1.8p18f;  // in the lowest bits: a float of this size counts in 32nds
        V of_32 = (V)_mm512_permutex2var_ps((__m512)low, (__m512i)index, (__m512)high);
        V p = part * 0.242840618f + 0.693116560f;
        return (V)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)((p * part + 1.f) * of_32), (__m512)y);
    }

  private:
    static constexpr float power[2 * W] = {
        1.0f, 1.0218972f, 1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,
        1.13878858f, 1.1637249f, 1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f,
        1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f,
        1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f, 1.61049032f, 1.64575553f,
        1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f, 1.87416768f,
        1.91520655f, 1.95714414f};
    V low, high;
};
#else
struct Exp2Table {
    V operator()(V y) const { return exp2<5>(y); }
};
#endif

// Scores times UNIT come to be powers of 2 where the processor has an instruction for these, else of e.
#if defined(__AVX512DQ__) && WIDTH == 16
constexpr float UNIT = LOG2E;
INLINE V power(V y) { return exp2<6>(y); }
#else
constexpr float UNIT = 1;
INLINE V power(V y) { return exp(y); }
#endif

// While this lives, what would be a denormal is 0: it would weigh nothing, and take 150 cycles.
struct [[maybe_unused]] NoDenormals {
#if defined(__SSE2__)
    unsigned was = _mm_getcsr();
    NoDenormals() { _mm_setcsr(was | 0x8000); }
    ~NoDenormals() { _mm_setcsr(was); }
#endif
};

// eˣ as `exp` has it, in fewer instructions where there are some for it; while `NoDenormals` lives.
INLINE V exp_flushed(V x) {
#if defined(__AVX512DQ__) && WIDTH == 16
    return exp2<6>(x * LOG2E);
#else
    return exp(x);
#endif
}

// tanh to the last bits (TANH_ERROR), ±1 at ±∞, NaN of NaN: a polynomial near 0 (Cephes), exponentials elsewhere.
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

// x / y as rounded, but for the rarest; inverse: 1 / y, or 0 where all is to be 0. A division would take
// as long as sixteen products.
INLINE V divided(V x, V y, V inverse) {
    V about = x * inverse, rest = x - about * y;
    return rest - rest == 0.f ? about + rest * inverse : about;  // ∞ and NaN correct nothing
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
        UNROLL_ROWS
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
