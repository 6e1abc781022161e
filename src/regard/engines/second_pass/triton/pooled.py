"""Pooled rectangles by Triton: what `second_pass.pooled` defines, on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ....call.checked import Call
from ....errors import RegardError
from ..pooled import SIDE, Rectangle
from .arguments import Shared, on_device
from .read import why_not as unreadable
from .tile_grid import FAR, band_of

BLOCK = 64  # queries, and keys, of a tile
GROUPS = 8  # of a rectangle's columns, at most


def why_not(call: Call, tiles: Sequence[Rectangle]) -> list[str]:
    """The reasons why the kernel cannot pool these; empty if it can."""
    reasons = unreadable(call)
    if any(max(abs(t.row), abs(t.col), SIDE << t.zoom) > FAR for t in tiles):
        reasons.append("a tile reaches beyond 2²⁸ of the call; it counts positions in int32")
    if max(call.place.q_len, call.place.k_len) > FAR:
        reasons.append("the call is longer than 2²⁸; it counts positions in int32")
    return reasons


def pooled(call: Call, lse: Tensor, tiles: Sequence[Rectangle], largest: bool) -> Tensor:
    """(tiles, 128, 128) float32: the sums, or the largest, of each cell's weights.

    lse (batch, heads, q_len). RegardError if `why_not` has a reason.
    """
    reasons = why_not(call, tiles)
    if reasons:
        raise RegardError(f"the Triton kernel cannot pool tiles of {call}: {'; '.join(reasons)}")
    out = torch.zeros(len(tiles), SIDE, SIDE, dtype=torch.float32, device=call.place.device)
    shared = Shared(call, lse.to(torch.float32).contiguous())
    numbered = sorted(enumerate(tiles), key=lambda each: each[1].zoom)
    for zoom, some in groupby(numbered, key=lambda each: each[1].zoom):
        mine = list(some)
        out[[n for n, _ in mine]] = _of_one_zoom(shared, zoom, [t for _, t in mine], largest)
    return out


def _of_one_zoom(shared: Shared, zoom: int, tiles: Sequence[Rectangle], largest: bool) -> Tensor:
    """The tiles of one launch, whose cells are equally large."""
    from .pooled_kernel import pool_rectangles

    call, place = shared.call, shared.call.place
    cell = 1 << zoom
    lines = max(BLOCK // cell, 1)  # rows of cells of a block
    parts = max(cell // BLOCK, 1)  # blocks of a row of cells
    reach = max(min(SIDE * cell, place.q_len - t.row) for t in tiles)
    row_blocks = max(-(-reach // BLOCK), 0)
    row_blocks += -row_blocks % parts  # whole rows of cells
    found = torch.zeros(
        len(tiles), row_blocks, lines, SIDE, dtype=torch.float32, device=place.device
    )
    groups = min(GROUPS, SIDE * cell // BLOCK)
    given = torch.tensor(
        [[t.batch, t.head, t.row, t.col] for t in tiles], dtype=torch.int32, device="cpu"
    ).to(place.device, non_blocking=True)
    band = band_of(shared)
    if row_blocks:
        with on_device(place.device):
            pool_rectangles[(len(tiles) * row_blocks * groups,)](
                shared.args, shared.mask_args(), shared.biases, given, found, row_blocks,
                *(band or (0, 0)), shared.form(BLOCK, BLOCK), MAX=largest, CELL=cell,
                GROUPS=groups, NEAR=band is not None, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    cells = (
        found.view(len(tiles), -1, parts, SIDE) if parts > 1 else found.flatten(1, 2)[:, :, None]
    )
    whole = cells.amax(2) if largest else cells.sum(2)
    return torch.nn.functional.pad(whole[:, :SIDE], (0, 0, 0, max(SIDE - whole.shape[1], 0)))
