"""Where the queries and keys of a cached call stand, and the same call said in slots.

A cache holds keys in slots; masks, biases and observers speak of positions in the sequence. Where
nothing was evicted, slot i holds position i and nothing needs saying. Otherwise `Layout.request`
says the caller's mask and biases again for the slots: a causal mask stays one (the slots before the
new keys are all in the past), everything else is asked at the slots' positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from ...call.biases import ALiBi, Bias, DenseBias, RelativeBias, relative_bucket
from ...call.geometry import Place, Span
from ...call.masks import (
    And,
    Causal,
    Dense,
    Documents,
    First,
    Full,
    Heads,
    Mask,
    Not,
    Or,
    Padding,
    Window,
)

Biases = Bias | Tensor | Sequence[Bias | Tensor] | None


class Layout(NamedTuple):
    """One call of q_len queries over the slots of a cache, for each of its kv_heads.

    starts, fills, new: for each item of the batch the position of its first new token, the slots
    filled before it, and how many tokens are new; those of q_len beyond `new` are padding.
    positions int32 (batch, 1 or kv_heads, slots): that of each filled slot; None: slot i holds
    position i. shown: what the cache lets a query see, in positions. in_sight: whether it lets the
    newest query see all that is held.
    """

    kv_heads: int
    q_len: int
    slots: int
    starts: list[int]
    fills: list[int]
    new: list[int]
    positions: Tensor | None = None
    shown: Mask | None = None
    in_sight: bool = True

    @property
    def length(self) -> int:
        """The tokens seen, the new ones among them: of the longest item."""
        return max((s + n for s, n in zip(self.starts, self.new, strict=True)), default=0)

    @property
    def full(self) -> bool:
        """Whether every slot is filled and every query real."""
        return one(self.fills) and self.new.count(self.q_len) == len(self.new)

    @property
    def latest(self) -> bool:
        """Whether it is one new token of each item, which sees all slots."""
        return self.q_len == 1 and self.in_sight and self.full

    @property
    def straight(self) -> bool:
        """Whether the call in slots is the call in positions: nothing evicted, no item ahead."""
        return self.positions is None and self.together

    @property
    def together(self) -> bool:
        """Whether all items' first queries stand at one position."""
        return one(self.starts)

    @property
    def query_start(self) -> int:
        """Where the first query stands among the slots.

        Where the items' fills differ, no place is right for all: the mask then says it all.
        """
        return max(self.fills, default=0)

    def filled(self, device: torch.device) -> Tensor:
        """Which slots hold a key: bool (batch, slots)."""
        ends = torch.tensor(self.fills, device=device, dtype=torch.int64) + torch.tensor(
            self.new, device=device, dtype=torch.int64
        )
        return torch.arange(self.slots, device=device, dtype=torch.int64) < ends[:, None]

    def real(self, device: torch.device) -> Tensor:
        """Which queries are not padding: bool (batch, q_len)."""
        new = torch.tensor(self.new, device=device, dtype=torch.int64)
        return torch.arange(self.q_len, device=device, dtype=torch.int64) < new[:, None]

    def request(self, query: Tensor, mask: Mask, bias: Biases) -> dict[str, Any]:
        """mask, bias and query_start of the call in slots. query (batch, heads, q_len, dim)."""
        if not isinstance(mask, Mask):  # attention says what is wrong with it
            return {"mask": mask, "bias": bias}
        if self.latest and not has_torch_function_unary(query):
            # All that a cache holds for its newest query is in that query's past, and in sight;
            # but who watches is told the mask as it was given
            mask = _latest(mask)
        elif self.shown is not None:
            mask = mask & self.shown
        if not self.straight and not (isinstance(mask, Full) and bias is None):
            slots = InSlots(self, query)
            mask, bias = slots.mask(mask), slots.biases(bias)
        if not self.full:
            mask = mask & self._real(query.device)
        return {"mask": mask, "bias": bias, "query_start": self.query_start}

    def _real(self, device: torch.device) -> Mask:
        """Padding sees nothing, and empty slots are not seen."""
        return Documents(self.real(device).int() - 1, self.filled(device).int() - 1)


def one(numbers: Sequence[int]) -> bool:
    """Whether they are all the same."""
    return len(numbers) < 2 or len(set(numbers)) == 1


def _latest(mask: Mask) -> Mask:
    """The mask for the last position of a sequence: causal hides nothing from it."""
    if isinstance(mask, Causal):
        return Full()
    if isinstance(mask, And):
        left, right = _latest(mask.left), _latest(mask.right)
        if isinstance(left, Full):
            return right
        return left if isinstance(right, Full) else left & right
    return mask


