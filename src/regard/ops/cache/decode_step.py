"""From decode step to decode step: what stays the same is made once, so that Python costs little.

`DecodePlan` is the attention of one new token; `Steady` is what a cache that evicts does after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...call.checked import Call
from ...engines import select
from ...engines.cpu import calls as running
from ...engines.cpu import engine as cpu
from ...engines.cpu.call_struct import Buffers, received_alone
from ...engines.functorch import unwatched

CONTIGUOUS = torch.contiguous_format


class Steady:
    """One token comes to each item, and one slot of each head goes; what stays the same is kept.

    key, value: the cache's buffers. positions int32, total float32 or None, both contiguous (batch,
    kv_heads or 1, slots): of the filled slots, of which the last is the new token's; total is what
    a policy that sums up has summed so far. seen float32 (batch, heads, slots): what a step's
    query gave to each slot; or None, where position decides. held, held_total: what is held between
    steps, views of all but the last slot.
    """

    def __init__(
        self, key: Tensor, value: Tensor, positions: Tensor, total: Tensor | None,
        seen: Tensor | None, by_layer: bool,
    ) -> None:  # fmt: skip
        self.positions, self.total = positions, total
        self.held = positions[:, :, :-1]
        self.held_total = None if total is None else total[:, :, :-1]
        self.ones, self.next = [1] * positions.shape[0], -1
        self.fills = [positions.shape[2] - 1] * positions.shape[0]
        self._kept = Buffers()
        self.seen = None if seen is None else torch.empty_like(seen, memory_format=CONTIGUOUS)
        self.observe = 0 if self.seen is None else received_alone(self._kept, self.seen)
        self._step = running.step_of(key, value, positions, total, self.seen, by_layer)

    def follows(self, held: Tensor, new: list[int], starts: list[int]) -> bool:
        """Whether one token comes to each item of what the last step left."""
        return held is self.held and new == self.ones and starts == [self.next] * len(starts)

    def evict(self, among: tuple[int, int], length: int, seen: Tensor | None) -> None:
        """One slot of each head goes, by what it received, of those at positions `among` (a range).

        length: the tokens seen, so the position of the next one, whose slot is now the last.
        """
        if seen is not None and self.seen is not None and seen is not self.seen:
            self.seen.copy_(seen)
        running.evict(self._step, among, length)
        self.next = length


class DecodePlan:
    """The attention of a decode step by engine cpu: one new token of each item, over all slots.

    observe: the address of what the kernel fills beside, 0 for nothing. asked: what
    `regard.attention` is asked besides, `scale`, `softcap` and so on; no mask, no bias.
    """

    def __init__(self, call: Call, engine: str, observe: int, asked: Mapping[str, Any]) -> None:
        self.observe = observe
        self._engine, self._scaled = engine, _scaled(asked)
        self._again = running.Again(call, observe)

    @classmethod
    def of(
        cls, call: Call, engine: str, observe: int, asked: Mapping[str, Any]
    ) -> DecodePlan | None:
        """The plan; None where another engine computes the call, or a graph is wanted of it."""
        fits = cpu.direct(call) and not call.needs_grad and _plain(asked)
        if not fits or select(call, engine) is not cpu:
            return None
        return cls(call, engine, observe, asked)

    def serves(self, query: Tensor, engine: str, asked: Mapping[str, Any]) -> bool:
        """Whether this call is the same, but for what the query and the keys hold."""
        first = self._again
        return (
            query.shape == first.shape
            and query.stride() == first.stride
            and query.dtype == first.dtype
            and engine == self._engine
            and _scaled(asked) == self._scaled
            and _plain(asked)
            and unwatched(query)
            and not (query.requires_grad and torch.is_grad_enabled())
        )

    def attend(self, query: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        return self._again.run(query, slots)


def _scaled(asked: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return asked.get("scale"), asked.get("softcap")


def _plain(asked: Mapping[str, Any]) -> bool:
    return asked.get("sinks") is None and not asked.get("dropout")
