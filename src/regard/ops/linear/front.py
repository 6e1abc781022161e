"""The front door: `linear_attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.masks import Causal, Full, Mask
from ...call.observers import Observer
from ...engines import functorch as transforms
from ...errors import NoEngine, RegardError
from . import apart, chunked, reference
from . import token_by_token as recurrent
from .features import Favor
from .recurrence import Flow, Prepared, full_precision, in_document_order, prepared, with_ones
from .request import Request
from .second_pass import check, weigh
from .state import LinearState
from .triton import engine as by_triton
from .within_chunk import CHUNK

ENGINES = ("triton", "chunked", "recurrent", "reference")
PART = 2**19  # numbers in one tensor of a part of a long sequence
MOST_STEPS = 4  # `auto` decodes so many tokens one by one


class Given(TypedDict, total=False):
    """What `linear_attention` takes by name that says nothing of what it returns: for checkers."""

    feature_map: str | Favor | Callable[[Tensor], Tensor] | None
    decay: Tensor | None
    beta: Tensor | None
    causal: bool
    mask: Mask
    normalise: bool | None
    scale: float | None
    state: LinearState | None
    engine: str


Results = tuple[Any, ...]


@overload
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, observe: None = None,
    return_state: Literal[False] = False, **request: Unpack[Given],
) -> Tensor: ...  # fmt: skip
@overload
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, observe: None = None,
    return_state: Literal[True], **request: Unpack[Given],
) -> tuple[Tensor, LinearState]: ...  # fmt: skip
@overload
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, observe: Sequence[Observer],
    return_state: Literal[False] = False, **request: Unpack[Given],
) -> tuple[Tensor, Results]: ...  # fmt: skip
@overload
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, observe: Sequence[Observer],
    return_state: Literal[True], **request: Unpack[Given],
) -> tuple[Tensor, LinearState, Results]: ...  # fmt: skip
@overload
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, observe: Sequence[Observer] | None = None,
    return_state: bool = False, **request: Unpack[Given],
) -> Any: ...  # fmt: skip
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str | Favor | Callable[[Tensor], Tensor] | None = "elu",
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    causal: bool = True,
    mask: Mask = Full(),
    normalise: bool | None = None,
    scale: float | None = None,
    state: LinearState | None = None,
    return_state: bool = False,
    observe: Sequence[Observer] | None = None,
    engine: str = "auto",
) -> Any:
    """Attention whose weights are φ(q_i) · φ(k_j): a state instead of a cache, cost linear in N.

        S_t = exp(decay_t) ∘ S_{t−1} + φ(k_t) v_tᵀ        out_t = scale · S_tᵀ φ(q_t)

    normalised, out_t is divided by the sum of its weights; with beta, the delta rule, v_t gives
    place to beta_t (v_t − (exp(decay_t) ∘ S_{t−1})ᵀ φ(k_t)): it writes only what is new.

    query (batch, heads, q_len, dim); key (batch, kv_heads, k_len, dim);
    value (batch, kv_heads, k_len, v_dim); kv_heads divides heads. Causal: q_len = k_len.

    feature_map: φ. "elu": elu + 1 (Katharopoulos et al. 2020); "identity" or None;
        `Favor(features, seed)` (Choromanski et al. 2021); or a function of a tensor (…, dim).
    decay: natural logarithm of the factor, ≤ 0 (−inf forgets). (heads,): fixed (RetNet, Sun et al.
        2023); (batch, heads, k_len): a gate per token (Mamba-2, Dao & Gu 2024); with one more
        dimension of features: per key channel (GLA, Yang et al. 2024). Also with kv_heads.
    beta (batch, heads or kv_heads, k_len): the delta rule's strength, 0 … 1 (DeltaNet, Yang et al.
        2024; with decay Gated DeltaNet, Yang et al. 2025). Stable for keys no longer than 1.
    causal: a query sees the keys at its position and before; else all keys, and nothing decays.
    mask: `Documents` (the state is forgotten between them; each one run of tokens), `Padding` (a
        hidden key changes nothing), or both joined by &.
    normalise: divide by the sum of the weights. Default: where φ is "elu" or Favor and there is no
        beta (Katharopoulos normalises; RetNet, GLA, DeltaNet do not). A sum of 0 gives 0.
    scale: multiplies the weights that are not normalised; default 1.
    state: what the tokens before left, of a call with `return_state`.
    observe: what to keep of the weights w with out_i = Σ_j w_ij v_j, exactly; see docs/linear.md.
    engine: "triton" (CUDA: chunks by kernels of our own), "chunked" (parallel, for training),
        "recurrent" (token by token, for decoding), "reference" (readable, the specification), or
        "auto". A named engine never falls back: NoEngine says why it cannot.

    Returns out (batch, heads, q_len, v_dim); with `return_state`, also a `LinearState`; with
    `observe`, last, a tuple of results in its order. float64 is computed in float64, all else in
    float32. RegardError if the request does not fit together.
    """
    request = asked(
        query, key, value, feature_map=feature_map, decay=decay, beta=beta, causal=causal,
        mask=mask, normalise=normalise, scale=scale, state=state, observe=observe,
    )  # fmt: skip
    if engine not in ("auto", *ENGINES):
        raise RegardError(f"no engine is named {engine!r}; there are auto, {', '.join(ENGINES)}")
    if return_state and not causal and request.key_ids is not None:
        raise RegardError("documents without causality leave no single state: return_state=False")
    check(request)
    with full_precision(query):
        if observe is None and engine != "reference":
            out, last = _run(request, engine)
            return (out, last) if return_state else out
        # Features are made once: what is observed is what was computed
        ready = prepared(request, by_triton.narrow(request, engine))
        out, last = reference.forward(request) if engine == "reference" else _whole(ready, engine)
        answer: tuple[Any, ...] = (out, last) if return_state else (out,)
        if observe is not None:
            answer = (*answer, weigh(ready.widened()))
    return answer if len(answer) > 1 else out


def asked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: Any = "elu",
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    causal: bool = True,
    mask: Mask = Full(),
    normalise: bool | None = None,
    scale: float | None = None,
    state: LinearState | None = None,
    observe: Sequence[Observer] | None = None,
) -> Request:
    """The checked request of `linear_attention`."""
    start = state.length if isinstance(state, LinearState) else 0
    joined = Causal() & mask if causal and isinstance(mask, Mask) else mask
    call = Call.checked(
        query, key, value, mask=joined, query_start=start if causal else None, key_start=start,
        observe=observe,
    )  # fmt: skip
    return Request.checked(
        call, feature_map=feature_map, decay=decay, beta=beta, causal=causal,
        normalise=normalise, scale=scale, state=state,
    )  # fmt: skip


def _run(request: Request, engine: str) -> tuple[Tensor, LinearState]:
    """Out and the last state: part by part, whose features stay in the processor's caches."""
    call, step, state = request.call, _part(request), request.state
    total = call.place.k_len
    if step >= total:
        return _whole(prepared(request, by_triton.narrow(request, engine)), engine)
    assert call.value is not None
    out = call.query.new_empty(*call.query.shape[:3], call.value.shape[-1])
    for start in range(0, total, step):
        stop = min(start + step, total)
        part = prepared(request.part(start, stop, state))
        out[:, :, start:stop], state = _whole(part, engine)
    assert state is not None
    return out, state


