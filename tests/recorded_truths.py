"""What a recording's own queries and keys give: in float64, and beside it by plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.capture.recorded_layer import RecordedLayer
from regard.engines import reference


@dataclass
class Dense:
    """weights (batch, heads, q_len, k_len) and lse (batch, heads, q_len), in one dtype."""

    weights: Tensor
    lse: Tensor


def kept(layer: RecordedLayer) -> tuple[Dense, Dense]:
    """Of the numbers that a layer holds: exact, in float64, and plain, in float32."""
    exact, plain = (_dense(layer, dtype) for dtype in (torch.float64, torch.float32))
    return exact, plain


def _dense(layer: RecordedLayer, dtype: torch.dtype) -> Dense:
    weights = torch.zeros(layer.batch, layer.heads, layer.q_len, layer.k_len, dtype=dtype)
    lse = torch.zeros(layer.batch, layer.heads, layer.q_len, dtype=dtype)
    for b in range(layer.batch):
        at = 0
        for chunk in layer.chunks:
            call = layer.call(chunk, b)
            call = replace(call, query=call.query.to(dtype), key=call.key.to(dtype))
            scores = reference.scores(call)
            rows = slice(at, at := at + scores.shape[2])
            first, last = (position - layer.key_start for position in chunk.keys)
            lse[b, :, rows] = reference.log_sum_exp(scores, call.sinks)[0]
            blind = (lse[b, :, rows] == -torch.inf)[..., None]
            shift = lse[b, :, rows, None].masked_fill(blind, 0)
            weights[b, :, rows, first:last] = torch.exp(scores[0] - shift)
    return Dense(weights, lse)
