"""What observers saw: typed results, and how they merge.

Results are per batch and head and carry no gradients. `then` appends later queries of the same
sequence (decode steps); `beside` joins key shards whose results were read with the *global* lse.

Fields say the same everywhere: `indices` are positions of keys, `queries` of queries, int32 or
Python's; `query_start` and `key_start` the position of the first row and column. `weights` are
shares of a row (0 … 1), sums of them are mass, in rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .brief import summary
from .display.frame import Start, Table, first_of
from .display.picture import Picture, Side, labelled, part_of
from .display.result import Result

_ROWS = ("batch", "heads", "q_len")
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

    def starts(self) -> range:
        """The position at which each begins."""
        return range(self.first * self.size, (self.first + self.count) * self.size, self.size)


@dataclass(frozen=True, eq=False)
class ReceivedSeen(Result):
    """Column sums: what each key received.

    sum (batch, heads, k_len), heads being 1 or kv_heads where they were pooled.
    count int32 (batch, heads, k_len): the queries that see the key.
    q_len: how many queries were summed over. key_start: the first key's position.
    """

    sum: Tensor
    count: Tensor
    q_len: int
    key_start: int

    def __repr__(self) -> str:
        most = ("largest mean {:.3g}", lambda: self.mean.max())
        return summary(self, _COLUMNS, self.sum, ("{:.0f} queries", lambda: self.q_len), most)

    @property
    def mean(self) -> Tensor:
        """Per visible query (batch, heads, k_len); 0 where no query sees the key."""
        return self.sum / self.count.clamp(min=1)

    def then(self, later: ReceivedSeen) -> ReceivedSeen:
        """With later queries added; they may see more keys, and no longer see the first."""
        starts = (self.key_start, later.key_start)
        total = _aligned((self.sum, later.sum), starts)
        count = _aligned((self.count, later.count), starts)
        q_len = self.q_len + later.q_len
        return ReceivedSeen(total[0] + total[1], count[0] + count[1], q_len, min(starts))

    def beside(self, other: ReceivedSeen) -> ReceivedSeen:
        """With the keys of another shard."""
        return replace(self.then(other), q_len=self.q_len)

    def _table(self) -> Table:
        index = {"batch": 0, "head": 0, "key": self.key_start}
        return Table(index, {"sum": self.sum, "count": self.count, "mean": self.mean})

    def _picture(self, batch: int, head: int | None) -> Picture:
        values, heads, title = part_of(self.mean, batch, head, "plot")
        keys = Side("key", self.key_start, sequence=True)
        return Picture(values, heads, keys, "mean weight received", True, title=title)

    def _per_head(self) -> tuple[Tensor, str]:
        return _most(self.mean), "largest mean weight received"


@dataclass(frozen=True, eq=False)
class RowSeen(Result):
    """One number per row: values (batch, heads, q_len).

    query_start: the first query's position; one per batch item where they differ.
    """

    values: Tensor
    query_start: Start = field(default=0, kw_only=True)

    name: ClassVar[str] = "value"
    unit: ClassVar[str] = "value"

    def __repr__(self) -> str:
        mean, least, most = self.values.mean, self.values.min, self.values.max
        ends = ("least {:.3f}", least), ("most {:.3f}", most)
        return summary(self, _ROWS, self.values, ("mean {:.3f}", mean), *ends)

    def then(self, later: RowSeen) -> RowSeen:
        """With the rows of later queries appended."""
        return replace(self, values=torch.cat([self.values, later.values], 2))

    def _table(self) -> Table:
        index: Any = {"batch": 0, "head": 0, "query": self.query_start}
        return Table(index, {self.name: self.values})

    def _picture(self, batch: int, head: int | None) -> Picture:
        values, heads, title = part_of(self.values, batch, head, "plot")
        queries = Side("query", first_of(self.query_start, batch), sequence=True)
        shown = values.masked_fill(values == -torch.inf, torch.nan)
        return Picture(shown, heads, queries, self.unit, title=title)

    def _per_head(self) -> tuple[Tensor, str]:
        seeing = self.values > -torch.inf
        total = self.values.masked_fill(~seeing, 0).sum(-1)
        return total / seeing.sum(-1), f"{self.unit}, mean over queries"


class EntropySeen(RowSeen):
    """values (batch, heads, q_len): −Σ p ln p over keys, in nats, not renormalised."""

    name: ClassVar[str] = "entropy"
    unit: ClassVar[str] = "entropy [nats]"

    def beside(self, other: EntropySeen) -> EntropySeen:
        """Joined with another key shard, both under the global lse."""
        return replace(self, values=self.values + other.values)


class MaxScoreSeen(RowSeen):
    """values (batch, heads, q_len): the largest score of the row; −inf where none is visible."""

    name: ClassVar[str] = "max_score"
    unit: ClassVar[str] = "largest score"

    def beside(self, other: MaxScoreSeen) -> MaxScoreSeen:
        """Joined with another key shard."""
        return replace(self, values=torch.maximum(self.values, other.values))


class LogSumExpSeen(RowSeen):
    """values (batch, heads, q_len): natural log-sum-exp of the row; −inf where none is visible."""

    name: ClassVar[str] = "lse"
    unit: ClassVar[str] = "log-sum-exp [nats]"

    def beside(self, other: LogSumExpSeen) -> LogSumExpSeen:
        """Joined with another key shard's own (not global) lse."""
        return replace(self, values=torch.logaddexp(self.values, other.values))


