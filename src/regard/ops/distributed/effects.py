"""Effects over ranks: results that wait for the backward, filled block of keys by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.edge_results import EffectSeen
from ...call.observers import Effect, Observer
from ...engines.second_pass.effect import measure
from .parts import Rows
from .results import Sharded
from .whole import Whole


def effects_of(whole: Whole) -> dict[int, list[EffectSeen]]:
    """For each `Effect`, by its number, results of this rank's ranges, which the backward fills."""
    start = whole.call.place.query_start
    return {
        i: [EffectSeen(start + first) for _, first, _ in whole.queries.local(whole.ranks.rank)]
        for i, o in enumerate(whole.call.observers)
        if isinstance(o, Effect)
    }


def waiting(whole: Whole, observer: Observer, effects: Sequence[EffectSeen]) -> Sharded:
    """Effects, which the backward measures."""
    return Sharded(effects, "queries", whole, observer)


class BlockEffects:
    """Fills the effects of one backward pass block of keys by block; the largest of all remain."""

    def __init__(self, whole: Whole, effects: dict[int, list[EffectSeen]]) -> None:
        self.whole, self.effects = whole, effects
        place, local = whole.call.place, whole.queries.local(whole.ranks.rank)
        self.ranges = {start: n for n, (_, start, _) in enumerate(local)}
        for i, each in effects.items():
            for seen, (_, start, stop) in zip(each, local, strict=True):
                shape = (place.batch, place.heads, stop - start, self._effect(i).k)
                nothing = torch.zeros(shape, dtype=whole.call.working, device=place.device)
                none = torch.full(shape, -1, dtype=torch.int32, device=place.device)
                seen.fill(none, nothing, nothing)

    def _effect(self, number: int) -> Effect:
        effect = self.whole.call.observers[number]
        assert isinstance(effect, Effect)
        return effect

    def add(self, call: Call, rows: Rows, out: Tensor, start: int) -> None:
        """What a block's edges do; out: of all keys. start: of the range of queries."""
        for i, each in self.effects.items():
            seen, block = each[self.ranges[start]], EffectSeen(call.place.query_start)
            k = self._effect(i).k
            block.fill(*measure(call, rows.lse, out, rows.grad_out[None], k, shard=True))
            seen.fill(*seen.beside(block).tensors())
