"""What observers saw where a sequence lies on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from ...call.edge_results import EffectSeen
from ...call.observers import Distances, Map, NormTopK, Observer, Received, Rows
from ...call.results import MapSeen, ReceivedSeen, RowsSeen
from ...errors import RegardError
from .collectives import Ranks
from .whole import Whole

By = Literal["queries", "keys", "heads", "nothing"]
Keep = Callable[[Whole, Observer, Sequence[Any]], Any]  # as `collected`


class Sharded:
    """One observer's result over all ranks.

    local: the typed results that lie here: one for each range of positions that this rank holds, or
    one of its heads, or, where every rank has it, the whole. by: what it is cut by. `gather()`,
    which all ranks must call, gives each of them the whole result.
    """

    def __init__(self, local: Sequence[Any], by: By, whole: Whole, observer: Observer) -> None:
        self.local, self.by = tuple(local), by
        self._whole, self._observer = whole, observer

    def __repr__(self) -> str:
        ranks = self._whole.ranks
        said = "whole in each" if self.by == "nothing" else f"cut by {self.by}"
        return f"Sharded({self._observer}, rank {ranks.rank} of {ranks.size}, {said})"

    def gather(self) -> Any:
        """The whole result, in every rank."""
        whole, first = self._whole, self.local[0]
        if self.by == "nothing" or (whole.ranks.size == 1 and len(self.local) == 1):
            return first
        if isinstance(first, RowsSeen) and self.by == "queries":
            return self._rows()
        if self.by == "heads":
            return made(first, [torch.cat(whole.ranks.all_gather(t), 1) for t in tensors_of(first)])
        layout = whole.keys if self.by == "keys" else whole.queries
        tensors = [
            whole.ranks.gather(torch.cat(parts, 2), layout, 2)
            for parts in zip(*map(tensors_of, self.local), strict=True)
        ]
        start = (
            {"key_start": whole.call.place.key_start}
            if self.by == "keys"
            else {"query_start": whole.call.place.query_start}
        )
        return made(first, tensors, **start)

    def _rows(self) -> RowsSeen:
        """Each row lies on one rank: the others add 0."""
        assert isinstance(self._observer, Rows)
        whole = self._whole
        places = {p: i for i, (p, _) in enumerate(self._observer.local(whole.call.place))}
        queries = tuple(p for p, _ in self._observer.local(whole.call.place))
        like = self.local[0].weights
        weights = like.new_zeros(*like.shape[:2], len(queries), like.shape[3])
        for part in self.local:
            for row, position in enumerate(part.queries):
                weights[:, :, places[position]] = part.weights[:, :, row]
        for i, position in enumerate(queries):  # a query that is asked for twice
            weights[:, :, i] = weights[:, :, places[position]]
        return RowsSeen(queries, whole.ranks.all_reduce(weights), self.local[0].key_start)

    def then(self, later: Any) -> Any:
        """Results of decode steps are appended to whole ones."""
        raise RegardError(
            "a sharded result takes no later steps: gather() it, or watch the prefill alone"
        )


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of a typed result."""
    if isinstance(result, EffectSeen):
        return [result.indices, result.effects, result.weights]
    values = (getattr(result, f.name) for f in fields(result))
    return [v for v in values if isinstance(v, Tensor)]


def made(like: Any, tensors: list[Tensor], **changed: Any) -> Any:
    """A result like this one, of other tensors."""
    if isinstance(like, EffectSeen):
        effects = EffectSeen(changed.get("query_start", like.query_start))
        effects.fill(*tensors)
        return effects
    names = [f.name for f in fields(like) if isinstance(getattr(like, f.name), Tensor)]
    return replace(like, **dict(zip(names, tensors, strict=True)), **changed)


def rows_merged(ranks: Ranks, mine: Any) -> Any:
    """A result of rows over the keys of all ranks, each under the log-sum-exp of all."""
    starts = {}
    if hasattr(mine, "key_start"):
        own = torch.tensor(
            [mine.key_start, mine.weights.shape[-1]], dtype=torch.int64, device=mine.weights.device
        )
        starts = dict(enumerate(t.tolist() for t in ranks.all_gather(own)))
        short = max(n for _, n in starts.values()) - mine.weights.shape[-1]
        mine = replace(mine, weights=torch.nn.functional.pad(mine.weights, (0, short)))
    came = zip(*(ranks.all_gather(t) for t in tensors_of(mine)), strict=True)
    parts = []
    for rank, tensors in enumerate(came):
        part = made(mine, list(tensors))
        if starts:
            start, length = starts[rank]
            part = replace(part, key_start=start, weights=part.weights[..., :length])
        parts.append(part)
    return reduce(lambda a, b: a.beside(b), parts)


