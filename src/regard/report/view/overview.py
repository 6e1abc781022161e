"""What each head does, in one number a metric: the colours of layers × heads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...capture.recorded_layer import RecordedLayer
from ...capture.recording import Recording
from .page_facts import METRICS, SAMPLED

_AT_ONCE = 1 << 23  # weights in memory


def layer_metrics(recording: Recording, number: int, batch: int) -> dict[str, Any]:
    """Of one layer, a list of heads for each metric; "sampled": those read from some queries."""
    layer = recording.layer(number)
    values = recording.head_metrics(number, batch)  # of all queries, as far as they were recorded
    sampled = [key for key in METRICS if key not in values]
    if sampled:
        values = _layer(recording, number, layer, batch) | values
    return {key: _finite(values[key]) for key in METRICS} | {"sampled": sampled}


def _layer(
    recording: Recording, number: int, layer: RecordedLayer, batch: int
) -> dict[str, Tensor]:
    """Each metric (heads,) of a layer: means over sampled queries."""
    count = min(SAMPLED, layer.q_len)
    rows = [(i + 1) * layer.q_len // count - 1 for i in range(count)]
    at_once = max(1, _AT_ONCE // (layer.heads * layer.k_len))
    parts = [
        _sums(recording, number, layer, rows[i : i + at_once], batch)
        for i in range(0, count, at_once)
    ]
    return {key: sum(part[key] for part in parts) / count for key in METRICS}  # type: ignore[misc]


def _sums(
    recording: Recording, number: int, layer: RecordedLayer, rows: list[int], batch: int
) -> dict[str, Tensor]:
    """Each metric (heads,), summed over some queries."""
    weights = recording.weights(number, None, rows, batch=batch)
    # Positions count from the end: the last query of a self-attention sees the last key
    at = torch.tensor(rows, dtype=torch.int64, device=weights.device) + layer.k_len - layer.q_len
    keys = torch.arange(layer.k_len, dtype=torch.int64, device=weights.device)
    far = (at[:, None] - keys).abs().to(weights.dtype)
    one = torch.arange(len(rows), dtype=torch.int64, device=weights.device)
    return {
        "sink": weights[:, :, 0].sum(1),
        "before": (weights[:, one, (at - 1).clamp(0)] * (at >= 1)).sum(1),
        "itself": (weights[:, one, at.clamp(0)] * (at >= 0)).sum(1),
        "largest": weights.amax(-1).sum(1),
        "entropy": torch.special.entr(weights).sum((1, 2)),
        "distance": (weights * far).sum((1, 2)),
    }


def _finite(values: Tensor) -> list[float | None]:
    """Rounded; None where it is no number: JSON has no NaN."""
    return [round(value, 5) if math.isfinite(value) else None for value in values.tolist()]
