"""Which queries of a padded batch are padding, so that what keys receive can leave them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..call.biases import Kind
from ..call.checked import Call
from ..call.observers import Observer
from ..call.opcodes import Op
from ..call.padding import kept
from ..engines.cpu import engine as cpu
from ..engines.second_pass.weigh import weigh


def real_queries(call: Call) -> Tensor | None:
    """bool (batch, q_len), False for padding; None where no query is.

    In self-attention a token that is hidden as a key is padding as a query.
    """
    place = call.place
    diagonal = place.query_start - place.key_start
    added = [
        b.tensor.detach() for b in call.biases if b.kind == Kind.DENSE and b.tensor.shape[-2] == 1
    ]
    keep = kept(call.mask, (place.q_len, place.k_len), diagonal, added)
    if keep is None or not place.k_len:
        return None
    own = torch.arange(place.q_len, device=place.device, dtype=torch.int64) + diagonal
    beyond = (own < 0) | (own >= place.k_len)
    real = keep[:, own.clamp(0, place.k_len - 1)] | beyond
    return None if bool(real.all()) else real.expand(place.batch, -1)


def without(call: Call, real: Tensor) -> Call:
    """The same call, where queries that are not real see nothing."""
    program, keys = call.program, real.new_zeros(1, call.place.k_len, dtype=torch.int64)
    ids = real.to(torch.int64) - 1  # −1: in no document
    n = len(program.tensors)
    code = (*program.code, Op.DOCUMENTS, n, n + 1, Op.AND)
    return replace(call, program=replace(program, code=code, tensors=(*program.tensors, ids, keys)))


def summed(call: Call, observers: Sequence[Observer], lse: Tensor, real: Tensor) -> list[Any]:
    """What observers that sum over queries see of the real ones; lse: that of all."""
    left = replace(without(call, real), observers=tuple(observers))
    lse = lse.detach().masked_fill(~real[:, None], -torch.inf)
    seen: dict[int, Any] = {}
    if left.value is not None and left.pages is None:
        fused = replace(left, query=call.query.detach(), key=call.key.detach())
        fused = replace(fused, value=fused.key[..., :0])
        if not cpu.why_not(fused):  # in one pass of compiled code, without mixing any values
            _, lse, seen = cpu.observed(fused)
    return list(weigh(left, lse, seen=seen))
