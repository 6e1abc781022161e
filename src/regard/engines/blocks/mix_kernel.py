"""Triton: weights times values, of which those that no row sees add nothing."""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from ..second_pass.triton.scores_kernel import WIDEN

_LOST = tl.constexpr(16384.0)  # 128², within float16


@triton.jit
def mix(p, value, seen):
    """p · value over the pairs seen, at most 64 of a row: 0 · NaN of a hidden one would be NaN."""
    odd = not_finite(value)
    mixed = product(p, tl.where(odd, 0, value), value)
    if tl.max(odd.to(tl.int32)) > 0:  # beside it what rows see of the odd ones, as in `hidden.py`
        # One product counts all kinds in digits of base 128, which up to 64 keys do not fill; what
        # is above the second is NaN: a NaN, and infinities that a vanished weight multiplies
        kind = tl.where(value == float("inf"), 1.0, tl.where(value == float("-inf"), 128.0, 0.0))
        kind = tl.where(value != value, _LOST, kind)
        found = product(tl.where(seen, tl.where(p == 0, _LOST, 1.0), 0.0), kind, value)
        lost = found >= _LOST
        count = tl.where(lost, 0.0, found).to(tl.int32)
        mixed = tl.where((count & 127) > 0, mixed + float("inf"), mixed)
        mixed = tl.where((count >> 7) > 0, mixed - float("inf"), mixed)
        mixed = tl.where(lost, float("nan"), mixed)
    return mixed


@triton.jit
def product(a, b, like):
    """a · b in the type of `like`, summed in float32."""
    if WIDEN:
        return tl.dot(a, b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a.to(like.dtype), b.to(like.dtype), input_precision="ieee")


@triton.jit
def not_finite(x):
    """Which numbers are NaN or infinite."""
    return (tl.abs(x.to(tl.float32)) < float("inf")) == 0
