"""Observers: what to keep of the attention weights, in O(N·k) memory.

An observer is a small frozen value; what it saw comes back as a typed result, in the order asked.
Results are per batch and head and carry no gradients. Weights are those before dropout; where
learned sinks stand in the denominator, the rows sum to less than 1 and stay so.

How results merge: `then` appends later queries of the same sequence (decode steps); `beside`
joins key shards whose results were read with the *global* lse.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import RegardError
from .masks import Place

Shape = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Cells:
    """A grid over one side of the map: cells of `size` (a power of two), from cell `first`."""

    first: int
    count: int
    size: int

    @classmethod
    def fitting(cls, start: int, length: int, most: int) -> Cells:
        """The smallest cells such that at most `most` of them cover start … start + length − 1."""
        size = 1
        while length and (start + length - 1) // size - start // size >= most:
            size *= 2
        first = start // size
        count = (start + length - 1) // size - first + 1 if length else 0
        return cls(first, count, size)


class Observer:
    """What to keep of the weights."""

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        """Shape and dtype of the tensors that a pass over the weights fills."""
        raise NotImplementedError

    def result(self, tensors: list[Tensor], place: Place) -> Any:
        """The typed result made of those tensors."""
        raise NotImplementedError

    def check(self, place: Place) -> None:
        """RegardError if this observer cannot watch a call at `place`."""


@dataclass(frozen=True, eq=False)
class TopKSeen:
    """The k largest weights of each row, largest first; ties go to the lower key.

    indices int32 (batch, heads, q_len, k): positions of keys, −1 where fewer were visible.
    weights (batch, heads, q_len, k). rest (batch, heads, q_len): the visible mass not listed.
    sink (batch, heads, q_len): the mass that learned sinks took (0 without).
    """

    indices: Tensor
    weights: Tensor
    rest: Tensor
    sink: Tensor

    def then(self, later: TopKSeen) -> TopKSeen:
        """With the rows of later queries appended."""
        return TopKSeen(*_appended(self, later, 2))

    def beside(self, other: TopKSeen) -> TopKSeen:
        """With another key shard's candidates, both under the global lse."""
        k = self.indices.shape[-1]
        weights = torch.cat([self.weights, other.weights], -1)
        indices = torch.cat([self.indices, other.indices], -1)
        # Absent entries (−1) last; else by key first, so that a stable sort keeps ties in order
        order = indices.long().where(indices >= 0, torch.iinfo(torch.int64).max).argsort(-1)
        weights, indices = weights.gather(-1, order), indices.gather(-1, order)
        ranked = (
            weights.where(indices >= 0, -1.0).sort(dim=-1, descending=True, stable=True).indices
        )
        weights, indices = weights.gather(-1, ranked), indices.gather(-1, ranked)
        dropped = weights[..., k:].sum(-1)
        return TopKSeen(
            indices[..., :k], weights[..., :k], self.rest + other.rest + dropped, self.sink
        )


