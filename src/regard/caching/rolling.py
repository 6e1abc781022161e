"""WindowCache: the last tokens, and the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..checks import FARTHEST, whole
from ..errors import RegardError
from ..masks import First, Mask, Window
from .held import KVCache

EVER = 2**62  # beyond every position


class WindowCache(KVCache):
    """The last `window` tokens, and with `first` the first ones (StreamingLLM's attention sinks).

        cache = regard.WindowCache(1024, first=4)

    Outputs are those of uncached attention under `mask & (Window(window) | First(first))`; between
    calls `first + window − 1` keys are held. Xiao et al. 2024.

    Keys stay with their positions: a mask, ALiBi, or the rotation that the keys came with, reckons
    with the true distance, also from the first ones. StreamingLLM instead counts positions within
    the cache, which keeps distances below those trained on, at the price of rotating all held keys
    anew at each step; here a model sees the distances that its training length allows for.
    """

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

    def settle(self, seen: Sequence[Any]) -> None:
        super().settle(seen)
        if self.layout.slots > self._bound and not self._evict_one((self.first, EVER)):
            positions = self._where(self.layout)
            worth = positions.double().masked_fill(positions < self.first, torch.inf)
            self._keep(worth, [min(f, self._bound) for f in self._fills])
