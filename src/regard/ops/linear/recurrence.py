"""Flow: a request as the one recurrence that the chunked and the recurrent form compute.

    S_t   = exp(decay_t) ∘ S_{t−1} + key_t u_tᵀ
    out_t = S_tᵀ query_t
    u_t   = value_t, or with the delta rule beta_t (value_t − (exp(decay_t) ∘ S_{t−1})ᵀ key_t)

Features, scale, grouped heads, documents and padding are all in its tensors: a hidden key is 0 and
lets the state pass, and the first token of a document forgets everything (a decay of −inf). The
normaliser is one more column of the values, of ones. Without causality nothing decays: the packed
documents are sorted, each with its keys before its queries, and go through the same recurrence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...engines import functorch as transforms
from ...engines.hidden import finite
from ...errors import RegardError
from . import running_shift
from .features import Favor, mapped, relative_to_largest
from .request import Request, filled_ids
from .state import LinearState


@dataclass(frozen=True, eq=False)
class Flow:
    """The recurrence's tensors.

    query (batch, heads, n, features) and key (batch, state_heads, n, features) in the working
    dtype; value (batch, state_heads, n, v_dim); decay (batch, state_heads, n, 1 or features) in
    natural logs, or None; beta (batch, state_heads, n) or None; memory (batch, state_heads,
    features, columns), of v_dim columns or one more: that of the ones, which `with_ones` adds to
    the values. heads is a multiple of state_heads.

    A narrow flow has query and key as they were given, in bfloat16, and the queries still to be
    multiplied by `scale`; `widened` does both.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None
    beta: Tensor | None
    memory: Tensor
    scale: float = 1.0

    @property
    def needs_grad(self) -> bool:
        """Whether anything that goes in asks for a gradient."""
        tensors = (self.query, self.key, self.value, self.decay, self.beta, self.memory)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def widened(self) -> Flow:
        """With queries and keys in the working dtype, the scale in the queries."""
        query, key = (t.to(self.memory.dtype) for t in (self.query, self.key))
        if self.scale != 1:
            query = query * self.scale
        return replace(self, query=query, key=key, scale=1.0)

    def items(self, rows: Tensor) -> Flow:
        """Of these items of the batch (int64)."""
        query, key, memory = (t[rows] for t in (self.query, self.key, self.memory))
        decay, beta = (None if t is None else t[rows] for t in (self.decay, self.beta))
        return Flow(query, key, self.value[rows], decay, beta, memory, self.scale)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request's flow, and what turns the recurrence's results into the request's.

    log_factor (batch, heads, q_len): ln of the factor that the query's features lack, or None.
    shift (batch, state_heads, features): ln of the factor that the last state lacks, or None.
    short: the items of the batch, bool (batch,), that need no shift, and their decay; None: all
        items are alike.
    """

    request: Request
    flow: Flow
    log_factor: Tensor | None
    shift: Tensor | None = None
    short: tuple[Tensor, Tensor | None] | None = None

    def widened(self) -> Prepared:
        """With a flow that is not narrow."""
        return replace(self, flow=self.flow.widened())

    def out(self, mixed: Tensor) -> Tensor:
        """The output (batch, heads, q_len, v_dim) of what the queries read, (…, columns)."""
        request = self.request
        if request.normalise:
            mixed, total = mixed[..., :-1], mixed[..., -1:]
            mixed = mixed / total.masked_fill(total == 0, 1)
        if request.query_ids is not None:
            mixed = mixed.masked_fill((request.query_ids < 0)[:, None, :, None], 0)
        return mixed.to(request.call.query.dtype)

    def state(self, memory: Tensor) -> LinearState:
        """The state to hand on, from the recurrence's last memory."""
        request = self.request
        normaliser = memory[..., -1] if request.normalise else None
        before = None if request.state is None else request.state.document
        if request.key_ids is not None:
            before = filled_ids(request.key_ids, before)[:, -1]
        length = request.call.place.k_len + (0 if request.state is None else request.state.length)
        memory = memory[..., :-1] if request.normalise else memory
        return LinearState(memory, normaliser, before, length, self.shift)


