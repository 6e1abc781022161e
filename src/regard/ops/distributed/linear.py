"""Linear attention over ranks: each hands its state to the next, and its gradient back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...call.masks import And, Documents, Mask, Padding
from ...errors import RegardError
from ..linear import Favor, LinearState, linear_attention
from ..region import inside
from .collectives import Ranks

_NONE = {
    "state": "the first rank begins with none; cut the whole sequence",
    "return_state": "it lies on the last rank; call linear_attention there",
    "observe": "its weights are of the keys of all ranks before; gather the sequence by "
    "regard.distributed.unshard and observe it in one",
}


def linear_over_ranks(
    query: Tensor, key: Tensor, value: Tensor, mesh: DeviceMesh, **request: Any
) -> Tensor:
    """`linear_attention` of a sequence cut in plain order; each rank hands its state to the next.

    query (batch, heads, own q_len, dim) and so on, as `shard(…, order="plain", dim=2)` cuts them;
    decay and beta are cut alike; a mask holds the own tokens: `Documents` may go on in the next
    rank, `Padding` may hide any. Causal. A rank waits for the one before it, and sends batch ·
    state heads · features · (v_dim + 1) numbers, with `Favor` features one more for each; then its
    length, and the last documents. Gradients flow back from rank to rank; every rank must go back
    through its result.
    """
    ranks = Ranks(mesh)
    for name, why in _NONE.items():
        if request.get(name):
            raise RegardError(f"linear attention over ranks takes no {name}: {why}")
    if not request.get("causal", True):
        raise RegardError("linear attention over ranks is causal: a state knows what came before")
    with inside(None):
        # Of no tokens, the state has the form that all ranks' have
        none = (t[:, :, :0] for t in (query, key, value))
        _, form = linear_attention(
            *none, **{n: _none_of(n, v) for n, v in request.items()}, return_state=True
        )
        if isinstance(request.get("feature_map"), Favor) and form.normaliser is not None:
            form = replace(form, shift=torch.zeros_like(form.normaliser))  # long keys have one
        state = form if ranks.rank == 0 else _came(ranks, form)
        out, last = linear_attention(query, key, value, **request, state=state, return_state=True)
        if ranks.rank == ranks.size - 1:
            return out
        return out + _handed_on(ranks, form, last).to(out.dtype)  # so that the backward passes it


def _none_of(name: str, given: Any) -> Any:
    """An argument for no tokens."""
    if isinstance(given, And):
        return And(_none_of(name, given.left), _none_of(name, given.right))
    if isinstance(given, Padding):
        return Padding(given.keep[..., :0])
    if isinstance(given, Documents):
        theirs = None if given.key_ids is None else given.key_ids[..., :0]
        return Documents(given.query_ids[..., :0], theirs)
    if isinstance(given, Mask):
        return given
    return given[:, :, :0] if name in ("decay", "beta") and given.dim() > 2 else given


def _tensors(state: LinearState) -> list[Tensor]:
    """The floats of a state."""
    return [t for t in (state.memory, state.normaliser, state.shift) if t is not None]


def _handed_on(ranks: Ranks, form: LinearState, last: LinearState) -> Tensor:
    """Send a state to the next rank; a 0 through which its gradient comes back."""
    if form.shift is not None:
        last = replace(last, shift=form.shift if last.shift is None else last.shift.detach())
    nothing = _Send.apply(ranks, torch.cat([t.reshape(-1) for t in _tensors(last)]))
    told = torch.tensor([last.length], dtype=torch.int64, device=last.memory.device)
    if last.document is not None:
        told = torch.cat([told, last.document.to(torch.int64)])
    dist.send(told, group=ranks.group, group_dst=ranks.rank + 1)
    assert isinstance(nothing, Tensor)
    return nothing


def _came(ranks: Ranks, form: LinearState) -> LinearState:
    """The state of the tokens before, from the rank that has them."""
    like, memory = _tensors(form), form.memory
    sizes = [t.numel() for t in like]
    start = torch.zeros((), dtype=memory.dtype, device=memory.device, requires_grad=True)
    flat = _Receive.apply(ranks, start, sum(sizes))
    pieces = [p.view_as(t) for p, t in zip(flat.split(sizes), like, strict=True)]
    count = 1 + (0 if form.document is None else len(form.document))
    told = torch.empty(count, dtype=torch.int64, device=memory.device)
    dist.recv(told, group=ranks.group, group_src=ranks.rank - 1)
    return LinearState(
        pieces[0],
        None if form.normaliser is None else pieces[1],
        None if form.document is None else told[1:].to(form.document.dtype),
        int(told[0]),
        None if form.shift is None else pieces[-1].detach(),
    )


class _Send(torch.autograd.Function):
    """Hand a tensor to the next rank; the gradient comes back from it. Its result is 0."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, flat: Tensor) -> Tensor:
        ctx.ranks, ctx.length = ranks, flat.shape[0]
        dist.send(flat.contiguous(), group=ranks.group, group_dst=ranks.rank + 1)
        return flat.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = torch.empty(ctx.length, dtype=grad.dtype, device=grad.device)
        dist.recv(found, group=ctx.ranks.group, group_src=ctx.ranks.rank + 1)
        return None, found


class _Receive(torch.autograd.Function):
    """Take a tensor from the rank before; its gradient goes there."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, start: Tensor, length: int) -> Tensor:
        ctx.ranks = ranks
        found = torch.empty(length, dtype=start.dtype, device=start.device)
        dist.recv(found, group=ranks.group, group_src=ranks.rank - 1)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ranks = ctx.ranks
        dist.send(grad.contiguous(), group=ranks.group, group_dst=ranks.rank - 1)
        return None, torch.zeros((), dtype=grad.dtype, device=grad.device), None
