"""how="heads": an all-to-all gives each rank the whole sequence in some heads, another undoes it.

The call between them is an ordinary one (Jacobs et al. 2023, DeepSpeed-Ulysses, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...call.geometry import Span
from ...engines import run
from ...engines.second_pass.weigh import weigh
from .collectives import Ranks
from .layout import Layout
from .results import Sharded, of_all_heads, of_heads
from .whole import Whole


def attend(
    whole: Whole, query: Tensor, key: Tensor, value: Tensor, engine: str, lse_wanted: bool
) -> tuple[Tensor, Tensor | None, tuple[Sharded, ...]]:
    """out and, if wanted, lse of this rank's rows; and what was seen, sharded by head."""
    ranks = whole.ranks
    full = _ToHeads.apply(ranks, (whole.queries, whole.keys, whole.keys), query, key, value)
    mine, place = query.shape[1] // ranks.size, whole.call.place
    heads = slice(ranks.rank * mine, (ranks.rank + 1) * mine)
    span = Span(0, place.q_len, 0, place.k_len, heads=heads)
    asked = [of_heads(o, heads, place.heads) for o in whole.call.observers]
    call = whole.part(full[0], full[1], full[2], span, asked)
    if not lse_wanted:  # an engine may compute it that gives no gradient through lse
        call = replace(call, return_lse=False)
    out, lse, seen = run(call, engine)
    results = weigh(call, lse, out, seen=seen) if asked else ()
    sharded = tuple(
        of_all_heads(whole, observer, result)
        for observer, result in zip(whole.call.observers, results, strict=True)
    )
    sent = (out, lse[..., None]) if lse_wanted else (out,)
    back = _ToRows.apply(ranks, (whole.queries,) * len(sent), *sent)
    return back[0], back[1][..., 0] if lse_wanted else None, sharded


class _ToHeads(torch.autograd.Function):
    """Tensors of some positions in all heads → all positions in some heads."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, layouts: Sequence[Layout], *tensors: Tensor) -> Any:
        ctx.ranks, ctx.layouts = ranks, layouts
        return tuple(to_heads(ranks, layouts, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *to_rows(ctx.ranks, ctx.layouts, grads)


class _ToRows(torch.autograd.Function):
    """And back."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, layouts: Sequence[Layout], *tensors: Tensor) -> Any:
        ctx.ranks, ctx.layouts = ranks, layouts
        return tuple(to_rows(ranks, layouts, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *to_heads(ctx.ranks, ctx.layouts, grads)


def to_heads(ranks: Ranks, layouts: Sequence[Layout], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each (batch, heads, own positions, n) → (batch, heads / ranks, all positions, n).

    All of one dtype travel in one all-to-all.
    """
    sent = [[t.chunk(ranks.size, 1)[r] for t in tensors] for r in range(ranks.size)]
    shapes = [
        [(t.shape[0], t.shape[1] // ranks.size, layout.size(r), t.shape[3])
         for t, layout in zip(tensors, layouts, strict=True)]
        for r in range(ranks.size)
    ]  # fmt: skip
    came = _exchanged(ranks, sent, shapes)
    return [layout.join([parts[i] for parts in came], 2) for i, layout in enumerate(layouts)]


def to_rows(ranks: Ranks, layouts: Sequence[Layout], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each (batch, some heads, all positions, n) → (batch, all heads, own positions, n)."""
    pairs = list(zip(tensors, layouts, strict=True))
    sent = [[layout.take(t, r, 2) for t, layout in pairs] for r in range(ranks.size)]
    shapes = [
        [(t.shape[0], t.shape[1], layout.size(ranks.rank), t.shape[3]) for t, layout in pairs]
    ] * ranks.size
    came = _exchanged(ranks, sent, shapes)
    return [torch.cat([parts[i] for parts in came], 1) for i in range(len(pairs))]


def _exchanged(
    ranks: Ranks, sent: list[list[Tensor]], shapes: Sequence[Sequence[Sequence[int]]]
) -> list[list[Tensor]]:
    """An all-to-all of several tensors for each rank; one a dtype."""
    came: list[dict[int, Tensor]] = [{} for _ in sent]
    dtypes = [t.dtype for t in sent[0]]
    for dtype in dict.fromkeys(dtypes):
        mine = [i for i, d in enumerate(dtypes) if d == dtype]
        flat = [torch.cat([parts[i].reshape(-1) for i in mine]) for parts in sent]
        sizes = [[torch.Size(each[i]).numel() for i in mine] for each in shapes]
        found = ranks.all_to_all(flat, [(sum(s),) for s in sizes])
        for rank, whole in enumerate(found):
            for i, piece in zip(mine, whole.split(sizes[rank]), strict=True):
                came[rank][i] = piece.view(*shapes[rank][i])
    return [[parts[i] for i in range(len(dtypes))] for parts in came]
