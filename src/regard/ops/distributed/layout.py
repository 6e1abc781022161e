"""Which rank holds which positions of a sequence.

A sequence of N positions is cut into chunks of equal size (but for one position, where they do not
divide it): chunk c of C holds ⌊cN/C⌋ … ⌊(c+1)N/C⌋ − 1. Each rank holds some of them, ascending.

    plain, P = 4    0 | 1 | 2 | 3              rank r holds chunk r
    zigzag, P = 4   0 7 | 1 6 | 2 5 | 3 4      rank r holds chunks r and 2P − 1 − r of 2P
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...call.geometry import Place, Span
from ...call.masks import Mask
from ...errors import RegardError

Order = tuple[tuple[int, ...], ...]  # the chunks of each rank
MOST_CHUNKS = 4  # a rank gets of `balanced`


def named(order: str | Order, size: int) -> Order:
    """The order of this name for `size` ranks; one that is given is checked."""
    if order == "plain":
        return tuple((r,) for r in range(size))
    if order == "zigzag":
        return tuple((r, 2 * size - 1 - r) for r in range(size))
    if isinstance(order, str):
        raise RegardError(f'order is {order!r}; give "zigzag", "plain", or what balanced returns')
    held = sorted(c for chunks in order for c in chunks)
    if len(order) != size or held != list(range(len(held))):
        raise RegardError(f"order {order} does not give each of its chunks to one of {size} ranks")
    return tuple(tuple(sorted(chunks)) for chunks in order)


@dataclass(frozen=True)
class Layout:
    """A sequence of `length` positions over the ranks of an order."""

    length: int
    order: Order

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """The ranges (start, stop) that a rank holds, ascending; one that is empty if it has none.

        Neighbouring chunks are one range.
        """
        count = sum(map(len, self.order))
        found: list[tuple[int, int]] = []
        for chunk in self.order[rank]:
            start, stop = (c * self.length // count for c in (chunk, chunk + 1))
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], stop)
            elif stop > start:
                found.append((start, stop))
        return found or [(0, 0)]

    def size(self, rank: int) -> int:
        """How many positions a rank holds."""
        return sum(stop - start for start, stop in self.spans(rank))

    @property
    def sizes(self) -> list[int]:
        """How many each holds."""
        return [self.size(r) for r in range(len(self.order))]

    def local(self, rank: int) -> list[tuple[int, int, int]]:
        """(start in the rank's own tensors, start, stop) of each of its ranges."""
        at, found = 0, []
        for start, stop in self.spans(rank):
            found.append((at, start, stop))
            at += stop - start
        return found

    def take(self, whole: Tensor, rank: int, dim: int) -> Tensor:
        """A rank's part of a tensor that counts all positions along dim."""
        parts = [whole.narrow(dim, a, b - a) for a, b in self.spans(rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The whole again, from what `take` gives each rank."""
        pieces = [
            (start, part.narrow(dim, at, stop - start))
            for rank, part in enumerate(parts)
            for at, start, stop in self.local(rank)
            if stop > start
        ]
        if not pieces:
            return parts[0]
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda p: p[0])], dim)

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """The positions that a rank holds, in its order: int64."""
        every = torch.arange(self.length, device=device, dtype=torch.int64)
        return self.take(every, rank, 0)


def balanced(mask: Mask, length: int, size: int, block: int = 128) -> Order:
    """An order of `length` positions in which every rank sees about as many pairs of a mask.

    Up to four chunks a rank, those of most visible pairs first, each to the rank that has least. A
    pair of blocks that the mask neither shows nor hides whole counts half. For `order=` of `shard`
    and `context_parallel`; masks that know distances alone are as well off with "zigzag".
    """
    count = MOST_CHUNKS * size
    place = Place(1, 1, 1, length, length, 0, 0, torch.device("cpu"))
    program = mask.lower(place)
    weights = []
    for chunk in range(count):
        start, stop = (c * length // count for c in (chunk, chunk + 1))
        if stop == start:
            weights.append(0.0)
            continue
        some, every = program.part(Span(start, stop, 0, length)).classes(block, block)
        seen = some.expand_as(every) if some.numel() < every.numel() else some
        weights.append(float((seen.float() + every.float()).mean()) * (stop - start))
    held: list[list[int]] = [[] for _ in range(size)]
    load = [0.0] * size
    for chunk in sorted(range(count), key=lambda c: (-weights[c], c)):
        open_to = [r for r in range(size) if len(held[r]) < MOST_CHUNKS]
        rank = min(open_to, key=lambda r: (load[r], r))
        held[rank].append(chunk)
        load[rank] += weights[chunk]
    return tuple(tuple(sorted(chunks)) for chunks in held)
