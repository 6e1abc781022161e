"""What the edges of a layer do to a target, of each query those that do most: `Effect`, kept.

Maps of it hold |effect|, so that what pulls one way does not hide what pulls the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call.brief import Brief
from ..engines.second_pass.pooled import SIDE
from .stored import read


@dataclass(frozen=True, eq=False)
class EdgeEffects(Brief):
    """Of each query the edges whose removal would change the target most, |effect| falling.

    indices int32: recorded keys, −1 where fewer are visible; effects: what removal would add to
    the target, to first order (a length, without sign, where the target is a vector); weights:
    the edges' own, in the run that was differentiated. Each (batch, heads, q_len, k); of one head
    and some rows, (rows, k).
    """

    indices: Tensor
    effects: Tensor
    weights: Tensor

    def of(self, batch: int, head: int | None, rows: Sequence[int]) -> EdgeEffects:
        """Of one batch item and these rows: (heads, rows, k), or (rows, k)."""
        first, last = (min(rows), max(rows) + 1) if rows else (0, 0)
        places = [row - first for row in rows]
        mine = (t[batch] if head is None else t[batch, head] for t in self.tensors)
        return EdgeEffects(*(read(t[..., first:last, :])[..., places, :] for t in mine))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three in their order."""
        return self.indices, self.effects, self.weights

    def dense(self, k_len: int) -> Tensor:
        """|effect| (…, k_len), float32; 0 where an edge is not among those kept."""
        keys = self.indices.long()
        shape = (*keys.shape[:-1], k_len + 1)
        out = torch.zeros(shape, dtype=torch.float32, device="cpu")
        out.scatter_(-1, keys.where(keys >= 0, k_len), self.effects.abs().float())
        return out[..., :k_len]

    def tile(self, batch: int, where: Sequence[int], reduce: str) -> Tensor:
        """|effect| pooled to a tile (SIDE, SIDE); where: head, zoom, row, col, as `Tile`."""
        head, zoom, row, col = where
        first = (row * SIDE) << zoom
        keys, effects = (
            read(t[batch, head, first : first + (SIDE << zoom)])
            for t in (self.indices, self.effects)
        )
        cells = (keys.long() >> zoom) - col * SIDE
        inside = (keys >= 0) & (cells >= 0) & (cells < SIDE)
        rows = torch.arange(len(keys), dtype=torch.int64, device="cpu") >> zoom
        places = (rows[:, None] * SIDE + cells)[inside]
        found = torch.zeros(SIDE * SIDE, dtype=torch.float64, device="cpu")
        kind = "sum" if reduce == "sum" else "amax"
        found.scatter_reduce_(0, places, effects[inside].abs().double(), kind)
        return found.view(SIDE, SIDE).float()
