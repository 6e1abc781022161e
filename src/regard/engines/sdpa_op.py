"""PyTorch's kernel for CPUs as an op of ours, for compilers and torch.func's gradients.

What a graph holds of the kernel itself multiplies by 0 what is hidden, with nobody to look at what
comes out. An opaque op looks inside, as eager calls do: where a number is not finite it computes
again with 0 there, and engine `tiled` the rows that see it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..call.checked import Call
from ..call.op_schema import SCHEMA, pack, unpack
from . import functorch as transforms
from . import hidden, sdpa, tiled
from .op_with_backward import op_with_backward


def wanted(call: Call) -> bool:
    """Whether somebody looks at the ops of a call that hides something.

    A program that is exported holds PyTorch's own op, which it runs anywhere.
    """
    watched = transforms.active() or (
        torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    )
    return watched and call.place.device.type == "cpu" and hidden.hides(call)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call that engine `sdpa` can run; out is differentiable, lse is not."""
    assert call.value is not None
    op, back = torch.ops.regard.sdpa, torch.ops.regard.sdpa_backward
    if transforms.active():
        return transforms.run(call, call.value, op, back)
    out, lse = op(call.query, call.key, call.value, *pack(call))
    return out, lse


def _computed(query: Tensor, key: Tensor, value: Tensor, *packed: Any) -> tuple[Tensor, Tensor]:
    call = unpack(query, key, value, *packed)
    out, lse = sdpa.forward(call)
    if not hidden.finite(query, key, value):  # as its gradient needs them
        out, lse = hidden.apart(call, sdpa.forward, tiled.forward)
    return _as_the_kernel_lays_it(out), lse.contiguous()


def _as_the_kernel_lays_it(out: Tensor) -> Tensor:
    """(batch, heads, q_len, v_dim), in memory (batch, q_len, heads, v_dim)."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _shapes(query: Tensor, key: Tensor, value: Tensor, *packed: Any) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, _ = query.shape
    working = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(batch, q_len, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, q_len, dtype=working)


def _computed_back(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    """Gradients of query, key and value; an empty tensor for each bias, of which none is wanted."""
    *packed, out, lse, grad_out, _, asked = rest
    call = unpack(query, key, value, *packed)
    if hidden.finite(query, key, value):
        grads = list(sdpa.backward(call, out, lse, grad_out))
    else:
        grads = _apart(call, out, lse, grad_out)
    return [*(g.contiguous() for g in grads), *(query.new_empty(0) for _ in asked)]


def _apart(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> list[Tensor]:
    """The gradients beside `hidden.apart`: rows that see what is not finite are `tiled`'s."""
    assert call.value is not None
    query, key, value = (hidden.filled(t) for t in (call.query, call.key, call.value))
    clean, odd = replace(call, query=query, key=key, value=value), hidden.rows_that_see(call)
    odd = odd[..., None]
    grads = list(sdpa.backward(clean, *sdpa.forward(clean), grad_out.masked_fill(odd, 0)))
    if odd.any():
        more = torch.ops.regard.tiled_backward(
            call.query, call.key, call.value, *pack(call), out, lse, grad_out.masked_fill(~odd, 0),
            torch.zeros_like(lse), [False] * len(call.biases),
        )  # fmt: skip
        grads = [a + b for a, b in zip(grads, more, strict=False)]
    return grads


_sdpa, _backward = op_with_backward(
    "sdpa",
    f"Tensor query, Tensor key, Tensor value, {SCHEMA}",
    "(Tensor, Tensor)",
    forward=_computed,
    fake=_shapes,
    backward=_computed_back,
    differentiable=("query", "key", "value", "bias_tensors", "sinks"),
    kept={0: "out", 1: "lse"},
    gradients=("Tensor grad_out", "Tensor grad_lse"),
)
