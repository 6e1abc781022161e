"""The weights of queries that lie anywhere in a call, read at once: keys are made ready once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.geometry import Span
from .. import hidden
from .strips import Strip, StripWeights, product


def scattered_rows(call: Call, lse: Tensor, rows: Sequence[int]) -> Tensor:
    """The weights (batch, heads, rows, k_len) of these queries of the call, in their order.

    lse (batch, heads, q_len): that of all keys. As `weigh.whole_rows`, whose strips are of
    neighbours: a strip here is all the rows of one kv head.
    """
    place, taken = call.place, list(rows)
    out = torch.zeros(
        place.batch, place.heads, len(taken), place.k_len, dtype=call.working, device=place.device
    )
    if not taken or not place.k_len:
        return out
    lse = lse[:, :, taken].to(call.working)
    for strip in _strips(call, taken):
        part = strip.part
        out[part.batch, part.heads] = StripWeights(strip, lse, call).weights
    return out


def _strips(call: Call, rows: list[int]) -> Iterator[Strip]:
    place, group = call.place, call.place.heads // call.place.kv_heads
    for item in range(place.batch):
        for head in range(place.kv_heads):
            batch, kv = slice(item, item + 1), slice(head, head + 1)
            part = Span(
                0, len(rows), 0, place.k_len, batch, slice(head * group, (head + 1) * group)
            )
            query = call.query[batch, part.heads][:, :, rows].to(call.working) * call.scale
            query = query.flatten(1, 2)[:, None]
            key = call.key[batch, kv].to(call.working)
            scores = product(query, key.mT).reshape(1, group, len(rows), place.k_len)
            _shape(call, scores, rows, part)
            yield Strip(part, kv, [(0, place.k_len)], query, key, scores)


def _shape(call: Call, scores: Tensor, rows: list[int], part: Span) -> None:
    """Softcap, biases and the mask, in this order, in place."""
    if call.softcap is not None:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
    careful = hidden.beside_biases(call)
    for first, last in _runs(rows):
        start = rows[first]
        span = Span(start, start + last - first, 0, part.k1, part.batch, part.heads)
        mine = scores[:, :, first:last]
        for bias in call.biases:
            added = bias.tile(span, scores.dtype)
            mine += added
            # A score of NaN, or +inf, and −∞ make NaN; but a bias of −∞ hides
            if careful and bias.dense:
                mine.masked_fill_(added == -torch.inf, -torch.inf)
        if not call.program.full:
            mine.masked_fill_(~call.program.visible(span), -torch.inf)


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Where rows that follow each other begin and end in the list."""
    first = 0
    for n in range(1, len(rows) + 1):
        if n == len(rows) or rows[n] != rows[n - 1] + 1:
            yield first, n
            first = n
