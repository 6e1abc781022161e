"""Attention rollout of one token: how layer after layer of mean attention passes it on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RegardError
from .recorded_layer import RecordedLayer
from .segments import HELD


def rollout(layers: Sequence[RecordedLayer], row: int, batch: int) -> Tensor:
    """What token `row` holds of each token (k_len,), float32, after all these layers.

    Abnar & Zuidema 2020, section 3: row `row` of A_L ⋯ A_2 A_1 with A_l = ½ (W̄_l + I), W̄ the mean
    over heads; rows of weights sum to 1 (less where sinks take some). One row is multiplied through
    from the last layer to the first, block by block of rows, so memory is O(N).
    """
    n = layers[0].k_len if layers else 0
    for layer in layers:
        if layer.kind != "self" or (layer.q_len, layer.k_len) != (n, n):
            raise RegardError(
                f"rollout goes through self-attention of {n} tokens; {layer.name} is "
                f"{layer.kind}, {layer.q_len} × {layer.k_len}: name the layers"
            )
    if not layers or not -n <= row < n:
        raise RegardError(f"row {row}: the recording has {n} tokens in {len(layers)} layers")
    held = torch.zeros(n, dtype=torch.float64, device="cpu")
    held[row] = 1
    for layer in reversed(layers):
        held = (held + _passed(layer, held, batch)) / 2
    return held.float()


def _passed(layer: RecordedLayer, held: Tensor, batch: int) -> Tensor:
    """held (q_len,) times the mean weights of a layer: (k_len,)."""
    out = torch.zeros_like(held)
    shown = held.nonzero().flatten()
    if not len(shown):
        return out
    first, last = int(shown[0]), int(shown[-1]) + 1
    step = max(HELD // max(layer.heads * layer.k_len, 1), 1)
    for start in range(first, last, step):
        stop = min(start + step, last)
        if held[start:stop].any():
            weights = layer.weights(slice(start, stop), batch).double().mean(0)
            out += held[start:stop] @ weights
    return out
