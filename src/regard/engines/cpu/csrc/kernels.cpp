// Compiled once for each instruction set: LEVEL is its name, WIDTH its floats in a vector.
#include "kernels.h"

#include <new>

#include "backward.h"
#include "columns.h"
#include "effect.h"
#include "forward.h"
#include "pooled.h"

namespace regard {

const Kernels LEVEL_NAME(kernels) = {LEVEL::forward, LEVEL::backward, LEVEL::effect, LEVEL::pooled,
                                     LEVEL::columns};

}  // namespace regard
