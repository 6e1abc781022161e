"""The lowered form of a mask: one program of integers plus tensors.

A program is a list of instructions in postfix order, flat in a tuple of integers: an `Op` and its
operands (`ops`). Leaves push an answer, AND, OR and NOT combine what was pushed. The same form
serves every engine, the registered op and files. It answers two questions:

- `visible(span)`: element by element, who sees whom in a tile;
- `classes(block_q, block_k)`: for all tiles at once, whether anything may be visible in it and
  whether everything is (three-valued logic: neither is "mixed"), so that engines skip work.

Positions are those of the sequence: query i of the call is at query_start + i, key j at
key_start + j. Leaves that hold a tensor per query or key index it by i and j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .geometry import Span
from .mask_tiles import Answer, BlockRange, Tiling
from .opcodes import EMPTY_CELL, FULL_CELL, TILE_SIDE, Op


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
        sizes = {"b": 1, "h": 1}
        for op, args in self.instructions():
            for i, dims in zip(args, op.form.tensors, strict=False):
                for dim, size in zip(dims, self.tensors[i].shape, strict=False):
                    sizes[dim] = max(sizes[dim], size)
        return sizes["b"], sizes["h"]

    def item(self, batch: int) -> Program:
        """The same mask for one item of the batch."""
        return self.items(slice(batch, batch + 1))

    def items(self, which: slice | list[int]) -> Program:
        """The same mask for these items of the batch."""
        tensors = list(self.tensors)
        for op, args in self.instructions():
            for i, dims in zip(args, op.form.tensors, strict=False):
                if dims[:1] == "b" and tensors[i].shape[0] > 1:
                    tensors[i] = tensors[i][which]
        return replace(self, tensors=tuple(tensors))

    def part(self, span: Span) -> Program:
        """The same mask for some queries, keys and heads of the call; all items of the batch."""
        tensors, heads = list(self.tensors), span.heads

        # Only tensors that stand by query or key are cut; numbers and edges are positions, which
        # the starts below move along
        rows, cols = slice(span.q0, span.q1), slice(span.k0, span.k1)
        for op, args in self.instructions():
            if op == Op.DOCUMENTS:
                tensors[args[0]] = tensors[args[0]][:, rows]
                tensors[args[1]] = tensors[args[1]][:, cols]
            elif op == Op.PADDING:
                tensors[args[0]] = tensors[args[0]][:, cols]
            elif op == Op.DENSE:
                tensors[args[0]] = span.cut(tensors[args[0]])
            elif op == Op.HEADS:
                tensors[args[0]] = tensors[args[0]][heads]
            elif op == Op.BLOCKS:
                tensors[args[0]] = _items(tensors[args[0]], span).contiguous()
            elif op == Op.TILES:
                tensors[args[0]], tensors[args[1]] = self._cells_part(args, span)
        return Program(
            self.code, tuple(tensors), span.q1 - span.q0, span.k1 - span.k0,
            self.query_start + span.q0, self.key_start + span.k0, self.device,
        )  # fmt: skip

    def _cells_part(self, args: Sequence[int], span: Span) -> list[Tensor]:
        """A predicate's cells and bits in a span; where it is the whole call, they are kept."""
        cells, bits = (self.tensors[i] for i in args)
        # Cells begin at multiples of their side from the call's first query: another start needs
        # new ones
        if (span.q0, span.q1, span.k0, span.k1) == (0, self.q_len, 0, self.k_len):
            return [_items(cells, span), bits]

        def shown(q0: int, q1: int) -> Tensor:
            rows = Span(span.q0 + q0, span.q0 + q1, span.k0, span.k1, span.batch, span.heads)
            return _unpack(cells, bits, rows)

        return cells_of(shown, span.q1 - span.q0, span.k1 - span.k0, self.device)

    def instructions(self) -> Iterator[tuple[Op, tuple[int, ...]]]:
        """The instructions in order, each with its operands."""
        at = 0
        while at < len(self.code):
            op = Op(self.code[at])
            end = at + 1 + op.form.operands
            yield op, self.code[at + 1 : end]
            at = end

    def _operands(self, args: tuple[int, ...], op: Op) -> tuple[list[Tensor], tuple[int, ...]]:
        """A leaf's operands: its tensors, and its numbers."""
        count = len(op.form.tensors)
        return [self.tensors[i] for i in args[:count]], args[count:]

    def visible(self, span: Span) -> Tensor:
        """Who sees whom: bool, broadcastable to (batch, heads, q1 − q0, k1 − k0) of the span."""
        query = (
            torch.arange(span.q0, span.q1, device=self.device, dtype=torch.int64)[:, None]
            + self.query_start
        )
        key = (
            torch.arange(span.k0, span.k1, device=self.device, dtype=torch.int64)[None, :]
            + self.key_start
        )
        stack: list[Tensor] = []
        for op, args in self.instructions():
            if op == Op.NOT:
                stack.append(~stack.pop())
            elif op in (Op.AND, Op.OR):
                right, left = stack.pop(), stack.pop()
                stack.append(left & right if op == Op.AND else left | right)
            else:
                shown = self._leaf(op, *self._operands(args, op), span, query, key)
                stack.append(shown[None, None] if shown.dim() == 2 else shown)
        return stack.pop()

    def _leaf(
        self,
        op: Op,
        tensors: Sequence[Tensor],
        numbers: Sequence[int],
        span: Span,
        query: Tensor,
        key: Tensor,
    ) -> Tensor:
        """One leaf's answer, (q1 − q0, k1 − k0) or with batch and heads before them."""
        rows, cols = span.q1 - span.q0, span.k1 - span.k0
        if op == Op.FULL:
            # Asked of the keys rather than made anew, so that it has their device, and 0 keys give
            # 0 columns
            return (key >= key[:, :1]).expand(rows, -1)  # True, of as many keys as there are
        if op == Op.CAUSAL:
            return key <= query
        if op == Op.WINDOW:
            back = query - key
            return (back < numbers[0]) & (back >= -numbers[1])
        if op == Op.FIRST:
            return (key < numbers[0]).expand(rows, -1)
        if op == Op.STEP:
            return (query - key) % numbers[0] == 0
        if op == Op.CHUNK:
            return query // numbers[0] == key // numbers[0]
        if op == Op.PHASE:
            phase = key % numbers[0]
            return ((phase >= numbers[1]) & (phase < numbers[2])).expand(rows, -1)
        if op == Op.QUERIES:
            return ((query >= numbers[0]) & (query < numbers[1])).expand(-1, cols)
        if op == Op.DOCUMENTS:
            mine = _batch(tensors[0], span)[:, None, span.q0 : span.q1, None]
            theirs = _batch(tensors[1], span)[:, None, None, span.k0 : span.k1]
            # A negative id is of no document: such tokens see nothing, not each other
            return (mine == theirs) & (mine >= 0)
        if op == Op.PADDING:
            keep = _batch(tensors[0], span)[:, None, None, span.k0 : span.k1]
            return keep.expand(-1, 1, rows, -1)
        if op == Op.EDGES:
            return self._edges(tensors[0], span)
        if op == Op.HEADS:
            mine = tensors[0][span.heads].view(1, -1, 1, 1)
            return mine.expand(-1, -1, rows, cols)
        if op == Op.DENSE:
            return span.cut(tensors[0]).expand(-1, -1, rows, cols)
        if op == Op.BLOCKS:
            block, row, col = numbers
            # The layout is looked up by position, so that a call may begin inside a block
            mine = _items(tensors[0], span).index_select(2, query[:, 0] // block - row)
            return mine.index_select(3, key[0] // block - col)
        return _unpack(tensors[0], tensors[1], span)

    def _edges(self, pairs: Tensor, span: Span) -> Tensor:
        rows = span.q1 - span.q0
        query = pairs[:, 0] - self.query_start - span.q0
        key = pairs[:, 1] - self.key_start - span.k0
        inside = (query >= 0) & (query < rows) & (key >= 0) & (key < span.k1 - span.k0)
        tile = torch.zeros(rows, span.k1 - span.k0, dtype=torch.bool, device=self.device)
        tile[query[inside], key[inside]] = True
        return tile

    def classes(self, block_q: int, block_k: int) -> Answer:
        """Two bool tensors broadcastable to (batch, heads, q tiles, k tiles): (some, all).

        `some` is False only where a tile is surely empty; `all` True only where it is surely full.
        """
        tiles = self.tiles(block_q, block_k)
        return tiles.some, tiles.every

    def tiles(self, block_q: int, block_k: int, lead: tuple[int, int] = (0, 0)) -> Tiles:
        """All tiles with their classes; the first ones begin `lead` indices before the call."""
        grid = Tiling(
            BlockRange(self.q_len, block_q, self.query_start, lead[0], self.device),
            BlockRange(self.k_len, block_k, self.key_start, lead[1], self.device),
        )
        stack: list[Answer] = []
        for op, args in self.instructions():
            if op == Op.NOT:
                # Three-valued: what may be hidden is what is not surely full, and the other way
                some, every = stack.pop()
                stack.append((~every, ~some))
            elif op in (Op.AND, Op.OR):
                # Two parts that are mixed may still not meet: `some` errs to True, `every` to False
                right, left = stack.pop(), stack.pop()
                if op == Op.AND:
                    stack.append((left[0] & right[0], left[1] & right[1]))
                else:
                    stack.append((left[0] | right[0], left[1] | right[1]))
            else:
                stack.append(grid.leaf(op, *self._operands(args, op)))
        some, every = stack.pop()
        sizes = (1, 1, grid.query.count, grid.key.count)
        shape = torch.broadcast_shapes(some.shape, every.shape, sizes)
        return Tiles(some.expand(shape), every.expand(shape), grid.query, grid.key)


@dataclass(frozen=True, eq=False)
class Tiles:
    """A call's tiles: bool (batch or 1, heads or 1, q tiles, k tiles), and the grid's two sides."""

    some: Tensor
    every: Tensor
    query: BlockRange
    key: BlockRange

    @cached_property
    def undecided(self) -> Tensor:
        """(rows, cols): tiles that are neither surely empty nor surely full, for some item."""
        return (self.some & ~self.every).flatten(0, 1).any(0)

    def mixed(self) -> Iterator[tuple[int, int, int, Span]]:
        """Where elements decide: (row, first col, last col + 1) of neighbours, and their span."""
        mixed = self.undecided
        # With a column that is not mixed at both ends, changes come in pairs: a run's start and end
        edge = mixed.new_zeros(len(mixed), 1)
        change = torch.cat([edge, mixed, edge], 1).diff(dim=1).nonzero().tolist()
        q0, q1, k0, k1 = (
            [int(n) for n in side]
            for side in (self.query.first, self.query.last + 1, self.key.first, self.key.last + 1)
        )
        for (row, start), (_, stop) in zip(change[::2], change[1::2], strict=True):
            yield row, start, stop, Span(q0[row], q1[row], k0[start], k1[stop - 1])


def _batch(tensor: Tensor, span: Span) -> Tensor:
    return tensor if tensor.shape[0] == 1 else tensor[span.batch]


def _items(tensor: Tensor, span: Span) -> Tensor:
    """The batch items and heads of a span, of a tensor (batch or 1, heads or 1, …)."""
    heads = slice(None) if tensor.shape[1] == 1 else span.heads
    return _batch(tensor, span)[:, heads]


def _unpack(cells: Tensor, bits: Tensor, span: Span) -> Tensor:
    """The elements of a span from a predicate's cells."""
    r0, r1 = span.q0 // TILE_SIDE, (span.q1 - 1) // TILE_SIDE + 1
    c0, c1 = span.k0 // TILE_SIDE, (span.k1 - 1) // TILE_SIDE + 1
    cells = _items(cells, span)[:, :, r0:r1, c0:c1]
    mixed = cells >= 0  # then the number of its tile of bits
    shift = torch.arange(8, device=bits.device, dtype=torch.uint8)
    out = (cells == FULL_CELL)[..., None, None].repeat(1, 1, 1, 1, TILE_SIDE, TILE_SIDE)
    packed = bits[cells[mixed].long()]
    out[mixed] = ((packed[..., None] >> shift) & 1).bool().flatten(-2)
    # (rows, cols, side, side) → (rows · side, cols · side), then cut to what the span asks for
    out = out.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
    dq, dk = span.q0 - r0 * TILE_SIDE, span.k0 - c0 * TILE_SIDE
    return out[..., dq : dq + span.q1 - span.q0, dk : dk + span.k1 - span.k0]


def cells_of(
    shown: Callable[[int, int], Tensor], q_len: int, k_len: int, device: torch.device
) -> list[Tensor]:
    """What `Op.TILES` holds, cells and bits, of shown(q0, q1): bool (batch, heads, q1 − q0, k_len).

    Row by row of cells, so that only O(k_len) elements exist at a time.
    """
    side, rows, bits, count = TILE_SIDE, [], [], 0
    for q0 in range(0, q_len, side):
        part = shown(q0, min(q0 + side, q_len))
        # 1 visible, 0 hidden, 2 beyond the end: neither decides what a cell is
        padded = part.new_full((*part.shape[:2], side, k_len + -k_len % side), 2, dtype=torch.uint8)
        padded[:, :, : part.shape[2], :k_len] = part
        cells = padded.unflatten(-1, (-1, side)).transpose(-3, -2)
        every = (cells != 0).all(-1).all(-1)
        some = (cells == 1).any(-1).any(-1)
        mixed = some & ~every
        kinds = torch.where(every, FULL_CELL, EMPTY_CELL).to(torch.int32)
        found = int(mixed.sum())
        kinds[mixed] = torch.arange(count, count + found, dtype=torch.int32, device=device)
        count += found
        bits.append(pack(cells[mixed] == 1))
        rows.append(kinds)
    if not rows:
        empty = torch.zeros(1, 1, 0, -(-k_len // side), dtype=torch.int32, device=device)
        return [empty, torch.zeros(0, side, side // 8, dtype=torch.uint8, device=device)]
    return [torch.stack(rows, 2), torch.cat(bits)]


def pack(visible: Tensor) -> Tensor:
    """Bits of bool (..., side) → uint8 (..., side / 8), least significant first."""
    shift = torch.arange(8, device=visible.device, dtype=torch.uint8)
    parts = visible.unflatten(-1, (-1, 8)).to(torch.uint8) << shift
    return parts.sum(-1, dtype=torch.uint8)
