"""Random features of keys of any length, relative to the largest so far.

The features of long keys, exp(w · x − ‖x‖² / 2), leave the dtype. Where weights are normalised,
what all keys that a query sees have in common cancels. So each feature of a key is taken relative
to a running shift M, just above its largest exponent e so far (q: the exponents of a query):

    key_t = exp(e_t − M_t)      S_t = exp(decay_t + M_{t−1} − M_t) ∘ S_{t−1} + key_t v_tᵀ
    query_t = exp(q_t + M_t − max(q_t + M_t))

That is the recurrence of `Flow` with a decay for each feature: all forms compute it as it is, and
no row's sum is below exp(−1). The state that remains lacks the factor exp(M), which is handed on
with it. M takes whole numbers, whose differences are exact; it is a constant to gradients, as what
is read does not depend on it.

Keys whose features the dtype holds keep M = 0: `long_items` says whose do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...engines import functorch as transforms
from .features import Favor, relative_to_largest
from .request import Request

BOUND = {torch.float32: 60.0, torch.float64: 600.0}  # of |e|: features within lose no digits
MOST = 80.0  # a state is multiplied by no more than exp of this, which float32 holds


def long_items(request: Request, exponents: Tensor) -> Tensor | None:
    """Which items of the batch need a shift, bool (batch,); None: none of them.

    exponents (batch, kv_heads, k_len, features): of the keys, within the bound where hidden. A
    compiler or a transform sees no numbers: there the answer is a tensor always.
    """
    assert isinstance(request.feature_map, Favor)
    bound, state = BOUND[exponents.dtype], request.state
    largest = _largest(exponents)
    # A key that is not finite is no reason to shift the others
    if not transforms.unwatched(largest) or largest.isnan().any():
        largest = _largest(exponents.nan_to_num(0))
    long = largest > bound
    if state is not None and state.shift is not None:
        long = long | (state.shift != 0).flatten(1).any(1)
    return long if not transforms.unwatched(long) or bool(long.any()) else None


def _largest(exponents: Tensor) -> Tensor:
    """Of their absolute values, for each item: (batch,)."""
    if not exponents[:1].numel():
        return exponents.new_zeros(len(exponents))
    least, most = exponents.detach().flatten(1).aminmax(dim=1)
    return torch.maximum(-least, most)


def carried(shift: Tensor | None, memory: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
    """M before the first token, (batch, state_heads, features), and the memory under it.

    shift: that of the state given, or None. memory: the state's, or 0; its last column is the
    normaliser. M fits what is there anew, for a decay may have left little of it.
    """
    total = memory[..., -1].detach()
    shift = torch.zeros_like(total) if shift is None else shift
    start = torch.maximum((shift + total.log()).ceil(), shift - MOST)
    start = start.masked_fill(total <= 0, -torch.inf).where(long[:, None, None], 0)
    by = (shift - start).masked_fill(start == -torch.inf, 0).exp()
    return start, memory * by[..., None]


def running(
    exponents: Tensor, decay: Tensor | None, start: Tensor, long: Tensor
) -> tuple[Tensor, Tensor]:
    """M after each token (batch, state_heads, n, features), and the decay relative to it.

    exponents: of the keys, −inf where hidden; decay like those, or of one feature, or None;
    start (batch, state_heads, features): M before.
    """
    exponents, start = exponents.detach(), start[:, :, None]
    if decay is None:
        top = torch.cat([start, exponents.ceil()], 2).cummax(2).values
    else:
        top = torch.cat([start, _decayed_maximum(exponents, decay.detach(), start).ceil()], 2)
    top = top.where(long[:, None, None, None], 0)
    before, top = top[:, :, :-1], top[:, :, 1:]
    by = (before - top).masked_fill(top == -torch.inf, -torch.inf)  # nothing was there
    return top, by if decay is None else _plus(by, decay)


def _decayed_maximum(exponents: Tensor, decay: Tensor, start: Tensor) -> Tensor:
    """top_t = max(top_{t−1} + decay_t, e_t) from top = start, by doubling: log₂ n passes."""
    decay, tokens = decay.expand_as(exponents), exponents.shape[2]
    first = torch.maximum(exponents[:, :, :1], _plus(start, decay[:, :, :1]))
    top, step = torch.cat([first, exponents[:, :, 1:]], 2), 1
    while step < tokens:
        # top: over the last `step` tokens; decay: the sum over them
        later = torch.maximum(top[:, :, step:], _plus(top[:, :, :-step], decay[:, :, step:]))
        older, newer = decay[:, :, :-step], decay[:, :, step:]
        through = _plus(older, newer).masked_fill(older == -torch.inf, -torch.inf)
        top = torch.cat([top[:, :, :step], later], 2)
        decay = torch.cat([decay[:, :, :step], through], 2)
        step *= 2
    return top


def _plus(log: Tensor, decay: Tensor) -> Tensor:
    """log + decay: −inf forgets, though it be NaN."""
    return (log + decay).masked_fill(decay == -torch.inf, -torch.inf)


def at_once(
    exponents: Tensor, start: Tensor, request: Request, long: Tensor
) -> tuple[Tensor, Tensor]:
    """Without causality: M of each key and of each query; one for all, or one a document."""
    exponents = exponents.detach().ceil()
    long = long[:, None, None, None]
    if request.key_ids is None or request.query_ids is None:
        top = torch.cat([start[:, :, None], exponents], 2).amax(2, keepdim=True).where(long, 0)
        return top, top
    ids, order = torch.cat([request.key_ids, request.query_ids], 1).sort(dim=-1)
    # Documents counted: their number is not known to a compiler, so there is room for one a token
    count = torch.nn.functional.pad((ids[:, 1:] != ids[:, :-1]).cumsum(-1), (1, 0))
    number = count.gather(1, order.argsort(-1))[:, None, :, None]
    number = number.expand(-1, exponents.shape[1], -1, exponents.shape[3])
    keys, queries = number.split([request.key_ids.shape[1], request.query_ids.shape[1]], 2)
    shape = (*exponents.shape[:2], ids.shape[1], exponents.shape[3])
    top = exponents.new_full(shape, -torch.inf).scatter_reduce(2, keys, exponents, "amax")
    top = top.where(long, 0)
    return top.gather(2, keys), top.gather(2, queries)


def of_keys(exponents: Tensor, top: Tensor) -> Tensor:
    """The features of keys under their M; 0 where hidden."""
    return (exponents - no_less(top)).exp()


def of_queries(exponents: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """The features of queries under the M that they see, and ln of what was taken out of each.

    exponents (batch, heads, n, features); top (batch, state_heads, n or 1, features).
    """
    group = exponents.shape[1] // top.shape[1]
    return relative_to_largest(exponents + no_less(top).repeat_interleave(group, 1))


def no_less(top: Tensor) -> Tensor:
    """0 where no key was seen yet: what is there is 0 under any shift."""
    return top.masked_fill(top == -torch.inf, 0)
