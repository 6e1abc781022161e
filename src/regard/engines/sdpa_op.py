"""PyTorch's kernels as an op of ours, for compilers and torch.func's gradients.

What a graph holds of a kernel itself multiplies by 0 what is hidden, with nobody to look at what
comes out. An opaque op looks inside, as eager calls do. On the CPU, where a number is not finite,
it computes again with 0 there, and engine `tiled` the rows that see it. On CUDA nothing waits for
an answer: kernels look at each block of what comes out and mend it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..call.checked import Call
from ..call.op_schema import SCHEMA, pack, unpack
from . import functorch as transforms
from . import hidden, sdpa, sdpa_cuda, tiled
from .blocks import launch as blocks
from .op_with_backward import op_with_backward


def wanted(call: Call) -> bool:
    """Whether somebody looks at the ops of a call that hides something; on CUDA, at gradients.

    A program that is exported holds PyTorch's own op, which it runs anywhere.
    """
    if not hidden.hides(call) or torch.compiler.is_exporting():
        return False
    watched = transforms.active() or torch.compiler.is_compiling()
    if not sdpa_cuda.serves(call):
        return watched and call.place.device.type == "cpu"
    return (watched or call.needs_grad) and blocks.mendable(call)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call that engine `sdpa` can run; out is differentiable, lse is not."""
    op, back = torch.ops.regard.sdpa, torch.ops.regard.sdpa_backward
    if sdpa_cuda.serves(call):
        call = sdpa.in_order(call)
    assert call.value is not None
    if transforms.active():
        return transforms.run(call, call.value, op, back)
    if sdpa_cuda.serves(call) and not torch.compiler.is_compiling():
        mended: tuple[Tensor, Tensor] = _Mended.apply(call.query, call.key, call.value, call)
        return mended
    out, lse = op(call.query, call.key, call.value, *pack(call))
    return out, lse


def _computed(query: Tensor, key: Tensor, value: Tensor, *packed: Any) -> tuple[Tensor, Tensor]:
    call = unpack(query, key, value, *packed)
    out, lse = sdpa.forward(call)
    if sdpa_cuda.serves(call):
        return _laid(out, query, value), lse.contiguous()
    if not hidden.finite(query, key, value):  # as its gradient needs them
        out, lse = hidden.apart(call, sdpa.forward, tiled.forward)
    return _laid(out, query, value), lse.contiguous()


def _laid(out: Tensor, query: Tensor, value: Tensor) -> Tensor:
    """As `_shapes` says; a copy where the kernel lays it otherwise."""
    empty = _empty(query, value)
    return out if out.stride() == empty.stride() else empty.copy_(out)


def _empty(query: Tensor, value: Tensor) -> Tensor:
    """(batch, heads, q_len, v_dim), in memory mostly as the kernels lay it.

    That for CPUs (batch, q_len, heads, v_dim), those on CUDA like the queries.
    """
    batch, heads, q_len, dim = query.shape
    if query.device.type == "cuda" and value.shape[-1] == dim:
        return torch.empty_like(query)
    return query.new_empty(batch, q_len, heads, value.shape[-1]).transpose(1, 2)


def _shapes(query: Tensor, key: Tensor, value: Tensor, *packed: Any) -> tuple[Tensor, Tensor]:
    working = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _empty(query, value), query.new_empty(query.shape[:3], dtype=working)


def _computed_back(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    """Gradients of query, key and value; an empty tensor for each bias, of which none is wanted."""
    *packed, out, lse, grad_out, _, asked = rest
    call = unpack(query, key, value, *packed)
    if sdpa_cuda.serves(call):
        kernel = sdpa_cuda.kernel_of(call, sdpa.capability(call))
        grads = _mended_back(call, kernel, kernel.mask(call), out, lse, grad_out)
    elif hidden.finite(query, key, value):
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


class _Mended(torch.autograd.Function):
    """One of PyTorch's kernels on CUDA, what it spoils mended, forward and backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Any:
        call = replace(call, query=query.detach(), key=key.detach(), value=value.detach())
        kernel = sdpa_cuda.kernel_of(call, sdpa.capability(call))
        laid = kernel.mask(call)
        out, lse = kernel.forward(call, laid)
        lse = lse.contiguous()
        if blocks.mendable(call):
            blocks.mend(call, out, lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rest = replace(call, query=lse, key=lse, value=None), kernel, laid
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        call, kernel, laid = ctx.rest
        call = replace(call, query=query, key=key, value=value)
        return *_mended_back(call, kernel, laid, out, lse, grad_out), None


def _mended_back(
    call: Call, kernel: sdpa_cuda.Kernel, laid: sdpa_cuda.Laid, out: Tensor, lse: Tensor,
    grad_out: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of query, key and value on CUDA."""
    grads = kernel.backward(call, laid, out, lse, grad_out)
    if blocks.mendable(call):
        blocks.mend_gradients(call, out, lse, grad_out, grads)
    return list(grads)


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
