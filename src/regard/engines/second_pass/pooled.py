"""Tiles of a pooled map, lse given: only the rectangles asked for are computed.

A tile is `SIDE` × `SIDE` cells, a cell `cell` queries × `cell` keys: its mass ("sum"), or its
largest weight ("max"). A weight is exp(score − lse), so no rows beside the rectangle are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.geometry import Span
from ...errors import RegardError
from .strips import BUDGET

SIDE = 128
Reduce = Literal["sum", "max"]


class Rectangle(NamedTuple):
    """A tile of one head: its first cell begins at query `row` and key `col` of the call.

    Both count from the call's first, and may lie before it, or the tile may end beyond the last:
    what is outside is 0.
    """

    head: int
    row: int
    col: int
    cell: int


def pooled_tiles(
    call: Call, lse: Tensor, tiles: Sequence[Rectangle], reduce: Reduce = "sum"
) -> Tensor:
    """The tiles (n, SIDE, SIDE) of a call of one batch item, in its working dtype.

    lse (1, heads, q_len): that of all keys, learned sinks included.
    """
    if reduce not in ("sum", "max"):
        raise RegardError(f"reduce is {reduce!r}; give 'sum' or 'max'")
    out = torch.zeros(len(tiles), SIDE, SIDE, dtype=call.working, device=call.place.device)
    for tile, target in zip(tiles, out, strict=True):
        _fill(call, lse, tile, reduce, target)
    return out


def _fill(call: Call, lse: Tensor, tile: Rectangle, reduce: Reduce, target: Tensor) -> None:
    """One tile, block of rows by block of rows."""
    for span in _spans(call, tile):
        weights = _weights(call, lse, span)
        if weights is None:
            continue
        cols = _pooled_cols(weights, span.k0 - tile.col, tile.cell, reduce)
        first = (span.k0 - tile.col) // tile.cell
        into = target[:, first : first + cols.shape[1]]
        rows = torch.arange(span.q0, span.q1, device=cols.device, dtype=torch.int64) - tile.row
        index = rows // tile.cell
        if reduce == "sum":
            into.index_add_(0, index, cols)
        else:
            into.scatter_reduce_(0, index[:, None].expand_as(cols), cols, "amax")


def _spans(call: Call, tile: Rectangle) -> Iterator[Span]:
    """The blocks of rows of the part of a tile that lies in the call."""
    place, side = call.place, SIDE * tile.cell
    q0, q1 = max(tile.row, 0), min(tile.row + side, place.q_len)
    k0, k1 = max(tile.col, 0), min(tile.col + side, place.k_len)
    if k0 >= k1:
        return
    step = max(BUDGET // (k1 - k0), 1)
    for start in range(q0, q1, step):
        yield Span(
            start, min(start + step, q1), k0, k1, slice(0, 1), slice(tile.head, tile.head + 1)
        )


def _weights(call: Call, lse: Tensor, span: Span) -> Tensor | None:
    """The weights (rows, cols) of a span of one head; None where the mask hides all of it."""
    visible = None if call.program.full else call.program.visible(span)
    if visible is not None and not visible.any():
        return None
    head = span.heads.start
    query = call.query[0, head, span.q0 : span.q1].to(call.working) * call.scale
    key = call.key[0, head // (call.place.heads // call.place.kv_heads), span.k0 : span.k1]
    scores = query @ key.to(call.working).mT
    if call.softcap is not None:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
    for bias in call.biases:
        scores += bias.tile(span, scores.dtype)[0, 0]
    if visible is not None:
        scores.masked_fill_(~visible[0, 0], -torch.inf)
    own = lse[0, head, span.q0 : span.q1].to(call.working)
    return scores.sub_(own.masked_fill(own == -torch.inf, 0)[:, None]).exp_()


def _pooled_cols(weights: Tensor, start: int, cell: int, reduce: Reduce) -> Tensor:
    """(rows, cols) pooled along cols into cells, the first col standing `start` into the tile."""
    before = start % cell
    after = -(before + weights.shape[1]) % cell
    padded = torch.nn.functional.pad(weights, (before, after)).unflatten(1, (-1, cell))
    return padded.sum(-1) if reduce == "sum" else padded.amax(-1)