def of_heads(observer: Observer, heads: slice, total: int) -> Observer:
    """What to ask of some heads alone, so that those of all can be put together."""
    if isinstance(observer, NormTopK) and observer.projection is not None:
        own = observer.projection.unflatten(-1, (total, -1))[:, heads].flatten(1)
        return replace(observer, projection=own)
    if isinstance(observer, Received) and observer.heads in ("sum", "mean"):
        return replace(observer, heads="each")
    return observer


def of_span(observer: Observer, whole: Whole, stop: int) -> Observer:
    """What to ask of some queries alone: a map in no more cells than that of the whole.

    What keys receive is asked by head: how many queries see a key is pooled once all are counted.
    stop: where the queries end; a row is asked for by its position in the whole.
    """
    if isinstance(observer, Rows):
        end = whole.call.place.query_start + stop
        positions = (p for p, _ in observer.local(whole.call.place))
        return Rows([p if p >= 0 else p - end for p in positions])
    if isinstance(observer, Received):
        return replace(observer, heads="each")
    if isinstance(observer, Map):
        rows, cols = observer.cells(whole.call.place)
        return replace(observer, rows=max(rows.count, 1), cols=max(cols.count, 1))
    return observer


def heads_joined(parts: Sequence[Any]) -> Any:
    """One result of all heads, from those of consecutive heads."""
    if len(parts) == 1:
        return parts[0]
    tensors = [torch.cat(each, 1) for each in zip(*map(tensors_of, parts), strict=True)]
    return made(parts[0], tensors)


def collected(whole: Whole, observer: Observer, parts: Sequence[Any]) -> Sharded:
    """The result over all ranks, from those of this rank's ranges of queries, in all heads.

    Of rows they are final. Columns are sums over queries: what each key receives goes to the rank
    that holds the key, maps and distances to all.
    """
    if isinstance(observer, Received):
        return _received(whole, observer, parts)
    if isinstance(observer, Map):
        return Sharded([_map(whole, observer, parts)], "nothing", whole, observer)
    if isinstance(observer, Distances):
        mine = reduce(lambda a, b: a.then(b), parts)
        sums = whole.ranks.all_reduce(torch.stack([mine.past, mine.future]))
        whole_result = replace(mine, past=sums[0], future=sums[1])
        return Sharded([whole_result], "nothing", whole, observer)
    return Sharded(parts, "queries", whole, observer)


def _received(whole: Whole, observer: Received, parts: Sequence[ReceivedSeen]) -> Sharded:
    """This rank's keys of the sum over all queries."""
    total = sum((p.sum for p in parts[1:]), parts[0].sum)
    count = sum((p.count for p in parts[1:]), parts[0].count)
    place, ranks = whole.call.place, whole.ranks
    total = ranks.reduce_scatter(total, whole.keys, 2)
    count = ranks.reduce_scatter(count, whole.keys, 2)
    total, count = observer.pool(total, count, place)
    start, stop = observer.span(place)
    local = [
        ReceivedSeen(
            total[:, :, at : at + last - first], count[:, :, at : at + last - first],
            stop - start, place.key_start + first,
        )
        for at, first, last in whole.keys.local(ranks.rank)
    ]  # fmt: skip
    return Sharded(local, "keys", whole, observer)


def _map(whole: Whole, observer: Map, parts: Sequence[MapSeen]) -> MapSeen:
    """The map of the whole, in the cells that one process would take."""
    rows, cols = observer.cells(whole.call.place)
    like = parts[0].weights
    total = like.new_zeros(*like.shape[:2], rows.count, cols.count)
    for part in parts:
        part = part.coarser(rows.size, cols.size)
        if not part.rows.count or not part.cols.count:
            continue
        r, c = part.rows.first - rows.first, part.cols.first - cols.first
        view = total[:, :, r : r + part.rows.count, c : c + part.cols.count]
        if observer.reduce == "max":
            torch.maximum(view, part.weights, out=view)
        else:
            view += part.weights
    total = whole.ranks.all_reduce(total, largest=observer.reduce == "max")
    return MapSeen(total, rows, cols, observer.reduce, (observer.rows, observer.cols))


def of_all_heads(whole: Whole, observer: Observer, mine: Any) -> Sharded:
    """The result over all ranks, from that of this rank's heads over the whole sequence."""
    if isinstance(observer, Received) and observer.heads in ("sum", "mean"):
        total = whole.ranks.all_reduce(mine.sum.sum(1, keepdim=True))
        if observer.heads == "mean":
            total = total / whole.call.place.heads
        count = whole.ranks.all_reduce(mine.count.amax(1, keepdim=True), largest=True)
        whole_result = replace(mine, sum=total, count=count)
        return Sharded([whole_result], "nothing", whole, observer)
    return Sharded([mine], "heads", whole, observer)