@dataclass(frozen=True)
class TopK(Observer):
    """The k largest weights of each row, and what remains."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RegardError(f"{self}: give k ≥ 1")

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        row = (place.batch, place.heads, place.q_len)
        return [((*row, self.k), torch.int32), ((*row, self.k), dtype), (row, dtype), (row, dtype)]

    def result(self, tensors: list[Tensor], place: Place) -> TopKSeen:
        return TopKSeen(*tensors)


@dataclass(frozen=True, eq=False)
class ReceivedSeen:
    """Column sums: what each key received.

    sum (batch, heads, k_len), heads being 1 or kv_heads where they were pooled.
    count int32 (batch, heads, k_len): the queries that see the key.
    queries: how many queries were summed over. key_start: the first key's position.
    """

    sum: Tensor
    count: Tensor
    queries: int
    key_start: int

    @property
    def mean(self) -> Tensor:
        """Per visible query (batch, heads, k_len); 0 where no query sees the key."""
        return self.sum / self.count.clamp(min=1)

    def then(self, later: ReceivedSeen) -> ReceivedSeen:
        """With later queries added; they may see more keys, and no longer see the first."""
        starts = (self.key_start, later.key_start)
        total = _aligned((self.sum, later.sum), starts)
        count = _aligned((self.count, later.count), starts)
        queries = self.queries + later.queries
        return ReceivedSeen(total[0] + total[1], count[0] + count[1], queries, min(starts))

    def beside(self, other: ReceivedSeen) -> ReceivedSeen:
        """With the keys of another shard."""
        return replace(self.then(other), queries=self.queries)


@dataclass(frozen=True)
class Received(Observer):
    """What each key receives, summed over the queries (a range of positions, or all).

    heads: "each", or pooled "sum" / "mean" over all heads, or over the query heads of each kv head
    ("group_sum" / "group_mean"). The result has the sum, the count, and the mean per visible query.
    """

    queries: tuple[int, int] | None = None
    heads: Literal["each", "sum", "mean", "group_sum", "group_mean"] = "each"

    def __post_init__(self) -> None:
        if self.heads not in ("each", "sum", "mean", "group_sum", "group_mean"):
            raise RegardError(f"{self}: heads is each, sum, mean, group_sum or group_mean")
        if self.queries is not None and not 0 <= self.queries[0] <= self.queries[1]:
            raise RegardError(f"{self}: queries is a range (start, stop) of positions")

    def span(self, place: Place) -> tuple[int, int]:
        """The rows of the call that count: start, stop."""
        if self.queries is None:
            return 0, place.q_len
        start, stop = (min(max(p - place.query_start, 0), place.q_len) for p in self.queries)
        return start, stop

    def pooled(self, place: Place) -> int:
        """The number of heads of the result."""
        if self.heads == "each":
            return place.heads
        return place.kv_heads if self.heads.startswith("group") else 1

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        heads = self.pooled(place)
        return [
            ((place.batch, heads, place.k_len), dtype),
            ((place.batch, heads, place.k_len), torch.int32),
        ]

    def result(self, tensors: list[Tensor], place: Place) -> ReceivedSeen:
        start, stop = self.span(place)
        return ReceivedSeen(tensors[0], tensors[1], stop - start, place.key_start)


@dataclass(frozen=True, eq=False)
class RowSeen:
    """One number per row: values (batch, heads, q_len)."""

    values: Tensor

    def then(self, later: RowSeen) -> RowSeen:
        """With the rows of later queries appended."""
        return type(self)(torch.cat([self.values, later.values], 2))


class EntropySeen(RowSeen):
    """values (batch, heads, q_len): −Σ p ln p over keys, in nats, not renormalised."""

    def beside(self, other: EntropySeen) -> EntropySeen:
        """Joined with another key shard, both under the global lse."""
        return EntropySeen(self.values + other.values)


class MaxScoreSeen(RowSeen):
    """values (batch, heads, q_len): the largest score of the row; −inf where none is visible."""

    def beside(self, other: MaxScoreSeen) -> MaxScoreSeen:
        """Joined with another key shard."""
        return MaxScoreSeen(torch.maximum(self.values, other.values))


class LogSumExpSeen(RowSeen):
    """values (batch, heads, q_len): natural log-sum-exp of the row; −inf where none is visible."""

    def beside(self, other: LogSumExpSeen) -> LogSumExpSeen:
        """Joined with another key shard's own (not global) lse."""
        return LogSumExpSeen(torch.logaddexp(self.values, other.values))


@dataclass(frozen=True)
class _PerRow(Observer):
    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        return [((place.batch, place.heads, place.q_len), dtype)]


class Entropy(_PerRow):
    """The entropy of each row, in nats: 0 reads one key, ln n spreads evenly over n."""

    def result(self, tensors: list[Tensor], place: Place) -> EntropySeen:
        return EntropySeen(tensors[0])


class MaxScore(_PerRow):
    """The largest score of each row, after scale, softcap and bias."""

    def result(self, tensors: list[Tensor], place: Place) -> MaxScoreSeen:
        return MaxScoreSeen(tensors[0])


class LogSumExp(_PerRow):
    """The log-sum-exp of each row's scores, learned sinks included."""

    def result(self, tensors: list[Tensor], place: Place) -> LogSumExpSeen:
        return LogSumExpSeen(tensors[0])


