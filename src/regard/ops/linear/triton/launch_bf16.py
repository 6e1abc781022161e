"""Linear attention's recurrence of bfloat16 by Triton: plain torch around `recurrence_bf16`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 64  # tokens; a power of two from 16


class Tile(NamedTuple):
    """What a program takes: features, columns of values; its warps, and tiles under way."""

    features: int
    columns: int
    warps: int
    stages: int


# By kernel ("channel": with a decay per channel; "delta": with the delta rule), then by the larger
# of features and columns: at most 64, 128 or 256. What smaller heads do not need is cut off.
# Those up to 128 are the fastest of some eight each on an H200. No scan has one stage: compiled by
# Triton 3.6 for that GPU, Tile(128, 32, 4, 1) with the delta rule touches memory that is not there,
# where the same program of two or three stages does not.
TILES: dict[str, dict[int, Tile]] = {
    "sums": {64: Tile(32, 0, 8, 1), 128: Tile(64, 0, 4, 1), 256: Tile(64, 0, 4, 1)},
    "pairs": {d: Tile(64, 0, 8, 1) for d in (64, 128, 256)},
    "pairs delta": {d: Tile(64, 0, 8, 1) for d in (64, 128, 256)},
    "solve": {64: Tile(64, 64, 4, 1), 128: Tile(128, 128, 4, 1), 256: Tile(64, 64, 4, 2)},
    "scan": {64: Tile(64, 16, 4, 4), 128: Tile(64, 64, 4, 4), 256: Tile(64, 64, 4, 4)},
    "scan channel": {64: Tile(64, 32, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 4, 3)},
    "scan delta": {64: Tile(64, 16, 4, 3), 128: Tile(128, 32, 4, 3), 256: Tile(256, 16, 8, 2)},
    "scan channel delta": {
        64: Tile(64, 16, 4, 3), 128: Tile(128, 16, 4, 3), 256: Tile(256, 16, 8, 2),
    },
    "read": {64: Tile(64, 64, 8, 2), 128: Tile(64, 128, 4, 3), 256: Tile(64, 128, 4, 3)},
    "read channel": {64: Tile(64, 64, 4, 1), 128: Tile(64, 128, 8, 2), 256: Tile(64, 128, 8, 2)},
}  # fmt: skip


def tile_of(kernel: str, features: int, columns: int) -> Tile:
    """The tile of a kernel, cut to what so many features and columns need."""
    widest = max(features, columns)
    best = TILES[kernel][64 if widest <= 64 else 128 if widest <= 128 else 256]
    return best._replace(
        features=block(features, best.features), columns=block(columns, best.columns)
    )


def block(size: int, most: int) -> int:
    """The least power of two from 16 that holds so many, or `most`."""
    return min(most, 1 << max(size - 1, 15).bit_length())


def forward(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
    memory: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """scale times what the queries read, bfloat16, and the last memory, float32.

    As `linear.forward`, of bfloat16 query, key and value of as many columns as the memory.
    """
    run = _Forward(query, key, value, decay, beta)
    pairs = run.pairs()
    new, reads = run.solve(pairs.overlap)
    states, news, last = run.scan(memory, pairs.key, new, reads)
    return run.read(pairs, states, news, scale), last


class _Pairs(NamedTuple):
    """Of a decay per channel: the pairs within chunks, the queries decayed from the chunk's start
    and the keys to its end. Of others the queries and keys, and nothing that is read.
    """

    scores: Tensor
    overlap: Tensor
    query: Tensor
    key: Tensor


class _Forward:
    """The tensors and sizes of a recurrence, and a launch of each kernel."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None
    ) -> None:
        self.query, self.key, self.value = (t.contiguous() for t in (query, key, value))
        self.beta = None if beta is None else beta.contiguous()
        self.kind = 0 if decay is None else 1 if decay.shape[-1] == 1 else 2
        self.batch, self.heads, self.tokens, self.features = query.shape
        self.state_heads, self.columns = key.shape[1], value.shape[-1]
        self.group = self.heads // self.state_heads
        self.states = self.batch * self.state_heads
        self.size = CHUNK
        self.chunks = -(-self.tokens // self.size)
        # What is not there is not read
        self.sums = self.query if decay is None else self.summed(decay)

    def device(self) -> AbstractContextManager[Any]:
        """Kernels start on the current GPU; it must be the tensors'."""
        device = self.query.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def new(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return self.query.new_empty(shape, dtype=dtype)

    def tile(self, kernel: str) -> Tile:
        """Of a kernel, with what this recurrence adds to its name."""
        if kernel != "sums" and self.kind == 2 and f"{kernel} channel" in TILES:
            kernel += " channel"
        if self.beta is not None and f"{kernel} delta" in TILES:
            kernel += " delta"
        return tile_of(kernel, self.features, self.columns)

    def summed(self, decay: Tensor) -> Tensor:
        """(batch, state_heads, tokens, 1 or features): the decays' sums within chunks."""
        from . import forward_bf16_kernel as recurrence_bf16

        width, tile = decay.shape[-1], tile_of("sums", decay.shape[-1], 0)
        blocks = -(-width // tile.features) if width > 1 else 1
        out = self.new(*decay.shape, dtype=torch.float32)
        with self.device():
            recurrence_bf16.sums[(self.states * self.chunks * blocks,)](
                decay.contiguous(), out, self.tokens, width, self.chunks, blocks,
                T=self.size, F=tile.features if width > 1 else 1,
                num_warps=tile.warps if width > 1 else 2, num_stages=tile.stages,
            )  # fmt: skip
        return out

    def pairs(self) -> _Pairs:
        """With a decay per channel the queries' and, with the delta rule, the keys' pairs."""
        from . import forward_bf16_kernel as recurrence_bf16

        if self.kind < 2:
            return _Pairs(self.query, self.query, self.query, self.key)
        tile, area = self.tile("pairs"), (self.chunks, self.size, self.size)
        scores = overlap = self.new(self.batch, self.heads, *area)
        if self.beta is not None:
            overlap = self.new(self.batch, self.state_heads, *area, dtype=torch.float32)
        query, key = torch.empty_like(self.query), torch.empty_like(self.key)
        with self.device():
            recurrence_bf16.pairs[(self.batch * self.heads * self.chunks,)](
                self.query, self.key, self.sums, scores, overlap, query, key,
                self.tokens, self.features, self.group, self.chunks,
                DELTA=self.beta is not None, T=self.size, F=tile.features,
                LEVELS=self.size.bit_length() - 1, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        return _Pairs(scores, overlap, query, key)

    def solve(self, overlap: Tensor) -> tuple[Tensor, Tensor]:
        """With the delta rule, u where the state is 0, and what the state is read with."""
        from . import forward_bf16_kernel as recurrence_bf16

        if self.beta is None:
            return self.value, self.key
        tile = self.tile("solve")
        new, reads = torch.empty_like(self.value), torch.empty_like(self.key)
        with self.device():
            recurrence_bf16.solve[(self.states * self.chunks,)](
                self.key, self.value, self.beta, self.sums, overlap, new, reads,
                self.tokens, self.features, self.columns, self.chunks,
                KIND=self.kind, T=self.size, F=tile.features, V=tile.columns, PRECISION="tf32",
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        return new, reads

    def scan(
        self, memory: Tensor, key: Tensor, new: Tensor, reads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state before each chunk, the values or u, and the last state."""
        from . import forward_bf16_kernel as recurrence_bf16

        tile, delta = self.tile("scan"), self.beta is not None
        features = block(self.features, 256) if delta else tile.features
        f_blocks, v_blocks = -(-self.features // features), -(-self.columns // tile.columns)
        states = self.new(
            self.batch, self.state_heads, self.chunks, self.features, self.columns
        )  # fmt: skip
        last = self.new(*memory.shape, dtype=torch.float32)
        news = torch.empty_like(new) if delta else new
        with self.device():
            recurrence_bf16.scan[(self.states * f_blocks * v_blocks,)](
                key, new, self.sums, reads, memory.contiguous(), states, news, last,
                self.tokens, self.features, self.columns, self.chunks, f_blocks, v_blocks,
                KIND=self.kind, DELTA=delta, T=self.size, F=features, V=tile.columns,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        return states, news, last

    def read(self, pairs: _Pairs, states: Tensor, news: Tensor, scale: float) -> Tensor:
        """(batch, heads, tokens, columns)"""
        from . import forward_bf16_kernel as recurrence_bf16

        tile = self.tile("read")
        v_blocks = -(-self.columns // tile.columns)
        out = self.new(*self.query.shape[:3], self.columns)
        with self.device():
            recurrence_bf16.read[(self.batch * self.heads * self.chunks * v_blocks,)](
                pairs.query, pairs.key, news, self.sums, pairs.scores, states, out, scale,
                self.tokens, self.features, self.columns, self.group, self.chunks, v_blocks,
                KIND=self.kind, T=self.size, F=tile.features, V=tile.columns,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        return out
