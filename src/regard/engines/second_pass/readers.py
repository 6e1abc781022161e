from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.observers import (
    Distances,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    NormTopK,
    Observer,
    Received,
    Rows,
    TopK,
)
from ..hidden import plus
from .strips import StripWeights, take
from .top_k import largest

READERS: dict[type[Observer], type[Accumulator]] = {}  # of softmax attention; `of` enters them


class Accumulator:
    """Feeds strips into the tensors of one observer."""

    def __init_subclass__(cls, *, of: type[Observer] | None = None) -> None:
        if of is not None:
            READERS[of] = cls

    def __init__(self, observer: Any, call: Call) -> None:
        self.observer, self.call, self.place = observer, call, call.place
        shapes = observer.shapes(call.place, call.working)
        self.tensors = [torch.zeros(s, dtype=d, device=call.place.device) for s, d in shapes]
        self.start()

    def start(self) -> None:
        """Set what an untouched row holds, where that is not 0."""

    def read(self, seen: StripWeights) -> None:
        """Take what the observer keeps from one strip."""
        raise NotImplementedError

    def finish(self, lse: Tensor) -> list[Tensor]:
        """The filled tensors, after the last strip."""
        return self.tensors


class TopKAccumulator(Accumulator, of=TopK):
    def start(self) -> None:
        self.tensors[0].fill_(-1)

    def read(self, seen: StripWeights) -> None:
        indices, weights, rest, _ = self.tensors
        k = min(self.observer.k, seen.log.shape[-1])
        logs, cols = largest(seen.log, k)
        listed = logs.exp() / seen.total[..., None]
        at = seen.strip.here
        # NaN, and +inf under a NaN lse, are kept: they surface
        shown = logs != -torch.inf
        keys = seen.strip.keys()[cols] + self.place.key_start
        indices[at][..., :k] = keys.where(shown, -1).to(torch.int32)
        weights[at][..., :k] = listed
        rest[at] = (seen.mass - listed.sum(-1)).clamp(min=0)

    def finish(self, lse: Tensor) -> list[Tensor]:
        if self.call.sinks is not None:
            self.tensors[3] = (self.call.sinks.to(lse.dtype)[:, None] - lse).exp()
        return self.tensors


class NormTopKAccumulator(Accumulator, of=NormTopK):
    norms: Tensor  # (batch, heads, k_len), given before the first strip

    def start(self) -> None:
        self.tensors[0].fill_(-1)

    def read(self, seen: StripWeights) -> None:
        indices, norms, weights = self.tensors
        k = min(self.observer.k, seen.log.shape[-1])
        own = take(seen.strip.runs, self.norms[seen.part.batch, seen.part.heads], 2)
        logs, cols = largest(plus(seen.log, own.log()[:, :, None]), k)
        at, shown = seen.strip.here, logs != -torch.inf
        keys = seen.strip.keys()[cols] + self.place.key_start
        total = seen.total[..., None]
        indices[at][..., :k] = keys.where(shown, -1).to(torch.int32)
        norms[at][..., :k] = logs.exp() / total
        weights[at][..., :k] = (seen.log.gather(-1, cols).exp() / total).where(shown, 0)


class ReceivedAccumulator(Accumulator, of=Received):
    def start(self) -> None:
        self.rows = self.observer.span(self.place)
        self.pooled = self.observer.pooled(self.place)
        shape = (self.place.batch, self.place.heads, self.place.k_len)
        self.count = torch.zeros(shape, dtype=torch.int32, device=self.place.device)

    def read(self, seen: StripWeights) -> None:
        part = seen.part
        r0, r1 = (min(max(r - part.q0, 0), part.q1 - part.q0) for r in self.rows)
        if r0 == r1:
            return
        everything = r1 - r0 == part.q1 - part.q0
        given = seen.column_sum if everything else seen.weights[:, :, r0:r1].sum(-2)
        counted = torch.full_like(given, r1 - r0, dtype=torch.int32)
        for col, hidden in seen.strip.hidden:
            width = hidden.shape[-1]
            counted[..., col : col + width] -= hidden[:, :, r0:r1].sum(-2, dtype=torch.int32)
        here = (part.batch, part.heads)
        seen.strip.add(self.count[here], counted, 2)
        total = self.tensors[0]
        if self.pooled == self.place.heads and self.observer.heads == "each":
            seen.strip.add(total[here], given, 2)
            return
        size = self.place.heads // self.pooled
        owner = (
            torch.arange(self.place.heads, device=given.device, dtype=torch.int64)[part.heads]
            // size
        )
        summed = given.new_zeros(given.shape[0], self.pooled, given.shape[-1])
        summed.index_add_(1, owner, given)
        seen.strip.add(total[part.batch], summed, 2)

    def finish(self, lse: Tensor) -> list[Tensor]:
        size = self.place.heads // self.pooled
        total = self.tensors[0]
        if self.observer.heads.endswith("mean"):
            total = total / size
        # A pooled column counts the queries that see it in any of its heads
        return [total, self.count.unflatten(1, (self.pooled, size)).amax(2)]


