"""Numbers that are not finite, kept to the rows that see them.

A hidden pair has weight 0, and 0 · NaN is NaN, as is 0 · ∞: a product over all keys would carry a
NaN of the padding, or of the future, into rows that do not see it. So products here are those of
the finite numbers, and beside them stands what each row sees of the others.

This costs several products for one, and nearly always all is finite. So whoever computes does it
plainly first, and with care only where what came out is not `finite`: no number that is spoiled
ever turns finite again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..call.checked import Call
from ..call.geometry import Span
from . import functorch as transforms

ROWS = 256  # queries whose mask is looked at together
Forward = Callable[[Call], tuple[Tensor, Tensor]]  # (out, lse)


def finite(*tensors: Tensor | None) -> bool:
    """Whether all numbers are finite; False also where a sum overflows, or nobody may look."""
    for tensor in tensors:
        if tensor is None or not tensor.numel():
            continue
        if not transforms.unwatched(tensor):
            return False
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        total = tensor.detach().sum(dtype=torch.float32 if half else None)
        if not math.isfinite(total.item()):
            return False
    return True


def filled(tensor: Tensor) -> Tensor:
    """With 0 for what is not finite; its gradient passes as it is."""
    return _Filled.apply(tensor)


def dot(query: Tensor, key: Tensor, shown: Callable[[], Tensor]) -> Tensor:
    """query @ keyᵀ: of pairs whose slope is 0, nothing reaches the other's gradient.

    shown: who sees whom, bool that broadcasts to the result; what is hidden is some finite number.
    """
    if not query.numel() or not key.numel() or finite(query, key):
        return query @ key.mT
    clean = filled(query) @ filled(key).mT
    rows, cols = (~torch.isfinite(t.detach()).all(-1) for t in (query, key))
    rest = query.detach() @ key.detach().mT - clean.detach()
    return clean + rest.where((rows[..., None] | cols[..., None, :]) & shown(), 0)


def mix(weights: Tensor, value: Tensor, seen: Callable[[], Tensor]) -> Tensor:
    """weights @ value over the pairs seen: (…, m, n), (…, n, d), and seen bool like weights."""
    plain = weights @ value
    return plain if finite(plain) else _Mixed.apply(weights, value, seen())


def visible_rest(weights: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """What the pairs seen add to a product of what is finite: NaN, ∞, −∞, or 0.

    As in any product, 0 · ∞ is NaN: where a weight that is seen has vanished.
    """
    bad = ~torch.isfinite(value)
    if transforms.unwatched(weights, value, seen):
        # Mostly a few keys
        some = bad.any(-1).flatten(0, -2).any(0)
        weights, seen, value = weights[..., some], seen[..., some], value[..., some, :]
    wide = weights.dtype if weights.dtype == torch.float64 else torch.float32

    def any_of(rows: Tensor, numbers: Tensor) -> Tensor:
        return (rows & seen).to(wide) @ numbers.to(wide) > 0

    above, below, high, low = weights > 0, weights < 0, value == torch.inf, value == -torch.inf
    up = any_of(above, high) | any_of(below, low)
    down = any_of(above, low) | any_of(below, high)
    lost = any_of(seen, torch.isnan(value)) | any_of(weights == 0, high | low) | (up & down)
    rest = torch.zeros(lost.shape, dtype=weights.dtype, device=weights.device)
    rest = rest.masked_fill(up, torch.inf).masked_fill(down, -torch.inf)
    return rest.masked_fill(lost, torch.nan)


def beside_biases(call: Call) -> bool:
    """Whether a bias may have to hide a score that is not finite: NaN − ∞ is NaN."""
    return any(b.dense for b in call.biases) and not finite(call.query, call.key)


def plus(log: Tensor, more: Tensor) -> Tensor:
    """log + more, −inf where log is, whatever more is."""
    total = log + more
    return total if finite(more) else total.masked_fill_(log == -torch.inf, -torch.inf)


def hides(call: Call) -> bool:
    """Whether some row may not see some key."""
    return not call.program.full or bool(call.biases) or call.pages is not None


def spread_by(call: Call, out: Tensor) -> bool:
    """Whether a kernel that multiplies what is hidden by 0 may have spoiled rows or gradients."""
    tensors = (call.query, call.key, call.value)
    if not hides(call) or call.place.device.type != "cpu" or not transforms.unwatched(*tensors):
        return False
    return not finite(*(tensors if call.needs_grad else (out,)))


def apart(call: Call, by: Forward, exactly: Forward) -> tuple[Tensor, Tensor]:
    """(out, lse) `by` a kernel, with 0 for what is not finite; `exactly` of rows that see it."""
    call = call.gathered()
    assert call.value is not None
    query, key, value = (filled(t) for t in (call.query, call.key, call.value))
    out, lse = by(replace(call, query=query, key=key, value=value))
    odd = rows_that_see(call)
    if not odd.any():
        return out, lse
    exact, exact_lse = exactly(call)
    return exact.where(odd[..., None], out), exact_lse.to(lse.dtype).where(odd, lse)


def rows_that_see(call: Call) -> Tensor:
    """Which rows hold or see a number that is not finite: bool (batch, heads, q_len)."""
    assert call.value is not None
    place = call.place
    rows, keys, values = (
        ~torch.isfinite(t.detach()).all(-1) for t in (call.query, call.key, call.value)
    )
    group = place.heads // place.kv_heads
    keys, values = (t.repeat_interleave(group, 1)[:, :, None] for t in (keys, values))
    for q0 in range(0, place.q_len, ROWS):
        q1 = min(q0 + ROWS, place.q_len)
        span = Span(q0, q1, 0, place.k_len)
        shown = call.program.visible(span)
        for bias in call.biases:
            shown = shown & (bias.tile(span, call.working) != -torch.inf)
        rows[:, :, q0:q1] &= shown.any(-1)
        rows[:, :, q0:q1] |= (shown & (keys | values)).any(-1)
    return rows


class _Filled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.masked_fill(~torch.isfinite(tensor), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Mixed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        return careful_product(weights, value, seen)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, value, seen = ctx.saved_tensors
        d_weights = (grad @ value.mT).masked_fill(~seen, 0)
        return d_weights, careful_product(weights.mT, grad, seen.mT), None


def careful_product(weights: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """As `mix`, in any case."""
    return weights @ value.masked_fill(~torch.isfinite(value), 0) + visible_rest(
        weights, value, seen
    )
