"""Attention in plain torch, O(N) memory forward and backward, on any device.

Forward and backward walk the same strips (`strips`); the backward recomputes the weights from the
log-sum-exp (Dao et al. 2022, section 3 and appendix B). Both are opaque registered ops, so that
`torch.compile` keeps them whole; a call crosses them in its lowered form (`packed`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.checked import Call
from ..call.op_schema import SCHEMA, pack, unpack
from . import functorch as transforms
from . import hidden
from .op_with_backward import op_with_backward
from .second_pass.strips import Strips, product, take

name = "tiled"


def why_not(call: Call) -> list[str]:
    """It computes whatever a `Call` can say."""
    return []


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable in everything that goes in."""
    call = call.gathered()
    assert call.value is not None
    return _run(call, call.value)


def log_sum_exp(call: Call) -> Tensor:
    """lse (batch, heads, q_len) of a call without values."""
    return _run(call, call.key[..., :0])[1].detach()


def _run(call: Call, value: Tensor) -> tuple[Tensor, Tensor]:
    if transforms.active():
        return transforms.run(call, value, torch.ops.regard.tiled, torch.ops.regard.tiled_backward)
    out, lse = torch.ops.regard.tiled(call.query, call.key, value, *pack(call))
    return out, lse


def _computed(query: Tensor, key: Tensor, value: Tensor, *packed: Any) -> tuple[Tensor, Tensor]:
    call = unpack(query, key, value, *packed)
    value = value.to(call.working).contiguous()
    out, lse = _walk(call, value)
    if not hidden.finite(out):
        out, lse = _walk(call, value, careful=True)
    return out.to(query.dtype), lse


def _walk(call: Call, value: Tensor, careful: bool = False) -> tuple[Tensor, Tensor]:
    """Out in the working dtype, and lse. careful: numbers that are not finite stay where seen."""
    rows = call.query.shape[:3]
    out = value.new_zeros(*rows, value.shape[-1])
    lse = value.new_full(rows, -torch.inf)
    if call.sinks is not None:
        lse[:] = call.sinks.to(call.working)[:, None]
    for strip in Strips(call):
        top = strip.scores.amax(-1)
        if call.sinks is not None:
            top = torch.maximum(top, lse[strip.here])
        top = top.masked_fill(top == -torch.inf, 0)
        seen = strip.grouped(strip.scores != -torch.inf) if careful else None
        p = strip.scores.sub_(top[..., None]).exp_()
        total = p.sum(-1)
        if call.sinks is not None:
            total = total + (lse[strip.here] - top).exp()
        lse[strip.here] = top + total.log()
        if call.dropout is not None:
            p = p * strip.dropout(call)
        values = take(strip.runs, value[strip.part.batch, strip.kv], 2)
        mixed = _product(strip.grouped(p), values, seen)
        mixed = mixed.reshape(*p.shape[:3], value.shape[-1])
        out[strip.here] = mixed / total.masked_fill(total == 0, 1)[..., None]
    return out, lse


