"""Which queries of a padded batch are padding, so that what keys receive can leave them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .biases import Kind
from .call import Call
from .engines import cpu
from .masks import And, Dense, Mask, Padding
from .observers import Distances, Map, Observer, Received
from .ops import Op
from .weigh import weigh

SUMMED = (Received, Map, Distances)  # observers that sum over queries


def real_queries(call: Call) -> Tensor | None:
    """bool (batch, q_len), False for padding; None where no query is.

    In self-attention a token that is hidden as a key is padding as a query.
    """
    place = call.place
    keeps = [*_shown(call.mask, call), *_added(call)]
    if not keeps or not place.k_len:
        return None
    keep = keeps[0]
    for other in keeps[1:]:
        keep = keep & other
    own = torch.arange(place.q_len, device=place.device, dtype=torch.int64)
    own = own + (place.query_start - place.key_start)
    beyond = (own < 0) | (own >= place.k_len)
    real = keep[:, own.clamp(0, place.k_len - 1)] | beyond
    return None if bool(real.all()) else real.expand(place.batch, -1)


def _shown(mask: Mask, call: Call) -> Iterator[Tensor]:
    """bool (batch or 1, k_len) of each part of a mask that hides keys as padding does."""
    if isinstance(mask, And):
        yield from _shown(mask.left, call)
        yield from _shown(mask.right, call)
    elif isinstance(mask, Padding):
        yield torch.atleast_2d(mask.keep).bool()
    elif isinstance(mask, Dense):
        yield from _dense(_four(mask.visible), call)


def _added(call: Call) -> Iterator[Tensor]:
    """The same of biases that hide keys by −inf, as torch's modules do."""
    for bias in call.biases:
        if bias.kind == Kind.DENSE and bias.tensor.shape[-2] == 1:
            yield from _dense(_four(bias.tensor.detach()) > -torch.inf, call)


def _four(tensor: Tensor) -> Tensor:
    return tensor[(None,) * (4 - tensor.dim())]


def _dense(visible: Tensor, call: Call) -> Iterator[Tensor]:
    """Of visible (batch, heads, q_len, k_len), sizes may be 1: the keys that some query sees.

    Where tokens do not see themselves (strictly causal), one that nobody sees may yet be real.
    """
    visible = visible.any(1)
    visible = visible.expand(-1, -1, call.place.k_len)
    diagonal = call.place.query_start - call.place.key_start
    if visible.shape[1] == 1 or bool(visible.diagonal(diagonal, 1, 2).any(-1).all()):
        yield visible.any(1)


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
