"""The specification, token by token: readable, any float dtype, plain autograd.

Shares only the request with the other forms: features, heads, documents, padding and the division
are written again here, straight from their definitions. Random features of weights that are
normalised are kept as logarithms, for those of long keys leave any dtype: what a state holds of
each feature is taken relative to exp(top), top being `size`, its largest logarithm so far, decayed,
up to the next whole number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...engines import functorch as transforms
from ...engines import hidden
from .features import Favor
from .request import Request
from .state import LinearState


def forward(request: Request, dtype: torch.dtype | None = None) -> tuple[Tensor, LinearState]:
    """(out, state), computed wholly in dtype (default: the working dtype)."""
    call = request.call
    dtype = call.working if dtype is None else dtype
    assert call.value is not None
    each = request.state_heads  # of key and value: a state for each
    unseen = torch.zeros(1, 1, dtype=torch.bool, device=call.query.device)
    if request.key_ids is not None:
        unseen = unseen | (request.key_ids < 0)
    if request.keep is not None:
        unseen = unseen | ~request.keep
    key, value = (
        t.to(dtype).masked_fill(unseen[:, None, :, None], 0) for t in (call.key, call.value)
    )
    logs = request.normalise and isinstance(request.feature_map, Favor)
    query, key = (phi(request.feature_map, t, logs) for t in (call.query.to(dtype), key))
    key, value = (t.repeat_interleave(each // t.shape[1], 1) for t in (key, value))
    query = request.scale * query
    batch, heads, q_len = query.shape[:3]
    k_len, features = key.shape[2:]
    everywhere = torch.zeros(1, 1, dtype=torch.long, device=query.device)
    key_ids = everywhere.expand(batch, k_len) if request.key_ids is None else request.key_ids
    query_ids = everywhere.expand(batch, q_len) if request.query_ids is None else request.query_ids
    keep = (key_ids >= 0) if request.keep is None else (key_ids >= 0) & request.keep

    memory = value.new_zeros(batch, each, features, value.shape[-1])
    total = value.new_zeros(batch, each, features)
    top, long = torch.zeros_like(total), _long(request, key, dtype) if logs else None
    document, length = None, 0
    if request.state is not None:
        memory = request.state.memory.to(dtype)
        if request.state.normaliser is not None:
            total = request.state.normaliser.to(dtype)
        top = top if request.state.shift is None else request.state.shift.to(dtype)
        document, length = request.state.document, request.state.length

    # ln of what the state holds of each feature: −inf where it holds nothing yet
    size = top + total.detach().log()

    if not request.causal:
        shown = (query_ids[:, :, None] == key_ids[:, None, :]) & keep[:, None, :]
        across = heads // each
        shown = shown[:, None].expand(-1, heads, -1, -1)
        if long is not None:
            new = torch.cat([size[:, :, None], _shown(key, keep)], 2).amax(2)
            new = _whole(new, long)
            # An empty state stays empty under any shift: 0, not 0 · exp(inf)
            by = (top - new).masked_fill(size == -torch.inf, -torch.inf).exp()
            memory, total, top = by[..., None] * memory, by * total, new
            reads = new if request.state is not None else None
            weights, query = _of_logarithms(query, key, reads, shown)
            key = (key - _finite(new)[:, :, None]).exp()
        else:
            query, key = (_relative(query), key.exp()) if logs else (query, key)
            weights = hidden.dot(query, key.repeat_interleave(across, 1), lambda: shown)
        weights = weights.masked_fill(~shown, 0)
        out = hidden.mix(weights, value.repeat_interleave(across, 1), lambda: shown)
        out = out + query @ memory.repeat_interleave(across, 1)
        sums = weights.sum(-1) + (query * total.repeat_interleave(across, 1)[:, :, None]).sum(-1)
        kept = key * keep[:, None, :, None]
        memory, total = memory + kept.mT @ value, total + kept.sum(2)
    else:
        rows, row_sums = [], []
        opened = (
            torch.full((batch,), -1, device=query.device, dtype=torch.int64)
            if document is None
            else document
        )
        if request.key_ids is None:
            opened = torch.zeros_like(opened)
        for t in range(k_len):
            begins = (key_ids[:, t] >= 0) & (key_ids[:, t] != opened)
            opened = key_ids[:, t].where(begins, opened)
            memory = memory.masked_fill(begins[:, None, None, None], 0)
            total = total.masked_fill(begins[:, None, None], 0)
            size = size.masked_fill(begins[:, None, None], -torch.inf)

            k, v = key[:, :, t], value[:, :, t]
            # ln of the factor on the memory: its decay, and with logs the change of its shift
            left = _log_factor(request, t, each, dtype)
            if logs:
                here, before = keep[:, t, None, None], size
                size = torch.where(here, torch.maximum(size + left, k).detach(), size)
                new = torch.where(here, _whole(size, long), top)
                left = (left + top - new).masked_fill(before == -torch.inf, -torch.inf)
                k, top = (k - new).exp(), new
            factor = left.exp()
            decayed = factor[..., None] * memory
            if request.beta is not None:
                beta = request.beta[:, :, t].to(dtype)
                beta = beta.repeat_interleave(each // beta.shape[1], 1)[..., None]
                # The delta rule: of the value only what the memory does not already say of this key
                v = beta * (v - torch.einsum("bhf,bhfv->bhv", k, decayed))
            written = decayed + torch.einsum("bhf,bhv->bhfv", k, v)
            here = keep[:, t, None, None]  # a hidden token leaves even the decay out
            memory = torch.where(here[..., None], written, memory)
            total = torch.where(here, factor * total + k, total)

            q = query[:, :, t].unflatten(1, (each, -1))
            q = _relative(q + _finite(top)[:, :, None]) if logs else q
            rows.append(torch.einsum("bhgf,bhfv->bhgv", q, memory).flatten(1, 2))
            row_sums.append(torch.einsum("bhgf,bhf->bhg", q, total).flatten(1, 2))
        shape = (batch, heads, q_len)
        out = torch.stack(rows, 2) if rows else query.new_zeros(*shape, value.shape[-1])
        sums = torch.stack(row_sums, 2) if rows else query.new_zeros(shape)
        if request.key_ids is not None:
            document = opened
    if request.normalise:
        out = out / sums.masked_fill(sums == 0, 1)[..., None]
    out = out.masked_fill((query_ids < 0)[:, None, :, None], 0)
    normaliser = total if request.normalise else None
    shift = None if long is None else _finite(top)
    last = LinearState(memory, normaliser, document, length + k_len, shift)
    return out.to(call.query.dtype), last


def _long(request: Request, key: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The items with keys whose features may not stand as they are: (batch, 1, 1), or None.

    key: ln of them, (batch, state_heads, k_len, features).
    """
    most = 600 if dtype == torch.float64 else 60
    long = (key.detach().abs() > most).flatten(1).any(1)
    if request.state is not None and request.state.shift is not None:
        long = long | (request.state.shift != 0).flatten(1).any(1)
    return long[:, None, None] if not transforms.unwatched(long) or bool(long.any()) else None