def _product(weights: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    """`product`; with what is seen of numbers that are not finite beside it, if seen is given."""
    if seen is None:
        return product(weights, value)
    clean = product(weights, hidden.filled(value))
    return clean + hidden.visible_rest(weights, value, seen)


def _computed_back(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    """Gradients of query, key, value, the biases (empty where not wanted), and the sinks."""
    *packed, out, lse, grad_out, grad_lse, wanted = rest
    call = unpack(query, key, value, *packed)
    given = (call, value.to(call.working), out, lse, grad_out.to(call.working), grad_lse, wanted)
    grads = _walk_back(*given)
    if not hidden.finite(*grads):
        grads = _walk_back(*given, careful=True)
    return grads


def _walk_back(
    call: Call, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor,
    wanted: list[bool], careful: bool = False, delta: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """What the backward op returns. careful: as in `_walk`; of hidden pairs the slope is 0.

    delta: D − grad_lse, where the call holds some of the keys alone and lse is that of all.
    """
    query, key = call.query, call.key
    d_query, d_key, d_value = (
        torch.zeros_like(t, dtype=call.working, memory_format=torch.contiguous_format)
        for t in (query, key, value)
    )
    collecting = [
        (bias, torch.zeros_like(bias.tensor, dtype=call.working) if want else None)
        for bias, want in zip(call.biases, wanted, strict=True)
    ]
    # d(loss)/d(score) = p · (dp − D) with D = grad_out · out; lse adds p · grad_lse
    shard = delta is not None
    if delta is None:
        delta = (grad_out * out.to(call.working)).sum(-1) - grad_lse
    blind = lse == -torch.inf
    safe = lse.masked_fill(blind, 0)
    strips = Strips(call, keep_capped=True)
    for strip in strips:
        shown = strip.scores != -torch.inf if careful else None
        seen = None if shown is None else strip.grouped(shown)
        p = strip.scores.sub_(safe[strip.here][..., None]).exp_()
        if not shard:
            # A strip holds whole rows: their own sum is nearer than lse where scores are large
            total = p.sum(-1)
            if call.sinks is not None:
                total += (call.sinks[strip.part.heads, None] - safe[strip.here]).exp()
            p.div_(total.masked_fill(blind[strip.here], 1)[..., None])
        if shown is not None:
            p.masked_fill_(~shown, 0)
        g = strips.rows_of(grad_out, strip.part)
        dp = product(g, take(strip.runs, value[strip.part.batch, strip.kv], 2).mT).reshape(p.shape)
        dropped = p
        if call.dropout is not None:
            factor = strip.dropout(call)
            dropped, dp = p * factor, dp * factor
        turned = None if seen is None else seen.mT
        mine = _product(strip.grouped(dropped).mT, g, turned)
        strip.add(d_value[strip.part.batch, strip.kv], mine, 2)
        ds = dp.sub_(delta[strip.here][..., None]).mul_(p)
        if shown is not None:
            ds.masked_fill_(~shown, 0)
        for at, span in strip.spans():
            for bias, gradient in collecting:
                if gradient is not None:
                    bias.collect(gradient, ds[..., at : at + span.k1 - span.k0], span)
        if strip.capped is not None and call.softcap is not None:
            ds = ds * (1 - (strip.capped / call.softcap) ** 2)
        ds, keys, queries = strip.grouped(ds), strip.key, strip.query
        if seen is not None:
            # Of a pair that is seen the slope is not finite itself
            ds = ds.masked_fill(~seen, 0)
            keys, queries = hidden.filled(keys), hidden.filled(queries)
        d_query[strip.here] = product(ds, keys).mul(call.scale).reshape(*p.shape[:3], -1)
        strip.add(d_key[strip.part.batch, strip.kv], product(ds.mT, queries), 2)
    grads = [d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(key.dtype)]
    grads += [
        query.new_empty(0) if total is None else total.to(bias.tensor.dtype)
        for bias, total in collecting
    ]
    if call.sinks is not None:
        taken = (call.sinks.to(lse.dtype)[:, None] - lse).exp()
        grads.append(-(taken * delta).sum((0, 2)).to(call.sinks.dtype))
    return grads


def part_backward(
    call: Call, lse: Tensor, grad_out: Tensor, delta: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Gradients of query, key, value and biases where the call's keys are some of many.

    lse is that of all keys, delta = grad_out · out − grad_lse with the out of all keys.
    """
    assert call.value is not None
    value, grad = call.value.to(call.working), grad_out.to(call.working)
    given = (call, value, grad, lse, grad, lse, wanted)  # out and grad_lse are in delta
    grads = _walk_back(*given, delta=delta)
    if not hidden.finite(*grads):
        grads = _walk_back(*given, careful=True, delta=delta)
    biases = [g if w else None for g, w in zip(grads[3:], wanted, strict=True)]
    return grads[0], grads[1], grads[2], biases


def _shapes(query: Tensor, key: Tensor, value: Tensor, *packed: Any) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    working = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(*rows, value.shape[-1]), query.new_empty(rows, dtype=working)


_tiled, _backward = op_with_backward(
    "tiled",
    f"Tensor query, Tensor key, Tensor value, {SCHEMA}",
    "(Tensor, Tensor)",
    forward=_computed,
    fake=_shapes,
    backward=_computed_back,
    differentiable=("query", "key", "value", "bias_tensors", "sinks"),
    kept={0: "out", 1: "lse"},
    gradients=("Tensor grad_out", "Tensor grad_lse"),
)
