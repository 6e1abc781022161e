"""Empty, full or mixed: every instruction's answer for all tiles of a call at once.

Three-valued logic: `some` is False only where a tile is surely empty, `every` True only where it is
surely full, so that engines skip work. For leaves that hold no tensor both are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .opcodes import EMPTY_CELL, FULL_CELL, TILE_SIDE, Op

Answer = tuple[Tensor, Tensor]  # for tiles: (something may be visible, everything is visible)


class BlockRange:
    """One side of a grid of tiles: blocks over `length` indices, the first at position `start`.

    lead: how many indices the first block has lost in front, so that blocks can be aligned to the
    positions of the sequence. first, last: each block's indices; low, high: the same as positions.
    """

    length: int
    block: int
    start: int
    first: Tensor
    last: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, length: int, block: int, start: int, lead: int, device: torch.device
    ) -> None:
        self.length, self.block, self.start = length, block, start
        self.lead: int = lead if length else 0
        self.count: int = -(-(length + self.lead) // block)
        edges = torch.arange(self.count, device=device, dtype=torch.int64) * block - self.lead
        self.first, self.last = edges.clamp(min=0), (edges + block).clamp(max=length) - 1
        self.low, self.high = self.first + start, self.last + start

    def split(self, tensor: Tensor, dim: int) -> Tensor:
        """(…, length, …) → (…, blocks, block, …); the ends repeat, which min and max ignore."""
        if self.lead or self.length % self.block:
            index = (
                torch.arange(self.count * self.block, device=tensor.device, dtype=torch.int64)
                - self.lead
            )
            tensor = tensor.index_select(dim, index.clamp(0, self.length - 1))
        return tensor.unflatten(dim, (self.count, self.block))


class Tiling:
    """A grid of tiles over a call; each answer is broadcastable to (batch, heads, rows, cols)."""

    query: BlockRange
    key: BlockRange

    def __init__(self, query: BlockRange, key: BlockRange) -> None:
        self.query, self.key = query, key

    def leaf(self, op: Op, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Answer:
        """The answer of one leaf."""
        q, k = self.query, self.key
        if op == Op.FULL:
            whole = torch.ones(1, 1, q.count, k.count, dtype=torch.bool, device=q.low.device)
            return whole, whole
        if op in (Op.CAUSAL, Op.WINDOW, Op.STEP):
            some, every = self._distances(op, numbers)
            return some[None, None], every[None, None]
        if op == Op.FIRST:
            return _keys(k.low < numbers[0]), _keys(k.high < numbers[0])
        if op == Op.QUERIES:
            lo, hi = numbers
            # The tile's queries and lo … hi − 1 have one in common
            some = q.low.clamp(min=lo) < (q.high + 1).clamp(max=hi)
            return _queries(some), _queries((q.low >= lo) & (q.high < hi))
        if op == Op.PHASE:
            # Counted, as a tile may hold several periods
            found = _phases(k.high + 1, *numbers) - _phases(k.low, *numbers)
            return _keys(found > 0), _keys(found == k.high - k.low + 1)
        if op == Op.CHUNK:
            (n,) = numbers
            return _same(
                _queries(q.low // n), _queries(q.high // n), _keys(k.low // n), _keys(k.high // n)
            )
        if op == Op.DOCUMENTS:
            mine, theirs = (
                s.split(t, -1).aminmax(dim=-1) for s, t in zip((q, k), tensors, strict=True)
            )
            low, high = _queries(mine.min), _queries(mine.max)
            some, every = _same(low, high, _keys(theirs.min), _keys(theirs.max))
            # By the range of ids alone, so `some` may be too often True: ids need not be in order
            return some & (high >= 0), every & (low >= 0)
        if op == Op.PADDING:
            keep = k.split(tensors[0], -1)
            return _keys(keep.any(-1)), _keys(keep.all(-1))
        if op == Op.EDGES:
            return self._edges(tensors[0])
        if op == Op.HEADS:
            return (tensors[0].view(1, -1, 1, 1),) * 2
        if op == Op.DENSE:
            return self._dense(tensors[0])
        if op == Op.BLOCKS:
            block, row, col = numbers
            rows = (q.low // block - row, q.high // block - row)
            cols = (k.low // block - col, k.high // block - col)
            return _overlapping(tensors[0], tensors[0], rows, cols)
        rows, cols = ((s.first // TILE_SIDE, s.last // TILE_SIDE) for s in (q, k))
        return _overlapping(tensors[0] != EMPTY_CELL, tensors[0] == FULL_CELL, rows, cols)

    def _distances(self, op: Op, numbers: Sequence[int]) -> Answer:
        """Leaves that know query − key alone, which takes every value from least to most."""
        least = self.query.low[:, None] - self.key.high
        most = self.query.high[:, None] - self.key.low
        if op == Op.CAUSAL:
            return most >= 0, least >= 0
        if op == Op.WINDOW:
            behind, ahead = numbers
            return (most >= -ahead) & (least < behind), (least >= -ahead) & (most < behind)
        (n,) = numbers
        last = most - most % n  # the last multiple of n in the tile or before it
        return last >= least, (last == most) & ((least == most) | (n == 1))

    def _edges(self, pairs: Tensor) -> Answer:
        q, k = self.query, self.key
        query, key = pairs[:, 0] - q.start, pairs[:, 1] - k.start
        inside = (query >= 0) & (query < q.length) & (key >= 0) & (key < k.length)
        # Pairs are distinct (`Edges`), so a tile with as many as it has elements is full
        row, col = (query[inside] + q.lead) // q.block, (key[inside] + k.lead) // k.block
        count = torch.zeros(q.count, k.count, dtype=torch.int64, device=row.device)
        count.index_put_((row, col), torch.ones_like(row), accumulate=True)
        area = (q.last - q.first + 1)[:, None] * (k.last - k.first + 1)
        return (count > 0)[None, None], (count == area)[None, None]

    def _dense(self, dense: Tensor) -> Answer:
        some = every = dense
        for dim, side in ((-2, self.query), (-1, self.key)):
            if dense.shape[dim] > 1:
                some = side.split(some, dim).any(dim)
                every = side.split(every, dim).all(dim)
        return some, every


def _queries(numbers: Tensor) -> Tensor:
    """(rows,) or (batch, rows), to be compared with what counts the keys."""
    return numbers[None, None, :, None] if numbers.dim() == 1 else numbers[:, None, :, None]


def _keys(numbers: Tensor) -> Tensor:
    """(cols,) or (batch, cols), to be compared with what counts the queries."""
    return numbers[None, None, None] if numbers.dim() == 1 else numbers[:, None, None]


def _same(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Answer:
    """Whether ids from low to high may, or must, equal others from other_low to other_high."""
    some = (low <= other_high) & (other_low <= high)
    return some, (low == high) & (other_low == other_high) & (low == other_low)


def _phases(end: Tensor, n: int, lo: int, hi: int) -> Tensor:
    """How many numbers below `end` have lo ≤ number % n < hi, up to a constant."""
    return end // n * (hi - lo) + (end % n - lo).clamp(0, hi - lo)


def _overlapping(some: Tensor, every: Tensor, rows: Answer, cols: Answer) -> Answer:
    """Flags of cells (batch, heads, rows, cols), pooled over those that each tile overlaps."""
    for dim, (first, last) in ((-2, rows), (-1, cols)):
        # Dim after dim: any of any is any, and all of all is none that is not
        some = _count(some, dim, first, last) > 0
        every = _count(~every, dim, first, last) == 0
    return some, every


def _count(flags: Tensor, dim: int, first: Tensor, last: Tensor) -> Tensor:
    """How many flags are set among the cells first … last, along dim."""
    # A tile may overlap any number of cells: a difference of running sums serves all alike
    total = flags.cumsum(dim, dtype=torch.int32)
    before = total.new_zeros([1 if d == dim % 4 else n for d, n in enumerate(total.shape)])
    total = torch.cat([before, total], dim)
    return total.index_select(dim, last + 1) - total.index_select(dim, first)
