"""The specification: readable, materialises the weights, plain autograd.

float64 in float64; every other dtype in float32, rounded once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.checked import Call
from ..call.geometry import Span
from . import hidden

name = "reference"


def why_not(call: Call) -> list[str]:
    """It computes whatever a `Call` can say."""
    return []


def whole(call: Call) -> Span:
    """The span of the whole call."""
    return Span(0, call.place.q_len, 0, call.place.k_len)


def scores(call: Call) -> Tensor:
    """softcap · tanh(scale · q kᵀ / softcap) + bias, −inf where hidden.

    (batch, heads, q_len, k_len).
    """
    group = call.place.heads // call.place.kv_heads
    key = call.key.repeat_interleave(group, 1).to(call.working)
    query = call.query.to(call.working)
    out = call.scale * hidden.dot(query, key, lambda: visible(call))
    if call.softcap is not None:
        out = call.softcap * torch.tanh(out / call.softcap)
    for bias in call.biases:
        out = out + bias.tile(whole(call), out.dtype)
    if call.place.q_len == 0 or call.place.k_len == 0:
        return out
    # A score of −inf hides too; through masked_fill it has no gradient, rather than NaN
    return out.masked_fill(~visible(call) | (out == -torch.inf), -torch.inf)


def visible(call: Call) -> Tensor:
    """Who sees whom, by the mask and by biases of −∞: bool that broadcasts to the scores."""
    shown = call.program.visible(whole(call))
    for bias in call.biases:
        if bias.dense:  # NaN − ∞ is NaN
            shown = shown & (bias.tile(whole(call), call.working) != -torch.inf)
    return shown


def log_sum_exp(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """(batch, heads, q_len); −inf where nothing is visible and there is no sink."""
    if scores.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:-1], -torch.inf)
    else:
        lse = torch.logsumexp(scores, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None].expand_as(lse))
    return lse


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The weights, by softmax itself: exp(score − lse) would round with the size of the scores."""
    if scores.shape[-1] == 0:
        return scores
    if sinks is not None:
        logit = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, logit], -1).softmax(-1)[..., :-1]
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse). Vaswani et al. 2017, eq. 1."""
    call = call.gathered()
    assert call.value is not None
    scored = scores(call)
    p = softmax(scored, call.sinks)
    if call.dropout is not None:
        p = p * call.dropout.factor(whole(call), call.place, p.dtype)
    group = call.place.heads // call.place.kv_heads
    value = call.value.repeat_interleave(group, 1).to(call.working)
    out = hidden.mix(p, value, lambda: scored != -torch.inf)
    return out.to(call.value.dtype), log_sum_exp(scored, call.sinks)