class InSlots:
    """Says masks and biases of a sequence for the slots of a layout."""

    def __init__(self, layout: Layout, query: Tensor) -> None:
        batch, self.heads, q_len, _ = query.shape
        self.layout = layout
        self.place = Place(
            batch, self.heads, layout.kv_heads, q_len, layout.length,
            layout.starts[0] if batch else 0, 0, query.device,
        )  # fmt: skip
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32

    @cached_property
    def key(self) -> Tensor:
        """Positions of the slots, int64 (batch or 1, heads or 1, 1, slots); any in empty ones."""
        layout, device = self.layout, self.place.device
        if layout.positions is None:
            return torch.arange(layout.slots, device=device, dtype=torch.int64)[None, None, None]
        positions = layout.positions
        if positions.shape[1] > 1:
            positions = positions.repeat_interleave(self.heads // layout.kv_heads, 1)
        return positions[:, :, None].clamp(0, max(layout.length - 1, 0)).long()

    @cached_property
    def query(self) -> Tensor:
        """Positions of the queries, int64 (batch, 1, q_len, 1)."""
        starts = torch.tensor(self.layout.starts, device=self.place.device, dtype=torch.int64)
        return (
            starts[:, None, None, None]
            + torch.arange(self.place.q_len, device=self.place.device, dtype=torch.int64)[:, None]
        )

    def mask(self, mask: Mask) -> Mask:
        """The mask, for the slots. RegardError if it does not fit the sequence."""
        if isinstance(mask, And):
            return self.mask(mask.left) & self.mask(mask.right)
        if isinstance(mask, Or):
            return self.mask(mask.left) | self.mask(mask.right)
        if isinstance(mask, Not):
            return ~self.mask(mask.mask)
        if isinstance(mask, Full | Heads) or not isinstance(mask, Mask):
            return mask
        if isinstance(mask, Causal):
            # New keys come after all that was there: among the slots too, if all start at one
            return mask if one(self.layout.fills) else Dense(self.key <= self.query)
        if isinstance(mask, Window):
            back = self.query - self.key
            return Dense((back < mask.n) & (back >= -mask.ahead))
        if isinstance(mask, First):
            return Dense(self.key < mask.n)
        if isinstance(mask, Padding):
            keep = mask.lower(self.place).tensors[0]
            return Dense(self._at_slots(keep[:, None, None]))
        return Dense(self._at_slots(self._each_start(lambda place: _visible(mask, place))))

    def biases(self, bias: Biases) -> list[Bias | Tensor] | None:
        """The biases, for the slots. RegardError if one does not fit the sequence."""
        if bias is None:
            return None
        given = list(bias) if isinstance(bias, list | tuple) else [bias]
        return [self._bias(b) for b in given]

    def _bias(self, bias: Any) -> Bias | Tensor:
        if isinstance(bias, ALiBi):
            slopes = bias.lower(self.place).tensor.to(self.dtype)[:, None, None]
            return DenseBias(-slopes * (self.key - self.query).abs())
        if isinstance(bias, RelativeBias):
            added = bias.lower(self.place)
            both, longest = added.args
            buckets = relative_bucket(
                self.key - self.query, bool(both), added.tensor.shape[1], longest
            )
            head = torch.arange(self.heads, device=self.place.device, dtype=torch.int64)[
                :, None, None
            ]
            return DenseBias(added.tensor[head, buckets])
        if isinstance(bias, Tensor):
            bias = DenseBias(bias)
        if not isinstance(bias, Bias):
            return bias  # attention says what is wrong with it
        return DenseBias(self._at_slots(self._each_start(lambda place: _added(bias, place))))

    def _at_slots(self, told: Tensor) -> Tensor:
        """What was told of every position (…, length), at the slots."""
        return told if told.shape[-1] == 1 else torch.take_along_dim(told, self.key, -1)

    def _each_start(self, tell: Callable[[Place], Tensor]) -> Tensor:
        """What is told for the call in the sequence; item by item where they start apart."""
        if self.layout.together:
            return tell(self.place)
        parts = []
        for item, start in enumerate(self.layout.starts):
            told = tell(replace(self.place, query_start=start))
            parts.append(told[item : item + 1] if told.shape[0] > 1 else told)
        return torch.cat(parts)


def _visible(mask: Mask, place: Place) -> Tensor:
    """(batch or 1, heads or 1, q_len, length)."""
    return mask.lower(place).visible(Span(0, place.q_len, 0, place.k_len))


def _added(bias: Bias, place: Place) -> Tensor:
    """(batch or 1, heads or 1, q_len or 1, length or 1)."""
    added = bias.lower(place)
    return added.tile(Span(0, place.q_len, 0, place.k_len), added.tensor.dtype)
