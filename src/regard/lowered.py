"""The lowered form of a mask: one program of integers plus tensors.

A program is a list of instructions in postfix order, flat in a tuple of integers: an `Op` and its
operands. Leaves push an answer, AND, OR and NOT combine what was pushed. The same form serves every
engine, the registered op and files. It answers two questions:

- `visible(span)`: element by element, who sees whom in a tile;
- `classes(block_q, block_k)`: for all tiles at once, whether anything may be visible in it and
  whether everything is (three-valued logic: neither is "mixed"), so that engines skip work.

Positions are those of the sequence: query i of the call is at query_start + i, key j at
key_start + j. Leaves that hold a tensor per query or key index it by i and j.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor


class Op(IntEnum):
    """Instructions. The operands are integers; `t` is an index into the program's tensors."""

    FULL = 0
    CAUSAL = 1
    WINDOW = 2  # n, ahead
    FIRST = 3  # n
    DOCUMENTS = 4  # t: query ids (batch, q_len), t: key ids (batch, k_len)
    PADDING = 5  # t: keep (batch, k_len)
    EDGES = 6  # t: (n, 2) positions of query and key
    DENSE = 7  # t: bool, broadcastable to (batch, heads, q_len, k_len)
    TILES = 8  # t: cells (batch, heads, rows, cols) int32, t: bits (mixed cells, side, side / 8)
    HEADS = 9  # t: bool (heads,)
    AND = 16
    OR = 17
    NOT = 18

    @property
    def holds_tensors(self) -> bool:
        """Whether the operands are indices into the program's tensors."""
        return self in (Op.DOCUMENTS, Op.PADDING, Op.EDGES, Op.DENSE, Op.TILES, Op.HEADS)


OPERANDS = {Op.WINDOW: 2, Op.FIRST: 1, Op.DOCUMENTS: 2, Op.PADDING: 1, Op.EDGES: 1, Op.DENSE: 1}
OPERANDS |= {Op.TILES: 2, Op.HEADS: 1}
TILE_SIDE = 64  # of the cells into which a predicate is evaluated
EMPTY_CELL, FULL_CELL = -2, -1  # a cell's value is one of these, or its row in `bits`

Answer = tuple[Tensor, Tensor]  # for tiles: (something may be visible, everything is visible)


@dataclass(frozen=True)
class Span:
    """A rectangle of one call: queries q0 ≤ i < q1, keys k0 ≤ j < k1, of some batches and heads."""

    q0: int
    q1: int
    k0: int
    k1: int
    batch: slice = field(default_factory=lambda: slice(None))
    heads: slice = field(default_factory=lambda: slice(None))

    def cut(self, tensor: Tensor) -> Tensor:
        """The part of a tensor broadcastable to (batch, heads, q_len, k_len) inside this span."""
        dims = (self.batch, self.heads, slice(self.q0, self.q1), slice(self.k0, self.k1))
        wanted = (slice(None) if tensor.shape[d] == 1 else dims[d] for d in range(4))
        return tensor[tuple(wanted)]


