"""What caches that forget make of padding: it is never worth more than a token, nor a first one."""

from __future__ import annotations

import torch
from torch import Tensor

from .slots import Layout

NEVER = 2**62  # beyond every position


def padding_last(worth: Tensor, positions: Tensor, real: Tensor | None) -> Tensor:
    """The worth of slots (batch, kv_heads or 1, slots), padding's below that of all others.

    positions int32 (batch, kv_heads or 1, slots); real bool (batch or 1, length), or None.
    """
    if real is None:
        return worth
    shape = torch.broadcast_shapes(worth.shape, positions.shape)
    real = real[:, None].expand(*shape[:2], -1)
    at = positions.expand(shape).long().clamp(max=real.shape[-1] - 1)
    return worth.expand(shape).masked_fill(~real.gather(-1, at), -torch.inf)


def first_real(before: Tensor | None, layout: Layout, real: Tensor | None, n: int) -> Tensor | None:
    """The positions of each item's first n tokens that are not padding: int64 (batch, n).

    NEVER for those yet to come. before: the same before the last append; None there and here: they
    are 0 … n − 1, whatever comes. real bool (batch or 1, length) of all tokens; None: all are.
    """
    if before is None:
        if real is None or bool(real[:, :n].all()):
            return None
        starts = torch.tensor(layout.starts, device=real.device, dtype=torch.int64)[:, None]
        at = torch.arange(n, device=real.device, dtype=torch.int64).expand(len(layout.starts), -1)
        before = at.where(at < starts, NEVER)
    starts, new = (
        torch.tensor(t, device=before.device, dtype=torch.int64)[:, None]
        for t in (layout.starts, layout.new)
    )
    token = torch.arange(layout.q_len, device=before.device, dtype=torch.int64)
    at = starts + token
    found = token < new
    if real is not None:
        found = found & real.expand(len(at), -1).gather(1, at.clamp(max=layout.length - 1))
    return torch.cat([before, at.where(found, NEVER)], 1).sort(1).values[:, :n]


def among(positions: Tensor, length: int) -> Tensor:
    """bool (batch, length): whether a position is one of int64 (batch, n)."""
    out = torch.zeros(len(positions), length + 1, dtype=torch.bool, device=positions.device)
    return out.scatter_(1, positions.clamp(max=length), True)[:, :length]
