"""The k largest of each row, ties to the lower index, at about the cost of one pass."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices (…, k) of the k largest of (…, n), largest first; ties: lower index.

    The k largest stand in the k groups of 32 with the largest maxima (among equal maxima the
    earlier groups), so only those groups are ranked.
    """
    n = rows.shape[-1]
    whole = n // GROUP * GROUP
    if n <= 4 * GROUP or k * GROUP * 2 >= n:
        return _ranked(
            rows, torch.arange(n, device=rows.device, dtype=torch.int64).expand(rows.shape), k
        )
    tops = rows[..., :whole].unflatten(-1, (-1, GROUP)).amax(-1)
    number = torch.arange(tops.shape[-1], device=rows.device, dtype=torch.int64).expand(tops.shape)
    _, groups = _ranked(tops, number, k)
    inside = torch.arange(GROUP, device=rows.device, dtype=torch.int64)
    index = (groups[..., None] * GROUP + inside).flatten(-2)
    if whole < n:
        tail = torch.arange(whole, n, device=rows.device, dtype=torch.int64).expand(
            *rows.shape[:-1], -1
        )
        index = torch.cat([index, tail], -1)
    return _ranked(rows.gather(-1, index), index, k)


def _ranked(values: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest by (value, then lower index)."""
    if values.dtype == torch.float32:
        # One integer orders both: the float's bits, made monotone, above the index' complement
        bits = (values + 0.0).view(torch.int32)
        bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
        order = (bits << 32) | (0xFFFFFFFF - index)
        place = order.topk(k, -1).indices
    else:
        by_index = index.argsort(-1)
        ranked = values.gather(-1, by_index).sort(dim=-1, descending=True, stable=True).indices
        place = by_index.gather(-1, ranked[..., :k])
    return values.gather(-1, place), index.gather(-1, place)