@dataclass(frozen=True, eq=False)
class Program:
    """A mask, lowered for one call of q_len queries and k_len keys."""

    code: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    q_len: int
    k_len: int
    query_start: int
    key_start: int
    device: torch.device

    @property
    def full(self) -> bool:
        """Whether the mask is `Full`, by its form."""
        return self.code == (Op.FULL,)

    @property
    def by_batch(self) -> bool:
        """Whether the answer differs between batch items (by its form)."""
        return self.spread()[0] > 1

    def spread(self) -> tuple[int, int]:
        """The batch and head sizes of the answer: 1 where all share one."""
        sizes = [(1, 1), *self._leaf_sizes()]
        return max(b for b, _ in sizes), max(h for _, h in sizes)

    def _leaf_sizes(self) -> Iterator[tuple[int, int]]:
        for op, args in self.instructions():
            if op in (Op.DOCUMENTS, Op.PADDING):
                yield self.tensors[args[0]].shape[0], 1
            elif op == Op.HEADS:
                yield 1, self.tensors[args[0]].numel()
            elif op in (Op.DENSE, Op.TILES):
                yield self.tensors[args[0]].shape[0], self.tensors[args[0]].shape[1]

    def item(self, batch: int) -> Program:
        """The same mask for one item of the batch."""
        tensors = list(self.tensors)
        for op, args in self.instructions():
            # Of a predicate, only the cells count the batch; of edges and heads, nothing does
            by_batch = {Op.EDGES: (), Op.HEADS: (), Op.TILES: args[:1]}.get(op, args)
            for i in by_batch if op.holds_tensors else ():
                if tensors[i].shape[0] > 1:
                    tensors[i] = tensors[i][batch : batch + 1]
        return replace(self, tensors=tuple(tensors))

    def instructions(self) -> Iterator[tuple[Op, tuple[int, ...]]]:
        """The instructions in order, each with its operands."""
        at = 0
        while at < len(self.code):
            op = Op(self.code[at])
            count = OPERANDS.get(op, 0)
            yield op, self.code[at + 1 : at + 1 + count]
            at += 1 + count

    def visible(self, span: Span) -> Tensor:
        """Who sees whom: bool, broadcastable to (batch, heads, q1 − q0, k1 − k0) of the span."""
        query = torch.arange(span.q0, span.q1, device=self.device)[:, None] + self.query_start
        key = torch.arange(span.k0, span.k1, device=self.device)[None, :] + self.key_start
        stack: list[Tensor] = []
        for op, args in self.instructions():
            if op == Op.NOT:
                stack.append(~stack.pop())
            elif op in (Op.AND, Op.OR):
                right, left = stack.pop(), stack.pop()
                stack.append(left & right if op == Op.AND else left | right)
            else:
                stack.append(self._leaf(op, args, span, query, key))
        return stack.pop()

    def _leaf(
        self, op: Op, args: tuple[int, ...], span: Span, query: Tensor, key: Tensor
    ) -> Tensor:
        tensors = [self.tensors[i] for i in args] if op.holds_tensors else []
        if op == Op.FULL:
            return (key >= key[:, :1]).expand(1, 1, span.q1 - span.q0, -1)
        if op == Op.CAUSAL:
            return (key <= query)[None, None]
        if op == Op.WINDOW:
            back = query - key
            return ((back < args[0]) & (back >= -args[1]))[None, None]
        if op == Op.FIRST:
            return (key < args[0]).expand(1, 1, span.q1 - span.q0, -1)
        if op == Op.DOCUMENTS:
            mine = _batch(tensors[0], span)[:, None, span.q0 : span.q1, None]
            theirs = _batch(tensors[1], span)[:, None, None, span.k0 : span.k1]
            return (mine == theirs) & (mine >= 0)
        if op == Op.PADDING:
            keep = _batch(tensors[0], span)[:, None, None, span.k0 : span.k1]
            return keep.expand(-1, 1, span.q1 - span.q0, -1)
        if op == Op.EDGES:
            return self._edges(tensors[0], span)
        if op == Op.HEADS:
            mine = tensors[0][span.heads].view(1, -1, 1, 1)
            return mine.expand(-1, -1, span.q1 - span.q0, span.k1 - span.k0)
        if op == Op.DENSE:
            return span.cut(tensors[0]).expand(-1, -1, span.q1 - span.q0, span.k1 - span.k0)
        return _unpack(tensors[0], tensors[1], span)

    def _edges(self, pairs: Tensor, span: Span) -> Tensor:
        rows = span.q1 - span.q0
        query = pairs[:, 0] - self.query_start - span.q0
        key = pairs[:, 1] - self.key_start - span.k0
        inside = (query >= 0) & (query < rows) & (key >= 0) & (key < span.k1 - span.k0)
        tile = torch.zeros(rows, span.k1 - span.k0, dtype=torch.bool, device=self.device)
        tile[query[inside], key[inside]] = True
        return tile[None, None]

    def classes(self, block_q: int, block_k: int) -> Answer:
        """Two bool tensors broadcastable to (batch, heads, q tiles, k tiles): (some, all).

        `some` is False only where a tile is surely empty; `all` True only where it is surely full.
        """
        stack: list[Answer] = []
        tiles = Tiling(self, block_q, block_k)
        for op, args in self.instructions():
            if op == Op.NOT:
                some, every = stack.pop()
                stack.append((~every, ~some))
            elif op in (Op.AND, Op.OR):
                right, left = stack.pop(), stack.pop()
                if op == Op.AND:
                    stack.append((left[0] & right[0], left[1] & right[1]))
                else:
                    stack.append((left[0] | right[0], left[1] | right[1]))
            else:
                stack.append(tiles.leaf(op, args))
        some, every = stack.pop()
        shape = torch.broadcast_shapes(
            some.shape, every.shape, (1, 1, len(tiles.q0), len(tiles.k0))
        )
        return some.expand(shape), every.expand(shape)


