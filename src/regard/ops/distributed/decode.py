"""A decode step over keys on several ranks, and linear attention whose state is passed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...call.checked import Call
from ...call.observers import Effect, LogSumExp, Observer
from ...call.top_blocks import by_content
from ...engines import run
from ...errors import RegardError
from ..linear import LinearState, linear_attention
from ..merging import merge
from ..region import inside
from .block_observers import read_block
from .collectives import Ranks
from .results import made, tensors_of


@torch.no_grad()
def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: DeviceMesh,
    *,
    query_start: int,
    key_start: int,
    observe: Sequence[Observer] | None = None,
    engine: str = "auto",
    **request: Any,
) -> Any:
    """A few queries, the same in every rank, over keys of which each rank holds a run.

        out = regard.distributed.decode(q, cache_k, cache_v, mesh["cp"], query_start=n, key_start=a)

    query (batch, heads, q_len, dim), at query_start; key and value (batch, kv_heads, own k_len, …),
    of which the first stands at key_start. The other arguments are those of `attention`; what a
    mask or bias holds for each key is of the own keys. Each rank sends its out and log-sum-exp,
    batch · heads · q_len · (v_dim + 1) numbers of the working dtype, to the others; keys stay. The
    result is whole in every rank, rounded as `merge` is. It carries no gradient.

    With `observe`, also a tuple: of rows merged over all keys, of `Received` this rank's keys.
    """
    ranks = Ranks(mesh)
    call = Call.checked(
        query, key, value, **request, query_start=query_start, key_start=key_start,
        observe=observe, return_lse=True,
    )  # fmt: skip
    if by_content(call.mask) or call.dropout is not None:
        raise RegardError("decode: a rank's keys alone choose no blocks, and nothing is dropped")
    if any(isinstance(o, Effect) for o in call.observers):
        raise RegardError("decode: Effect is read in a backward pass; here there is none")
    # Learned sinks belong to one shard alone
    own = replace(call, observers=(), sinks=call.sinks if ranks.rank == 0 else None)
    part, part_lse, _ = run(own, engine)
    both = torch.cat([part.to(call.working), part_lse[..., None]], -1)
    came = ranks.all_gather(both)
    out, lse = merge([t[..., :-1] for t in came], [t[..., -1] for t in came])
    out = out.to(query.dtype)
    if observe is None:
        return out
    seen = read_block(call, lse)
    pairs = zip(call.observers, seen, strict=True)
    return out, tuple(r if o.sums_queries else _merged(ranks, o, r) for o, r in pairs)


def _merged(ranks: Ranks, observer: Observer, mine: Any) -> Any:
    """A result of rows over the keys of all ranks."""
    if isinstance(observer, LogSumExp):  # that of all keys already
        return mine
    starts = {}
    if hasattr(mine, "key_start"):
        own = torch.tensor(
            [mine.key_start, mine.weights.shape[-1]], dtype=torch.int64, device=mine.weights.device
        )
        starts = dict(enumerate(t.tolist() for t in ranks.all_gather(own)))
        most = max(n for _, n in starts.values())
        short = most - mine.weights.shape[-1]
        mine = replace(mine, weights=torch.nn.functional.pad(mine.weights, (0, short)))
    came = zip(*(ranks.all_gather(t) for t in tensors_of(mine)), strict=True)
    parts = []
    for rank, tensors in enumerate(came):
        part = made(mine, list(tensors))
        if starts:
            start, length = starts[rank]
            part = replace(part, key_start=start, weights=part.weights[..., :length])
        parts.append(part)
    return reduce(lambda a, b: a.beside(b), parts)


def linear_over_ranks(
    query: Tensor, key: Tensor, value: Tensor, mesh: DeviceMesh, **request: Any
) -> Tensor:
    """`linear_attention` of a sequence cut in plain order; each rank hands its state to the next.

    query (batch, heads, own q_len, dim) and so on, as `shard(…, order="plain", dim=2)` cuts them;
    decay and beta are cut alike, a mask is of the own tokens. Causal. A rank waits for the one
    before it, and sends batch · state heads · features · (v_dim + 1) numbers. Gradients flow back
    from rank to rank; every rank must go back through its result.
    """
    ranks = Ranks(mesh)
    for name in ("state", "return_state", "observe"):
        if request.get(name):
            raise RegardError(f"linear attention over ranks takes no {name}")
    if not request.get("causal", True):
        raise RegardError("linear attention over ranks is causal: a state knows what came before")
    with inside(None):
        # Of no tokens, the state has the form that all ranks' have
        none = (t[:, :, :0] for t in (query, key, value))
        empty = {n: v[:, :, :0] if n in ("decay", "beta") and v.dim() > 2 else v
                 for n, v in request.items() if isinstance(v, Tensor) or n != "mask"}  # fmt: skip
        _, form = linear_attention(*none, **empty, return_state=True)
        if form.shift is not None or form.document is not None or "mask" in request:
            raise RegardError(
                "linear attention over ranks takes no mask, and no random features of long keys"
            )
        state = form if ranks.rank == 0 else _came(ranks, form, query)
        out, last = linear_attention(query, key, value, **request, state=state, return_state=True)
        if ranks.rank == ranks.size - 1:
            return out
        sent = [last.memory] + ([] if last.normaliser is None else [last.normaliser])
        nothing = _Send.apply(ranks, torch.cat([t.reshape(-1) for t in sent]))
        return out + nothing.to(out.dtype)  # so that the backward passes through it


def _came(ranks: Ranks, form: LinearState, query: Tensor) -> LinearState:
    """The state of the tokens before, from the rank that has them."""
    shapes = [t.shape for t in (form.memory, form.normaliser) if t is not None]
    length = sum(s.numel() for s in shapes)
    start = torch.zeros((), dtype=form.memory.dtype, device=query.device, requires_grad=True)
    flat = _Receive.apply(ranks, start, length)
    pieces = [
        p.view(s) for p, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)
    ]
    return replace(form, memory=pieces[0], normaliser=pieces[1] if len(pieces) > 1 else None)


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
