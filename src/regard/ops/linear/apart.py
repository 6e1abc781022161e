"""Numbers that are not finite, kept to the rows that read them.

A chunk is a product over all its tokens, those that are later or of another document with weight 0;
0 · NaN is NaN. So where what came out is not finite the chunks are computed once more with 0 for
such numbers, and the rows that read one are taken from the recurrence, token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...engines import functorch as transforms
from ...engines.hidden import filled, finite
from . import token_by_token as recurrent
from .recurrence import Flow

Forward = Callable[[Flow], tuple[Tensor, Tensor]]  # what is read, and the last memory


def forward(flow: Flow, by: Forward) -> tuple[Tensor, Tensor]:
    """As `by`, with care where it is needed; under a compiler or a transform nobody may look."""
    mixed, last = by(flow)
    # What a memory holds its token's row reads, though with 0: no need to look there, too
    if not transforms.unwatched(mixed) or finite(mixed):
        return mixed, last
    reads, ends = _reads(flow)
    exact, exact_last = recurrent.forward(flow)
    mixed, last = by(_clean(flow))
    return exact.where(reads[..., None], mixed), exact_last.where(ends[..., None, None], last)


def _clean(flow: Flow) -> Flow:
    decay, beta = flow.decay, flow.beta
    if decay is not None:  # −∞ forgets, and stays
        decay = decay.masked_fill(decay.isnan() | (decay == torch.inf), 0)
    return replace(
        flow, query=filled(flow.query), key=filled(flow.key), value=filled(flow.value),
        decay=decay, beta=None if beta is None else filled(beta), memory=filled(flow.memory),
    )  # fmt: skip


def _reads(flow: Flow) -> tuple[Tensor, Tensor]:
    """Which rows read such a number (batch, heads, n), and which memories end with one."""
    odd = ~(torch.isfinite(flow.key).all(-1) & torch.isfinite(flow.value).all(-1))
    forgets = torch.zeros_like(odd)
    if flow.beta is not None:
        odd = odd | ~torch.isfinite(flow.beta)
    if flow.decay is not None:
        odd = odd | (flow.decay.isnan() | (flow.decay == torch.inf)).any(-1)
        forgets = (flow.decay == -torch.inf).all(-1).expand_as(odd)
    token = torch.arange(odd.shape[2], dtype=torch.int64, device=odd.device)
    # Before the first token stands the memory
    given = -1 - torch.isfinite(flow.memory).all((-2, -1)).long()[..., None]
    last_odd = token.where(odd, given).cummax(-1).values
    last_forgotten = token.where(forgets, -1).cummax(-1).values
    read = last_odd >= last_forgotten
    rows = read.repeat_interleave(flow.query.shape[1] // read.shape[1], 1)
    return rows | ~torch.isfinite(flow.query).all(-1), read[..., -1]
