"""The recurrent form: one token after another, O(1) memory; the step that decodes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...engines import functorch as transforms
from ...engines.hidden import finite
from .recurrence import Flow, with_ones


def forward(flow: Flow) -> tuple[Tensor, Tensor]:
    """What the queries read (batch, heads, n, columns), and the last memory. Katharopoulos et al.
    2020, eq. 18–20; with the delta rule Yang et al. 2024, DeltaNet, eq. 3. Plain autograd, which
    keeps a state for each token.
    """
    mixed, memory = _walk(flow)
    if flow.decay is None or (transforms.unwatched(mixed) and finite(mixed)):
        return mixed, memory
    return _walk(flow, careful=True)


def _walk(flow: Flow, careful: bool = False) -> tuple[Tensor, Tensor]:
    """careful: what is forgotten goes, though it be NaN, which 0 would not take away."""
    state_heads, memory, read = flow.key.shape[1], flow.memory, []
    value = with_ones(flow.value.to(memory.dtype), memory.shape[-1])
    for t in range(flow.query.shape[2]):
        key, new = flow.key[:, :, t], value[:, :, t]
        if flow.decay is not None:
            log = flow.decay[:, :, t, :, None]
            memory = log.exp() * memory
            if careful:
                memory = memory.masked_fill(log == -torch.inf, 0)
        if flow.beta is not None:
            written = (key[:, :, None] @ memory)[:, :, 0]
            new = flow.beta[:, :, t, None] * (new - written)
        memory = memory + key[..., None] * new[:, :, None]
        rows = flow.query[:, :, t].unflatten(1, (state_heads, -1))
        read.append((rows @ memory).flatten(1, 2))
    if not read:
        return memory.new_zeros(*flow.query.shape[:3], value.shape[-1]), memory
    return torch.stack(read, 2), memory