class EntropyAccumulator(Accumulator, of=Entropy):
    def read(self, seen: StripWeights) -> None:
        terms = seen.exp * seen.log
        # A hidden pair is 0 · −inf there
        for col, hidden in seen.strip.hidden:
            terms[..., col : col + hidden.shape[-1]].masked_fill_(hidden, 0)
        if self.call.biases:
            terms.masked_fill_(seen.log == -torch.inf, 0)
        # ln(weight) is log − ln(total)
        entropy = seen.mass * seen.total.log() - terms.sum(-1) / seen.total
        self.tensors[0][seen.strip.here] = entropy


class MaxScoreAccumulator(Accumulator, of=MaxScore):
    def start(self) -> None:
        self.tensors[0].fill_(-torch.inf)

    def read(self, seen: StripWeights) -> None:
        self.tensors[0][seen.strip.here] = seen.top


class LogSumExpAccumulator(Accumulator, of=LogSumExp):
    def read(self, seen: StripWeights) -> None:
        """Nothing: the pass was given it."""

    def finish(self, lse: Tensor) -> list[Tensor]:
        return [lse.to(self.tensors[0].dtype, copy=True)]


class RowsAccumulator(Accumulator, of=Rows):
    def start(self) -> None:
        self.wanted = [row for _, row in self.observer.local(self.place)]

    def read(self, seen: StripWeights) -> None:
        part = seen.part
        for n, row in enumerate(self.wanted):
            if part.q0 <= row < part.q1:
                mine = self.tensors[0][part.batch, part.heads, n]
                seen.strip.add(mine, seen.weights[:, :, row - part.q0], 2)


class MapAccumulator(Accumulator, of=Map):
    def start(self) -> None:
        self.rows, self.cols = self.observer.cells(self.place)
        self.max = self.observer.reduce == "max"

    def read(self, seen: StripWeights) -> None:
        part, place = seen.part, self.place
        first = (place.query_start + part.q0) // self.rows.size
        last = (place.query_start + part.q1 - 1) // self.rows.size
        if first == last and not self.max:
            pooled = seen.column_sum[:, :, None]
        else:
            pooled = self._pool(seen.weights, -2, place.query_start + part.q0, self.rows.size)
        keys = (seen.strip.keys() + place.key_start) // self.cols.size - self.cols.first
        target = self.tensors[0][part.batch, part.heads, first - self.rows.first :]
        target = target[:, :, : last - first + 1]
        if self.max:
            target.scatter_reduce_(-1, keys.expand_as(pooled), pooled, "amax")
        else:
            target.index_add_(-1, keys, pooled)

    def _pool(self, weights: Tensor, dim: int, start: int, size: int) -> Tensor:
        """Rows into cells of `size`: aligned ones by a view, the ragged ends apart."""
        length = weights.shape[dim]
        head = min(-start % size, length)
        body = (length - head) // size * size
        parts = []
        if head:
            parts.append(self._reduce(weights.narrow(dim, 0, head), dim, keepdim=True))
        if body:
            parts.append(
                self._reduce(weights.narrow(dim, head, body).unflatten(dim, (-1, size)), dim)
            )
        if head + body < length:
            tail = weights.narrow(dim, head + body, length - head - body)
            parts.append(self._reduce(tail, dim, keepdim=True))
        return torch.cat(parts, dim)

    def _reduce(self, part: Tensor, dim: int, keepdim: bool = False) -> Tensor:
        return part.amax(dim, keepdim) if self.max else part.sum(dim, keepdim)


class DistancesAccumulator(Accumulator, of=Distances):
    """Shears each run of a strip so that every distance stands in one column, then adds up."""

    def start(self) -> None:
        self.edges = torch.tensor(self.observer.edges, device=self.place.device, dtype=torch.int64)

    def read(self, seen: StripWeights) -> None:
        for at, span in seen.strip.spans():
            p = seen.weights[..., at : at + span.k1 - span.k0]
            items, heads, rows, cols = p.shape
            length = rows + cols - 1
            sheared = p.new_zeros(items, heads, rows * length)
            stride = sheared.stride()
            # (i, j) goes to column rows − 1 − i + j, so a column is one value of query − key
            sheared.as_strided(p.shape, (stride[0], stride[1], length - 1, 1), rows - 1).copy_(p)
            by_distance = sheared.view(items, heads, rows, length).sum(2)
            most = self.place.query_start - self.place.key_start + span.q0 - span.k0 + rows - 1
            distance = most - torch.arange(length, device=p.device, dtype=torch.int64)
            bins = torch.bucketize(distance.abs(), self.edges, right=True) - 1
            behind = distance >= 0
            for tensor, side in zip(self.tensors, (behind, ~behind), strict=True):
                mine = tensor[seen.part.batch, seen.part.heads]
                mine.index_add_(-1, bins[side], by_distance[..., side])