class Tiling:
    """A grid of tiles over a call, and each leaf's answer for all of them at once."""

    def __init__(self, program: Program, block_q: int, block_k: int) -> None:
        self.program = program
        self.block_q, self.block_k = block_q, block_k
        device = program.device
        self.q0 = torch.arange(0, program.q_len, block_q, device=device)
        self.k0 = torch.arange(0, program.k_len, block_k, device=device)
        self.q_last = (self.q0 + block_q).clamp(max=program.q_len) - 1
        self.k_last = (self.k0 + block_k).clamp(max=program.k_len) - 1

    def leaf(self, op: Op, args: tuple[int, ...]) -> Answer:
        """The answer of one leaf, each half broadcastable to (batch, heads, q tiles, k tiles)."""
        program = self.program
        shift = program.query_start - program.key_start
        # query − key, over the tile: smallest and largest
        least = (self.q0 + shift)[:, None] - self.k_last[None, :]
        most = (self.q_last + shift)[:, None] - self.k0[None, :]
        tensors = [program.tensors[i] for i in args] if op.holds_tensors else []
        if op == Op.FULL:
            return _both(torch.ones_like(least, dtype=torch.bool))
        if op == Op.CAUSAL:
            return (most >= 0)[None, None], (least >= 0)[None, None]
        if op == Op.WINDOW:
            behind, ahead = args
            some = (most >= -ahead) & (least < behind)
            return some[None, None], ((least >= -ahead) & (most < behind))[None, None]
        if op == Op.FIRST:
            first = args[0] - program.key_start
            some, every = self.k0 < first, self.k_last < first
            return some[None, None, None], every[None, None, None]
        if op == Op.DOCUMENTS:
            mine, theirs = _ends(tensors[0], self.block_q), _ends(tensors[1], self.block_k)
            low, high = (e[:, None, :, None] for e in mine)
            other_low, other_high = (e[:, None, None, :] for e in theirs)
            some = (low <= other_high) & (other_low <= high) & (high >= 0)
            every = (low == high) & (other_low == other_high) & (low == other_low) & (low >= 0)
            return some, every
        if op == Op.PADDING:
            low, high = _ends(tensors[0].to(torch.int8), self.block_k)
            return (high > 0)[:, None, None, :], (low > 0)[:, None, None, :]
        if op == Op.EDGES:
            return self._edges(tensors[0])
        if op == Op.HEADS:
            return (tensors[0].view(1, -1, 1, 1),) * 2
        if op == Op.DENSE:
            return self._dense(tensors[0])
        return self._cells(tensors[0])

    def _edges(self, pairs: Tensor) -> Answer:
        query, key = pairs[:, 0] - self.program.query_start, pairs[:, 1] - self.program.key_start
        inside = (query >= 0) & (query < self.program.q_len) & (key >= 0)
        inside &= key < self.program.k_len
        row, col = query[inside] // self.block_q, key[inside] // self.block_k
        count = torch.zeros(len(self.q0), len(self.k0), dtype=torch.int64, device=row.device)
        count.index_put_((row, col), torch.ones_like(row), accumulate=True)
        area = (self.q_last - self.q0 + 1)[:, None] * (self.k_last - self.k0 + 1)[None, :]
        return (count > 0)[None, None], (count == area)[None, None]

    def _dense(self, dense: Tensor) -> Answer:
        some = every = dense
        for dim, block in ((-2, self.block_q), (-1, self.block_k)):
            if dense.shape[dim] > 1:
                some = _pool(some, dim, block, torch.amax, False)
                every = _pool(every, dim, block, torch.amin, True)
        return some, every

    def _cells(self, cells: Tensor) -> Answer:
        """A predicate's cells have a side of their own: pool those that a tile overlaps."""
        some, every = cells != EMPTY_CELL, cells == FULL_CELL
        for dim, start, last in ((-2, self.q0, self.q_last), (-1, self.k0, self.k_last)):
            some = _count(some, dim, start, last) > 0
            every = _count(~every, dim, start, last) == 0
        return some, every