@dataclass(frozen=True, eq=False)
class RowsSeen:
    """Whole rows. indices: the queries' positions. weights (batch, heads, len(indices), k_len).

    key_start: the first key's position.
    """

    indices: tuple[int, ...]
    weights: Tensor
    key_start: int

    def then(self, later: RowsSeen) -> RowsSeen:
        """With later queries' rows appended; earlier rows see none of the keys added since."""
        starts = (self.key_start, later.key_start)
        weights = torch.cat(_aligned((self.weights, later.weights), starts), 2)
        return RowsSeen(self.indices + later.indices, weights, min(starts))

    def beside(self, other: RowsSeen) -> RowsSeen:
        """With the keys of another shard, both under the global lse."""
        starts = (self.key_start, other.key_start)
        mine, theirs = _aligned((self.weights, other.weights), starts)
        return RowsSeen(self.indices, mine + theirs, min(starts))


@dataclass(frozen=True)
class Rows(Observer):
    """The whole rows of a few queries, by position; negative counts from the call's last query.

    `watch` and decode steps keep those that the call computes.
    """

    indices: tuple[int, ...]

    def __init__(self, indices: Iterable[int]) -> None:
        object.__setattr__(self, "indices", tuple(int(i) for i in indices))

    def local(self, place: Place) -> list[tuple[int, int]]:
        """(position, row of the call) of each index that this call computes."""
        end = place.query_start + place.q_len
        positions = (end + i if i < 0 else i for i in self.indices)
        return [(p, p - place.query_start) for p in positions if place.query_start <= p < end]

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        return [((place.batch, place.heads, len(self.local(place)), place.k_len), dtype)]

    def result(self, tensors: list[Tensor], place: Place) -> RowsSeen:
        indices = tuple(p for p, _ in self.local(place))
        return RowsSeen(indices, tensors[0], place.key_start)


