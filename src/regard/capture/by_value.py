"""Maps of weight · ‖W_O v‖, how long a vector each key adds (Kobayashi et al. 2020, section 3).

exp(score − lse) · norm = exp(score + ln norm − lse): a bias of each key, added to the scores while
the lse stays, makes the same compiled tiles of them, exact at every zoom.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..call.biases import Added, Kind
from ..call.checked import Call
from ..call.results import Cells, MapSeen
from ..engines.second_pass.pooled import SIDE, Rectangle, Reduce
from ..ops.pooled import pooled_tiles


def by_norm(call: Call, norm: Tensor) -> Call:
    """The call whose weights, by the lse of this one, are each multiplied by its key's norm.

    norm (batch, heads, k_len) ≥ 0; ln 0 = −∞ makes a weight of 0.
    """
    place = call.place
    added = norm.to(call.working).log()[:, :, None]
    return replace(
        call,
        biases=(*call.biases, Added(Kind.DENSE, added, (), place.query_start, place.key_start)),
    )


def pooled_maps(call: Call, lse: Tensor, norm: Tensor, like: MapSeen) -> tuple[MapSeen, MapSeen]:
    """The whole map of weight · ‖W_O v‖ in the cells of `like`, as sums and as maxima.

    lse (batch, heads, q_len); norm (batch, heads, k_len), of the call's keys. Each is a pass over
    queries and keys by what computes tiles, so that coarse tiles are what finer ones add up to.
    """
    place, valued = call.place, by_norm(call, norm)
    size = min(like.rows.size, like.cols.size)  # a tile's cells are square
    rows, cols = (
        Cells(start // size, (start + length - 1) // size - start // size + 1, size)
        for start, length in ((place.query_start, place.q_len), (place.key_start, place.k_len))
    )
    corners = [
        (row, col) for row in range(0, rows.count, SIDE) for col in range(0, cols.count, SIDE)
    ]

    def whole(reduce: Reduce) -> MapSeen:
        shape = (place.batch, place.heads, rows.count, cols.count)
        made = torch.empty(shape, dtype=torch.float32, device=place.device)
        for batch in range(place.batch):
            for head in range(place.heads):  # one at a time: as many cells again are held
                asked = [
                    Rectangle(
                        head, size.bit_length() - 1, (rows.first + row) * size - place.query_start,
                        (cols.first + col) * size - place.key_start, batch,
                    )
                    for row, col in corners
                ]  # fmt: skip
                found = pooled_tiles(valued, lse, asked, reduce)
                for (row, col), tile in zip(corners, found, strict=True):
                    room = made[batch, head, row : row + SIDE, col : col + SIDE]
                    room.copy_(tile[: room.shape[0], : room.shape[1]])
        fine = MapSeen(made, rows, cols, reduce, like.most)
        return fine.coarser(like.rows.size, like.cols.size)

    return whole("sum"), whole("max")
