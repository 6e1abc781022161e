"""Steady: a cache that evicts, from decode step to decode step, at next to no cost in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..engines import cpu, select
from ..kernels import running
from ..kernels.described import Buffers, received_alone
from ..results import ReceivedSeen

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
        self.key, self.value, self.positions, self.total = key, value, positions, total
        self.held = positions[:, :, :-1]
        self.held_total = None if total is None else total[:, :, :-1]
        self.ones, self.next = [1] * positions.shape[0], -1
        self.fills = [positions.shape[2] - 1] * positions.shape[0]
        self._kept = Buffers()
        self._seen = None if seen is None else torch.empty_like(seen, memory_format=CONTIGUOUS)
        if self._seen is not None:
            count = torch.zeros(self._seen.shape, dtype=torch.int32)
            self._observe = received_alone(self._kept, self._seen, count)
            self._result = (ReceivedSeen(self._seen, count, 1, 0),)
        self._step = running.step_of(key, value, positions, total, self._seen, by_layer)

    def follows(self, key: Tensor, held: Tensor, new: list[int], starts: list[int]) -> bool:
        """Whether one token comes to each item of what the last step left."""
        alike = held is self.held and key is self.key and new == self.ones
        return alike and starts == [self.next] * len(starts)

    def attend(self, call: Call, engine: str) -> tuple[Tensor, Tensor, Any] | None:
        """(out, lse, what a policy's observer sees), by engine cpu; None where it is not the one.

        The call is of one query for each item, over all slots.
        """
        fits = self._seen is not None and self._seen.shape[1] == call.place.heads
        if not fits or not cpu.direct(call) or call.needs_grad or select(call, engine) is not cpu:
            return None
        out, lse, _ = running.run(call, observe=self._observe)
        return out, lse, self._result

    def evict(self, keep: tuple[int, int], length: int, seen: Tensor | None) -> None:
        """One slot of each head goes, by what it received; its positions are not in `keep`.

        length: the tokens seen, so the position of the next one, whose slot is now the last.
        """
        if seen is not None and self._seen is not None and seen is not self._seen:
            self._seen.copy_(seen)
        running.evict(self._step, keep, length)
        self.next = length
