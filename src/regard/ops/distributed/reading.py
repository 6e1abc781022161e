"""A call over ranks read for a recording: each rank its own rows, none of them the whole.

Keys alone travel, by gather or by ring; values are not mixed. What observers see of rows stays with
them; of maps and distances each rank keeps its own rows' share, of what keys receive its own keys'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.geometry import Place, Span
from ...call.observers import Map, Observer, Received
from ...call.results import MapSeen
from .. import beside
from .collectives import Ranks
from .gather import Gather
from .layout import Layout, Order
from .results import Keep, collected
from .ring import Ring
from .whole import Whole, hollow


@dataclass(frozen=True, eq=False)
class OwnRows:
    """A range of this rank's queries.

    call: on all keys, of which it has the form alone; its query is given. lse (batch, heads, rows).
    seen: results in the order of the observers; None for `Received`, which is of keys.
    """

    call: Call
    lse: Tensor
    seen: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's part of a call, the whole of which stands at `place`.

    rows: its ranges of queries. keys, values: (position of the first, tensor) of its ranges of
    keys. received: what those get, one result each, where a `Received` looked.
    """

    place: Place
    rank: int
    ranks: int
    rows: list[OwnRows]
    keys: list[tuple[int, Tensor]]
    values: list[tuple[int, Tensor]]
    received: list[Any]


@dataclass(frozen=True)
class Way:
    """How keys travel: by ring, or `most` bytes of gathered ones at a time."""

    ranks: Ranks
    order: Order
    ring: bool
    most: int


def read(call: Call, way: Way, query: Tensor, key: Tensor, value: Tensor) -> Shard:
    """This rank's part of a call. All ranks take part.

    call: that of the whole sequence, with its observers and without its numbers. query, key, value:
    the rank's own.
    """
    whole, lse, results = _read(call, way, query, key, _kept)
    return _sorted(whole, query, key, value, lse, results)


def results_of(call: Call, way: Way, query: Tensor, key: Tensor) -> tuple[Any, ...]:
    """What the call's observers see, as `Sharded` results; the rest as for `read`."""
    return _read(call, way, query, key, collected)[2]


@torch.no_grad()
def _read(
    call: Call, way: Way, query: Tensor, key: Tensor, keep: Keep
) -> tuple[Whole, Tensor, tuple[Any, ...]]:
    """The whole call, this rank's lse, and what is kept of each observer's results."""
    place = call.place
    formal = [
        hollow(query, (*query.shape[:2], place.q_len, query.shape[3])),
        hollow(key, (*key.shape[:2], place.k_len, key.shape[3])),
    ]
    call = replace(call, query=formal[0], key=formal[1], dropout=None)
    layouts = [Layout(n, way.order) for n in (place.q_len, place.k_len)]
    whole = Whole(call, layouts[0], layouts[1], way.ranks)
    job: Gather | Ring = (
        Ring(whole, "auto", _computed, keep)
        if way.ring
        else Gather(whole, "auto", way.most, _computed, keep)
    )
    query, key = query.detach(), key.detach()
    _, lse = job.forward(query, key, key[..., :0])
    return whole, lse, job.results


def _computed(call: Call, engine: str) -> tuple[Tensor, Tensor, dict[int, Any]]:
    """(an out of no numbers, lse, results) of a part."""
    lse, seen = beside.unrounded(replace(call, value=None))
    return call.query[..., :0], lse, seen


def _kept(whole: Whole, observer: Observer, parts: Sequence[Any]) -> list[Any]:
    """Results one for each range of queries; of what keys receive, for each range of keys."""
    if isinstance(observer, Received):
        return list(collected(whole, observer, parts).local)
    if isinstance(observer, Map):
        return [_own_cells(whole, observer, part) for part in parts]
    return list(parts)


def _own_cells(whole: Whole, observer: Map, part: MapSeen) -> MapSeen:
    """A range's rows of the map, in cells of the size that those of the whole have."""
    rows, cols = observer.cells(whole.call.place)
    return replace(part.coarser(rows.size, cols.size), most=(observer.rows, observer.cols))


def _sorted(
    whole: Whole, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, results: Sequence[Any]
) -> Shard:
    """What was read, by ranges; those without positions are left out."""
    place, rank = whole.call.place, whole.ranks.rank
    of_keys = [isinstance(o, Received) for o in whole.call.observers]
    rows, keys, values, received = [], [], [], []
    for n, (at, start, stop) in enumerate(whole.queries.local(rank)):
        here = slice(at, at + stop - start)
        span = Span(start, stop, 0, place.k_len)
        call = whole.part(query[:, :, here], whole.call.key, None, span)
        seen = (None if c else r[n] for c, r in zip(of_keys, results, strict=True))
        if stop > start:
            rows.append(OwnRows(call, lse[:, :, here], tuple(seen)))
    for n, (at, start, stop) in enumerate(whole.keys.local(rank)):
        if stop > start:
            there = (slice(None), slice(None), slice(at, at + stop - start))
            keys.append((place.key_start + start, key[there]))
            values.append((place.key_start + start, value[there]))
            received += [r[n] for c, r in zip(of_keys, results, strict=True) if c]
    return Shard(place, rank, whole.ranks.size, rows, keys, values, received)
