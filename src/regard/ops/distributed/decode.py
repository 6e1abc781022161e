"""A decode step over keys on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...call.checked import Call
from ...call.observers import Effect, LogSumExp, Observer
from ...call.top_blocks import by_content
from ...engines import run
from ...errors import RegardError
from ..merging import merge
from .block_observers import read_block
from .collectives import Ranks
from .results import rows_merged


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
    return out, tuple(
        # The log-sum-exp is that of all keys already
        result if o.sums_queries or isinstance(o, LogSumExp) else rows_merged(ranks, result)
        for o, result in zip(call.observers, seen, strict=True)
    )
