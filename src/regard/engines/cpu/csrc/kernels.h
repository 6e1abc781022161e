// What each instruction set offers.
#pragma once
#include "abi.h"

namespace regard {

struct Kernels {
    int (*forward)(const RegardCall&);
    int (*backward)(const RegardCall&, const RegardBackward&);
    int (*effect)(const RegardCall&, const RegardEffect&);
    int (*pooled)(const RegardCall&, const RegardPooled&);
    int (*columns)(const RegardCall&, const RegardColumns&);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512bf16,
    kernels_amx, kernels_neonbf16;

}  // namespace regard