def _both(answer: Tensor) -> Answer:
    return answer[None, None], answer[None, None]


def _batch(tensor: Tensor, span: Span) -> Tensor:
    return tensor if tensor.shape[0] == 1 else tensor[span.batch]


def _count(flags: Tensor, dim: int, start: Tensor, last: Tensor) -> Tensor:
    """How many flags are set among the cells that [start, last] overlaps, along dim."""
    total = flags.to(torch.int32).cumsum(dim, dtype=torch.int32)
    total = torch.cat([torch.zeros_like(total.narrow(dim, 0, 1)), total], dim)
    upto = total.index_select(dim, last // TILE_SIDE + 1)
    return upto - total.index_select(dim, start // TILE_SIDE)


def _ends(ids: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Least and largest id of each block: (batch, n) → two of (batch, blocks)."""
    pad = -ids.shape[-1] % block
    if pad:
        ids = torch.cat([ids, ids[..., -1:].expand(*ids.shape[:-1], pad)], -1)
    low, high = ids.unflatten(-1, (-1, block)).aminmax(dim=-1)
    return low, high


def _pool(flags: Tensor, dim: int, block: int, reduce, padding: bool) -> Tensor:  # type: ignore[no-untyped-def]
    pad = -flags.shape[dim] % block
    if pad:
        shape = list(flags.shape)
        shape[dim] = pad
        flags = torch.cat([flags, flags.new_full(shape, padding)], dim)
    pooled: Tensor = reduce(flags.unflatten(dim, (-1, block)), dim)
    return pooled


def _unpack(cells: Tensor, bits: Tensor, span: Span) -> Tensor:
    """The elements of a span from a predicate's cells."""
    r0, r1 = span.q0 // TILE_SIDE, (span.q1 - 1) // TILE_SIDE + 1
    c0, c1 = span.k0 // TILE_SIDE, (span.k1 - 1) // TILE_SIDE + 1
    batch = slice(None) if cells.shape[0] == 1 else span.batch
    heads = slice(None) if cells.shape[1] == 1 else span.heads
    cells = cells[batch, heads, r0:r1, c0:c1]
    mixed = cells >= 0
    shift = torch.arange(8, device=bits.device, dtype=torch.uint8)
    out = (cells == FULL_CELL)[..., None, None].repeat(1, 1, 1, 1, TILE_SIDE, TILE_SIDE)
    packed = bits[cells[mixed].long()]
    out[mixed] = ((packed[..., None] >> shift) & 1).bool().flatten(-2)
    out = out.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
    dq, dk = span.q0 - r0 * TILE_SIDE, span.k0 - c0 * TILE_SIDE
    return out[..., dq : dq + span.q1 - span.q0, dk : dk + span.k1 - span.k0]


def pack(visible: Tensor) -> Tensor:
    """Bits of bool (..., side) → uint8 (..., side / 8), least significant first."""
    shift = torch.arange(8, device=visible.device, dtype=torch.uint8)
    parts = visible.unflatten(-1, (-1, 8)).to(torch.uint8) << shift
    return parts.sum(-1, dtype=torch.uint8)
