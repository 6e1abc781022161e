"""Biases: what is added to the scores before the softmax.

A bias lowers to an `Added`: a kind, its tensors, and how to read a tile of it. Positions are those
of the sequence, as in `masks`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from ..errors import RegardError
from .brief import Brief
from .geometry import Place, Span
from .numbers import FARTHEST, whole_fields


class Kind(IntEnum):
    """How a lowered bias is read; its tensor comes beside it."""

    ALIBI = 0  # slopes (heads,)
    RELATIVE = 1  # table (heads, buckets); arguments: bidirectional, max_distance
    DENSE = 2  # broadcastable to (batch, heads, q_len, k_len)


@dataclass(frozen=True, eq=False)
class Added:
    """A lowered bias for one call."""

    kind: Kind
    tensor: Tensor
    args: tuple[int, ...]
    query_start: int
    key_start: int

    def tile(self, span: Span, dtype: torch.dtype) -> Tensor:
        """The bias in a span, broadcastable to (batch, heads, q1 − q0, k1 − k0), in dtype."""
        if self.kind == Kind.DENSE:
            return span.cut(self.tensor).to(dtype)
        rows = replace(self, tensor=self.tensor[span.heads].to(dtype))
        return rows.along(self.offsets(span))[None]

    @property
    def dense(self) -> bool:
        """Whether it is a tensor, which may hold −∞: that hides a pair, whatever its score is."""
        return self.kind == Kind.DENSE

    def along(self, offsets: Tensor) -> Tensor:
        """A bias of distance alone, at offsets key − query (…): (heads, …)."""
        if self.kind == Kind.ALIBI:
            slopes = self.tensor.view(-1, *[1] * offsets.dim())
            return -slopes * offsets.abs()
        both, longest = self.args
        return self.tensor[:, relative_bucket(offsets, bool(both), self.tensor.shape[1], longest)]

    def item(self, batch: int) -> Added:
        """The same bias for one item of the batch."""
        return self.items(slice(batch, batch + 1))

    def items(self, which: slice | list[int]) -> Added:
        """The bias of these items of the batch."""
        if self.kind != Kind.DENSE or self.tensor.shape[0] == 1:
            return self
        return replace(self, tensor=self.tensor[which])

    def part(self, span: Span) -> Added:
        """The same bias for some queries, keys and heads of the call; its tensor is a view."""
        dense = self.kind == Kind.DENSE
        return replace(
            self,
            tensor=span.cut(self.tensor) if dense else self.tensor[span.heads],
            query_start=self.query_start + span.q0,
            key_start=self.key_start + span.k0,
        )

    def offsets(self, span: Span) -> Tensor:
        """key − query in a span: (q1 − q0, k1 − k0) int64."""
        device = self.tensor.device
        query = torch.arange(span.q0, span.q1, device=device, dtype=torch.int64) + self.query_start
        key = torch.arange(span.k0, span.k1, device=device, dtype=torch.int64) + self.key_start
        return key[None, :] - query[:, None]

    def buckets(self, span: Span) -> Tensor:
        """T5's bucket of each pair in a span: (q1 − q0, k1 − k0) int64."""
        both, longest = self.args
        return relative_bucket(self.offsets(span), bool(both), self.tensor.shape[1], longest)

    def collect(self, grad: Tensor, scores_grad: Tensor, span: Span) -> None:
        """Add d(loss)/d(scores) of a span to this bias' gradient, in place."""
        if self.kind == Kind.DENSE:
            part = span.cut(grad)
            summed = [d for d in range(4) if part.shape[d] == 1 and scores_grad.shape[d] > 1]
            part += scores_grad.sum(summed, keepdim=True) if summed else scores_grad
        else:
            grad[span.heads] += self.collect_along(scores_grad.sum(0), self.offsets(span))

    def collect_along(self, grad: Tensor, offsets: Tensor) -> Tensor:
        """The gradient of a bias of distance alone, from d(loss)/d(scores) at offsets key − query.

        grad (heads, …); offsets (…) int64.
        """
        if self.kind == Kind.ALIBI:
            return -(grad * offsets.abs()).flatten(1).sum(1)
        both, longest = self.args
        buckets = relative_bucket(offsets, bool(both), self.tensor.shape[1], longest)
        total = grad.new_zeros(len(grad), self.tensor.shape[1])
        return total.index_add_(1, buckets.flatten(), grad.flatten(1))