@dataclass(frozen=True, eq=False)
class RowsSeen(Result):
    """Whole rows. queries: their positions. weights (batch, heads, len(queries), k_len).

    key_start: the first key's position.
    """

    queries: tuple[int, ...]
    weights: Tensor
    key_start: int

    def __repr__(self) -> str:
        largest = ("largest weight {:.3f}", self.weights.max)
        return summary(self, ("batch", "heads", "rows", "k_len"), self.weights, largest)

    def then(self, later: RowsSeen) -> RowsSeen:
        """With later queries' rows appended; earlier rows see none of the keys added since."""
        starts = (self.key_start, later.key_start)
        weights = torch.cat(_aligned((self.weights, later.weights), starts), 2)
        return RowsSeen(self.queries + later.queries, weights, min(starts))

    def beside(self, other: RowsSeen) -> RowsSeen:
        """With the keys of another shard, both under the global lse."""
        starts = (self.key_start, other.key_start)
        mine, theirs = _aligned((self.weights, other.weights), starts)
        return RowsSeen(self.queries, mine + theirs, min(starts))

    def _table(self) -> Table:
        queries = list(self.queries)
        index: Any = {"batch": 0, "head": 0, "query": queries, "key": self.key_start}
        return Table(index, {"weight": self.weights})

    def _picture(self, batch: int, head: int | None) -> Picture:
        values, _, title = part_of(self.weights, batch, head, "plot", pool="max")
        rows = Side("query", labels=tuple(map(str, self.queries)), sequence=True)
        keys = Side("key", self.key_start, sequence=True)
        return Picture(values[0], rows, keys, "weight", log=True, title=title)

    def _per_head(self) -> tuple[Tensor, str]:
        return _most(self.weights).mean(-1), "largest weight of a row, mean"


@dataclass(frozen=True, eq=False)
class MapSeen(Result):
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

    def _table(self) -> Table:
        rows, cols = self.rows.starts(), self.cols.starts()
        index: Any = {"batch": 0, "head": 0, "query": rows, "key": cols}
        return Table(index, {"weight": self.weights})

    def _picture(self, batch: int, head: int | None) -> Picture:
        values, _, title = part_of(self.weights, batch, head, "plot", pool=self.reduce)
        rows, cols = (
            Side(name, cells.first * cells.size, cells.size, sequence=True)
            for name, cells in (("query", self.rows), ("key", self.cols))
        )
        of = "largest weight" if self.reduce == "max" else "weight summed"
        one = rows.size == cols.size == 1
        unit = "weight" if one else f"{of}\nin cells of {rows.size} × {cols.size}"
        return Picture(_blank(values[0]), rows, cols, unit, log=True, title=title)

    def _per_head(self) -> tuple[Tensor, str]:
        return _most(self.weights.flatten(2)), "largest cell"


@dataclass(frozen=True, eq=False)
class DistancesSeen(Result):
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

    def _table(self) -> Table:
        index: Any = {"batch": 0, "head": 0, "distance": list(self.edges)}
        return Table(index, {"past": self.past, "future": self.future})

    def _picture(self, batch: int, head: int | None) -> Picture:
        past, heads, title = part_of(self.past, batch, head, "plot")
        future, *_ = part_of(self.future, batch, head, "plot")
        bins = labelled(self.edges)
        used = (
            1 + int(((past + future).sum(0) > 0).nonzero().amax()) if (past + future).any() else 1
        )
        past, future, bins = past[:, :used], future[:, :used], bins[:used]  # far bins may be empty
        if future.any():  # a second half, mirrored: far ahead stands at the right
            bins = (*(f"−{b}" for b in bins[::-1]), *(f"+{b}" for b in bins))
            past = torch.cat([past.flip(-1), future], -1)
        shares = past / past.sum(-1, keepdim=True)
        side = Side("distance of the key [positions]", labels=bins)
        return Picture(shares, heads, side, "share of the mass", title=title)

    def _per_head(self) -> tuple[Tensor, str]:
        near = sum(edge < 8 for edge in self.edges)
        both = self.past + self.future
        return both[..., :near].sum(-1) / both.sum(-1), "share of the mass within 8 positions"


def _most(numbers: Tensor) -> Tensor:
    """The largest along the last dimension, 0 where it is empty."""
    return numbers.amax(-1) if numbers.shape[-1] else numbers.new_zeros(numbers.shape[:-1])


def _blank(values: Tensor) -> Tensor:
    """NaN, which is not drawn, in the place of 0."""
    return values.masked_fill(values == 0, torch.nan)


def _aligned(parts: tuple[Tensor, Tensor], starts: tuple[int, int]) -> list[Tensor]:
    """Two tensors whose last dimension counts keys, padded with 0 to one range of positions."""
    first = min(starts)
    last = max(s + p.shape[-1] for p, s in zip(parts, starts, strict=True))
    return [
        torch.nn.functional.pad(p, (s - first, last - s - p.shape[-1]))
        for p, s in zip(parts, starts, strict=True)
    ]
