"""Observers: what to keep of the attention weights, in O(N·k) memory.

An observer is a small frozen value; what it saw comes back as a typed result, in the order asked.
Weights are those before dropout; where learned sinks stand in the denominator, the rows sum to
less than 1 and stay so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import RegardError
from .brief import Brief
from .edge_results import NormTopKSeen, TopKSeen
from .geometry import Place
from .numbers import FARTHEST, whole_fields, wholes
from .results import (
    Cells,
    DistancesSeen,
    EntropySeen,
    LogSumExpSeen,
    MapSeen,
    MaxScoreSeen,
    ReceivedSeen,
    RowsSeen,
)

MOST_UNUSED = 2**16  # a k may exceed the keys of a call by: those of a cache are yet to come
Shape = tuple[tuple[int, ...], torch.dtype]


class Observer(Brief):
    """What to keep of the weights.

    sums_queries: whether its results sum over queries; `watch` then leaves padding's out.
    """

    sums_queries: ClassVar[bool] = False

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        """Shape and dtype of the tensors that a pass over the weights fills."""
        raise NotImplementedError

    def result(self, tensors: list[Tensor], place: Place) -> Any:
        """The typed result made of those tensors."""
        raise NotImplementedError

    def written(self) -> list[str]:
        """The arguments that make this observer again, each as JSON."""
        return []

    def check(self, place: Place) -> None:
        """RegardError if this observer cannot watch a call at `place`."""


@dataclass(frozen=True)
class TopK(Observer):
    """The k largest weights of each row, and what remains."""

    k: int

    def __post_init__(self) -> None:
        whole_fields(self, "k")
        if self.k < 1:
            raise RegardError(f"{self}: give k ≥ 1")

    def check(self, place: Place) -> None:
        _check_k(self, self.k, place)

    def written(self) -> list[str]:
        return [str(self.k)]

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        row = (place.batch, place.heads, place.q_len)
        return [((*row, self.k), torch.int32), ((*row, self.k), dtype), (row, dtype), (row, dtype)]

    def result(self, tensors: list[Tensor], place: Place) -> TopKSeen:
        return TopKSeen(*tensors, query_start=place.query_start)


@dataclass(frozen=True)
class Received(Observer):
    """What each key receives, summed over the queries (a range of positions, or all).

    heads: "each", or pooled "sum" / "mean" over all heads, or over the query heads of each kv head
    ("group_sum" / "group_mean"). The result has the sum, the count, and the mean per visible query.
    """

    sums_queries: ClassVar[bool] = True

    queries: tuple[int, int] | None = None
    heads: Literal["each", "sum", "mean", "group_sum", "group_mean"] = "each"

    def __post_init__(self) -> None:
        if self.heads not in ("each", "sum", "mean", "group_sum", "group_mean"):
            raise RegardError(f"{self}: heads is each, sum, mean, group_sum or group_mean")
        if self.queries is not None:
            queries = wholes(self.queries, "Received: queries")
            object.__setattr__(self, "queries", queries)
            if len(queries) != 2:
                raise RegardError(f"{self}: queries is a range (start, stop) of positions")
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

    def pool(self, total: Tensor, count: Tensor, place: Place) -> list[Tensor]:
        """Sum and count (batch, heads, k_len) of each head, pooled as asked.

        A pooled column counts the queries that see it in any of its heads.
        """
        if self.heads == "each":
            return [total, count]
        size = place.heads // self.pooled(place)
        total = total.unflatten(1, (-1, size))
        pooled = total.mean(2) if self.heads.endswith("mean") else total.sum(2)
        return [pooled, count.unflatten(1, (-1, size)).amax(2)]

    def written(self) -> list[str]:
        queries = "null" if self.queries is None else _list(self.queries)
        return [queries, f'"{self.heads}"']

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        heads = self.pooled(place)
        return [
            ((place.batch, heads, place.k_len), dtype),
            ((place.batch, heads, place.k_len), torch.int32),
        ]

    def result(self, tensors: list[Tensor], place: Place) -> ReceivedSeen:
        start, stop = self.span(place)
        return ReceivedSeen(tensors[0], tensors[1], stop - start, place.key_start)


@dataclass(frozen=True)
class PerRow(Observer):
    """One number for each row; caches take its results from slots to positions as they are."""

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        return [((place.batch, place.heads, place.q_len), dtype)]


class Entropy(PerRow):
    """The entropy of each row, in nats: 0 reads one key, ln n spreads evenly over n."""

    def result(self, tensors: list[Tensor], place: Place) -> EntropySeen:
        return EntropySeen(tensors[0], query_start=place.query_start)


class MaxScore(PerRow):
    """The largest score of each row, after scale, softcap and bias."""

    def result(self, tensors: list[Tensor], place: Place) -> MaxScoreSeen:
        return MaxScoreSeen(tensors[0], query_start=place.query_start)


class LogSumExp(PerRow):
    """The log-sum-exp of each row's scores, learned sinks included."""

    def result(self, tensors: list[Tensor], place: Place) -> LogSumExpSeen:
        return LogSumExpSeen(tensors[0], query_start=place.query_start)


