"""The gradients of one part of a call: some queries on some keys, under the global out and lse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.geometry import Span
from ...engines import hidden, tiled
from ...engines.cpu import engine as cpu
from ...engines.second_pass.triton import gradients as triton
from .whole import Whole

Compute = Callable[[Call, str], tuple[Tensor, Tensor, dict[int, Any]]]  # as `engines.run`


@dataclass(frozen=True, eq=False)
class Rows:
    """What the backward needs of some rows: all (batch, heads, rows, …), lse global.

    delta = grad_out · out − grad_lse, once for all keys; out is the global one.
    """

    query: Tensor
    lse: Tensor
    grad_out: Tensor
    delta: Tensor


class Gradients:
    """Sums up what parts give, in the working dtype: of biases and sinks over the whole call."""

    def __init__(self, whole: Whole, wanted: Sequence[bool]) -> None:
        self.whole, self.wanted = whole, list(wanted)
        working = whole.call.working
        self.biases = [
            replace(b, tensor=torch.zeros_like(b.tensor, dtype=working)) if w else None
            for b, w in zip(whole.call.biases, wanted, strict=True)
        ]

    def of(self, call: Call, rows: Rows, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value in the working dtype; those of biases are added."""
        *three, biases = _computed(call, rows, self.wanted)
        for total, gradient in zip(self.biases, biases, strict=True):
            if total is not None and gradient is not None:
                total.part(span).tensor.add_(gradient)  # a view
        return three[0], three[1], three[2]

    def finished(self) -> list[Tensor | None]:
        """Of the biases, each in its own dtype."""
        given = self.whole.call.biases
        return [
            None if total is None else total.tensor.to(bias.tensor.dtype)
            for total, bias in zip(self.biases, given, strict=True)
        ]


def of_sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of learned sinks, from all rows of this rank."""
    taken = (sinks.to(lse.dtype)[:, None] - lse).exp()
    taken = taken.masked_fill(lse == -torch.inf, 0)
    return -(taken * delta).sum((0, 2)).to(sinks.dtype)


def engine_of(call: Call) -> Any:
    """What computes a part's gradients, whichever engine computed its forward.

    They take the log-sum-exp and D of all keys: the compiled kernels, on CUDA those of Triton,
    where they can run; elsewhere plain torch.
    """
    if not cpu.why_not(call):
        return cpu
    return triton if call.place.device.type == "cuda" and not triton.why_not(call) else tiled


def _computed(
    call: Call, rows: Rows, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    still = replace(call, sinks=None)
    given = (rows.lse, rows.grad_out, rows.delta, wanted)
    if engine_of(still) is triton:
        four = triton.part_backward(still, *given)
        if hidden.finite(*four[:3]):
            return four
        return tiled.part_backward(_widened(still), *given)  # it keeps what is hidden apart
    chosen: Any = engine_of(still)
    found: tuple[Tensor, Tensor, Tensor, list[Tensor | None]] = chosen.part_backward(
        _widened(still), *given
    )
    return found


def _widened(call: Call) -> Call:
    """In the working dtype, so that what the keys of several parts get is rounded once."""
    assert call.value is not None
    tensors = (t.to(call.working) for t in (call.query, call.key, call.value))
    query, key, value = tensors
    return replace(call, query=query, key=key, value=value)
