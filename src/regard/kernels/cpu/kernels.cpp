// Compiled once for each instruction set: LEVEL is its name, WIDTH its floats in a vector.
#include <new>

#include "backward.h"
#include "forward.h"

namespace regard {

int LEVEL_NAME(forward)(const RegardCall& call) { return LEVEL::forward(call); }

int LEVEL_NAME(backward)(const RegardCall& call, const RegardBackward& back) {
    return LEVEL::backward(call, back);
}

}  // namespace regard
