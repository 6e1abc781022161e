"""Pooled rectangles of a head's weights, from q, k and a given lse, in plain torch: the definition.

A tile is 128 × 128 cells, and a cell pools 2ᶻ × 2ᶻ weights exp(score − lse). Nothing outside of the
rectangle is read, so a row's weights are not divided by their own sum: the lse stands for it. The
engine `cpu` and the Triton kernel compute the same, faster (`ops.pooled`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.geometry import Span
from .strips import product

Reduce = Literal["sum", "max"]
SIDE = 128  # cells of a tile, each way
MOST_ZOOM = 24
FARTHEST = 2**31  # of a tile's first row and column from the call's
ROWS, COLS = 512, 4096  # weights at once: powers of two, so that a piece is cells, or lies in one


class Rectangle(NamedTuple):
    """Where a tile lies: its cells pool 2^zoom queries × 2^zoom keys, from (row, col) on.

    row and col count the call's queries and keys; what lies outside of these weighs 0, so both
    may be below 0.
    """

    head: int
    zoom: int
    row: int
    col: int
    batch: int = 0

    def wrong(self, call: Call) -> str:
        """What is wrong with it, if anything is."""
        place = call.place
        if not 0 <= self.head < place.heads:
            return f"head is {self.head}; the call has {place.heads}"
        if not 0 <= self.batch < place.batch:
            return f"batch is {self.batch}; the call has {place.batch}"
        if not 0 <= self.zoom <= MOST_ZOOM:
            return f"zoom is {self.zoom}; give 0 (a cell is one weight) to {MOST_ZOOM}"
        if max(abs(self.row), abs(self.col)) > FARTHEST:
            return f"it begins at row {self.row}, column {self.col}; give numbers within ± 2³¹"
        return ""


def tiles_in_torch(call: Call, lse: Tensor, tiles: Sequence[Rectangle], largest: bool) -> Tensor:
    """(tiles, 128, 128) float32: the sums, or the largest, of each cell's weights.

    lse (batch, heads, q_len). A pair that is hidden weighs 0; a row whose lse is NaN or +∞ is NaN
    wherever it sees something, as the softmax of such a row is.
    """
    shape = (len(tiles), SIDE, SIDE)
    out = torch.zeros(shape, dtype=call.working, device=call.place.device)
    for tile, cells in zip(tiles, out, strict=True):
        for span, weights in _pieces(call, lse, tile):
            _pool(cells, weights, span, tile, largest)
    return out.float()


def _pieces(call: Call, lse: Tensor, tile: Rectangle) -> Iterator[tuple[Span, Tensor]]:
    """The weights (rows, cols) of the tile's pieces that show anything."""
    place, side = call.place, SIDE << tile.zoom
    batch, heads = (slice(n, n + 1) for n in (tile.batch, tile.head))
    kv = tile.head // (place.heads // place.kv_heads)
    for q0, q1 in _cut(tile.row, min(tile.row + side, place.q_len), ROWS):
        for k0, k1 in _cut(tile.col, min(tile.col + side, place.k_len), COLS):
            span = Span(q0, q1, k0, k1, batch, heads)
            seen = call.program.visible(span)
            if not seen.any():
                continue
            query = call.query[batch, heads, q0:q1].to(call.working) * call.scale
            key = call.key[batch, kv : kv + 1, k0:k1].to(call.working)
            scores = product(query, key.mT)
            if call.softcap is not None:
                scores.div_(call.softcap).tanh_().mul_(call.softcap)
            for bias in call.biases:
                scores += bias.tile(span, scores.dtype)
            if not seen.all():
                scores.masked_fill_(~seen, -torch.inf)
            yield span, _weights(scores, lse[batch, heads, q0:q1, None].to(call.working))[0, 0]


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(score − lse), in the scores' memory. lse: (…, rows, 1)."""
    lse = lse.masked_fill(lse == -torch.inf, 0)  # such a row sees nothing
    if lse.isfinite().all():
        return scores.sub_(lse).exp_()
    hidden = scores == -torch.inf  # weighs 0 whatever the row's lse
    lse = lse.masked_fill(lse == torch.inf, torch.nan)
    return scores.sub_(lse).exp_().masked_fill_(hidden, 0)


def _cut(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """The pieces of a range, `size` long from its start on, without what lies below 0."""
    first = start + max(-start, 0) // size * size
    for at in range(first, stop, size):
        if at + size > 0:
            yield max(at, 0), min(at + size, stop)


def _pool(cells: Tensor, weights: Tensor, span: Span, tile: Rectangle, largest: bool) -> None:
    """Add a piece's weights to the cells that they lie in, or raise these to the largest."""

    def reduced(weights: Tensor, offset: int) -> tuple[Tensor, slice]:
        """(…, n) from `offset` of the tile on, as (…, cells), and which these are."""
        n, size = weights.shape[-1], 1 << tile.zoom
        first, last = offset >> tile.zoom, offset + n - 1 >> tile.zoom
        grouped = weights.unsqueeze(-2)
        if first < last:
            around = (offset - first * size, (last + 1) * size - offset - n)
            grouped = torch.nn.functional.pad(weights, around).unflatten(-1, (-1, size))
        return grouped.amax(-1) if largest else grouped.sum(-1), slice(first, last + 1)

    by_col, cols = reduced(weights, span.k0 - tile.col)
    by_row, rows = reduced(by_col.mT, span.q0 - tile.row)
    held = cells[rows, cols]
    if largest:
        torch.maximum(held, by_row.mT, out=held)
    else:
        held += by_row.mT
