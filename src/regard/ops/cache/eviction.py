"""Eviction: which keys a cache forgets, by the weights that they received.

A policy is a small frozen value given to a cache: `KVCache(evict=H2O(512))`. It names one observer,
which is read beside the attention call (in O(N), whatever the engine), and turns what the observer
saw into the worth of each key. The cache then keeps the `budget` keys of most worth, for each item
of the batch and each kv head; of equal worth the later ones. Weights are those over the keys that
are still held, as in the papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...call.numbers import whole_fields
from ...call.observers import Received
from ...errors import RegardError


class Eviction:
    """What a cache is given to forget by. `budget`: how many keys a kv head keeps after a call."""

    budget: int

    @property
    def exempt(self) -> int:
        """How many of the last positions are never evicted."""
        return 0

    @property
    def by_neighbours(self) -> bool:
        """Whether a key's worth depends on its neighbours: slots must then stand in order."""
        return False

    @property
    def sums_up(self) -> bool:
        """Whether a key's worth counts on from call to call."""
        return False

    @property
    def by_layer(self) -> bool:
        """Whether all heads of the layer decide together, not those of a kv head."""
        return False

    def reads(self, q_len: int, slots: int) -> bool:
        """Whether a call of q_len queries over that many slots is observed, and may evict."""
        raise NotImplementedError

    def observer(self, stop: int) -> Received:
        """What to observe of an item whose last query is at stop − 1."""
        raise NotImplementedError

    def worth(self, seen: Tensor, before: Tensor, exempt: Tensor) -> Tensor:
        """What each slot is worth now: (batch, kv_heads, slots).

        seen (batch, heads, slots): what the slots received in this call. before
        (batch, kv_heads, slots): their worth after the last call, 0 for new ones. exempt bool
        (batch, 1 or kv_heads, slots): the slots that stay in any case.
        """
        raise NotImplementedError

    def _check(self) -> None:
        numbers = (f.name for f in fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]
        whole_fields(self, *(name for name in numbers if name != "pool"))
        if self.budget < 1 or not 0 <= self.exempt <= self.budget:
            raise RegardError(
                f"{self}: the budget is {self.budget} keys, of which the last {self.exempt} are "
                "exempt; give budget ≥ 1, and no more exempt keys than that"
            )


@dataclass(frozen=True)
class H2O(Eviction):
    """Heavy hitters: keeps what has received most since it came, and the `recent` last positions.

    Zhang et al. 2023, algorithm 1. A key's worth is the sum of the weights that it received from
    all queries so far (over the query heads of its kv head). recent: default half the budget, as in
    the paper's experiments.
    """

    budget: int
    recent: int | None = None

    def __post_init__(self) -> None:
        self._check()

    @property
    def exempt(self) -> int:
        return self.budget // 2 if self.recent is None else self.recent

    @property
    def sums_up(self) -> bool:
        return True

    def reads(self, q_len: int, slots: int) -> bool:
        return True

    def observer(self, stop: int) -> Received:
        return Received()

    def worth(self, seen: Tensor, before: Tensor, exempt: Tensor) -> Tensor:
        return before + _in_order(seen.unflatten(1, (before.shape[1], -1)).unbind(2))


@dataclass(frozen=True)
class SnapKV(Eviction):
    """Keeps what the end of a prompt reads, and that end: the last `window` positions.

    Li et al. 2024, section 4. A key's worth is the sum of the weights that it receives from the
    last `window` queries, pooled over `kernel` neighbouring keys (their mean, or with pool="max"
    their largest), then the mean over the query heads of its kv head: the paper has as many kv
    heads as query heads.

    It compresses prompts: a call of more than one query evicts (a prompt may come in chunks), a
    decode step only adds. So a cache holds `budget` keys and what was decoded since.
    """

    budget: int
    window: int = 32
    kernel: int = 5
    pool: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        self._check()
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise RegardError(f"{self}: give window ≥ 1 and an odd kernel")
        if self.pool not in ("mean", "max"):
            raise RegardError(f"{self}: pool is mean or max")

    @property
    def exempt(self) -> int:
        return self.window

    @property
    def by_neighbours(self) -> bool:
        return True

    def reads(self, q_len: int, slots: int) -> bool:
        return q_len > 1 and slots > self.budget

    def observer(self, stop: int) -> Received:
        return Received((max(stop - self.window, 0), stop))

    def worth(self, seen: Tensor, before: Tensor, exempt: Tensor) -> Tensor:
        # Only the keys before the window vote; beyond them the paper pads with zeros
        prefix = seen.unflatten(1, (before.shape[1], -1)).masked_fill(exempt[:, :, None], 0)
        heads, pad = prefix.flatten(1, 2), self.kernel // 2
        if self.pool == "max":
            pooled = F.max_pool1d(heads, self.kernel, 1, pad)
        else:
            pooled = F.avg_pool1d(heads, self.kernel, 1, pad)
        return pooled.unflatten(1, (before.shape[1], -1)).mean(2)


@dataclass(frozen=True)
class TOVA(Eviction):
    """Token omission via attention: keeps what the last query reads. Oren et al. 2024.

    A key's worth is the weight that the last query gives it, averaged over all heads of the layer,
    so every head keeps the same positions. Nothing is exempt, not even the newest key.
    """

    budget: int

    def __post_init__(self) -> None:
        self._check()

    def reads(self, q_len: int, slots: int) -> bool:
        return slots > self.budget

    @property
    def by_layer(self) -> bool:
        return True

    def observer(self, stop: int) -> Received:
        return Received((max(stop - 1, 0), stop))

    def worth(self, seen: Tensor, before: Tensor, exempt: Tensor) -> Tensor:
        mean = _in_order(seen.unbind(1)) / seen.shape[1]
        return mean[:, None].expand(-1, before.shape[1], -1)


def _in_order(heads: Sequence[Tensor]) -> Tensor:
    """Their sum, one after another: the compiled step adds so, and bits decide among equals."""
    total = heads[0]
    for head in heads[1:]:
        total = total + head
    return total


def first_to_go(worth: Tensor, positions: Tensor, count: int) -> Tensor:
    """The `count` slots that are evicted first: of least worth, of equals the earlier positions.

    worth and positions (batch, heads, slots); int64 (batch, heads, count), in that order.
    """
    if count == 1:  # each decode step: no need to sort
        least = worth == worth.amin(-1, keepdim=True)
        return positions.where(least, torch.iinfo(positions.dtype).max).argmin(-1, keepdim=True)
    by_position = positions.argsort(-1)
    ranked = torch.sort(worth.gather(-1, by_position), dim=-1, stable=True).indices
    return by_position.gather(-1, ranked[..., :count])
