"""The sides of a comparison: ours, and its peers. Each prepares what its call may know beforehand.

A peer that cannot run a problem is `Refused`, with the reason; what it gives is checked like ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...call.edge_results import TopKSeen
from ...call.masks import And, Causal, Documents, First, Full, Mask, Not, Or, Window
from ...call.results import EntropySeen, MapSeen, ReceivedSeen
from ...call.sparse_masks import BlockSparse
from ...engines import select
from ...ops.attend import attention
from ...ops.linear import linear_attention
from .accuracy import gradients
from .dense import Answer, attend, statistics
from .inputs import Inputs
from .machine import available_bytes
from .sides import Contestant, Refused

LINEAR = "chunked"
"""The engine of `linear_attention`."""


def engine_of(inputs: Inputs, engine: str) -> str:
    """The engine that ours takes. NoEngine where the named one cannot."""
    if inputs.problem.form is not None:
        return LINEAR
    name: str = select(inputs.call, engine).name
    return name


def ours(inputs: Inputs, engine: str) -> Contestant:
    """`regard.attention`, with the problem's observers, or `regard.linear_attention`."""
    q, k, v = inputs.tensors
    mask, observe = inputs.problem.mask, inputs.problem.observe
    if inputs.problem.form is not None:
        return Contestant(
            partial(linear_attention, **inputs.first(inputs.problem.k_len), engine=LINEAR)
        )
    if observe:
        return Contestant(
            lambda: attention(q, k, v, mask=mask, observe=observe, engine=engine), _seen
        )
    return _timed(inputs, lambda: attention(q, k, v, mask=mask, engine=engine))


def plain(inputs: Inputs, engine: str) -> Contestant:
    """`regard.attention` without the observers: their cost is ours over this."""
    q, k, v = inputs.tensors
    return _timed(inputs, lambda: attention(q, k, v, mask=inputs.problem.mask, engine=engine))


def causal(inputs: Inputs, engine: str) -> Contestant:
    """`regard.attention`, causal: what a sparser mask, or linear attention, is to save."""
    q, k, v = inputs.tensors
    return Contestant(lambda: attention(q, k, v, mask=Causal(), engine=engine), None)


def half(inputs: Inputs, engine: str) -> Contestant:
    """`regard.linear_attention` of the first half of the tokens: whether the time is linear."""
    given = inputs.first(inputs.problem.k_len // 2)
    return Contestant(partial(linear_attention, **given, engine=LINEAR), None)


def sdpa(inputs: Inputs, engine: str) -> Contestant:
    """torch's scaled_dot_product_attention; a mask that it does not know as a tensor."""
    q, k, v = inputs.tensors
    how: dict[str, Any] = {"enable_gqa": inputs.problem.group > 1}
    if inputs.causal and not inputs.full:
        how["is_causal"] = True
    elif not inputs.full:
        how["attn_mask"] = inputs.visible
    return _timed(inputs, lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, **how))


def eager(inputs: Inputs, engine: str) -> Contestant:
    """Plain torch with the weights materialised."""
    q, k, v = inputs.tensors
    _fits(inputs)
    visible, scale = None if inputs.full else inputs.visible, inputs.call.scale
    return _timed(inputs, lambda: attend(q, k, v, visible, scale)[0])


def materialised(inputs: Inputs, engine: str) -> Contestant:
    """The same, and what the observers would see of those weights."""
    q, k, v = inputs.tensors
    _fits(inputs)
    visible, scale = None if inputs.full else inputs.visible, inputs.call.scale

    def run() -> Answer:
        out, weights = attend(q, k, v, visible, scale)
        return {"out": out} | statistics(inputs.problem.observe, weights)

    return Contestant(run, lambda answer: answer)


def flex(inputs: Inputs, engine: str) -> Contestant:
    """FlexAttention, compiled, with the mask as a block mask."""
    from torch._dynamo import reset
    from torch._dynamo.exc import TorchDynamoException
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    p, (q, k, v) = inputs.problem, inputs.tensors
    blocks = None
    if not inputs.full:
        mod = flex_mask(p.mask, p.k_len - p.q_len)
        blocks = create_block_mask(mod, None, None, p.q_len, p.k_len, device="cpu")
    reset()  # each shape is a compilation of its own, not a recompilation too many
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    how: dict[str, Any] = {"block_mask": blocks, "enable_gqa": p.group > 1}
    try:
        compiled(q, k, v, **how)
    except TorchDynamoException as error:
        raise Refused(_first_line(error)) from error
    return _timed(inputs, lambda: compiled(q, k, v, **how))


