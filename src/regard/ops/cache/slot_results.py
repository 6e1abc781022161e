"""What observers see of a cached call, in positions of the sequence.

Where slots are not positions, the results of some observers are moved from slots to positions;
the others are read in a second pass over the keys spread out to their positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.edge_results import NormTopKSeen, TopKSeen
from ...call.masks import Dense, Mask
from ...call.observers import NormTopK, Observer, PerRow, Received, TopK
from ...call.results import ReceivedSeen
from ...errors import RegardError
from .slots import Biases, InSlots, Layout


def moves(observer: Observer) -> bool:
    """Whether the observer's results over slots can be moved to positions."""
    if isinstance(observer, Received):
        # Pooled over kv heads, a slot's sum would mix positions
        return observer.queries is None and observer.heads not in ("sum", "mean")
    return isinstance(observer, TopK | NormTopK | PerRow)


def to_positions(result: Any, slots: InSlots) -> Any:
    """A result over slots, over positions. Needs slots in order of position (ties of TopK)."""
    layout = slots.layout
    if hasattr(result, "query_start"):
        starts = layout.starts
        result = replace(result, query_start=starts[0] if layout.together else tuple(starts))
    if layout.positions is None:
        return result
    if isinstance(result, TopKSeen | NormTopKSeen):
        indices = result.indices.long()
        at = torch.take_along_dim(slots.key, indices.clamp(min=0), -1)
        return replace(result, indices=at.where(indices >= 0, -1).to(torch.int32))
    if isinstance(result, ReceivedSeen):
        key = slots.key[:, :, 0]
        if key.shape[1] > result.sum.shape[1]:
            key = key[:, :: key.shape[1] // result.sum.shape[1]]
        return replace(
            result,
            sum=_spread(result.sum, key, layout.length),
            count=_spread(result.count, key, layout.length),
        )
    return result


def _spread(columns: Tensor, position: Tensor, length: int) -> Tensor:
    """(batch, heads, slots) → (batch, heads, length), 0 where nothing is held."""
    out = columns.new_zeros(*columns.shape[:2], length)
    return out.scatter_add_(-1, position.expand_as(columns), columns)


def spread(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, mask: Mask, bias: Biases, **rest: Any
) -> Call:
    """The call in positions: keys and values of all tokens seen, those evicted being 0 and hidden.

    O(length) memory. The rest is what `Call.checked` takes. RegardError where the items of the
    batch stand at different positions: no one position is then that of a row.
    """
    if not layout.together:
        raise RegardError(
            f"the items of this batch stand at different positions ({layout.starts}), so a row has "
            "none of its own: of such a batch TopK, NormTopK, Entropy, MaxScore, LogSumExp and "
            "Received (each or group) can be observed"
        )
    length, slots = layout.length, InSlots(layout, query)
    held = Dense(_held(layout, slots))
    if layout.positions is None:
        # Settling moves what the cache holds
        key, value = key.clone(), value.clone()
    else:
        at = layout.positions.clamp(0, max(length - 1, 0)).long()
        filled = layout.filled(key.device)[:, None, :, None]
        key, value = (_placed(t.where(filled, 0), at, length) for t in (key, value))
    mask = mask if layout.shown is None else mask & layout.shown
    if not layout.full:
        mask = mask & Dense(layout.real(key.device)[:, None, :, None])
    start = layout.starts[0] if layout.starts else 0
    return Call.checked(query, key, value, mask=mask & held, bias=bias, query_start=start, **rest)


def _held(layout: Layout, slots: InSlots) -> Tensor:
    """Which positions are held: bool (batch, heads or 1, 1, length)."""
    filled = layout.filled(slots.place.device)[:, None]
    key = slots.key[:, :, 0].expand(len(filled), -1, -1)
    counts = torch.zeros(*key.shape[:2], layout.length, dtype=torch.int32, device=key.device)
    counts.scatter_add_(-1, key, filled.int().expand_as(key))
    return (counts > 0)[:, :, None]


def _placed(tensor: Tensor, positions: Tensor, length: int) -> Tensor:
    """(batch, kv_heads, slots, dim) → (batch, kv_heads, length, dim), 0 where nothing is held."""
    out = tensor.new_zeros(*tensor.shape[:2], length, tensor.shape[3])
    return out.scatter_add_(2, positions[..., None].expand_as(tensor), tensor)
