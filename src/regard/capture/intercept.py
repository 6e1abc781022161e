"""Catches torch's attention calls of one thread, and ours, and reads their weights beside them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..call.biases import DenseBias, Kind
from ..call.checked import Call
from ..call.masks import Causal, Dense, Full, Mask, Padding
from ..call.opcodes import Op
from ..engines import run
from ..engines.second_pass.weigh import weigh, whole_rows
from ..errors import RegardError
from ..nn import functional
from ..ops import beside, region
from ..ops.attend import attention
from ..ops.cache import tell
from ..ops.watches import WatchedCall
from .collector import Collector


class Caught(NamedTuple):
    """One of torch's attention calls: its tensors and request, and what torch would return.

    finish(out, weights) takes ours (batch, heads, q_len, v_dim) and a way to compute the weights.
    """

    kind: str
    query: Tensor
    key: Tensor
    value: Tensor
    request: dict[str, Any]
    finish: Callable[[Tensor, Callable[[], Tensor]], Any]


class Intercept(TorchFunctionMode):
    """While active, `F.scaled_dot_product_attention`, `F.multi_head_attention_forward` and
    `regard.attention` report.

    The output is torch's own, to the bit, with queries and keys read beside it; only where edges
    are cut, or effects asked for, is the attention itself computed by regard.
    """

    def __init__(self, collector: Collector) -> None:
        super().__init__()
        self._collector = collector

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        catch = _CATCH.get(func)
        # The call itself does not say whose it is: that is the module which runs now
        module = self._collector.tracker.innermost
        if self._collector.within:  # what a watched function calls is recorded with it
            return func(*args, **kwargs)
        if module is None or (catch is None and func not in (attention, tell)):
            return func(*args, **kwargs)
        met = self._collector.met(module)
        if catch is None:
            kind = getattr(self._collector.modules[module], "kind", None)  # modules of ours say it
            met.kind = kind if kind in ("self", "cross") else ""
            if func is tell:
                return _told(met, *args)
            # Nobody asks for it: as if there were no watch, to the bit and in time
            untouched = not met.wanted and met.kept is None
            return func(*args, **kwargs) if untouched else _regard(met, *args, **kwargs)
        if met.replaced:
            return _computed(met, catch(*args, **kwargs))
        return met.beside(lambda: func(*args, **kwargs), lambda: _read(met, catch(*args, **kwargs)))


def _read(met: WatchedCall, caught: Caught) -> Call | None:
    """What torch has computed, as a call; None without heads: there is nothing to read."""
    met.kind = caught.kind
    if not caught.query.shape[1]:
        return None
    tensors = (t.detach() for t in (caught.query, caught.key, caught.value))
    return Call.checked(*tensors, **caught.request | {"dropout": None})


def _computed(met: WatchedCall, caught: Caught) -> Any:
    """Ours in the place of torch's."""
    beside.check_draws(caught.request["dropout"], met.name)
    met.kind = caught.kind
    request = caught.request | {"mask": met.visible(caught.request["mask"])}
    call = Call.checked(caught.query, caught.key, caught.value, **request)
    out, lse, _ = met.run(call)
    rows = (0, call.place.q_len)
    return caught.finish(out, lambda: whole_rows(call, lse.detach(), rows).to(out.dtype))


def _regard(
    met: WatchedCall,
    *tensors: Tensor,
    mask: Mask,
    observe: Any,
    return_lse: bool,
    engine: str,
    **request: Any,
) -> Any:
    """`regard.attention`, computed by its own engine and read from its own lse."""
    if (parallel := region.current()) is not None:
        if observe is not None:
            raise RegardError(
                f"{met.name} asks for observers itself; inside context_parallel, watch it or let "
                "it ask, not both"
            )
        query, key, value = tensors
        request |= {"mask": met.visible(mask), "return_lse": return_lse, "engine": engine}
        out, among = met.over_ranks(parallel, query, key, value, request)
        return (out, among) if return_lse else out
    call = Call.checked(
        *tensors, mask=met.visible(mask), observe=observe, return_lse=return_lse, **request
    )
    out, lse, own = _recorded(met, call, engine) if met.wanted else run(call, engine)
    answer = (out, lse) if return_lse else (out,)
    if observe is not None:
        answer = (*answer, weigh(call, lse, out, seen=own))
    return answer if len(answer) > 1 else out


def _recorded(met: WatchedCall, call: Call, engine: str) -> tuple[Tensor, Tensor, dict[int, Any]]:
    """Run and record it: out, lse, and what was gathered for the call's own observers."""
    placed = _depends_on_positions(call)
    if not met.kind:  # then mask and lengths tell it
        met.kind = "self" if placed or call.place.q_len == call.place.k_len else "cross"
    # A mask that asks for no position leaves the start open: a cross layer's is its own count
    start = met.position(call.place.query_start)
    moved = call if placed else _shifted(call, start)
    if not call.observers:
        out, lse, _ = met.run(moved, engine)
        return out, lse, {}
    out, lse, own = run(call, engine)  # its own observers go by its own positions
    met.record(moved, lse, out)
    return out, lse, own


def _told(met: WatchedCall, call: Call, lse: Tensor, out: Tensor | None = None) -> None:
    """A call that is computed already: over a cache that has evicted, or of additive attention."""
    if met.kept is not None:
        why = "attends to a cache that has evicted; cut it before, or use KVCache()"
        if met.kind == "cross":  # no cache evicts what cross-attention reads
            why = "tells of weights that are computed already; nothing can be cut there"
        raise RegardError(f"cut: {met.name} {why}")
    if met.wanted:
        met.kind = met.kind or "self"
        met.position(call.place.query_start)
        met.record(call, lse, out)


