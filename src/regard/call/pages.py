"""Paged keys and values: where each sequence's tokens lie in a pool that all of them share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegardError
from .brief import Brief


@dataclass(frozen=True, eq=False)
class Pages(Brief):
    """With these, key and value of a call are pools (pages, kv_heads, size, dim). Kwon et al. 2023.

    table int (batch, most): token j of item b lies in page table[b, j // size], row j % size; what
    stands beyond an item's last page does not matter.
    lengths int (batch,): how many tokens each item has; the call's k_len is the largest.
    """

    table: Tensor
    lengths: Tensor

    @property
    def k_len(self) -> int:
        """Keys of the longest sequence."""
        return int(self.lengths.max()) if self.lengths.numel() else 0

    def misfit(self, query: Tensor, key: Tensor) -> str:
        """What is wrong with a table for these queries and this pool; empty if nothing."""
        batch = query.shape[0]
        if self.table.dim() != 2 or self.table.shape[0] != batch or self.lengths.shape != (batch,):
            return (
                f"pages have table {tuple(self.table.shape)} and lengths "
                f"{tuple(self.lengths.shape)}; give ({batch}, pages of an item) and ({batch},)"
            )
        size = key.shape[2]
        if self.k_len > self.table.shape[1] * size:
            return (
                f"pages: lengths reach {self.k_len}, the table holds {self.table.shape[1]} pages "
                f"of {size} tokens an item"
            )
        used = torch.arange(self.table.shape[1], device=self.table.device, dtype=torch.int64) * size
        mine = self.table[used < self.lengths[:, None]]
        if mine.numel() and not 0 <= int(mine.min()) <= int(mine.max()) < key.shape[0]:
            return f"pages: the table names page {int(mine.max())}; the pool has {key.shape[0]}"
        return ""

    def gather(self, pool: Tensor) -> Tensor:
        """A copy of the tokens in order: (batch, kv_heads, k_len, dim), 0 beyond an item's end."""
        held = pool[self.table.long().clamp(0, max(len(pool) - 1, 0))]
        held = held.transpose(1, 2).flatten(2, 3)[:, :, : self.k_len]
        return held.where(self.keep()[:, None, :, None], 0)

    def keep(self) -> Tensor:
        """Which keys each item has: bool (batch, k_len)."""
        return (
            torch.arange(self.k_len, device=self.table.device, dtype=torch.int64)
            < self.lengths[:, None]
        )


def check(query: Tensor, key: Tensor, pages: Pages | None) -> None:
    """RegardError if what was given as pages does not serve these queries and this pool."""
    if pages is None:
        return
    if not isinstance(pages, Pages):
        raise RegardError(f"pages is a {type(pages).__name__}; give Pages(table, lengths)")
    wrong = pages.misfit(query, key)
    if wrong:
        raise RegardError(wrong)
