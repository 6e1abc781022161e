"""Catches torch's own attention calls of one thread, computes them as ever, and reads their weights."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .biases import DenseBias
from .call import Call
from .engines import tiled
from .masks import Causal, Dense, Full, Mask, Padding
from .watched import Watched


class Intercept(TorchFunctionMode):
    """While active, `F.scaled_dot_product_attention` and `F.multi_head_attention_forward` report.

    The output is torch's own, to the bit: queries and keys are read beside it.
    """

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched
        self.stack: list[str] = []
        self.calls: dict[str, int] = {}
        self.thread = threading.get_ident()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        reads = {
            F.scaled_dot_product_attention: _read_sdpa,
            F.multi_head_attention_forward: _read_mha,
        }
        if func in reads and self.stack:
            self.read(reads[func](*args, **kwargs))
        return out

    def read(self, call: Call) -> None:
        """Record a call under the innermost module; a second one in it gets the suffix #2."""
        name = self.stack[-1]
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.calls[name] > 1:
            name = f"{name}#{self.calls[name]}"
        if self.watched.wants(name):
            self.watched.record(name, _kind(call), call, tiled.log_sum_exp(call))

    def inside(self, name: str) -> None:
        """A module's forward begins."""
        if threading.get_ident() == self.thread:
            self.stack.append(name)
            self.calls.pop(name, None)

    def outside(self) -> None:
        """A module's forward ended, or raised."""
        if threading.get_ident() == self.thread and self.stack:
            self.stack.pop()


@contextlib.contextmanager
def intercepting(model: nn.Module, watched: Watched) -> Iterator[None]:
    """Catch the calls made inside this model's modules, by this thread, while inside."""
    intercept = Intercept(watched)
    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(
                module.register_forward_pre_hook(lambda *_, name=name: intercept.inside(name))
            )
            handles.append(
                module.register_forward_hook(lambda *_: intercept.outside(), always_call=True)
            )
        with intercept:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _kind(call: Call) -> str:
    return "self" if call.place.q_len == call.place.k_len else "cross"


def _read_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """The call that `F.scaled_dot_product_attention` was: top-left causal, any leading sizes."""
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    query, key = (
        t.expand(*lead, *t.shape[-3:]) if t.dim() > 3 or lead else t for t in (query, key)
    )
    if query.dim() == 3:  # (batch, length, dim): one head
        query, key = query[:, None], key[:, None]
        attn_mask = (
            attn_mask[:, None] if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        )
    elif query.dim() == 2:
        query, key = query[None, None], key[None, None]
    elif query.dim() > 4:
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
        query, key = query.flatten(0, -4), key.flatten(0, -4)
    return _call(query, key, Causal() if is_causal else Full(), attn_mask, scale)


def _read_mha(*args: Any, **kwargs: Any) -> Call:
    """The call inside `F.multi_head_attention_forward`, from its arguments (Vaswani et al. 2017).

    There True in a bool mask means hidden, in both masks.
    """
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    query, key, value = a["query"], a["key"], a["value"]
    if query.dim() == 2:
        query, key, value = (t[:, None] for t in (query, key, value))
    heads, length, batch = a["num_heads"], query.shape[0], query.shape[1]
    if a["use_separate_proj_weight"]:
        weights = [a["q_proj_weight"], a["k_proj_weight"]]
    else:
        weights = list(a["in_proj_weight"].chunk(3)[:2])
    biases = [None, None] if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)[:2]
    q, k = (F.linear(t, w, b) for t, w, b in zip((query, key), weights, biases, strict=True))
    added = 0
    if a["bias_k"] is not None:
        k, added = torch.cat([k, a["bias_k"].expand(1, batch, -1)]), added + 1
    if a["static_k"] is not None:
        k = a["static_k"].unflatten(0, (batch, heads))
    else:
        k = k.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    if a["add_zero_attn"]:
        k, added = F.pad(k, (0, 0, 0, 1)), added + 1
    q = q.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    shown: Mask = Full()
    attn_mask, padding = a["attn_mask"], a["key_padding_mask"]
    if attn_mask is not None:
        attn_mask = attn_mask if attn_mask.dtype != torch.bool else ~attn_mask
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.expand(batch * heads, -1, -1).unflatten(0, (batch, heads))
        attn_mask = F.pad(attn_mask, (0, added), value=attn_mask.dtype == torch.bool)
    elif a["is_causal"]:
        shown = Causal()
    if padding is not None:
        padding = padding[None] if padding.dim() == 1 else padding
        if padding.dtype == torch.bool:
            shown = shown & Padding(F.pad(~padding, (0, added), value=True))
        else:
            extra = F.pad(padding, (0, added))[:, None, None]
            return _call(q, k, shown, attn_mask, None, extra)
    del length
    return _call(q, k, shown, attn_mask, None)


def _call(
    query: Tensor,
    key: Tensor,
    shown: Mask,
    attn_mask: Tensor | None,
    scale: float | None,
    extra: Tensor | None = None,
) -> Call:
    """A call without values: torch's mask becomes a mask if bool (True: visible), else a bias."""
    bias = [] if extra is None else [DenseBias(extra.detach())]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        shown = Dense(attn_mask) if isinstance(shown, Full) else shown & Dense(attn_mask)
    elif attn_mask is not None:
        bias.append(DenseBias(attn_mask.detach()))
    return Call.checked(
        query.detach(), key.detach(), None, mask=shown, bias=bias or None, scale=scale,
        query_start=0,
    )  # fmt: skip
