"""Effect: the edges whose removal would change a differentiated scalar most, read in the backward.

A hook on the output waits for its gradient; then one pass over the strips recomputes the weights
and keeps the k largest effects of each row. O(N·k) memory, exact top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.edge_results import EffectSeen
from ...call.observers import Effect
from ...errors import RegardError
from .strips import Strips, StripWeights, product, take
from .top_k import largest

Measured = tuple[Tensor, Tensor, Tensor]  # indices, effect, weights
Measure = Callable[[Tensor], Measured]  # of a scalar's gradient


def attach(
    call: Call, lse: Tensor, out: Tensor, effect: Effect,
    by: Measure | None = None,
) -> EffectSeen:  # fmt: skip
    """The result of an `Effect`, filled when the gradient of `out` arrives.

    out (batch, heads, q_len, v_dim), lse (batch, heads, q_len). RegardError without gradients.
    by: an engine's own way to measure the effect on one scalar, from the gradient.
    """
    if not out.requires_grad:
        raise RegardError(
            "Effect needs gradients: nothing here asks for one; run without no_grad, and call "
            "backward() on the scalar"
        )
    assert call.value is not None
    still = replace(
        call, query=call.query.detach(), key=call.key.detach(), value=call.value.detach()
    )
    seen, result, lse = (
        EffectSeen(call.place.query_start),
        out.detach(),
        lse.detach().to(call.working),
    )
    if not effect.norm:
        by = by or (lambda grad: measure(still, lse, result, grad[None], effect.k))
        out.register_hook(lambda grad: seen.fill(*by(grad.detach())))
        return seen
    if call.dropout is not None:
        raise RegardError("Effect of a norm takes no dropout: its copies would not be alike")
    if not torch.allclose(call.query, call.query[:1].expand_as(call.query), 1e-2, 1e-2):
        raise RegardError("Effect of a norm: the batch must hold copies of one input")
    one, lse, result = still.item(0), lse[:1].clone(), result[:1].clone()
    grads: list[Tensor] = []

    def keep(grad: Tensor) -> None:
        grads.append(grad.detach()[:, None].to(call.working))
        seen.fill_by(lambda: measure(one, lse, result, _fewest(grads), effect.k, norm=True))

    out.register_hook(keep)
    return seen


def _fewest(grads: list[Tensor]) -> Tensor:
    """Gradients (scalars, batch, heads, q_len, v_dim) with the same norms, v_dim at most.

    The triangle of each row's QR has the products of the row's gradients with any vector.
    """
    whole = torch.cat(grads)
    if len(whole) <= whole.shape[-1]:
        return whole
    return torch.linalg.qr(whole.movedim(0, -2), mode="r").R.movedim(-2, 0)


@torch.no_grad()
def measure(
    call: Call,
    lse: Tensor,
    out: Tensor,
    grads: Tensor,
    k: int,
    norm: bool = False,
    shard: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices int32, effect, weights), each (batch, heads, q_len, k), largest |effect| first.

    grads (scalars, batch, heads, q_len, v_dim): of one scalar, or, for a norm, of several.
    effect = −p (dp − D) / (1 − p) with dp = grad · v and D = grad · out; of the only key that a row
    sees, −D: without it the row's output is 0. shard: the call may hold only some of the keys; lse
    and out are of all. Then a row's only key is one whose weight is 1 but for rounding.
    """
    assert call.value is not None
    place, working = call.place, call.working
    rows = (place.batch, place.heads, place.q_len, k)
    indices = torch.full(rows, -1, dtype=torch.int32, device=place.device)
    effects = torch.zeros(rows, dtype=working, device=place.device)
    weights = torch.zeros_like(effects)
    value, grads = call.value.to(working).contiguous(), grads.to(working)
    deltas = (grads * out.to(working)).sum(-1)
    nothing = 8 * torch.finfo(working).eps if shard else 0
    strips = Strips(call)
    for strip in strips:
        seen = StripWeights(strip, lse, call, shard)
        p = seen.weights
        values = take(strip.runs, value[strip.part.batch, strip.kv], 2).mT
        effect = torch.zeros_like(p)
        for grad, delta in zip(grads, deltas, strict=True):
            dp = product(strips.rows_of(grad, strip.part), values).reshape(p.shape)
            if call.dropout is not None:
                dp *= strip.dropout(call)
            here, left = delta[strip.here][..., None], 1 - p
            one = torch.where(left > nothing, p * (here - dp) / left, -here)
            effect = effect + one.square() if norm else one
        effect = effect.sqrt() if norm else effect
        ranked = effect.abs().masked_fill(seen.log == -torch.inf, -torch.inf)
        top, cols = largest(ranked, min(k, p.shape[-1]))
        n = cols.shape[-1]
        keys = strip.keys()[cols] + place.key_start
        shown = top != -torch.inf
        indices[strip.here][..., :n] = keys.where(shown, -1).to(torch.int32)
        effects[strip.here][..., :n] = effect.gather(-1, cols).where(shown, 0)
        weights[strip.here][..., :n] = p.gather(-1, cols).where(shown, 0)
    return indices, effects, weights