def _part(request: Request) -> int:
    """The tokens of a part; all of them where a graph, a compiler or a GPU wants them at once."""
    call, place = request.call, request.call.place
    assert call.value is not None
    at_once = request.needs_grad or not request.causal or place.device.type != "cpu"
    if at_once or torch.compiler.is_compiling() or transforms.active():
        return place.k_len
    numbers = place.batch * place.heads * max(call.query.shape[-1], call.value.shape[-1])
    return max(PART // max(numbers, 1), CHUNK)


def _whole(ready: Prepared, engine: str) -> tuple[Tensor, LinearState]:
    request = ready.request
    if engine == "recurrent" and not request.causal:
        raise NoEngine(f"recurrent cannot run {request.call}: it goes token by token, causal=True")
    if engine == "triton" and (reasons := by_triton.why_not(ready)):
        raise NoEngine(f"triton cannot run {request.call}: {'; '.join(reasons)}")
    if not request.causal:
        return _everything(ready, engine)
    mixed, memory = _by_item(ready, lambda part: _in_order(ready, part, engine))
    return ready.out(mixed), ready.state(memory)


def _by_item(ready: Prepared, by: apart.Forward) -> tuple[Tensor, Tensor]:
    """Items that need a shift apart from those that do not, whose bits it must not change."""
    if ready.short is None:
        return by(ready.flow)
    short, decay = ready.short
    rows = short.nonzero()[:, 0], (~short).nonzero()[:, 0]
    flows = replace(ready.flow, decay=decay), ready.flow
    parts = [by(flow.items(at)) for flow, at in zip(flows, rows, strict=True)]
    back = torch.cat(rows).argsort()
    mixed, memory = (torch.cat(both)[back] for both in zip(*parts, strict=True))
    return mixed, memory


def _in_order(ready: Prepared, flow: Flow, engine: str) -> tuple[Tensor, Tensor]:
    few = flow.query.shape[2] <= MOST_STEPS and not flow.needs_grad
    if engine == "recurrent" or (engine == "auto" and few):
        return recurrent.forward(flow.widened())
    return _in_chunks(ready, flow, engine)


def _in_chunks(ready: Prepared, flow: Flow, engine: str) -> tuple[Tensor, Tensor]:
    """By the kernels where they are named, or `auto` and they can; else by torch."""
    on_gpu = engine == "auto" and flow.query.device.type == by_triton.DEVICE
    if engine == "triton" or (on_gpu and not by_triton.why_not(ready)):
        return by_triton.forward(ready, flow)
    return apart.forward(flow.widened(), chunked.forward)


def _everything(ready: Prepared, engine: str) -> tuple[Tensor, LinearState]:
    """Without causality: one sum over all keys, or one for each document."""
    flow = ready.flow
    value = with_ones(flow.value.to(flow.key.dtype), flow.memory.shape[-1])
    memory = flow.memory + flow.key.mT @ value
    if ready.request.query_ids is None:
        rows = flow.query.unflatten(1, (flow.key.shape[1], -1))
        return ready.out((rows @ memory[:, :, None]).flatten(1, 2)), ready.state(memory)
    in_order, place = in_document_order(ready)
    mixed, _ = _in_chunks(ready, in_order, engine)
    index = place[:, None, :, None].expand(-1, mixed.shape[1], -1, mixed.shape[3])
    return ready.out(mixed.gather(2, index)), ready.state(memory)
