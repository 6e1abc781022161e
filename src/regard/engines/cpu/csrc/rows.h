// Rows of a tensor as float32: in place where they are that already, else converted into scratch.
#pragma once
#include "mask.h"

namespace regard::LEVEL {

struct Rows {
    const float* data;
    long ld;  // floats from one row to the next
};

INLINE float from_half(uint16_t h) {
    // The exponent is rebased by a product, which also gets the subnormals right
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
    float x;
    memcpy(&x, &bits, 4);
    x *= 0x1p112f;
    uint32_t out;
    memcpy(&out, &x, 4);
    if ((h & 0x7c00) == 0x7c00) out |= 0x7f800000;
    out |= (uint32_t)(h & 0x8000) << 16;
    memcpy(&x, &out, 4);
    return x;
}
INLINE uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (size < 0x38800000) {  // subnormal: the sum rounds to its last place
        float y;
        memcpy(&y, &size, 4);
        y += 0.5f;
        memcpy(&size, &y, 4);
        return (uint16_t)(sign | (size - 0x3f000000));
    }
    size += 0xc8000fff + (size >> 13 & 1);
    return (uint16_t)(sign | size >> 13);
}
INLINE float from_brain(uint16_t b) {
    uint32_t bits = (uint32_t)b << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE uint16_t to_brain(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

// W numbers of a row, from the d-th.
template <int type>
INLINE V wide(const char* row, long d) {
    if constexpr (type == F32) {
        return load((const float*)row + d);
    } else {
        const uint16_t* x = (const uint16_t*)row + d;
#if defined(__AVX512F__) && WIDTH == 16
        __m256i halves = _mm256_loadu_si256((const __m256i*)x);
        // Those without a mask draw warnings from GCC 12's own headers
        if constexpr (type == F16) return (V)_mm512_maskz_cvtph_ps((__mmask16)-1, halves);
        return (V)((N)_mm512_maskz_cvtepu16_epi32((__mmask16)-1, halves) << 16);
#elif defined(__AVX2__) && defined(__F16C__) && WIDTH == 8
        __m128i halves = _mm_loadu_si128((const __m128i*)x);
        if constexpr (type == F16) return (V)_mm256_cvtph_ps(halves);
        return (V)((N)_mm256_cvtepu16_epi32(halves) << 16);
#elif defined(__aarch64__) && WIDTH == 4
        uint16x4_t halves = vld1_u16(x);
        if constexpr (type == F16) return (V)vcvt_f32_f16(vreinterpret_f16_u16(halves));
        return (V)((N)vmovl_u16(halves) << 16);
#else
        V y;
        for (int i = 0; i < W; i++) y[i] = type == F16 ? from_half(x[i]) : from_brain(x[i]);
        return y;
#endif
    }
}

// n numbers at `from` (elements `step` apart) to float32.
template <int type>
static void widen_of(const void* from, long step, long n, float* to) {
    const uint16_t* x = (const uint16_t*)from;
    long i = 0;
    for (; step == 1 && i + W <= n; i += W) store(to + i, wide<type>((const char*)from, i));
    for (; i < n; i++) to[i] = type == F16 ? from_half(x[i * step]) : from_brain(x[i * step]);
}
static void widen(int64_t type, const void* from, long step, long n, float* to) {
    if (type == BF16) return widen_of<BF16>(from, step, n, to);
    if (type == F16) return widen_of<F16>(from, step, n, to);
    const float* x = (const float*)from;
    for (long i = 0; i < n; i++) to[i] = x[i * step];
}

// The bf16 nearest to each number (ties to even), as the upper half of its float.
INLINE N nearest(V x) {
    N bits = (N)x, rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return (x != x ? bits | 0x400000u : rounded) & 0xffff0000u;
}

// n floats to a row of `type`.
static void narrow(int64_t type, const float* from, long n, void* to) {
    if (type == F32) {
        memcpy(to, from, n * sizeof(float));
    } else if (type == BF16) {
        uint16_t* x = (uint16_t*)to;
        long i = 0;
#if defined(__AVX512F__) && WIDTH == 16
        for (; i + W <= n; i += W) {
            N bits = nearest(load(from + i)) >> 16;
            _mm256_storeu_si256((__m256i*)(x + i),
                                _mm512_maskz_cvtepi32_epi16((__mmask16)-1, (__m512i)bits));
        }
#endif
        for (; i < n; i++) x[i] = to_brain(from[i]);
    } else {
        uint16_t* x = (uint16_t*)to;
        long i = 0;
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i*)(x + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
        for (; i + 4 <= n; i += 4)
            vst1_u16(x + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
#endif
        for (; i < n; i++) x[i] = to_half(from[i]);
    }
}

INLINE long size_of(int64_t type) { return type == F32 ? 4 : 2; }
INLINE const char* address(const RegardView& v, long b, long h, long row) {
    return (const char*)v.data +
           (b * v.stride[0] + h * v.stride[1] + row * v.stride[2]) * size_of(v.type);
}

// The addresses of the rows first … first + n − 1 of (batch, heads, length, dim), or in pages.
static void addresses(const RegardView& v, const RegardPages& pages, long b, long h, long first, int n,
                      const char** to) {
    long step = v.stride[2] * size_of(v.type);
    for (int i = 0; i < n;) {
        long page = b, row = first + i, rows = n - i;
        if (pages.size) {
            page = pages.table[b * pages.row + row / pages.size];
            row %= pages.size;
            rows = pages.size - row;
        }
        const char* at = address(v, page, h, row);
        for (; rows > 0 && i < n; rows--, at += step) to[i++] = at;
    }
}

// Rows first … first + n − 1 of (batch, heads, length, dim), or of the pages that hold them.
static Rows rows_of(const RegardView& v, const RegardPages& pages, long b, long h, long first, int n,
                    long dim, float* scratch) {
    bool direct = v.type == F32 && (v.stride[3] == 1 || dim == 1);
    if (!pages.size) {
        if (direct) return {(const float*)address(v, b, h, first), v.stride[2]};
        for (int i = 0; i < n; i++)
            widen(v.type, address(v, b, h, first + i), v.stride[3], dim, scratch + i * dim);
        return {scratch, dim};
    }
    const int32_t* table = pages.table + b * pages.row;
    if (direct && first / pages.size == (first + n - 1) / pages.size)
        return {(const float*)address(v, table[first / pages.size], h, first % pages.size),
                v.stride[2]};
    for (int i = 0; i < n; i++) {
        long page = table[(first + i) / pages.size];
        widen(v.type, address(v, page, h, (first + i) % pages.size), v.stride[3], dim,
              scratch + i * dim);
    }
    return {scratch, dim};
}

}  // namespace regard::LEVEL
