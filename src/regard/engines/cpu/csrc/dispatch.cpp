// The C interface: picks the instruction set.
#include "kernels.h"
#include "timed.h"

#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace regard {

#if defined(REGARD_PARTS)
std::atomic<int64_t> part_cycles[PART_COUNT];
#endif
void use_openmp(void*);
#if defined(REGARD_X86)
// Linux keeps the 8 KB of a thread's tiles for those processes alone that have asked.
static bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int REQUEST_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, of asm/prctl.h
    return syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0;
#else
    return false;
#endif
}

static bool of_amd() {
    unsigned a, name[3];
    if (!__get_cpuid(0, &a, &name[0], &name[2], &name[1])) return false;
    return !memcmp(name, "AuthenticAMD", 12) || !memcmp(name, "HygonGenuine", 12);
}

// What the processor has, and what the system saves when it switches threads.
static int detect() {
    int levels = 1;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return levels;
    bool fma = c >> 12 & 1, saved = c >> 27 & 1, half = c >> 29 & 1;
    if (!saved || !fma || !half) return levels;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return levels;
    if (b >> 5 & 1) levels |= 2;  // AVX2
#if defined(REGARD_PLAIN_TILES)
    return levels & 2 ? 16 : 0;
#endif
    // AVX-512 F, DQ, BW, VL
    if ((levels & 2) && (low & 0xe6) == 0xe6 && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) &&
        (b >> 31 & 1))
        levels |= 4;
    unsigned more;
    if (!(levels & 4) || !__get_cpuid_count(7, 1, &more, &b, &c, &a) || !(more >> 5 & 1)) return levels;
    // AVX512_BF16, where it gains (pairs.h)
    if ((regard_built() & 8) && of_amd()) levels |= 8;
    // AMX-BF16 and AMX-TILE, and their state
    bool tiles = (d >> 22 & 1) && (d >> 24 & 1) && (low >> 17 & 3) == 3;
    if ((regard_built() & 16) && tiles && tiles_permitted()) levels |= 16;
    return levels;
}
#elif defined(REGARD_NEON_BF16)
static bool has_pairs() {
#if defined(__linux__)
    constexpr unsigned long BF16 = 1ul << 14;  // HWCAP2_BF16, of asm/hwcap.h
    return getauxval(AT_HWCAP2) & BF16;
#elif defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return !sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) && found;
#else
    return false;
#endif
}
static int detect() { return has_pairs() ? 33 : 1; }
#else
static int detect() { return 1; }
#endif

static const Kernels& at(int64_t level) {
#if defined(REGARD_PLAIN_TILES)
    (void)level;
    return kernels_amx;
#elif defined(REGARD_X86)
#if defined(REGARD_AMX)
    if (level == 4) return kernels_amx;
#endif
#if defined(REGARD_BF16)
    if (level == 3) return kernels_avx512bf16;
#endif
    if (level == 2) return kernels_avx512;
    if (level == 1) return kernels_avx2;
    return kernels_portable;
#else
#if defined(REGARD_NEON_BF16)
    if (level == 5) return kernels_neonbf16;
#endif
    (void)level;
    return kernels_portable;
#endif
}

}  // namespace regard

extern "C" {

int regard_built(void) {
#if defined(REGARD_PLAIN_TILES)
    return 16;  // a library for tests, of this level alone, compiled for AVX2 (tests/cpp)
#elif defined(REGARD_AMX)
    return 31;
#elif defined(REGARD_BF16)
    return 15;
#elif defined(REGARD_X86)
    return 7;
#elif defined(REGARD_NEON_BF16)
    return 33;
#else
    return 1;
#endif
}

int regard_levels(void) {
    static const int levels = regard::detect();
    return levels;
}

int regard_forward(const RegardCall* call) { return regard::at(call->level).forward(*call); }

int regard_backward(const RegardCall* call, const RegardBackward* back) {
    return regard::at(call->level).backward(*call, *back);
}

int regard_effect(const RegardCall* call, const RegardEffect* wanted) {
    return regard::at(call->level).effect(*call, *wanted);
}

int regard_pooled(const RegardCall* call, const RegardPooled* wanted) {
    return regard::at(call->level).pooled(*call, *wanted);
}

int regard_columns(const RegardCall* call, const RegardColumns* wanted) {
    return regard::at(call->level).columns(*call, *wanted);
}

int regard_sizes(int64_t* bytes, int room) {
    const int64_t sizes[] = {
        sizeof(RegardView), sizeof(RegardPages), sizeof(RegardMap), sizeof(RegardReceived),
        sizeof(RegardDistances), sizeof(RegardObserve), sizeof(RegardCall), sizeof(RegardBackward),
        sizeof(RegardEffect), sizeof(RegardTile), sizeof(RegardPooled), sizeof(RegardColumns),
        sizeof(RegardRows), sizeof(RegardEvict),
    };
    const int count = sizeof sizes / sizeof *sizes;
    for (int i = 0; i < count && i < room; i++) bytes[i] = sizes[i];
    return count;
}

int regard_parts(int64_t* seven) {
#if defined(REGARD_PARTS)
    for (int i = 0; i < regard::PART_COUNT; i++) seven[i] = regard::part_cycles[i].exchange(0);
    return 1;
#else
    (void)seven;
    return 0;
#endif
}

void regard_use_openmp(void* gomp_parallel) { regard::use_openmp(gomp_parallel); }

const char* regard_error(int code) {
    return code == 1 ? "out of memory" : code == 2 ? "every slot is to stay" : code ? "unknown error" : "";
}
}
