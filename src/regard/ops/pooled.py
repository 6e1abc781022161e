"""`pooled_tiles`: rectangles of the map of a head's weights, each pooled to 128 × 128 cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call.checked import Call
from ..engines.cpu import calls, native
from ..engines.cpu.call_struct import TYPES
from ..engines.cpu.engine import MOST_CODE
from ..engines.second_pass.pooled import Rectangle, Reduce, tiles_in_torch
from ..engines.second_pass.triton import pooled as by_triton
from ..errors import RegardError


def pooled_tiles(
    call: Call,
    lse: Tensor,
    tiles: Sequence[Rectangle | tuple[int, ...]],
    reduce: Reduce = "sum",
) -> Tensor:
    """(tiles, 128, 128) float32: cells of 2^zoom × 2^zoom weights exp(score − lse), pooled.

    call: its value is not read, nor are its dropout and observers. lse (batch, heads, q_len): that
    of all keys, with the sinks. tiles: (head, zoom, row, col) or (head, zoom, row, col, batch)
    each; cell (r, c) holds the queries of the call from row + r · 2^zoom on, and the keys from
    col + c · 2^zoom on. Outside of the call, and where a pair is hidden, a weight is 0. Nothing
    but these rows and keys is read: O(cells) memory beside the copies of a few hundred rows. The
    same bits whatever the threads and the other tiles. RegardError for what does not fit.
    """
    if reduce not in ("sum", "max"):
        raise RegardError(f"reduce is {reduce!r}; give 'sum' or 'max'")
    place = call.place
    if lse.shape != (place.batch, place.heads, place.q_len):
        raise RegardError(
            f"lse is {tuple(lse.shape)}; this call needs (batch, heads, q_len), "
            f"{(place.batch, place.heads, place.q_len)}"
        )
    for given in tiles:
        if not 4 <= len(given) <= 5 or not all(isinstance(n, int) for n in given):
            raise RegardError(
                f"a tile is {given!r}; give integers, (head, zoom, row, col[, batch])"
            )
    asked = [Rectangle(*tile) for tile in tiles]
    for tile in asked:
        if wrong := tile.wrong(call):
            raise RegardError(f"{tile}: {wrong}")
    with torch.no_grad():
        if not kernel_refuses(call):
            return calls.pooled(call, lse, asked, reduce == "max")
        if call.place.device.type == "cuda" and not by_triton.why_not(call, asked):
            return by_triton.pooled(call, lse, asked, reduce == "max")
        return tiles_in_torch(call.gathered(), lse, asked, reduce == "max")


def kernel_refuses(call: Call) -> list[str]:
    """The reasons why the tiles are not by the compiled kernel; empty if they are."""
    reasons = []
    if not native.AVAILABLE:
        reasons.append("this installation was built without the compiled kernels")
    if call.place.device.type != "cpu":
        reasons.append(f"query is on {call.place.device}; the kernel runs on cpu")
    if call.query.dtype not in TYPES:
        reasons.append("query is float64; the kernel computes in float32")
    if len(call.program.code) > MOST_CODE:
        reasons.append(f"the mask has {len(call.program.code)} integers, more than {MOST_CODE}")
    return reasons
