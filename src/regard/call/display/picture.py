"""What a result looks like, before anything draws it: numbers in rows and columns, with names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import RegardError


@dataclass(frozen=True)
class Side:
    """What the rows or the columns are: `size` positions each from `start` on, or named ones.

    sequence: whether they are positions of the sequence, which tokens can name.
    """

    name: str
    start: int = 0
    size: int = 1
    labels: tuple[str, ...] = ()
    sequence: bool = False


@dataclass(frozen=True, eq=False)
class Picture:
    """values (rows, cols); NaN: nothing there. unit: what a number is, in words.

    log: numbers of many magnitudes. signed: around 0. title: of which part.
    """

    values: Tensor
    rows: Side
    cols: Side
    unit: str
    log: bool = False
    signed: bool = False
    title: str = ""

    def fitting(self, rows: int, cols: int) -> Picture:
        """At most so many rows and columns, each the number farthest from 0 of what it joins."""
        values, sides = self.values, []
        for dim, side, most in ((0, self.rows, rows), (1, self.cols, cols)):
            factor = -(-values.shape[dim] // most) if not side.labels else 1
            if factor > 1:
                values = _pooled(values, dim, factor)
                side = replace(side, size=side.size * factor)
            sides.append(side)
        pooled = (sides[0].size, sides[1].size) != (self.rows.size, self.cols.size)
        unit = f"{self.unit}\nlargest of each cell" if pooled else self.unit
        return replace(self, values=values, rows=sides[0], cols=sides[1], unit=unit)


def _pooled(values: Tensor, dim: int, factor: int) -> Tensor:
    """Of each `factor` numbers along dim the one farthest from 0; NaN where there is none."""
    size = values.shape[dim]
    tail = values.new_full([-size % factor if d == dim else n for d, n in enumerate(values.shape)],
                           torch.nan)  # fmt: skip
    parts = torch.cat([values, tail], dim).unflatten(dim, (-1, factor))
    absent = parts.isnan()
    most = parts.masked_fill(absent, -torch.inf).amax(dim + 1)
    least = parts.masked_fill(absent, torch.inf).amin(dim + 1)
    far = torch.where(least.abs() > most.abs(), least, most)
    return far.masked_fill(absent.all(dim + 1), torch.nan)


def part_of(
    tensor: Tensor, batch: int, head: int | None, what: str, pool: str = ""
) -> tuple[Tensor, Side, str]:
    """Of (batch, heads, …) one item's heads, or one of them: (heads or 1, …), their side, a title.

    pool: over all heads where none is named, "sum" as their mean, or "max": (1, …).
    """
    if not 0 <= batch < tensor.shape[0]:
        raise RegardError(f"{what}: batch is {batch}; the result has {tensor.shape[0]}")
    if head is not None and not 0 <= head < tensor.shape[1]:
        raise RegardError(f"{what}: head is {head}; the result has {tensor.shape[1]}")
    mine = tensor.detach()[batch]
    said = [f"batch {batch}"] if len(tensor) > 1 else []
    if head is not None:
        mine = mine[head : head + 1]
        said.append(f"head {head}")
    elif pool and len(mine) > 1:
        said.append(f"{'mean' if pool == 'sum' else 'largest'} of {len(mine)} heads")
        mine = mine.mean(0, True) if pool == "sum" else mine.amax(0, True)
    return mine, Side("head", head or 0), ", ".join(said)


def edges(keys: Tensor, numbers: Tensor, query_start: int, most: int) -> tuple[Tensor, Side, Side]:
    """Lists of keys as a matrix of at most `most` × `most` cells: the number farthest from 0.

    keys (heads, q_len, k): positions, −1 where there is none; numbers the same. O(heads · q_len ·
    k) time and O(most²) memory, whatever the positions are.
    """
    there = keys >= 0
    rows = torch.arange(keys.shape[1], device=keys.device, dtype=torch.int64)
    rows = rows[None, :, None].expand(keys.shape)[there]
    cols, numbers = keys[there].long(), numbers[there].double()
    first = int(cols.min()) if len(cols) else 0
    k_len = int(cols.max()) + 1 - first if len(cols) else 0
    heights, widths = (1 << max(-(-n // most) - 1, 0).bit_length() for n in (keys.shape[1], k_len))
    shape = (-(-keys.shape[1] // heights), -(-k_len // widths))
    cells = rows // heights * shape[1] + (cols - first) // widths
    least, top = (
        torch.full((shape[0] * shape[1],), torch.inf * sign, dtype=torch.float64,
                   device=keys.device)
        .scatter_reduce_(0, cells, numbers, how)
        for sign, how in ((1, "amin"), (-1, "amax"))
    )  # fmt: skip
    far = torch.where(least.abs() > top.abs(), least, top).masked_fill(top.isinf(), torch.nan)
    return (
        far.view(shape),
        Side("query", query_start, heights, sequence=True),
        Side("key", first, widths, sequence=True),
    )


def labelled(edges: Sequence[int]) -> tuple[str, ...]:
    """Bins [edges[b], edges[b + 1]), the last open, in words: "0", "1", "2–3", "64–127", "128–"."""
    ends = [*(e - 1 for e in edges[1:]), None]
    return tuple(
        f"{a}" if a == b else f"{a}–{'' if b is None else b}"
        for a, b in zip(edges, ends, strict=True)
    )