def _whole(size: Tensor, long: Tensor | None) -> Tensor:
    """The whole number above it; 0 where no key is long."""
    return torch.zeros_like(size) if long is None else size.ceil().where(long, 0)


def _shown(key: Tensor, keep: Tensor) -> Tensor:
    return key.detach().masked_fill(~keep[:, None, :, None], -torch.inf)


def _finite(top: Tensor) -> Tensor:
    """0 where there is nothing yet."""
    return top.masked_fill(top == -torch.inf, 0)


def _relative(logs: Tensor) -> Tensor:
    """Features relative to the vector's largest: a factor that cancels."""
    return (logs - logs.detach().amax(-1, keepdim=True)).exp()


def _of_logarithms(
    query: Tensor, key: Tensor, top: Tensor | None, shown: Tensor
) -> tuple[Tensor, Tensor]:
    """Without causality, from ln φ: each row's weights, relative to the row's own largest.

    Returns weights (batch, heads, q_len, k_len), and the query features that read the state given,
    which lacks exp(top); top None: there is none.
    """
    across = query.shape[1] // key.shape[1]
    pairs = query[:, :, :, None] + key.repeat_interleave(across, 1)[:, :, None]
    rows = pairs.where(shown[..., None], 0).logsumexp(-1).masked_fill(~shown, -torch.inf)
    reading = torch.full_like(query, -torch.inf)
    if top is not None:
        reading = query + _finite(top).repeat_interleave(across, 1)[:, :, None]
    largest = _finite(torch.cat([rows, reading], -1).detach().amax(-1, keepdim=True))
    return (rows - largest).exp(), (reading - largest).exp()


def phi(feature_map: object, x: Tensor, logs: bool = False) -> Tensor:
    """The feature map, plainly; logs: ln of it."""
    if logs and isinstance(feature_map, Favor):
        return feature_map.exponents(x)
    if feature_map == "elu":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if isinstance(feature_map, Favor):
        return feature_map.exponents(x).exp()
    return feature_map(x) if callable(feature_map) else x


def _log_factor(request: Request, t: int, each: int, dtype: torch.dtype) -> Tensor:
    """ln of what token t leaves of the state: (batch or 1, state_heads, 1 or features)."""
    decay = request.decay
    if decay is None:
        return torch.zeros(1, each, 1, dtype=dtype, device=request.call.place.device)
    if decay.dim() == 1:
        decay = decay[None, :, None]
    else:
        decay = decay[:, :, t, None] if decay.dim() == 3 else decay[:, :, t]
    return decay.to(dtype).repeat_interleave(each // decay.shape[1], 1)