def with_ones(value: Tensor, columns: int) -> Tensor:
    """Filled up to so many columns with ones."""
    missing = columns - value.shape[-1]
    return torch.nn.functional.pad(value, (0, missing), value=1.0) if missing else value


def full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast off: what says float32 is float32. A context manager."""
    return torch.autocast(tensor.device.type, enabled=False)


def prepared(request: Request, narrow: bool = False) -> Prepared:
    """The flow of a request, its queries and keys in their own order; narrow: see `Flow`."""
    call, working = request.call, request.call.working
    assert call.value is not None
    query, key, taken, exponents = call.query, call.key, None, None
    hidden = _hidden(request)
    favor = request.feature_map if isinstance(request.feature_map, Favor) else None
    spoiled = call.needs_grad and not finite(query, key)
    # Through a feature map, a gradient of 0 would be NaN there; and no hidden key is a long one
    if hidden is not None and (spoiled or favor is not None):
        key = key.masked_fill(hidden[:, None, :, None], 0)
    if request.query_ids is not None and spoiled:
        query = query.masked_fill((request.query_ids < 0)[:, None, :, None], 0)
    if favor is not None and request.normalise:
        # Kept as logarithms: features of long vectors leave the dtype. A query's largest is taken
        # out, as it cancels in the division; what keys lack must be the same for all of them
        exponents = favor.exponents(query.to(working)), favor.exponents(key.to(working))
        (query, taken), key = relative_to_largest(exponents[0]), exponents[1].exp()
    elif not narrow:
        query, key, taken = mapped(
            request.feature_map, query.to(working), key.to(working), request.normalise
        )
    request.check_state(key.shape[-1])
    if request.scale != 1 and not narrow:
        query = query * request.scale
    value = call.value
    decay, beta = _decay(request, key.shape[-1]), request.beta
    beta = None if beta is None else _headed(beta.to(working), request)
    # A hidden token leaves the state as it is: nothing written, forgotten (ln 1) or corrected
    if hidden is not None:
        key = key.masked_fill(hidden[:, None, :, None], 0)
        value = value.masked_fill(hidden[:, None, :, None], 0)
        if decay is not None:
            decay = decay.masked_fill(hidden[:, None, :, None], 0)
        if beta is not None:
            beta = beta.masked_fill(hidden[:, None], 0)
    if request.query_ids is not None:
        query = query.masked_fill((request.query_ids < 0)[:, None, :, None], 0)
        if request.causal:
            decay = _forgetting(request, decay)
    key, value = (_headed(t, request) for t in (key, value))
    scale = request.scale if narrow else 1.0
    flow = Flow(query, key, value, decay, beta, _memory(request, key, value), scale)
    if exponents is not None:
        long = running_shift.long_items(request, exponents[1])
        if long is not None:
            return _shifted(request, flow, exponents, hidden, long)
    return Prepared(request, flow, taken)


def _shifted(
    request: Request, flow: Flow, exponents: tuple[Tensor, Tensor], hidden: Tensor | None,
    long: Tensor,
) -> Prepared:  # fmt: skip
    """With the random features of `long` items relative to the largest so far."""
    of_key = _headed(exponents[1], request)
    # ln of 0: a hidden key must not raise what the others are taken relative to
    if hidden is not None:
        of_key = of_key.masked_fill(hidden[:, None, :, None], -torch.inf)
    given = None if request.state is None else request.state.shift
    start, memory = running_shift.carried(given, flow.memory, long)
    if request.causal:
        seen, decay = running_shift.running(of_key, flow.decay, start, long)
        # A key is written under the shift that holds once it is seen; the state keeps the last
        own, last = seen, torch.cat([start[:, :, None], seen], 2)[:, :, -1]
    else:
        own, seen = running_shift.at_once(of_key, start, request, long)
        last, decay = start, None
        if request.key_ids is None:
            last = own[:, :, 0]
            # The state given lacks exp(start): from here on it lacks exp(last), as the keys do
            by = (start - last).masked_fill(start == -torch.inf, 0).exp()
            memory = memory * by[..., None]
    query, taken = running_shift.of_queries(exponents[0], seen)
    if request.query_ids is not None:
        query = query.masked_fill((request.query_ids < 0)[:, None, :, None], 0)
    key = running_shift.of_keys(of_key, own)
    short = None
    # The others keep their own decay, so that their bits do not depend on a long neighbour's
    if request.causal and transforms.unwatched(long) and not bool(long.all()):
        short = ~long, flow.decay
    flow = replace(flow, query=query, key=key, decay=decay, memory=memory)
    return Prepared(request, flow, taken, running_shift.no_less(last), short)


def _headed(tensor: Tensor, request: Request) -> Tensor:
    """Of kv heads, repeated where the states are those of the query heads."""
    group = request.state_heads // tensor.shape[1]
    return tensor if group == 1 else tensor.repeat_interleave(group, 1)


def _decay(request: Request, width: int) -> Tensor | None:
    if request.decay is None:
        return None
    place, decay = request.call.place, request.decay.to(request.call.working)
    if decay.dim() == 1:
        decay = decay[:, None].expand(place.batch, -1, place.k_len)
    if decay.dim() == 3:
        decay = decay[..., None]
    elif decay.shape[-1] not in (1, width):
        raise RegardError(
            f"decay is {tuple(request.decay.shape)}; its last dimension must be that of the "
            f"features, {width}"
        )
    return _headed(decay, request)


def _hidden(request: Request) -> Tensor | None:
    """(batch, k_len): the keys that nobody sees."""
    ids, keep = request.key_ids, request.keep
    if ids is None:
        return None if keep is None else ~keep
    return ids < 0 if keep is None else (ids < 0) | ~keep


def _forgetting(request: Request, decay: Tensor | None) -> Tensor:
    """The decay with −inf where a document begins."""
    assert request.key_ids is not None
    before = None if request.state is None else request.state.document
    filled = filled_ids(request.key_ids, before)
    # exp(−inf) = 0: what was remembered before is gone, though documents share one recurrence
    begins = (filled[:, 1:] != filled[:, :-1])[:, None, :, None]
    if decay is None:
        place = request.call.place
        decay = begins.new_zeros(1, dtype=request.call.working)
        decay = decay.expand(place.batch, request.state_heads, place.k_len, 1)
    return decay.masked_fill(begins, -torch.inf)


def _memory(request: Request, key: Tensor, value: Tensor) -> Tensor:
    if request.state is None:
        columns = value.shape[-1] + request.normalise
        shape = (*key.shape[:2], key.shape[-1], columns)
        return key.new_zeros(shape, dtype=request.call.working)
    memory, normaliser = request.state.memory, request.state.normaliser
    return memory if normaliser is None else torch.cat([memory, normaliser[..., None]], -1)


def in_document_order(prepared: Prepared) -> tuple[Flow, Tensor]:
    """For packed documents without causality: keys, then queries, document by document.

    Returns the flow of k_len + q_len tokens, and where each query stands in it (batch, q_len).
    """
    request, flow = prepared.request, prepared.flow
    assert request.query_ids is not None
    assert request.key_ids is not None
    k_len = flow.key.shape[2]
    # Stable: of one document all keys stand before all queries, so each query sees each of them
    ids, order = torch.cat([request.key_ids, request.query_ids], 1).sort(dim=-1, stable=True)

    def sorted_(tensor: Tensor, before: int, after: int) -> Tensor:
        laid = torch.nn.functional.pad(tensor, (0, 0, before, after))
        return laid.gather(2, order[:, None, :, None].expand(-1, laid.shape[1], -1, laid.shape[3]))

    q_len = flow.query.shape[2]
    query = sorted_(flow.query, k_len, 0)
    key, value = (sorted_(t, 0, q_len) for t in (flow.key, flow.value))
    begins = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0))[:, None, :, None]
    decay = key.new_zeros(1).expand(*key.shape[:3], 1).masked_fill(begins, -torch.inf)
    place = order.argsort(-1)[:, k_len:]
    return replace(flow, query=query, key=key, value=value, decay=decay), place