def onnxruntime(inputs: Inputs, engine: str) -> Contestant:
    """onnxruntime's own attention operators; the extra `bench` brings it."""
    try:
        from . import ort
    except ModuleNotFoundError as error:
        raise Refused(f'{error.name} is not installed: pip install "regard[bench]"') from error
    return ort.side(inputs)


PEERS: dict[str, Callable[[Inputs, str], Contestant]] = {
    "sdpa": sdpa,
    "eager": eager,
    "flex": flex,
    "onnxruntime": onnxruntime,
    "plain": plain,
    "materialised": materialised,
    "causal": causal,
    "half": half,
}


def flex_mask(mask: Mask, offset: int) -> Callable[..., Tensor]:
    """FlexAttention's mask_mod (batch, head, query, key) of a mask; offset: the first query's key.

    Written in indices, as its users do: a lookup in a dense mask would be slower.
    """
    if isinstance(mask, And | Or):
        left, right = flex_mask(mask.left, offset), flex_mask(mask.right, offset)
        if isinstance(mask, And):
            return lambda b, h, i, j: left(b, h, i, j) & right(b, h, i, j)
        return lambda b, h, i, j: left(b, h, i, j) | right(b, h, i, j)
    if isinstance(mask, Not):
        inner = flex_mask(mask.mask, offset)
        return lambda b, h, i, j: ~inner(b, h, i, j)
    if isinstance(mask, Full):
        return lambda b, h, i, j: j >= 0
    if isinstance(mask, Causal):
        return lambda b, h, i, j: i + offset >= j
    if isinstance(mask, Window):
        n, ahead = mask.n, mask.ahead
        return lambda b, h, i, j: (i + offset - j < n) & (i + offset - j >= -ahead)
    if isinstance(mask, First):
        first = mask.n
        return lambda b, h, i, j: j < first
    if isinstance(mask, BlockSparse) and mask.layout.dim() == 2 and mask.first is None:
        layout, block = mask.layout, mask.block
        return lambda b, h, i, j: layout[(i + offset) // block - offset // block, j // block]
    if isinstance(mask, Documents) and mask.query_ids.dim() == 1:
        keys = mask.query_ids if mask.key_ids is None else mask.key_ids
        queries = mask.query_ids
        return lambda b, h, i, j: (queries[i] == keys[j]) & (keys[j] >= 0)
    raise Refused(f"no mask_mod is written here for {mask}")


def _timed(inputs: Inputs, forward: Callable[[], Tensor]) -> Contestant:
    """The forward, or, where the problem asks for it, the backward pass alone."""
    if not inputs.problem.backward:
        return Contestant(forward)
    out, tensors, gradient = forward(), inputs.tensors, inputs.gradient
    return Contestant(
        lambda: torch.autograd.grad(out, tensors, gradient, retain_graph=True), gradients
    )


def _seen(answer: tuple[Tensor, tuple[Any, ...]]) -> Answer:
    """The results of our observers, by the names that `statistics` gives."""
    out, results = answer
    found: Answer = {"out": out}
    for result in results:
        match result:
            case TopKSeen():
                found |= {"TopK": result.weights, "TopK keys": result.indices}
            case ReceivedSeen():
                found["Received"] = result.sum
            case EntropySeen():
                found["Entropy"] = result.values
            case MapSeen():
                found["Map"] = result.weights
            case _:
                raise NotImplementedError(f"{type(result).__name__}: no check of it here")
    return found


def _fits(inputs: Inputs) -> None:
    """Refused where the weights, and what softmax makes of them, would not fit into memory."""
    p = inputs.problem
    size = p.batch * p.heads * p.q_len * p.k_len * p.dtype.itemsize
    copies = 6 if p.backward else 4
    if size * copies > available_bytes():
        raise Refused(f"its weights would take {size / 2**30:.0f} GiB, {copies} times at its peak")


def _first_line(error: BaseException) -> str:
    """What the innermost cause says, in one line."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    said = str(error).strip().splitlines()
    return said[0].removeprefix("raised exception ") if said else type(error).__name__
