// The eight tile registers of AMX, each 16 rows of 64 bytes, and the one product on them. Registers 0
// … 3 hold a block of C, 2 × 2 tiles; 4 and 5 its rows of A, 6 and 7 its columns of B.
//
// Where the compiler has no AMX the same stands here in plain C++: tests build the level `amx` that
// way (REGARD_PLAIN_TILES), the other levels never call it.
#pragma once
#include "simd.h"

namespace regard::LEVEL {

// Whether this level multiplies bf16 that is laid out as tiles: on their registers, or by vectors (pairs.h).
#if defined(__AMX_BF16__) || defined(REGARD_PLAIN_TILES)
constexpr bool HAS_TILES = true, BY_PAIRS = false;
#elif defined(REGARD_PAIRS)
constexpr bool HAS_TILES = true, BY_PAIRS = true;
#else
constexpr bool HAS_TILES = false, BY_PAIRS = false;
#endif
constexpr int SIDE = BY_PAIRS ? W : 16;  // rows of a tile, and columns of one of float32
constexpr int DEPTH = 2 * SIDE;      // bf16 numbers in a row of a tile
constexpr int TILE = SIDE * DEPTH;   // … in a tile: 1 KB where SIDE is 16
static_assert(!HAS_TILES || W == SIDE);

// What stands in for an instruction on bf16: denormals are zeros of their sign while this lives, going
// in and coming out. In a function of its own, as a compiler does not know that arithmetic heeds it:
// it keeps in their places what is read from memory and written there.
#if defined(__x86_64__)
struct Flushing {
    const unsigned before = _mm_getcsr();
    Flushing() { _mm_setcsr(before | 0x8040); }
    ~Flushing() { _mm_setcsr(before); }
};
#else
struct Flushing {
    Flushing() {}  // no level multiplies bf16 that way
};
#endif

#if defined(__AMX_BF16__) && !defined(REGARD_PLAIN_TILES)

template <int t> inline void tile_zero();
template <int t> inline void tile_load(const void* from, long bytes);
// The same of what is not soon read again, by `tileloaddt1`: it is kept out of the nearest cache. Keys
// and values that pass through there drive out the scores and the mix, and a store to a line that has
// gone takes as long as several vectors of softmax.
template <int t> inline void tile_pass(const void* from, long bytes);
template <int t> inline void tile_store(void* to, long bytes);
template <int row, int column> inline void tile_dot();

// The intrinsics take the numbers of registers as literals alone.
#define REGISTER(t)                                                                                 \
    template <> INLINE_MEMBER void tile_zero<t>() { _tile_zero(t); }                                \
    template <> INLINE_MEMBER void tile_load<t>(const void* from, long bytes) {                     \
        _tile_loadd(t, from, bytes);                                                                \
    }                                                                                               \
    template <> INLINE_MEMBER void tile_pass<t>(const void* from, long bytes) {                     \
        _tile_stream_loadd(t, from, bytes);                                                         \
    }                                                                                               \
    template <> INLINE_MEMBER void tile_store<t>(void* to, long bytes) { _tile_stored(t, to, bytes); }
REGISTER(0)
REGISTER(1)
REGISTER(2)
REGISTER(3)
REGISTER(4)
REGISTER(5)
REGISTER(6)
REGISTER(7)
#undef REGISTER
template <> INLINE_MEMBER void tile_dot<0, 0>() { _tile_dpbf16ps(0, 4, 6); }
template <> INLINE_MEMBER void tile_dot<0, 1>() { _tile_dpbf16ps(1, 4, 7); }
template <> INLINE_MEMBER void tile_dot<1, 0>() { _tile_dpbf16ps(2, 5, 6); }
template <> INLINE_MEMBER void tile_dot<1, 1>() { _tile_dpbf16ps(3, 5, 7); }

// GCC does not know that tile loads read memory: what they are to read is written before this.
INLINE void tiles_written() { __asm__ volatile("" ::: "memory"); }

INLINE void tiles_begin() {
    struct alignas(64) {
        uint8_t palette, start, unused[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("" ::"r"(&shape) : "memory");
    _tile_loadconfig(&shape);
}
INLINE void tiles_end() { _tile_release(); }

#else

typedef float TileRow __attribute__((vector_size(64)));
typedef uint32_t TileBits __attribute__((vector_size(64)));
static thread_local TileRow tile_register[8][SIDE];

template <int t>
static void tile_zero() {
    for (int r = 0; r < SIDE; r++) tile_register[t][r] = TileRow{};
}
template <int t>
static void tile_load(const void* from, long bytes) {
    for (int r = 0; r < SIDE; r++) memcpy(&tile_register[t][r], (const char*)from + r * bytes, 64);
}
template <int t>
static void tile_pass(const void* from, long bytes) { tile_load<t>(from, bytes); }
template <int t>
static void tile_store(void* to, long bytes) {
    for (int r = 0; r < SIDE; r++) memcpy((char*)to + r * bytes, &tile_register[t][r], 64);
}
// The sums over the even and over the odd places run apart, each begins at 0, and their sum is added
// to C (Intel's manual, TDPBF16PS). A product of two bf16 is exact.
template <int row, int column>
NO_INLINE void tile_dot() {
    const TileRow *a = tile_register[4 + row], *b = tile_register[6 + column];
    TileRow* c = tile_register[2 * row + column];
    const Flushing denormals;
    TileRow low[SIDE], high[SIDE];
    for (int k = 0; k < SIDE; k++) {
        low[k] = (TileRow)((TileBits)b[k] << 16);
        high[k] = (TileRow)((TileBits)b[k] & 0xffff0000u);
    }
    for (int r = 0; r < SIDE; r++) {
        TileRow even = {}, odd = {};
        TileRow x = (TileRow)((TileBits)a[r] << 16);
        TileRow y = (TileRow)((TileBits)a[r] & 0xffff0000u);
        for (int k = 0; k < SIDE; k++) {
            even += x[k] * low[k];
            odd += y[k] * high[k];
        }
        c[r] += even + odd;
    }
}
INLINE void tiles_written() {}
INLINE void tiles_begin() {}
INLINE void tiles_end() {}

#endif

// A thread that works on tiles: they are shaped as long as this lives, and then let go, as a thread
// that holds them saves 8 KB whenever it is switched.
struct TileSession {
    bool held;
    explicit TileSession(bool wanted) : held(HAS_TILES && wanted) {
        if (held) tiles_begin();
    }
    ~TileSession() {
        if (held) tiles_end();
    }
    TileSession(const TileSession&) = delete;
};

}  // namespace regard::LEVEL
