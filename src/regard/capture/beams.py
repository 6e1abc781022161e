"""Whose row is whose after a cache was reordered between two decode steps: beam search.

Keys tell it. A row of the new call continues the row whose keys, since the prompt, it holds to the
bit; they are compared by fingerprints. Rows that hold the same from the first token on are one item
of the batch, and any of them serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..call.checked import Call
from ..errors import RegardError
from .stored import read

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Trail:
    """The keys that a layer's queries brought: by them its rows are known again.

    marks int64 (batch, kv_heads, n): fingerprints of the last n, from the prompt's last on.
    items: for each row the first row that began with the same keys.
    """

    def __init__(self, call: Call) -> None:
        own = _own(call)
        self.marks = _marks(own[:, :, -1:])
        self.items = _same(own, self.marks)
        self.end = call.place.query_start + call.place.q_len

    def order(self, call: Call) -> list[int] | None:
        """Which row each row of a call that continues goes on from; None: its own.

        RegardError where a row is nobody's.
        """
        known, place = self.marks.shape[2], call.place
        held = self.end - place.key_start
        count = 1 if len(self.items) == 1 or not _twice(self.marks[:, :, -1]) else known
        count = min(count, held)
        if count < 1 or held > place.k_len:
            return None
        key = call.key[:, :, held - count : held].detach()
        now, marks = _marks(key), self.marks[:, :, known - count :]
        gone = (key == 0).all(-1)[:, None]  # what a cache has evicted is 0
        alike = ((now[:, None] == marks[None]) | gone).flatten(2).all(-1)
        order = [self._choose(row, found) for row, found in enumerate(alike.tolist())]
        return None if order == list(range(len(self.items))) else order

    def _choose(self, row: int, alike: Sequence[bool]) -> int:
        """The row, of those whose keys are alike, that this one continues."""
        found = [n for n, same in enumerate(alike) if same]
        if row in found:
            return row
        # Beams move within their item, whose rows stand where they stood
        own = [n for n in found if row < len(self.items) and self.items[n] == self.items[row]]
        if own:
            return own[0]
        if len({self.items[n] for n in found}) == 1:
            return found[0]
        raise RegardError(
            "the cache was changed between two steps, and its keys do not tell whose row is whose; "
            "this way of generating cannot be watched"
        )

    def extend(self, call: Call, order: list[int] | None) -> None:
        """Take in a call that continues, its rows in this order of the last one's."""
        if order is not None:
            self.marks = self.marks[order]
            # Named by new places; the rows of one item stay one
            first: dict[int, int] = {}
            self.items = [first.setdefault(self.items[n], row) for row, n in enumerate(order)]
        own = _own(call)
        if own.shape[2]:
            self.marks = torch.cat([self.marks, _marks(own)], 2)
        self.end = call.place.query_start + call.place.q_len


def picked(result: Any, rows: list[int]) -> Any:
    """A typed result for these rows of its batch."""
    if not is_dataclass(result) or isinstance(result, type):
        return result
    tensors = {f.name: getattr(result, f.name) for f in fields(result)}
    chosen = {name: read(t)[rows] for name, t in tensors.items() if isinstance(t, Tensor)}
    return replace(result, **chosen)


def _own(call: Call) -> Tensor:
    """The keys at the positions of a call's own queries (batch, kv_heads, n, dim)."""
    start = max(call.place.query_start - call.place.key_start, 0)
    return call.key[:, :, start:][:, :, : call.place.q_len].detach()


def _marks(key: Tensor) -> Tensor:
    """A fingerprint of each key: int64 (batch, kv_heads, n) of (batch, kv_heads, n, dim)."""
    bits = key.contiguous().view(_BITS[key.element_size()]).long()
    odd = torch.arange(bits.shape[-1], device=bits.device, dtype=torch.int64) * 2 + 1
    # Numbers that no sum of few others gives: of Knuth's multiplicative hashing, mixed
    factors = odd * -7046029254386353131
    factors = (factors ^ (factors >> 29)) * -4658895280553007687
    mixed = bits * 6364136223846793005 + 1442695040888963407
    return ((mixed ^ (mixed >> 31)) * (factors | 1)).sum(-1)


def _twice(marks: Tensor) -> bool:
    """Whether two rows of (batch, kv_heads) are equal."""
    return len(torch.unique(marks, dim=0)) < len(marks)


def _same(key: Tensor, marks: Tensor) -> list[int]:
    """For each row of (batch, …) the first that equals it; those of other marks do not."""
    firsts = list(range(len(key)))
    if len(key) > 1:
        known: dict[tuple[int, ...], list[int]] = {}
        for row, mark in enumerate(marks.flatten(1).tolist()):
            near = known.setdefault(tuple(mark), [])
            firsts[row] = next((n for n in near[::-1] if torch.equal(key[n], key[row])), row)
            if firsts[row] == row:
                near.append(row)
    return firsts
