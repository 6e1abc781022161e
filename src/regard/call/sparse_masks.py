"""Sparse patterns: masks whose shape is known before any query or key is.

    Causal() & Strided(3)         Causal() & Fixed(3, 1)        Causal() & Dilated(3, 2)
        q\\k 0 1 2 3 4 5 6 7          q\\k 0 1 2 3 4 5 6 7          q\\k 0 1 2 3 4 5 6 7
        4   · ■ ■ ■ ■ · · ·          4   · · ■ ■ ■ · · ·          4   ■ · ■ · ■ · · ·
        5   · · ■ ■ ■ ■ · ·          5   · · ■ ■ ■ ■ · ·          5   · ■ · ■ · ■ · ·
        6   ■ · · ■ ■ ■ ■ ·          6   · · ■ · · ■ ■ ·          6   · · ■ · ■ · ■ ·
        7   · ■ · · ■ ■ ■ ■          7   · · ■ · · ■ ■ ■          7   · · · ■ · ■ · ■

None of them is causal by itself: join them with `Causal()`. Positions are those of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegardError
from .dropout import philox
from .masks import Lowering, Mask, given_tensor, on_device
from .numbers import FARTHEST, whole, whole_fields, wholes
from .opcodes import Op

_LOW = 0xFFFFFFFF


def cells(start: int, length: int, block: int) -> range:
    """The blocks, position // block, in which the positions start … start + length − 1 stand."""
    return range(start // block, (start + length - 1) // block + 1) if length else range(0)


@dataclass(frozen=True, eq=False)
class BlockSparse(Mask):
    """Blocks of pairs, each seen whole or not at all.

    layout bool, broadcastable to (batch, heads, rows, cols): whether the queries of the row's block
    see the keys of the col's. Blocks are those of the sequence, position // block; `first` is the
    (row, col) at which the layout begins. By default that is where the call's first query and first
    key stand: then rows is ceil(q_len / block) where query_start is a multiple of block, and may be
    one more where it is not; likewise cols. With first=(0, 0) one layout of a whole sequence serves
    every chunk of it. Memory: a byte a pair of blocks.
    """

    layout: Tensor
    block: int
    first: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        given_tensor(self.layout, "BlockSparse: layout")
        if self.layout.dtype != torch.bool or not 1 <= self.layout.dim() <= 4:
            raise RegardError(
                f"{self}: it is {self.layout.dtype}; give bool that broadcasts to (batch, heads, "
                "rows, cols), True: visible"
            )
        whole_fields(self, "block")
        if self.block < 1:
            raise RegardError(f"{self}: give block ≥ 1")

    def _write(self, to: Lowering) -> None:
        place = to.place
        spans = (
            cells(place.query_start, place.q_len, self.block),
            cells(place.key_start, place.k_len, self.block),
        )
        layout = on_device(self.layout[(None,) * (4 - self.layout.dim())], place, self, "layout")
        first = self.first or tuple(span.start for span in spans)
        for dim, span, begins in zip((2, 3), spans, first, strict=True):
            size, skip = layout.shape[dim], span.start - begins
            if size == 1:
                shape = [len(span) if d == dim else -1 for d in range(4)]
                layout = layout.expand(shape)
            elif skip >= 0 and skip + len(span) <= size and (self.first or size == len(span)):
                layout = layout.narrow(dim, skip, len(span))
            else:
                raise RegardError(self._misfit(to, spans))
        if layout.shape[0] not in (1, place.batch) or layout.shape[1] not in (1, place.heads):
            raise RegardError(self._misfit(to, spans))
        rows, cols = spans
        to.write(Op.BLOCKS, layout.contiguous(), self.block, rows.start, cols.start)

    def _misfit(self, to: Lowering, spans: tuple[range, range]) -> str:
        place, begins = to.place, "" if self.first is None else f" begins at block {self.first},"
        said = ", ".join(
            f"{name} at {start} … {start + length - 1} in blocks {span.start} … {span.stop - 1}"
            for name, start, length, span in (
                ("queries", place.query_start, place.q_len, spans[0]),
                ("keys", place.key_start, place.k_len, spans[1]),
            )
        )
        shape = (place.batch, place.heads, *map(len, spans))
        return f"{self}:{begins} this call has {said}: it needs what broadcasts to {shape}"

    def __str__(self) -> str:
        return f"BlockSparse(layout {tuple(self.layout.shape)}, block {self.block})"


@dataclass(frozen=True)
class Dilated(Mask):
    """Query at i sees n keys, every step-th back from itself: i, i − step, …, i − (n − 1) · step.

    The dilated window of Longformer (Beltagy et al. 2020, section 3.1), its past half.
    """

    n: int
    step: int

    def __post_init__(self) -> None:
        whole_fields(self, "n", "step")
        if self.n < 1 or self.step < 1:
            raise RegardError(f"{self}: give n ≥ 1 and step ≥ 1")

    def _write(self, to: Lowering) -> None:
        to.write(Op.WINDOW, (self.n - 1) * self.step + 1, 0)
        to.write(Op.STEP, self.step)
        to.write(Op.AND)

    def __str__(self) -> str:
        return f"Dilated({self.n}, {self.step})"


@dataclass(frozen=True)
class Strided(Mask):
    """Query at i sees the keys less than n away, and all whose distance is a multiple of n.

    The strided pattern of the Sparse Transformer, both its parts in one mask (Child et al. 2019,
    section 4.3, there causal).
    """

    n: int

    def __post_init__(self) -> None:
        whole_fields(self, "n")
        if self.n < 1:
            raise RegardError(f"{self}: give n ≥ 1")

    def _write(self, to: Lowering) -> None:
        to.write(Op.WINDOW, self.n, self.n - 1)
        to.write(Op.STEP, self.n)
        to.write(Op.OR)

    def __str__(self) -> str:
        return f"Strided({self.n})"


@dataclass(frozen=True)
class Fixed(Mask):
    """A query sees its own block of n positions, and the last `summary` positions of every block.

    The fixed pattern of the Sparse Transformer, both its parts in one mask (Child et al. 2019,
    section 4.3, there causal; `summary` is its c).
    """

    n: int
    summary: int

    def __post_init__(self) -> None:
        whole_fields(self, "n", "summary")
        if not 0 <= self.summary <= self.n or self.n < 1:
            raise RegardError(f"{self}: give n ≥ 1 and 0 ≤ summary ≤ n")

    def _write(self, to: Lowering) -> None:
        to.write(Op.CHUNK, self.n)
        to.write(Op.PHASE, self.n, self.n - self.summary, self.n)
        to.write(Op.OR)

    def __str__(self) -> str:
        return f"Fixed({self.n}, {self.summary})"


@dataclass(frozen=True)
class Longformer(Mask):
    """A window of window // 2 keys to each side, and global positions that see and are seen by all.

    global_keys: how many, from the first of the sequence on, or the positions themselves (those of
    a question, say). Beltagy et al. 2020, section 3.1.
    """

    window: int
    ranges: tuple[tuple[int, int], ...]  # of global positions: start, stop

    def __init__(self, window: int, global_keys: int | Iterable[int]) -> None:
        object.__setattr__(self, "window", whole(window, "Longformer: window"))
        if isinstance(global_keys, int):
            ranges = [(0, global_keys)] if global_keys else []
        else:
            ranges = _runs(sorted(set(wholes(global_keys, "Longformer: global_keys"))))
        object.__setattr__(self, "ranges", tuple(ranges))
        if self.window < 0 or (isinstance(global_keys, int) and global_keys < 0):
            raise RegardError(f"Longformer({window}, {global_keys}): give numbers ≥ 0")
        if ranges and ranges[0][0] < 0:
            raise RegardError(f"{self}: positions count from 0")

    def _write(self, to: Lowering) -> None:
        side = self.window // 2
        to.write(Op.WINDOW, side + 1, side)
        for start, stop in self.ranges:
            to.write(Op.FIRST, stop)
            if start:
                to.write(Op.FIRST, start)
                to.write(Op.NOT)
                to.write(Op.AND)
            to.write(Op.OR)
            to.write(Op.QUERIES, start, stop)
            to.write(Op.OR)

    def __str__(self) -> str:
        said = ", ".join(str(a) if b == a + 1 else f"{a} … {b - 1}" for a, b in self.ranges)
        return f"Longformer({self.window}, [{said}])"


def _runs(positions: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending positions as ranges."""
    runs: list[tuple[int, int]] = []
    for p in positions:
        if runs and runs[-1][1] == p:
            runs[-1] = (runs[-1][0], p + 1)
        else:
            runs.append((p, p + 1))
    return runs


@dataclass(frozen=True)
class BigBird(Mask):
    """By blocks: a window, the first blocks as global ones, and a few drawn at random.

    A block of queries sees window_blocks // 2 blocks to each side and its own; the first
    `global_blocks`, which also see everything; and `random_blocks` more of the call's key blocks,
    the same in every head. Zaheer et al. 2020, section 2 and appendix D (internal construction).

    A block's draw depends on the seed, the block and which key blocks the call has, not on where
    its queries begin: Philox 4×32-10 of (col // 4, row) under the seed ranks the candidates. Other
    layers: other seeds. Other heads: `BigBird(…, 1) & Heads([0]) | BigBird(…, 2) & Heads([1])`.
    Memory: a byte a pair of blocks.
    """

    block: int
    window_blocks: int = 3
    global_blocks: int = 2
    random_blocks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        whole_fields(self, "block", "window_blocks", "global_blocks", "random_blocks", "seed")
        if self.block < 1 or min(self.window_blocks, self.global_blocks, self.random_blocks) < 0:
            raise RegardError(f"{self}: give block ≥ 1 and numbers of blocks ≥ 0")

    def _write(self, to: Lowering) -> None:
        place = to.place
        rows = cells(place.query_start, place.q_len, self.block)
        cols = cells(place.key_start, place.k_len, self.block)
        layout = self.layout(rows, cols, place.device)[None, None]
        to.write(Op.BLOCKS, layout, self.block, rows.start, cols.start)

    def layout(self, rows: range, cols: range, device: torch.device | str = "cpu") -> Tensor:
        """Which blocks of queries see which blocks of keys: bool (rows, cols)."""
        row = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int64)[:, None]
        col = torch.arange(cols.start, cols.stop, device=device, dtype=torch.int64)
        beside, first = (
            min(n, 2 * FARTHEST) for n in (self.window_blocks // 2, self.global_blocks)
        )
        seen = (row - col).abs() <= beside
        seen = seen | (col < first)
        seen = seen | ((row >= 0) & (row < first))
        if self.random_blocks == 0 or not len(cols):
            return seen
        group = torch.arange(
            cols.start // 4, (cols.stop - 1) // 4 + 1, device=device, dtype=torch.int64
        )
        counter = (group & _LOW, row & _LOW, torch.zeros_like(group), torch.ones_like(group))
        words = torch.stack(philox(counter, (self.seed & _LOW, self.seed >> 32 & _LOW)), -1)
        words = words.flatten(-2)[:, cols.start % 4 :][:, : len(cols)]
        # The columns among themselves never tie
        rank = (
            words << 31 | torch.arange(len(cols), device=device, dtype=torch.int64)
        ).masked_fill(seen, -1)
        best = rank.topk(min(self.random_blocks, len(cols)), -1).indices
        return seen.scatter(-1, best, True)

    def __str__(self) -> str:
        numbers = (self.block, self.window_blocks, self.global_blocks, self.random_blocks)
        return f"BigBird({', '.join(map(str, numbers))}, seed={self.seed})"


@dataclass(frozen=True)
class Chunks(Mask):
    """A long document cut into chunks: query and key see each other where one chunk holds both.

    Chunk c covers the positions c · (size − overlap) … + size − 1. `Chunks(n) & Causal()` is what a
    model sees that reads a document n tokens at a time (chunked attention); with an overlap, what
    it sees when each chunk repeats the end of the last and the results are merged. A mask of reach
    r ≤ overlap, such as Window(r + 1), loses nothing by it: every pair it shows is in one chunk.
    """

    size: int
    overlap: int = 0

    def __post_init__(self) -> None:
        whole_fields(self, "size", "overlap")
        if not 0 <= self.overlap < self.size:
            raise RegardError(f"{self}: give size ≥ 1 and 0 ≤ overlap < size")

    @property
    def step(self) -> int:
        """How far a chunk begins after the one before."""
        return self.size - self.overlap

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Start and stop of each chunk of a document; the last one ends with it."""
        count = max(-(-(length - self.overlap) // self.step), 1) if length else 0
        return [(c * self.step, min(c * self.step + self.size, length)) for c in range(count)]

    def _write(self, to: Lowering) -> None:
        if self.overlap == 0:
            to.write(Op.CHUNK, self.size)
            return
        place = to.place
        query = (
            torch.arange(place.q_len, device=place.device, dtype=torch.int64) + place.query_start
        )
        key = torch.arange(place.k_len, device=place.device, dtype=torch.int64) + place.key_start
        # Of every `groups` chunks at most one holds a position: each group is a Documents
        size, step = min(self.size, FARTHEST), min(self.step, FARTHEST)
        if size == FARTHEST:  # the first chunk holds every position
            step = size
        groups = -(-size // step)
        for group in range(groups):
            chunks = (_chunk(p, size, step, group, groups)[None] for p in (query, key))
            to.write(Op.DOCUMENTS, *chunks)
            if group:
                to.write(Op.OR)

    def __str__(self) -> str:
        return f"Chunks({self.size}{f', overlap={self.overlap}' if self.overlap else ''})"


def _chunk(position: Tensor, size: int, step: int, group: int, groups: int) -> Tensor:
    """The chunk of a group, every `groups`-th, that holds each position; −1 where none does."""
    chunk = (position // step - group) // groups * groups + group
    inside = (chunk >= 0) & (position < chunk * step + size)
    return chunk.where(inside, -1)