@dataclass(frozen=True)
class Rows(Observer):
    """The whole rows of a few queries, by position; negative counts from the call's last query.

    `watch` and decode steps keep those that the call computes.
    """

    indices: tuple[int, ...]

    def __init__(self, indices: Iterable[int]) -> None:
        object.__setattr__(self, "indices", wholes(indices, "Rows: indices"))

    def local(self, place: Place) -> list[tuple[int, int]]:
        """(position, row of the call) of each index that this call computes."""
        end = place.query_start + place.q_len
        positions = (end + i if i < 0 else i for i in self.indices)
        return [(p, p - place.query_start) for p in positions if place.query_start <= p < end]

    def written(self) -> list[str]:
        return [_list(self.indices)]

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        return [((place.batch, place.heads, len(self.local(place)), place.k_len), dtype)]

    def result(self, tensors: list[Tensor], place: Place) -> RowsSeen:
        queries = tuple(p for p, _ in self.local(place))
        return RowsSeen(queries, tensors[0], place.key_start)


@dataclass(frozen=True)
class Map(Observer):
    """The whole map, pooled to at most rows × cols cells; a cell's side is a power of two.

    reduce "sum" keeps the mass of a cell; "max" its largest weight (a mean would hide a head that
    retrieves one token). least: the smallest side of a cell, a power of two.
    """

    sums_queries: ClassVar[bool] = True

    rows: int
    cols: int
    reduce: Literal["sum", "max"] = "sum"
    least: int = field(default=1, repr=False)

    def __post_init__(self) -> None:
        whole_fields(self, "rows", "cols", "least")
        if self.least < 1 or self.least & (self.least - 1):
            raise RegardError(f"{self}: give a least side that is a power of two")
        if self.rows < 1 or self.cols < 1 or self.reduce not in ("sum", "max"):
            raise RegardError(f"{self}: give rows ≥ 1, cols ≥ 1 and reduce sum or max")

    def cells(self, place: Place) -> tuple[Cells, Cells]:
        """The cells over the queries and over the keys of a call."""
        return (
            Cells.fitting(place.query_start, place.q_len, self.rows, self.least),
            Cells.fitting(place.key_start, place.k_len, self.cols, self.least),
        )

    def written(self) -> list[str]:
        return [str(self.rows), str(self.cols), f'"{self.reduce}"', str(self.least)]

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        rows, cols = self.cells(place)
        return [((place.batch, place.heads, rows.count, cols.count), dtype)]

    def result(self, tensors: list[Tensor], place: Place) -> MapSeen:
        rows, cols = self.cells(place)
        return MapSeen(tensors[0], rows, cols, self.reduce, (self.rows, self.cols))


@dataclass(frozen=True)
class Distances(Observer):
    """A histogram of the mass over the distance between query and key.

    bins: how many (0, 1, 2–3, 4–7, …: powers of two), or the edges at which each begins.
    """

    sums_queries: ClassVar[bool] = True

    bins: int | tuple[int, ...] = 16

    def __post_init__(self) -> None:
        if not isinstance(self.bins, int):
            object.__setattr__(self, "bins", wholes(self.bins, "Distances: bins"))
        edges = self.edges
        if not edges or list(edges) != sorted(set(edges)) or edges[0] != 0:
            raise RegardError(f"{self}: give bins ≥ 1, or edges that rise from 0")
        if edges[-1] > 2 * FARTHEST:
            raise RegardError(f"{self}: give edges up to 2³², beyond every distance")

    @property
    def edges(self) -> tuple[int, ...]:
        """Where each bin begins."""
        if isinstance(self.bins, int):
            return (0, *(2**b for b in range(self.bins - 1)))[: self.bins]
        return tuple(self.bins)

    def written(self) -> list[str]:
        return [str(self.bins) if isinstance(self.bins, int) else _list(self.bins)]

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        return [((place.batch, place.heads, len(self.edges)), dtype)] * 2

    def result(self, tensors: list[Tensor], place: Place) -> DistancesSeen:
        return DistancesSeen(tensors[0], tensors[1], self.edges)