def relative_bucket(offset: Tensor, bidirectional: bool, buckets: int, longest: int) -> Tensor:
    """T5's bucket of key − query: exact up to buckets/4 (or /2), then logarithmic to `longest`.

    Raffel et al. 2020, section 2.1; the arithmetic is that of the published implementation.
    """
    base = torch.zeros_like(offset)
    if bidirectional:
        buckets //= 2
        base = (offset > 0).long() * buckets
        distance = offset.abs()
    else:
        distance = (-offset).clamp(min=0)
    exact = buckets // 2
    # In float32, so that the borders fall where trained tables expect them
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(longest / exact)
    far = exact + (ratio * (buckets - exact)).long()
    return base + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


class Bias(Brief):
    """What is added to the scores."""

    def lower(self, place: Place) -> Added:
        """The bias for a call at `place`. RegardError if it does not fit there."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class ALiBi(Bias):
    """−slope · |query − key|, a slope a head. Press et al. 2022, section 3.

    slopes (heads,); default: the paper's geometric series, for any number of heads.
    """

    slopes: Tensor | None = None

    def lower(self, place: Place) -> Added:
        slopes = self.slopes
        if slopes is None:
            slopes = torch.tensor(
                alibi_slopes(place.heads), dtype=torch.float64, device=place.device
            )
        _check(slopes, (place.heads,), place, "ALiBi: slopes")
        return Added(Kind.ALIBI, slopes, (), place.query_start, place.key_start)


def alibi_slopes(heads: int) -> list[float]:
    """The paper's slopes: 2^(−8/n), its powers; between powers of two, every other of the next."""
    power = 2 ** math.floor(math.log2(max(heads, 1)))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    more = [2 ** (-4 * (h + 1) / power) for h in range(0, 2 * (heads - power), 2)]
    return (slopes + more)[:heads]


@dataclass(frozen=True, eq=False)
class RelativeBias(Bias):
    """A learned number per head and distance bucket. Raffel et al. 2020 (T5), section 2.1.

    table (buckets, heads), as T5 stores it; it may need gradients.
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        whole_fields(self, "max_distance")

    def lower(self, place: Place) -> Added:
        if self.table.dim() != 2 or self.table.shape[0] < 4:
            raise RegardError(
                f"RelativeBias: table is {tuple(self.table.shape)}; give (buckets ≥ 4, heads)"
            )
        _check(self.table, (self.table.shape[0], place.heads), place, "RelativeBias: table")
        exact = self.table.shape[0] // (4 if self.bidirectional else 2)
        if not exact < self.max_distance <= FARTHEST:
            raise RegardError(
                f"RelativeBias: max_distance is {self.max_distance}; {self.table.shape[0]} buckets "
                f"are exact up to {exact}: give a larger one"
            )
        args = (int(self.bidirectional), self.max_distance)
        return Added(Kind.RELATIVE, self.table.mT, args, place.query_start, place.key_start)


@dataclass(frozen=True, eq=False)
class DenseBias(Bias):
    """A tensor broadcastable to (batch, heads, q_len, k_len); a bare tensor means this."""

    tensor: Tensor

    def lower(self, place: Place) -> Added:
        tensor = self.tensor
        if tensor.dim() < 4:
            tensor = tensor[(None,) * (4 - tensor.dim())]
        wanted = (place.batch, place.heads, place.q_len, place.k_len)
        if tensor.dim() != 4 or any(
            s not in (1, w) for s, w in zip(tensor.shape, wanted, strict=True)
        ):
            raise RegardError(
                f"bias {tuple(self.tensor.shape)} does not broadcast to {wanted} ({place})"
            )
        if not tensor.is_floating_point():
            raise RegardError(f"bias is {tensor.dtype}; give floats, or a mask: Dense(tensor)")
        _check(tensor, tuple(tensor.shape), place, "bias")
        return Added(Kind.DENSE, tensor, (), place.query_start, place.key_start)


def _check(tensor: Tensor, shape: tuple[int, ...], place: Place, name: str) -> None:
    if tuple(tensor.shape) != shape:
        raise RegardError(f"{name} is {tuple(tensor.shape)}, this call needs {shape} ({place})")
    if tensor.device != place.device:
        raise RegardError(
            f"{name} is on {tensor.device}, the query on {place.device}; move one of them"
        )
