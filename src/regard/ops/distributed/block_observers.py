"""What observers see of a block of keys under the log-sum-exp of all keys.

The compiled engine reads rows in its forward, under the block's own log-sum-exp; each row's share
of the whole, exp(own − lse), makes them those of all keys. What keys receive has a pass of its own,
which holds nothing but its sums; a map's cells are pooled tiles; mass by distance is the
log-sum-exp of the keys at that distance. The rest is the second pass in torch.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.edge_results import TopKSeen
from ...call.numbers import FARTHEST
from ...call.observers import Distances, Entropy, Map, MaxScore, Observer, Received, TopK
from ...call.opcodes import Op
from ...call.results import DistancesSeen, EntropySeen, MapSeen, ReceivedSeen
from ...engines.cpu import engine as cpu
from ...engines.cpu.calls import columns
from ...engines.second_pass.pooled import SIDE
from ...engines.second_pass.weigh import weigh
from ..pooled import pooled_tiles


def read_block(call: Call, lse: Tensor) -> tuple[Any, ...]:
    """The results of a call's observers, in their order. lse (batch, heads, q_len): of all keys."""
    mine = {i: o for i, o in enumerate(call.observers) if _compiled(o, call)}
    if not mine or cpu.why_not(replace(call, value=call.key[..., :0])):
        return weigh(call, lse, shard=True)
    found = dict(zip(mine, _read(replace(call, observers=tuple(mine.values())), lse), strict=True))
    left = tuple(o for i, o in enumerate(call.observers) if i not in mine)
    others = iter(weigh(replace(call, observers=left), lse, shard=True) if left else ())
    return tuple(found[i] if i in found else next(others) for i in range(len(call.observers)))


def _compiled(observer: Observer, call: Call) -> bool:
    """Whether it is read here; of maps those of square cells."""
    if isinstance(observer, Map):
        rows, cols = observer.cells(call.place)
        return rows.size == cols.size and rows.count > 0 and cols.count > 0
    return isinstance(observer, TopK | Entropy | MaxScore | Received | Distances)


def _read(call: Call, lse: Tensor) -> list[Any]:
    """Of observers that are all compiled."""
    fused = tuple(o for o in call.observers if not isinstance(o, Map | Received | Distances))
    found = iter(_in_forward(replace(call, observers=fused), lse) if fused else ())
    return [
        _map(call, lse, o) if isinstance(o, Map)
        else _received(call, lse, o) if isinstance(o, Received)
        else _distances(call, lse, o) if isinstance(o, Distances)
        else next(found)
        for o in call.observers
    ]  # fmt: skip


def _in_forward(call: Call, lse: Tensor) -> list[Any]:
    """Of observers that the forward gathers."""
    # Sinks belong to all keys: the lse given counts them
    own = replace(call, value=call.key[..., :0], sinks=None)
    _, part, seen = cpu.observed(own)
    share = _share(part, lse)
    sink = torch.zeros_like(share)
    if call.sinks is not None:
        sink = (call.sinks.to(lse.dtype)[:, None] - lse).exp()
    return [_of_all(seen[i], share, sink) for i in range(len(call.observers))]


def _of_all(result: Any, share: Tensor, sink: Tensor) -> Any:
    """A result of a block's rows, whose weights are a share of the whole row's."""
    if isinstance(result, TopKSeen):
        weights = result.weights * share[..., None]
        return replace(result, weights=weights, rest=result.rest * share, sink=sink)
    if isinstance(result, EntropySeen):
        # −Σ cp ln cp = c (−Σ p ln p) − c ln c, as the block's weights p add up to 1
        return replace(result, values=result.values * share - torch.special.xlogy(share, share))
    return result


def _received(call: Call, lse: Tensor, observer: Received) -> ReceivedSeen:
    total, count = columns(call, lse, observer.span(call.place))
    return observer.result(observer.pool(total, count, call.place), call.place)


def _share(part: Tensor, lse: Tensor) -> Tensor:
    """Of each row's weights, those of some keys: exp(their log-sum-exp − that of all)."""
    return (part - lse).exp().masked_fill(part == -torch.inf, 0)


def _map(call: Call, lse: Tensor, observer: Map) -> MapSeen:
    """Tiles of 128 × 128 cells, for each item of the batch and each head."""
    place = call.place
    rows, cols = observer.cells(place)
    zoom = rows.size.bit_length() - 1
    corners = [
        (r, c) for r in range(0, rows.count, SIDE) for c in range(0, cols.count, SIDE)
    ]  # fmt: skip
    pairs = [(b, h) for b in range(place.batch) for h in range(place.heads)]
    wanted = [
        (h, zoom, (rows.first + r) * rows.size - place.query_start,
         (cols.first + c) * cols.size - place.key_start, b)
        for r, c in corners for b, h in pairs
    ]  # fmt: skip
    tiles = iter(pooled_tiles(call, lse, wanted, observer.reduce).split(len(pairs)))
    out = lse.new_zeros(len(pairs), rows.count, cols.count)
    for r, c in corners:
        here = out[:, r : r + SIDE, c : c + SIDE]
        here.copy_(next(tiles)[:, : here.shape[1], : here.shape[2]])
    whole = out.unflatten(0, (place.batch, place.heads))
    return observer.result([whole], place)


def _distances(call: Call, lse: Tensor, observer: Distances) -> DistancesSeen:
    """Each bin is a band of the mask; bands that the call has no pair in are 0."""
    place, edges = call.place, [*observer.edges, FARTHEST]
    behind = place.query_start + place.q_len - 1 - place.key_start  # the farthest back
    ahead = place.key_start + place.k_len - 1 - place.query_start
    past, future = lse.new_zeros(2, *lse.shape[:2], len(observer.edges))
    for n, (first, last) in enumerate(pairwise(edges)):
        if first <= behind:
            past[..., n] = _band(call, lse, min(last, behind + 1), -first)
        if max(first, 1) <= ahead and last > 1:
            future[..., n] = _band(call, lse, 1 - max(first, 1), min(last - 1, ahead))
    return observer.result([past, future], place)


def _band(call: Call, lse: Tensor, behind: int, ahead: int) -> Tensor:
    """The mass (batch, heads) of the keys at query − behind + 1 … query + ahead, of all queries."""
    program = call.program
    code = (*program.code, Op.WINDOW, behind, ahead, Op.AND)
    band = replace(
        call, program=replace(program, code=code), value=call.key[..., :0], sinks=None,
        observers=(), dropout=None,
    )  # fmt: skip
    return _share(cpu.forward(band)[1], lse).sum(-1)
