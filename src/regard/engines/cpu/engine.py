"""Compiled kernels for the CPU, with the observers inside the forward.

Kernels: csrc (Dao et al. 2022; lanes are queries). They read the mask's program, strides and
grouped heads in place, in O(N) memory. Scores and sums are float32; the same input gives the same
bits whatever the threads, the run, or the other items of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...call.checked import Call
from ...call.observers import Effect, Observer, from_json, to_json
from ...call.op_schema import SCHEMA, pack, unpack
from .. import functorch as transforms
from ..op_with_backward import op_with_backward
from ..second_pass.effect import attach
from . import native
from .call_struct import FUSED, TYPES
from .calls import effect, run, run_backward

name = "cpu"

MOST_CODE = 1024  # integers of a mask's program (csrc/mask.h)


def why_not(call: Call) -> list[str]:
    """It takes every mask, bias, cap, sink and dropout; not float64, and no other device."""
    reasons = []
    if not native.AVAILABLE:
        reasons.append("this installation was built without the compiled kernels")
    if call.place.device.type != "cpu":
        reasons.append(f"query is on {call.place.device}; this engine runs on cpu")
    if call.query.dtype not in TYPES:
        kind = str(call.query.dtype).removeprefix("torch.")
        reasons.append(f"query is {kind}; it computes in float32")
    if call.pages is not None and (call.needs_grad or not direct(call)):
        reasons.append("keys lie in pages; they take no gradients, and no compiler or transform")
    if transforms.active():
        reasons.append("a transform of torch.func looks on; it serves none")
    if len(call.program.code) > MOST_CODE:
        reasons.append(f"the mask has {len(call.program.code)} integers, more than {MOST_CODE}")
    return reasons


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable in everything that goes in."""
    out, lse, *_ = _computed(call, ())
    return out, lse


def observed(call: Call) -> tuple[Tensor, Tensor, dict[int, Any]]:
    """(out, lse, results): of those observers that the forward gathers itself, by their number."""
    mine = {i: o for i, o in enumerate(call.observers) if isinstance(o, FUSED)}
    out, lse, stats, *tensors = _computed(call, tuple(mine.values()))
    results: dict[int, Any] = {}
    effects = {i: o for i, o in enumerate(call.observers) if isinstance(o, Effect) and not o.norm}
    if effects and out.requires_grad and direct(call):
        still = replace(call, query=call.query.detach(), key=call.key.detach())
        for i, wanted in effects.items():
            by = partial(effect, still, out.detach(), stats, wanted.k)
            results[i] = attach(call, lse, out, wanted, by)
    for i, observer in mine.items():
        count = len(observer.shapes(call.place, call.working))
        results[i] = observer.result([t.detach() for t in tensors[:count]], call.place)
        del tensors[:count]
    return out, lse, results


def _computed(call: Call, observers: tuple[Observer, ...]) -> Any:
    """out, lse, stats, and the tensors of the observers: by the shortest way that serves the call.

    A registered op costs more than decoding one token does; it is for those who look at ops.
    """
    if not direct(call):
        return torch.ops.regard.cpu(
            call.query, call.key, call.value, *pack(call), to_json(observers), call.needs_grad
        )
    if not call.needs_grad:
        return run(call, observers)
    biases = [b.tensor for b in call.biases]
    return _Attention.apply(call, observers, call.query, call.key, call.value, call.sinks, *biases)


def part_backward(
    call: Call, lse: Tensor, grad_out: Tensor, delta: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Gradients of query, key, value and biases where the call's keys are some of many.

    lse is that of all keys, delta = grad_out · out − grad_lse with the out of all keys.
    """
    # exp(score − top) / total is then exp(score − lse); of a row that sees nothing it is not read
    top = lse.float().masked_fill(lse == -torch.inf, 0)
    stats = torch.stack([top, torch.ones_like(top)], -1)
    grad_out = grad_out.to(call.query.dtype)
    grads, biases, _ = run_backward(call, grad_out, stats, grad_out, None, wanted, delta)
    return grads[0], grads[1], grads[2], biases


def direct(call: Call) -> bool:
    """Whether nobody but autograd looks at the ops of this call: no compiler, mode or transform."""
    return transforms.unwatched(call.query, call.key, call.value)


class _Attention(torch.autograd.Function):
    """The kernels under autograd, at a tenth of a registered op's cost."""

    @staticmethod
    def forward(ctx: Any, call: Call, observers: tuple[Observer, ...], *tensors: Any) -> Any:
        out, lse, stats, *seen = run(call, observers, stats=True)
        query, key, value, sinks, *biases = tensors
        ctx.call, ctx.wanted = _emptied(call), [b.requires_grad for b in biases]
        ctx.save_for_backward(query, key, value, sinks, out, stats, *biases)
        ctx.mark_non_differentiable(stats, *seen)
        ctx.set_materialize_grads(False)
        return (out, lse, stats, *seen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: Any) -> Any:
        query, key, value, sinks, out, stats, *biases = ctx.saved_tensors
        call = _filled(ctx.call, query, key, value, sinks, biases)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads, d_biases, d_sinks = run_backward(call, out, stats, grad_out, grad_lse, ctx.wanted)
        return None, None, *grads, d_sinks, *d_biases


def _emptied(call: Call) -> Call:
    """The call without the tensors that autograd keeps."""
    nothing = torch.empty(0, dtype=torch.float32, device="cpu")
    biases = tuple(replace(b, tensor=nothing) for b in call.biases)
    return replace(
        call, query=nothing, key=nothing, value=nothing, sinks=None, biases=biases, observers=()
    )


def _filled(
    call: Call, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None,
    biases: Sequence[Tensor],
) -> Call:  # fmt: skip
    own = tuple(replace(b, tensor=t) for b, t in zip(call.biases, biases, strict=True))
    return replace(call, query=query, key=key, value=value, sinks=sinks, biases=own)


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    *packed, observers, stats = rest
    return run(unpack(query, key, value, *packed), from_json(observers), stats)


def _shapes(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    *packed, observers, stats = rest
    call = unpack(query, key, value, *packed)
    rows = query.shape[:3]
    numbers = (*rows, 2) if stats else (0,)
    shapes = [s for o in from_json(observers) for s in o.shapes(call.place, call.working)]
    return [
        query.new_empty(*rows, value.shape[-1]),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty(numbers, dtype=torch.float32),
        *(query.new_empty(shape, dtype=dtype) for shape, dtype in shapes),
    ]


def _backward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    """Gradients of query, key, value, the biases (empty where not wanted), and the sinks."""
    *packed, out, stats, grad_out, grad_lse, wanted = rest
    call = unpack(query, key, value, *packed)
    grads, d_biases, d_sinks = run_backward(call, out, stats, grad_out, grad_lse, wanted)
    grads += [query.new_empty(0) if g is None else g for g in d_biases]
    return grads if d_sinks is None else [*grads, d_sinks]


op_with_backward(
    "cpu",
    f"Tensor query, Tensor key, Tensor value, {SCHEMA}, str observers, bool stats",
    "Tensor[]",
    forward=_forward,
    fake=_shapes,
    backward=_backward,
    differentiable=("query", "key", "value", "bias_tensors", "sinks"),
    kept={0: "out", 2: "stats"},
    gradients=("Tensor grad_out", "Tensor? grad_lse"),
    unread=("observers", "stats"),
)
