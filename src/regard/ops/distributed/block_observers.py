"""What observers see of a block of keys under the log-sum-exp of all keys.

The compiled engine reads rows in its forward, under the block's own log-sum-exp; each row's share
of the whole, exp(own − lse), makes them those of all keys. What keys receive is the gradient of
values under a gradient of 1, by its backward. The rest is the second pass in torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.edge_results import TopKSeen
from ...call.observers import Entropy, MaxScore, Observer, Received, TopK
from ...call.results import EntropySeen, ReceivedSeen
from ...engines.cpu import engine as cpu
from ...engines.second_pass.weigh import weigh


def read_block(call: Call, lse: Tensor) -> tuple[Any, ...]:
    """The results of a call's observers, in their order. lse (batch, heads, q_len): of all keys."""
    mine = {i: o for i, o in enumerate(call.observers) if _compiled(o)}
    if not mine or cpu.why_not(replace(call, value=call.key[..., :0])):
        return weigh(call, lse, shard=True)
    found = dict(zip(mine, _read(replace(call, observers=tuple(mine.values())), lse), strict=True))
    left = tuple(o for i, o in enumerate(call.observers) if i not in mine)
    others = iter(weigh(replace(call, observers=left), lse, shard=True) if left else ())
    return tuple(found[i] if i in found else next(others) for i in range(len(call.observers)))


def _compiled(observer: Observer) -> bool:
    """Whether it is read here; of what keys receive, only by head."""
    by_head = isinstance(observer, Received) and observer.heads == "each"
    return isinstance(observer, TopK | Entropy | MaxScore) or by_head


def _read(call: Call, lse: Tensor) -> list[Any]:
    """Of observers that are all compiled."""
    # Sinks belong to all keys: the lse given counts them
    own = replace(call, value=call.key[..., :0], sinks=None)
    _, part, seen = cpu.observed(own)
    share = (part - lse).exp().masked_fill(part == -torch.inf, 0)
    sink = torch.zeros_like(share)
    if call.sinks is not None:
        sink = (call.sinks.to(lse.dtype)[:, None] - lse).exp()
    return [
        _of_all(call, seen[i], share, sink, lse, observer)
        for i, observer in enumerate(call.observers)
    ]


def _of_all(
    call: Call, result: Any, share: Tensor, sink: Tensor, lse: Tensor, observer: Observer
) -> Any:
    """A result of a block's rows, whose weights are a share of the whole row's."""
    if isinstance(result, TopKSeen):
        weights = result.weights * share[..., None]
        return replace(result, weights=weights, rest=result.rest * share, sink=sink)
    if isinstance(result, EntropySeen):
        # −Σ cp ln cp = c (−Σ p ln p) − c ln c, as the block's weights p add up to 1
        return replace(result, values=result.values * share - torch.special.xlogy(share, share))
    if isinstance(result, ReceivedSeen):
        assert isinstance(observer, Received)
        total = cpu.column_sums(call, lse, observer.span(call.place))
        return replace(result, sum=total)  # the queries that see a key are counted already
    return result
