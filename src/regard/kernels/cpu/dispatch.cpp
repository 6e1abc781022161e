// The C interface: picks the instruction set.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace regard {

void use_openmp(void*);
#if defined(REGARD_X86)
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
    // AVX-512 F, DQ, BW, VL
    if ((levels & 2) && (low & 0xe6) == 0xe6 && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) &&
        (b >> 31 & 1))
        levels |= 4;
    return levels;
}
#else
static int detect() { return 1; }
#endif

static const Kernels& at(int64_t level) {
#if defined(REGARD_X86)
    if (level == 2) return kernels_avx512;
    if (level == 1) return kernels_avx2;
#else
    (void)level;
#endif
    return kernels_portable;
}

}  // namespace regard

extern "C" {

int regard_built(void) {
#if defined(REGARD_X86)
    return 7;
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

void regard_use_openmp(void* gomp_parallel) { regard::use_openmp(gomp_parallel); }

const char* regard_error(int code) {
    return code == 1 ? "out of memory" : code ? "unknown error" : "";
}
}
