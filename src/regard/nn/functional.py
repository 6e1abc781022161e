"""torch's attention function by another import, its weights in sight.

    import regard.nn.functional as F
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    out, (top,) = F.scaled_dot_product_attention(query, key, value, observe=[TopK(8)])

One line swaps it in for `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ..call.masks import Causal, Dense, Full
from ..call.observers import Observer
from ..errors import NoEngine, RegardError
from ..ops.attend import attention


class RefusedError(RegardError, RuntimeError):
    """What torch's function refuses, or should: it raises RuntimeError, so this is one as well."""


@overload
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False, observe: None = None, engine: str = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False, observe: Sequence[Observer], engine: str = "auto",
) -> tuple[Tensor, tuple[Any, ...]]: ...  # fmt: skip
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    observe: Sequence[Observer] | None = None,
    engine: str = "auto",
) -> Any:
    """torch's function of this name, argument by argument; `observe` and `engine` are ours.

    query (…, heads, q_len, dim); key (…, kv_heads, k_len, dim); value (…, kv_heads, k_len, v_dim):
    two dimensions or more, of which all but the last two broadcast. enable_gqa: kv_heads divides
    heads instead.

    attn_mask: bool (True: visible) or float (added to the scores; it may need gradients), one that
        broadcasts to (…, heads, q_len, k_len), or torch's `CausalBias`.
    is_causal: aligned top-left, query 0 with key 0; not together with attn_mask.
    dropout_p: always applied; give 0.0 in evaluation. scale: default 1 / √dim.

    Returns out (…, heads, q_len, v_dim); with `observe`, also the tuple of its results, in which
    the leading dimensions are flattened to (batch, heads). A row that sees no key is 0. Under
    autocast it computes in autocast's dtype. Errors are RegardErrors, and RuntimeErrors as torch's.

    Two things that torch documents as errors, and its CPU kernel lets pass, are errors here: a mask
    beside is_causal, and a value with fewer rows than the key.
    """
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    _check(query, key, value, attn_mask, dropout_p, is_causal)
    before, (query, key, value) = batched(query, key, value, enable_gqa)
    request = requested(attn_mask, is_causal, (*before, query.shape[2], key.shape[2]))
    if 0 < dropout_p < 1:
        request["dropout"] = dropout_p
    try:
        answer = attention(
            query, key, value, **request, scale=scale, observe=observe, engine=engine
        )
    except NoEngine:
        raise
    except RegardError as error:
        raise RefusedError(str(error)) from error
    out, seen = (answer, None) if observe is None else answer
    # Where every weight is dropped: 0, and a gradient of 0
    out = (out * 0.0 if dropout_p == 1 else out).reshape(*before, *out.shape[2:])
    return out if observe is None else (out, seen)


def autocast(*tensors: Tensor | None) -> list[Any]:
    """The tensors as autocast, where it is on, gives them to torch: float64 stays float64."""
    kind = next(t.device.type for t in tensors if t is not None)
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> None:
    """RefusedError for what torch's function refuses before it looks at the sizes."""
    if any(t.is_nested for t in (query, key, value)):
        raise RefusedError(
            "nested tensors are not taken; pack the sequences, (1, heads, total, dim), and call "
            "regard.attention with mask=Documents.from_cu_seqlens(lengths)"
        )
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RefusedError(f"{_said(query, key, value)}: each needs 2 dimensions or more")
    if not 0 <= dropout_p <= 1:
        raise RefusedError(f"dropout_p is {dropout_p}; give a probability, 0 ≤ dropout_p ≤ 1")
    if attn_mask is None:
        return
    if is_causal:
        raise RefusedError(
            "attn_mask and is_causal are both given; make the mask causal and leave is_causal False"
        )
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RefusedError(
            f"attn_mask is {attn_mask.dtype}, query {query.dtype}; give a mask that is bool, "
            "float32 or of the query's dtype"
        )


def batched(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], list[Tensor]]:
    """The sizes before the last two, and the tensors as `regard.attention` takes them.

    An error's text is made where it is raised: torch.compile cannot write sizes that are open.
    """
    given = tensors = [query, key, value]
    rank = max(t.dim() for t in tensors)
    if enable_gqa and min(t.dim() for t in tensors) < 3:
        said = _said(*given)
        raise RefusedError(f"{said}: enable_gqa needs (heads, length, dim), 3 dimensions or more")
    tensors = [t if t.dim() > 2 else t[None] for t in tensors]
    try:
        lead = tuple(torch.broadcast_shapes(*(t.shape[:-3] for t in tensors)))
        heads = _heads([t.shape[-3] for t in tensors], enable_gqa)
    except RuntimeError as error:
        why = "kv_heads must divide heads, and what stands before them must broadcast"
        if not enable_gqa:
            why = "what stands before the last two must broadcast; enable_gqa groups the heads"
        raise RefusedError(f"{_said(*given)}: {why}") from error
    if enable_gqa:
        tensors = [
            t.repeat_interleave(h // t.shape[-3], -3) if t.shape[-3] != h else t
            for t, h in zip(tensors, heads, strict=True)
        ]
    tensors = [t.expand(*lead, h, -1, -1) for t, h in zip(tensors, heads, strict=True)]
    tensors = [t.flatten(0, -4) if lead else t[None] for t in tensors]
    return (*lead, heads[0]) if rank > 2 else (), tensors


def _heads(given: list[int], enable_gqa: bool) -> tuple[int, int, int]:
    """How many heads of query, key and value to compute with; keys that all share stay one."""
    query, key, value = given
    if not enable_gqa:
        most = torch.broadcast_shapes((query,), (key,), (value,))[0]
        kv_heads = 1 if key == value == 1 else most
        return most, kv_heads, kv_heads
    if not key or not value or query % key or query % value:
        raise RuntimeError("kv_heads must divide heads")
    return (query, key, value) if key == value else (query, query, query)


def requested(
    attn_mask: Tensor | None, is_causal: bool, weights: tuple[int, ...]
) -> dict[str, Any]:
    """mask, bias and query_start; weights: the shape (…, heads, q_len, k_len)."""
    if attn_mask is None:
        return {"mask": Causal() if is_causal else Full(), "query_start": 0}
    bias_module = sys.modules.get("torch.nn.attention.bias")  # slow to import: 1.5 s
    if bias_module is not None and isinstance(attn_mask, bias_module.CausalBias):
        right = attn_mask.variant == bias_module.CausalVariant.LOWER_RIGHT
        return {"mask": Causal(), "query_start": None if right else 0}
    shown = attn_mask
    fits = shown.dim() <= len(weights) and all(
        s in (1, w) for s, w in zip(shown.shape[::-1], weights[::-1], strict=False)
    )
    if not fits:
        raise RefusedError(
            f"attn_mask {tuple(attn_mask.shape)} does not broadcast to the weights, {weights}"
        )
    if shown.dim() > 3 and len(weights) > 4:
        shared = all(s == 1 for s in shown.shape[:-3])
        lead = shown.shape[:-3] if shared else weights[:-3]
        shown = shown.expand(*lead, *shown.shape[-3:]).flatten(0, -4)
    request = {"mask": Dense(shown)} if shown.dtype == torch.bool else {"bias": shown}
    return request | {"query_start": 0}


def _said(*tensors: Tensor) -> str:
    names = ("query", "key", "value")
    return ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(names, tensors, strict=True))
