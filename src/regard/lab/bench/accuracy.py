"""Whether a side's answer is right: against float64, on part of a large problem.

The bar is the project's: error ≤ 2 × (that of plain, eager torch in the same dtype + rounding).
Heads and rows do not depend on each other, so some of them are checked; what sums over rows (column
sums, the map, gradients of key and value) is checked whole, in one head or group. Of linear
attention the first tokens are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...call.geometry import Span
from ...call.observers import Entropy, Map, TopK
from ...ops.linear import linear_attention
from .dense import Answer, attend, pooled, sides, statistics
from .inputs import Inputs

WHOLE = 2**22  # weights of a head up to which all of its rows are checked
RUN = 64  # rows of each run otherwise: the first, the middle and the last
TOKENS = 4096  # the first ones, of linear attention: its specification goes one by one
STRIP = 2**24  # weights held at a time by what is summed over all rows


@dataclass(frozen=True)
class RowRange:
    """Some rows of one head of one item of the batch."""

    batch: int
    head: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor (batch, heads, q_len, …)."""
        one = tensor[self.batch : self.batch + 1, self.head : self.head + 1]
        return one[:, :, self.start : self.stop]


class Truth:
    """What the right answer to a problem is, in parts, and how far plain torch is from it."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.problem = inputs, inputs.problem
        self._specified = cache(self._specified_of)
        self._rows = cache(self._rows_of)
        self._columns = cache(self._columns_of)
        self._grads = cache(self._grads_of)

    def fault(self, answer: Answer) -> str | None:
        """The first fault of an answer; None if it is right."""
        p = self.problem
        checks = self._linear if p.form else self._backward if p.backward else self._forward
        return next((f for f in (*_blank(answer), *checks(answer)) if f is not None), None)

    def _linear(self, answer: Answer) -> Iterator[str | None]:
        exact, plain = (self._specified(d) for d in (torch.float64, self.problem.dtype))
        yield self._off("out", answer["out"][:, -self.problem.group :, :TOKENS], exact, plain)

    def _forward(self, answer: Answer) -> Iterator[str | None]:
        for part in self._parts():
            exact, weights = self._rows(part, torch.float64)
            plain, _ = self._rows(part, self.problem.dtype)
            mine = {name: part.of(answer[name]) for name in answer if name in exact}
            for name in ("out", "TopK", "Entropy"):
                if name in mine:
                    yield self._off(name, mine[name], exact[name], plain[name])
            if "TopK keys" in mine:
                # Rounding may exchange near ties: what counts is the weight of what is named
                named = [_named(weights, given["TopK keys"]) for given in (mine, plain)]
                yield self._off("TopK keys", named[0], exact["TopK"], named[1])
        for name in ("Received", "Map"):
            if name in answer:
                exact, plain = (self._columns(d) for d in (torch.float64, self.problem.dtype))
                yield self._off(name, answer[name][-1:, -1:], exact[name], plain[name])

    def _backward(self, answer: Answer) -> Iterator[str | None]:
        exact, plain = (self._grads(dtype) for dtype in (torch.float64, self.problem.dtype))
        for name in exact:
            mine = answer[name][-1:, -exact[name].shape[1] :]
            yield self._off(name, mine, exact[name], plain[name])

    def _off(self, what: str, ours: Tensor, exact: Tensor, plain: Tensor) -> str | None:
        if ours.shape != exact.shape:
            return f"{what} is {tuple(ours.shape)} where {tuple(exact.shape)} is right"
        rounding = self.problem.rounding * float(exact.abs().max())
        error, bar = _error(ours, exact), 2 * (_error(plain, exact) + rounding)
        # A NaN is not within the bar
        return None if error <= bar else f"{what} is off by {error:.1e}, bar {bar:.1e}"

    def _parts(self) -> Iterable[RowRange]:
        p = self.problem
        if p.q_len * p.k_len <= WHOLE or p.q_len <= 3 * RUN:
            runs = [(0, p.q_len)]
        else:
            starts = (0, p.q_len // 2, p.q_len - RUN)
            runs = [(start, start + RUN) for start in starts]
        ends = {(0, 0), (p.batch - 1, p.heads - 1)}
        return [RowRange(b, h, *run) for b, h in sorted(ends) for run in runs]

    def _given(
        self, part: RowRange, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
        """Query, key, value, who sees whom, and the scale, of a part."""
        call, kv = self.inputs.call, part.head // self.problem.group
        item, head = slice(part.batch, part.batch + 1), slice(part.head, part.head + 1)
        query = part.of(self.inputs.query).to(dtype)
        key, value = (t[item, kv : kv + 1].to(dtype) for t in self.inputs.tensors[1:])
        span = Span(part.start, part.stop, 0, self.problem.k_len, item, head)
        visible = None if self.inputs.full else call.program.visible(span)
        return query, key, value, visible, call.scale

    def _specified_of(self, dtype: torch.dtype) -> Tensor:
        """Linear attention of the first tokens, one by one, in the last kv head."""
        last = self.inputs.first(TOKENS, last=True)
        how: dict[str, Any] = {
            n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in last.items()
        }
        out: Tensor = linear_attention(**how, engine="reference")
        return out

    @torch.no_grad()
    def _rows_of(self, part: RowRange, dtype: torch.dtype) -> tuple[Answer, Tensor]:
        """Output and row statistics of a part, and its weights."""
        out, weights = attend(*self._given(part, dtype))
        by_row = tuple(o for o in self.problem.observe if isinstance(o, TopK | Entropy))
        return {"out": out} | statistics(by_row, weights), weights

    @torch.no_grad()
    def _columns_of(self, dtype: torch.dtype) -> Answer:
        """Received and Map of the last head, over all rows."""
        p = self.problem
        maps = [o for o in p.observe if isinstance(o, Map)]
        shape = torch.Size((p.q_len, p.k_len))
        rows, cols = sides(maps[0], shape) if maps else (1, 1)
        step = max(STRIP // p.k_len // rows, 1) * rows
        received, cells = torch.zeros(1, 1, p.k_len, dtype=torch.float64, device="cpu"), []
        for start in range(0, p.q_len, step):
            part = RowRange(p.batch - 1, p.heads - 1, start, min(start + step, p.q_len))
            _, weights = attend(*self._given(part, dtype))
            received += weights.sum(-2)
            cells.append(pooled(weights, rows, cols) if maps else weights[:0])
        return {"Received": received, "Map": torch.cat(cells, -2)}

    def _grads_of(self, dtype: torch.dtype) -> Answer:
        """The gradients of the last kv head and of its query heads."""
        p, i = self.problem, self.inputs
        heads = slice(p.heads - p.group, p.heads)
        given = [i.query[-1:, heads], i.key[-1:, -1:], i.value[-1:, -1:]]
        query, key, value = (t.detach().to(dtype).requires_grad_() for t in given)
        span = Span(0, p.q_len, 0, p.k_len, slice(p.batch - 1, p.batch), heads)
        visible = None if i.full else i.call.program.visible(span)
        out, _ = attend(query, key, value, visible, i.call.scale)
        tensors = torch.autograd.grad(out, (query, key, value), i.gradient[-1:, heads].to(dtype))
        return gradients(tensors)


def gradients(tensors: Iterable[Tensor]) -> Answer:
    """The gradients of query, key and value, by name."""
    return dict(zip(("d_query", "d_key", "d_value"), tensors, strict=True))


def _blank(answer: Answer) -> Iterator[str]:
    """What is not a number anywhere, outside the parts too."""
    for name, tensor in answer.items():
        if not tensor.isfinite().all():
            yield f"{name} holds NaN or infinity"


def _error(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact).abs().max())


def _named(weights: Tensor, keys: Tensor) -> Tensor:
    """The weights of the keys that were named; 0 for none (−1)."""
    return weights.gather(-1, keys.long().clamp(min=0)) * (keys >= 0)
