"""WindowCache: the last tokens, and the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...call.masks import First, Mask, Padding, Window
from ...call.numbers import FARTHEST, whole
from ...errors import RegardError
from .kv_cache import KVCache
from .real_tokens import NEVER, among, first_real


class WindowCache(KVCache):
    """The last `window` tokens, and with `first` the first ones (StreamingLLM's attention sinks).

        cache = regard.cache.WindowCache(1024, first=4)

    Outputs are those of uncached attention under `mask & (Window(window) | First(first))`; between
    calls `first + window − 1` keys are held. Xiao et al. 2024. Where a `Padding` mask hides
    tokens, the first ones are each item's first that are shown, as if it came alone.

    Keys stay with their positions: a mask, ALiBi, or the rotation that the keys came with, reckons
    with the true distance, also from the first ones. StreamingLLM instead counts positions within
    the cache, which keeps distances below those trained on, at the price of rotating all held keys
    anew at each step; here a model sees the distances that its training length allows for.
    """

    window: int
    first: int

    def __init__(self, window: int, *, first: int = 0, capacity: int = 0) -> None:
        window, first = (
            min(whole(n, f"WindowCache: {name}"), FARTHEST)
            for n, name in ((window, "window"), (first, "first"))
        )
        if window < 1 or first < 0:
            raise RegardError(f"WindowCache({window}, first={first}): give window ≥ 1, first ≥ 0")
        super().__init__(capacity=capacity)
        self.window, self.first = window, first
        self._window = Window(window) | First(first) if first else Window(window)
        # Positions of the first real tokens, int64 (batch, first), and whether all have come; None:
        # 0 … first − 1, as nothing among them is padding
        self._first_at: Tensor | None = None
        self._complete = False

    def __repr__(self) -> str:
        return f"WindowCache({self.window}, first={self.first})"

    @property
    def gapless(self) -> bool:
        return False

    @property
    def _bound(self) -> int:
        return self.first + self.window - 1

    @property
    def _shown(self) -> Mask:
        return self._window

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self._first_at is None else self._first_at.nbytes)

    def _note(self, mask: Any) -> None:
        super()._note(mask)
        at = self._firsts()
        if at is None:
            return
        layout = self.layout
        shown = Window(self.window) | Padding(among(at, layout.length))
        # Where a first token is in the window, too, there is room for padding before it
        apart = bool((at[:, -1] < layout.length - self.window).all())
        self._layout = layout._replace(shown=shown, in_sight=apart)

    def _firsts(self) -> Tensor | None:
        """The positions of the first real tokens, those of the last append among them."""
        if self._first_at is not None and self._complete:
            return self._first_at
        return first_real(self._first_at, self.layout, self._real, self.first)

    def settle(self, seen: Sequence[Any]) -> None:
        super().settle(seen)
        self._first_at = at = self._firsts()
        self._complete = at is not None and bool((at < NEVER).all())
        if self.layout.slots <= self._bound:
            return
        if at is not None or not self._evict_one((self.first, NEVER)):
            positions = self._where(self.layout)
            first = positions < self.first
            if at is not None:
                first = (positions[..., None] == at[:, None, None]).any(-1)
            worth = positions.double().masked_fill(first, torch.inf)
            self._keep(worth, [min(f, self._bound) for f in self._fills])

    def _drop(self, counts: list[int]) -> None:
        super()._drop(counts)
        if self._first_at is not None:
            left = [s - n for s, n in zip(self._lengths, counts, strict=True)]
            ends = torch.tensor(left, device=self._first_at.device, dtype=torch.int64)[:, None]
            self._first_at = self._first_at.where(self._first_at < ends, NEVER)
            self._complete = False

    def _clear(self) -> None:
        super()._clear()
        self._first_at = None

    def _pick(self, rows: Tensor) -> None:
        super()._pick(rows)
        if self._first_at is not None:
            self._first_at = self._first_at[rows.to(self._first_at.device)]
