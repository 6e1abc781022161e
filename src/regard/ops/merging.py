"""Attention over keys that come in pieces: partial results, merged through their log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..call.biases import Bias
from ..call.dropout import Dropout
from ..call.masks import Full, Mask
from ..call.sparse_masks import Chunks
from ..call.top_blocks import by_content
from ..errors import RegardError
from .attend import attention


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over all keys, from its results over disjoint shards of them: (out, lse).

    outs: each (batch, heads, q_len, v_dim); lses: each (batch, heads, q_len), as `attention(…,
    return_lse=True)` gives them. Exact but for rounding: out = Σ exp(lse_s − lse) · out_s with lse
    = ln Σ exp(lse_s) (Dao et al. 2022, section 3.1; Milakov & Gimelshein 2018). Differentiable in
    all of them. A shard of which a row sees nothing (out 0, lse −inf) adds nothing; a row that sees
    nothing anywhere is 0, its lse −inf. Learned sinks belong to one shard alone.

    out in the dtype of outs; lse in float64 if they are, else in float32. RegardError if the shapes
    do not fit together.
    """
    outs, lses = list(outs), list(lses)
    _check(outs, lses)
    working = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    parts = torch.stack([lse.to(working) for lse in lses])
    blind = (parts == -torch.inf).all(0)
    # Any number would do; the largest keeps exp within its range
    top = parts.detach().amax(0).masked_fill(blind, 0)
    shares = (parts - top).exp()
    total = shares.sum(0).masked_fill(blind, 1)
    out = sum(
        (share / total)[..., None] * each.to(working)
        for share, each in zip(shares, outs, strict=True)
    )
    assert isinstance(out, Tensor)
    return out.to(outs[0].dtype), (top + total.log()).masked_fill(blind, -torch.inf)


def _check(outs: list[Tensor], lses: list[Tensor]) -> None:
    said = f"outs {[tuple(t.shape) for t in outs]}, lses {[tuple(t.shape) for t in lses]}"
    if not outs or len(outs) != len(lses):
        raise RegardError(f"merge: {said}: give as many lses as outs, and at least one of each")
    shape = outs[0].shape
    alike = all(t.shape == shape for t in outs) and all(t.shape == shape[:3] for t in lses)
    if outs[0].dim() != 4 or not alike:
        raise RegardError(
            f"merge: {said}: each out must be (batch, heads, q_len, v_dim), its lse (batch, heads, "
            "q_len), all of one size"
        )
    if any(t.dtype != outs[0].dtype for t in outs) or not outs[0].is_floating_point():
        raise RegardError(f"merge: outs are {[t.dtype for t in outs]}; give floats of one dtype")


def piecewise(
    query: Tensor,
    pieces: Iterable[tuple[Tensor, Tensor]],
    *,
    mask: Mask = Full(),
    bias: Bias | Sequence[Bias] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: Dropout | float | None = None,
    query_start: int | None = None,
    key_start: int = 0,
    engine: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`attention` over keys and values that come piece by piece: (out, lse), merged as they come.

    query (batch, heads, q_len, dim). pieces: (key, value) of consecutive parts of the sequence,
    each (batch, kv_heads, any length, dim or v_dim); from a file, say, or another device, so that
    one piece at a time need be here. The other arguments are those of `attention`, which positions
    place in each piece; the default query_start, the last query at the last key, takes the length
    of all pieces and so holds them at once.

    Exact for every mask that positions decide, and for biases of distance. A mask or bias that
    holds a number for each key (Padding, Documents, Dense) does not fit a piece: call `attention`
    on each piece with its own part, and `merge`. RegardError for those, and for TopBlocks, which
    must see all keys to choose.
    """
    if by_content(mask):
        raise RegardError(
            f"mask {mask} chooses among all keys; one piece of them is not enough. Call its "
            "TopBlocks(…).choose(query, key, …) on all of them, and give what it returns"
        )
    if query_start is None:
        pieces = list(pieces)
        query_start = key_start + sum(key.shape[2] for key, _ in pieces) - query.shape[2]
    dropped = Dropout.given(dropout)  # one seed for all pieces
    out: Tensor | None = None
    lse: Tensor | None = None
    for key, value in pieces:
        part, part_lse = attention(
            query, key, value, mask=mask, bias=bias, scale=scale, softcap=softcap,
            sinks=sinks if out is None else None, dropout=dropped, query_start=query_start,
            key_start=key_start, return_lse=True, engine=engine,
        )  # fmt: skip
        part = part.to(part_lse.dtype)
        if out is None or lse is None:
            out, lse = part, part_lse
        else:
            out, lse = merge([out, part], [lse, part_lse])
        key_start += key.shape[2]
    if out is None or lse is None:
        raise RegardError("piecewise: there are no pieces; give at least one (key, value)")
    return out.to(query.dtype), lse


def stitch(
    parts: Sequence[Tensor], chunks: Chunks, length: int, *, causal: bool, dim: int = 1
) -> Tensor:
    """One result for a document of `length` positions, from a model's results for its chunks.

        chunks = Chunks(512, overlap=128)
        parts = [model(ids[:, a:b]).last_hidden_state for a, b in chunks.spans(length)]
        states = regard.context.stitch(parts, chunks, length, causal=False)

    parts: for each of `chunks.spans(length)` a tensor with its positions along `dim`. Where chunks
    overlap, a position is taken from the chunk that shows it most: with causal=True the earliest,
    which holds the most keys before it; else the one in which it stands farthest from an edge. So a
    position keeps at least `overlap` keys before it (causal), or overlap / 2 to each side.
    """
    spans = chunks.spans(length)
    sizes = [part.shape[dim] for part in parts]
    if sizes != [stop - start for start, stop in spans]:
        raise RegardError(
            f"stitch: parts have {sizes} positions along dim {dim}; {chunks} cuts {length} into "
            f"{spans}"
        )
    if not spans:
        raise RegardError(f"stitch: the document has length {length}; there is nothing to stitch")
    borders = [0]
    for (_, stop), (start, _) in pairwise(spans):
        borders.append(stop if causal else (start + stop + 1) // 2)
    borders.append(length)
    kept = [
        part.narrow(dim, first - start, last - first)
        for part, (start, _), (first, last) in zip(parts, spans, pairwise(borders), strict=True)
    ]
    return torch.cat(kept, dim)