@dataclass(frozen=True, eq=False)
class MapSeen:
    """The pooled map: weights (batch, heads, rows.count, cols.count).

    Cell (r, c) covers the queries at positions (rows.first + r) · rows.size … + rows.size − 1, and
    likewise the keys: cells are aligned to position 0, so that growth merges pairwise, exactly.
    """

    weights: Tensor
    rows: Cells
    cols: Cells
    reduce: str
    most: tuple[int, int]

    def coarser(self, rows: int, cols: int) -> MapSeen:
        """The same map in cells of at least this size (powers of two)."""
        weights = self.weights
        sides = []
        for dim, cells, size in ((-2, self.rows, rows), (-1, self.cols, cols)):
            factor = max(size // cells.size, 1)
            pad = cells.first % factor
            tail = -(pad + cells.count) % factor
            weights = weights.movedim(dim, -1)
            weights = torch.nn.functional.pad(weights, (pad, tail)).unflatten(-1, (-1, factor))
            weights = weights.amax(-1) if self.reduce == "max" else weights.sum(-1)
            weights = weights.movedim(-1, dim)
            sides.append(Cells(cells.first // factor, weights.shape[dim], cells.size * factor))
        return MapSeen(weights, sides[0], sides[1], self.reduce, self.most)

    def _joined(self, other: MapSeen) -> MapSeen:
        spans = []
        for mine, theirs, most in zip(
            (self.rows, self.cols), (other.rows, other.cols), self.most, strict=True
        ):
            start = min(mine.first * mine.size, theirs.first * theirs.size)
            end = max((c.first + c.count) * c.size for c in (mine, theirs))
            size = max(mine.size, theirs.size)
            while (end - 1) // size - start // size >= most:
                size *= 2
            spans.append(Cells(start // size, (end - 1) // size - start // size + 1, size))
        rows, cols = spans
        whole = self.weights.new_zeros(*self.weights.shape[:2], rows.count, cols.count)
        for part in (self, other):
            part = part.coarser(rows.size, cols.size)
            r, c = part.rows.first - rows.first, part.cols.first - cols.first
            view = whole[:, :, r : r + part.rows.count, c : c + part.cols.count]
            if self.reduce == "max":
                torch.maximum(view, part.weights, out=view)
            else:
                view += part.weights
        return MapSeen(whole, rows, cols, self.reduce, self.most)

    def then(self, later: MapSeen) -> MapSeen:
        """With later queries, and the keys that they added."""
        return self._joined(later)

    def beside(self, other: MapSeen) -> MapSeen:
        """With another key shard, both under the global lse."""
        return self._joined(other)


@dataclass(frozen=True)
class Map(Observer):
    """The whole map, pooled to at most rows × cols cells; a cell's side is a power of two.

    reduce "sum" keeps the mass of a cell; "max" its largest weight (a mean would hide a head that
    retrieves one token).
    """

    rows: int
    cols: int
    reduce: Literal["sum", "max"] = "sum"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.reduce not in ("sum", "max"):
            raise RegardError(f"{self}: give rows ≥ 1, cols ≥ 1 and reduce sum or max")

    def cells(self, place: Place) -> tuple[Cells, Cells]:
        """The cells over the queries and over the keys of a call."""
        return (
            Cells.fitting(place.query_start, place.q_len, self.rows),
            Cells.fitting(place.key_start, place.k_len, self.cols),
        )

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        rows, cols = self.cells(place)
        return [((place.batch, place.heads, rows.count, cols.count), dtype)]

    def result(self, tensors: list[Tensor], place: Place) -> MapSeen:
        rows, cols = self.cells(place)
        return MapSeen(tensors[0], rows, cols, self.reduce, (self.rows, self.cols))


@dataclass(frozen=True, eq=False)
class DistancesSeen:
    """How far the heads read: mass by |query − key|, bins [edges[b], edges[b + 1]), the last open.

    past (batch, heads, bins): keys at or before the query, its own included (distance 0).
    future (batch, heads, bins): keys after it. edges: where each bin begins.
    """

    past: Tensor
    future: Tensor
    edges: tuple[int, ...]

    def then(self, later: DistancesSeen) -> DistancesSeen:
        """With later queries added."""
        return replace(self, past=self.past + later.past, future=self.future + later.future)

    def beside(self, other: DistancesSeen) -> DistancesSeen:
        """With another key shard, both under the global lse."""
        return self.then(other)


@dataclass(frozen=True)
class Distances(Observer):
    """A histogram of the mass over the distance between query and key.

    bins: how many (0, 1, 2–3, 4–7, …: powers of two), or the edges at which each begins.
    """

    bins: int | tuple[int, ...] = 16

    def __post_init__(self) -> None:
        edges = self.edges
        if not edges or list(edges) != sorted(set(edges)) or edges[0] != 0:
            raise RegardError(f"{self}: give bins ≥ 1, or edges that rise from 0")

    @property
    def edges(self) -> tuple[int, ...]:
        """Where each bin begins."""
        if isinstance(self.bins, int):
            return (0, *(2**b for b in range(self.bins - 1)))[: self.bins]
        return tuple(self.bins)

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        return [((place.batch, place.heads, len(self.edges)), dtype)] * 2

    def result(self, tensors: list[Tensor], place: Place) -> DistancesSeen:
        return DistancesSeen(tensors[0], tensors[1], self.edges)


def _aligned(parts: tuple[Tensor, Tensor], starts: tuple[int, int]) -> list[Tensor]:
    """Two tensors whose last dimension counts keys, padded with 0 to the same range of positions."""
    first = min(starts)
    last = max(s + p.shape[-1] for p, s in zip(parts, starts, strict=True))
    return [
        torch.nn.functional.pad(p, (s - first, last - s - p.shape[-1]))
        for p, s in zip(parts, starts, strict=True)
    ]


def _appended(before: TopKSeen, later: TopKSeen, dim: int) -> list[Tensor]:
    pairs = (
        (getattr(before, n), getattr(later, n)) for n in ("indices", "weights", "rest", "sink")
    )
    return [torch.cat(pair, dim) for pair in pairs]


def written(observers: Iterable[Observer]) -> str:
    """The observers as JSON: the form in which they cross a registered op, or stand in a file."""
    return json.dumps([[type(o).__name__, asdict(o)] for o in observers])  # type: ignore[call-overload]


@cache
def parse(text: str) -> tuple[Observer, ...]:
    """The observers that `written` wrote."""
    kinds: dict[str, Any] = {
        k.__name__: k for k in (TopK, Received, Entropy, MaxScore, LogSumExp, Rows, Map, Distances)
    }
    return tuple(
        kinds[name](**{n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()})
        for name, fields in json.loads(text)
    )