def _depends_on_positions(call: Call) -> bool:
    """Whether the mask or a bias asks where the queries stand."""
    free = (Op.FULL, Op.DOCUMENTS, Op.PADDING, Op.DENSE, Op.HEADS, Op.AND, Op.OR, Op.NOT)
    return any(op not in free for op, _ in call.program.instructions()) or any(
        b.kind != Kind.DENSE for b in call.biases
    )


def _shifted(call: Call, start: int) -> Call:
    """The same call with its queries counted from `start`; nothing in it depends on that."""
    # Both hold it: the program was lowered at these positions
    place = replace(call.place, query_start=start)
    return replace(call, place=place, program=replace(call.program, query_start=start))


def _catch_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Caught:
    """`F.scaled_dot_product_attention`: top-left causal, any leading sizes, as autocast gives them.

    Self or cross is told by the lengths, for want of anything else. Without enable_gqa three
    dimensions are (batch, length, dim), of one head.
    """
    kind = "self" if query.shape[-2] == key.shape[-2] else "cross"
    query, key, value, attn_mask = functional.autocast(query, key, value, attn_mask)
    single = not enable_gqa and max(query.dim(), key.dim(), value.dim()) <= 3
    if single:
        query, key, value = (t.unsqueeze(-3) for t in (query, key, value))
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(-3)
    before, (query, key, value) = functional.batched(query, key, value, enable_gqa)
    weights = (*before, query.shape[2], key.shape[2])
    request = {"mask": Full()} | functional.requested(attn_mask, is_causal, weights)
    if is_causal and attn_mask is not None:  # torch's kernel for CPUs applies both
        request["mask"] = request["mask"] & Causal()
    request |= {"scale": scale, "dropout": dropout_p or None}
    shape = before[:-1] if single else before
    return Caught(
        kind, query, key, value, request, lambda out, _: out.reshape(*shape, *out.shape[2:])
    )


def _catch_mha(*args: Any, **kwargs: Any) -> Caught:
    """`F.multi_head_attention_forward`, from its arguments (Vaswani et al. 2017, section 3.2.2).

    There True in a bool mask means hidden, in both masks.
    """
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    given = [a["query"], a["key"], a["value"]]
    kind = "self" if given[0] is given[1] else "cross"
    batched = given[0].dim() == 3
    given = given if batched else [t[:, None] for t in given]
    heads, batch = a["num_heads"], given[0].shape[1]
    if a["use_separate_proj_weight"]:
        weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
    else:
        weights = list(a["in_proj_weight"].chunk(3))
    offsets = [None] * 3 if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)
    q, k, v = (F.linear(t, w, b) for t, w, b in zip(given, weights, offsets, strict=True))
    if a["bias_k"] is not None:
        k, v = (
            torch.cat([t, a[b].expand(1, batch, -1)]) for t, b in ((k, "bias_k"), (v, "bias_v"))
        )
    q, k, v = (t.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for t in (q, k, v))
    k, v = (
        t if a[s] is None else a[s].unflatten(0, (batch, heads))
        for t, s in ((k, "static_k"), (v, "static_v"))
    )
    if a["add_zero_attn"]:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    request = _mha_request(a, k.shape[2], batch, heads)
    request["dropout"] = (a["dropout_p"] or None) if a["training"] else None

    def finish(out: Tensor, weigh: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        mixed = out.permute(2, 0, 1, 3).flatten(2)
        mixed = F.linear(mixed, a["out_proj_weight"], a["out_proj_bias"])
        shown = weigh() if a["need_weights"] else None
        if shown is not None and a["average_attn_weights"]:
            shown = shown.mean(1)
        if batched:
            return mixed, shown
        return mixed[:, 0], None if shown is None else shown[0]

    return Caught(kind, q, k, v, request, finish)


def _mha_request(a: dict[str, Any], k_len: int, batch: int, heads: int) -> dict[str, Any]:
    """Mask and bias; the keys that the module adds by itself are visible to all."""
    attn_mask, padding = a["attn_mask"], a["key_padding_mask"]
    shown: Mask = Causal() if a["is_causal"] and attn_mask is None else Full()
    if attn_mask is not None:
        attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.expand(batch * heads, -1, -1).unflatten(0, (batch, heads))
        # bias_k and add_zero_attn have added keys that the mask knows nothing of
        missing = k_len - attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask, (0, missing), value=attn_mask.dtype == torch.bool)
    request = _request(shown, attn_mask)
    if padding is not None:
        padding = padding[None] if padding.dim() == 1 else padding
        if padding.dtype == torch.bool:
            keep = F.pad(~padding, (0, k_len - padding.shape[-1]), value=True)
            request["mask"] = request["mask"] & Padding(keep)
        else:
            added = F.pad(padding, (0, k_len - padding.shape[-1]))[:, None, None]
            request["bias"] = [*(request["bias"] or []), DenseBias(added)]
    return request


def _request(shown: Mask, attn_mask: Tensor | None) -> dict[str, Any]:
    """torch's mask becomes a mask if it is bool (True: visible), else a bias."""
    request: dict[str, Any] = {"mask": shown, "bias": None, "query_start": 0}
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        request["mask"] = Dense(attn_mask) if isinstance(shown, Full) else shown & Dense(attn_mask)
    elif attn_mask is not None:
        request["bias"] = [DenseBias(attn_mask)]
    return request


_CATCH: dict[Any, Callable[..., Caught]] = {
    F.scaled_dot_product_attention: _catch_sdpa,
    F.multi_head_attention_forward: _catch_mha,
}