@dataclass(frozen=True, eq=False)
class NormTopK(Observer):
    """The k largest weight · ‖W_O v‖ of each row: how long a vector each key adds.

    Kobayashi et al. 2020, section 3. projection (model_dim, heads · v_dim): the output projection
    W_O; without it ‖v‖ is taken. `watch` finds the projection of the model's modules.
    """

    k: int
    projection: Tensor | None = None

    def __post_init__(self) -> None:
        whole_fields(self, "k")
        if self.k < 1:
            raise RegardError(f"NormTopK({self.k}): give k ≥ 1")

    def check(self, place: Place) -> None:
        _check_k(self, self.k, place)

    def norms(self, value: Tensor, heads: int) -> Tensor:
        """‖W_O v‖ (batch, heads, k_len) of value (batch, kv_heads, k_len, v_dim)."""
        value = value.repeat_interleave(heads // value.shape[1], 1)
        if self.projection is None:
            return value.norm(dim=-1)
        if self.projection.shape[-1] != heads * value.shape[-1]:
            raise RegardError(
                f"NormTopK: projection is {tuple(self.projection.shape)}; for {heads} heads of "
                f"v_dim {value.shape[-1]} it must be (model_dim, {heads * value.shape[-1]})"
            )
        own = self.projection.detach().to(value.dtype).unflatten(-1, (heads, -1)).transpose(0, 1)
        gram = own.mT @ own
        return ((value @ gram) * value).sum(-1).clamp(min=0).sqrt()

    def written(self) -> list[str]:
        return [str(self.k)]

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        row = (place.batch, place.heads, place.q_len, self.k)
        return [(row, torch.int32), (row, dtype), (row, dtype)]

    def result(self, tensors: list[Tensor], place: Place) -> NormTopKSeen:
        return NormTopKSeen(*tensors, query_start=place.query_start)


@dataclass(frozen=True)
class Effect(Observer):
    """The k edges of each row whose removal would change the differentiated scalar most.

    Removing key j from a row leaves the other weights p / (1 − p_j), so the output changes by
    −p_j (v_j − o) / (1 − p_j), and the scalar, to first order, by −p_j (dp_j − D) / (1 − p_j) with
    dp_j = g · v_j and D = g · o, g being the scalar's gradient. Read in the backward pass: the
    result is ready after `backward()`.

    norm: the batch holds copies of one input, each with its own scalar, and an edge's effect is
    the root of the sum of their squares: the length of the change of a vector, where the scalars
    are its coordinates. Further backward passes through the same graph add to it. The result has
    a batch of 1; memory O(N · scalars).
    """

    k: int
    norm: bool = False

    def __post_init__(self) -> None:
        whole_fields(self, "k")
        if self.k < 1:
            raise RegardError(f"{self}: give k ≥ 1")

    def check(self, place: Place) -> None:
        _check_k(self, self.k, place)

    def shapes(self, place: Place, dtype: torch.dtype) -> list[Shape]:
        return []


def listed(observe: Any) -> tuple[Observer, ...]:
    """What `observe` asks for; RegardError where it is no list of observers."""
    if observe is None:
        return ()
    alone = " alone" if isinstance(observe, Observer | type) else ""
    if alone or not isinstance(observe, list | tuple):
        raise RegardError(f"observe is {observe!r}{alone}; give a list, such as [TopK(8)]")
    for observer in observe:
        if not isinstance(observer, Observer):
            raise RegardError(f"observe holds {observer!r}; give observers, such as TopK(8)")
    return tuple(observe)


def _check_k(observer: Observer, k: int, place: Place) -> None:
    """RegardError for a k that is not meant: each row would hold as many numbers, keys or not."""
    if k > max(place.k_len, MOST_UNUSED):
        raise RegardError(
            f"{type(observer).__name__}: k is {k}, and the call has {place.k_len} keys; give fewer"
        )


def to_json(observers: Sequence[Observer]) -> str:
    """The observers as JSON: the form in which they cross a registered op, or stand in a file.

    Built by hand, as torch.compile cannot trace the json module.
    """
    each = [f'["{type(o).__name__}"{"".join([f", {a}" for a in o.written()])}]' for o in observers]
    return f"[{', '.join(each)}]"


@lru_cache(256)  # a user may ask for ever new rows
def from_json(text: str) -> tuple[Observer, ...]:
    """The observers that `to_json` wrote."""
    kinds: dict[str, Any] = {c.__name__: c for c in _below(Observer)}
    return tuple(
        kinds[name](*(tuple(a) if isinstance(a, list) else a for a in arguments))
        for name, *arguments in json.loads(text)
    )


def _below(kind: type[Observer]) -> Iterator[type[Observer]]:
    """All observers there are, whoever defines them."""
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)


def _list(numbers: Iterable[int]) -> str:
    return f"[{', '.join([str(n) for n in numbers])}]"
