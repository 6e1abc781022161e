"""What observers saw: typed results, and how they merge.

Results are per batch and head and carry no gradients. `then` appends later queries of the same
sequence (decode steps); `beside` joins key shards whose results were read with the *global* lse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import RegardError
from .brief import summary

_ROWS = ("batch", "heads", "q_len")
_LISTS = (*_ROWS, "k")
_COLUMNS = ("batch", "heads", "k_len")


@dataclass(frozen=True)
class Cells:
    """A grid over one side of the map: cells of `size` (a power of two), from cell `first`."""

    first: int
    count: int
    size: int

    @classmethod
    def fitting(cls, start: int, length: int, most: int, least: int = 1) -> Cells:
        """The smallest cells such that at most `most` of them cover start … start + length − 1.

        least: the smallest size that they may have.
        Position 0 is always a border: positions on both sides of it need two.
        """
        if not length:
            return cls(start // least, 0, least)
        last, size = start + length - 1, least
        most = max(most, 2) if start < 0 <= last else most
        while last // size - start // size >= most:
            size *= 2
        return cls(start // size, last // size - start // size + 1, size)


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

    def __repr__(self) -> str:
        listed = ("{:.1%} of the mass listed", lambda: self.weights.sum() / self._mass())
        largest = ("largest weight {:.3f}", self.weights.max)
        return summary(self, _LISTS, self.weights, largest, listed)

    def _mass(self) -> Tensor:
        return self.weights.sum() + self.rest.sum() + self.sink.sum()

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

    def __repr__(self) -> str:
        most = ("largest mean {:.3g}", lambda: self.mean.max())
        return summary(self, _COLUMNS, self.sum, ("{:.0f} queries", lambda: self.queries), most)

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


@dataclass(frozen=True, eq=False)
class RowSeen:
    """One number per row: values (batch, heads, q_len)."""

    values: Tensor

    def __repr__(self) -> str:
        mean, least, most = self.values.mean, self.values.min, self.values.max
        ends = ("least {:.3f}", least), ("most {:.3f}", most)
        return summary(self, _ROWS, self.values, ("mean {:.3f}", mean), *ends)

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


@dataclass(frozen=True, eq=False)
class RowsSeen:
    """Whole rows. indices: the queries' positions. weights (batch, heads, len(indices), k_len).

    key_start: the first key's position.
    """

    indices: tuple[int, ...]
    weights: Tensor
    key_start: int

    def __repr__(self) -> str:
        largest = ("largest weight {:.3f}", self.weights.max)
        return summary(self, ("batch", "heads", "rows", "k_len"), self.weights, largest)

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

    def __repr__(self) -> str:
        cell = f"cells of {self.rows.size} × {self.cols.size}, {self.reduce}"
        largest = (cell + "; largest {:.3f}", self.weights.max)
        return summary(self, ("batch", "heads", "rows", "cols"), self.weights, largest)

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
            least = max(mine.size, theirs.size)
            fitting = Cells.fitting(start, end - start, most)
            size = max(fitting.size, least)
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


@dataclass(frozen=True, eq=False)
class DistancesSeen:
    """How far the heads read: mass by |query − key|, bins [edges[b], edges[b + 1]), the last open.

    past (batch, heads, bins): keys at or before the query, its own included (distance 0).
    future (batch, heads, bins): keys after it. edges: where each bin begins.
    """

    past: Tensor
    future: Tensor
    edges: tuple[int, ...]

    def __repr__(self) -> str:
        near = int(sum(edge < 8 for edge in self.edges))
        both = self.past + self.future
        within = ("{:.1%} of the mass within 8", lambda: both[..., :near].sum() / both.sum())
        return summary(self, ("batch", "heads", "bins"), self.past, within)

    def then(self, later: DistancesSeen) -> DistancesSeen:
        """With later queries added."""
        return replace(self, past=self.past + later.past, future=self.future + later.future)

    def beside(self, other: DistancesSeen) -> DistancesSeen:
        """With another key shard, both under the global lse."""
        return self.then(other)


def _aligned(parts: tuple[Tensor, Tensor], starts: tuple[int, int]) -> list[Tensor]:
    """Two tensors whose last dimension counts keys, padded with 0 to one range of positions."""
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


@dataclass(frozen=True, eq=False)
class NormTopKSeen:
    """The k largest contributions of each row, weight · ‖W_O v‖, largest first.

    indices int32, norms, weights (batch, heads, q_len, k): positions of keys (−1 where fewer were
    visible), the length of what each adds, and its weight.
    """

    indices: Tensor
    norms: Tensor
    weights: Tensor

    def __repr__(self) -> str:
        return summary(self, _LISTS, self.norms, ("longest {:.3g}", self.norms.max))

    def then(self, later: NormTopKSeen) -> NormTopKSeen:
        """With the rows of later queries appended."""
        pairs = ((getattr(self, n), getattr(later, n)) for n in ("indices", "norms", "weights"))
        return NormTopKSeen(*(torch.cat(pair, 2) for pair in pairs))


class EffectSeen:
    """The k edges of each row whose removal would change the differentiated scalar most.

    Empty until `backward()` has run: `ready` says so. Then indices int32, effect and weights, each
    (batch, heads, q_len, k), largest |effect| first: positions of keys (−1 where fewer were
    visible), the signed change of the scalar to first order, and the edge's weight. Of a norm the
    batch is 1, and the effect has no sign.
    """

    def __init__(self) -> None:
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = None
        self._measure: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None

    def __repr__(self) -> str:
        if self._tensors is None:  # measuring may take long: not for a repr
            said = (
                "measured when first asked for" if self.ready else "not measured: no backward() yet"
            )
            return f"EffectSeen({said})"
        return summary(self, _LISTS, self.effect, ("largest effect {:.3g}", self.effect.abs().max))

    def fill(self, indices: Tensor, effect: Tensor, weights: Tensor) -> None:
        """Take what a backward pass measured; a later pass replaces it."""
        self._tensors = indices, effect, weights

    def fill_by(self, measure: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
        """Take what is to be measured when it is first asked for: more passes may come."""
        self._tensors, self._measure = None, measure

    @property
    def ready(self) -> bool:
        """Whether a backward pass has reached this attention."""
        return self._tensors is not None or self._measure is not None

    def _field(self, at: int) -> Tensor:
        if self._tensors is None and self._measure is not None:
            self._tensors = self._measure()
        if self._tensors is None:
            raise RegardError("no effect yet: call backward() on the scalar that it is measured on")
        return self._tensors[at]

    @property
    def indices(self) -> Tensor:
        """Positions of keys, int32 (batch, heads, q_len, k); −1 where fewer were visible."""
        return self._field(0)

    @property
    def effect(self) -> Tensor:
        """What removal would add to the scalar, to first order: (batch, heads, q_len, k)."""
        return self._field(1)

    @property
    def weights(self) -> Tensor:
        """The edges' weights (batch, heads, q_len, k)."""
        return self._field(2)

    def then(self, later: EffectSeen) -> EffectSeen:
        """Effects of one backward pass do not add up with another's."""
        raise RegardError("Effect watches one forward pass and its backward, not decode steps")
