"""What a head does along a text: a line of each token's entropy, or of how much it is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...capture.recording import Recording
from ...errors import RegardError

POINTS = 1024
"""Of the line at most; where there are more tokens, a point is of several."""
_MOST = 1 << 28  # weights that are read again where nothing was read beside the recording
LINES = ("entropy", "received")


def line(recording: Recording, number: int, head: int, batch: int, what: str) -> dict[str, Any]:
    """{values, most, size}: of each `size` tokens the mean, and the largest.

    entropy: in nats, of what each query reads. received: what each key gets, summed over queries.
    RegardError where it was not read while recording and is too much to read now.
    """
    layer = recording.layer(number)
    held = layer.results.entropy if what == "entropy" else layer.results.received
    if held is None and layer.heads * layer.q_len * layer.k_len > _MOST:
        raise RegardError(
            f"{what} was not read beside this recording, and {layer.q_len:,} tokens are too many "
            "to read it now: record it without --bare"
        )
    if what == "entropy":
        values = recording.entropy(number, head, batch)
    else:
        values = recording.received(number, head, batch).sum
    return _binned(values.float())


def _binned(values: Tensor) -> dict[str, Any]:
    """Means and maxima of runs of tokens. RegardError where a value is not a number."""
    if not bool(values.isfinite().all()):
        raise RegardError("a weight along the text is not a number")
    size = -(-max(1, len(values)) // POINTS)
    padded = torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)
    counts = torch.full((len(padded),), size, dtype=torch.float32, device="cpu")
    counts[-1] -= -len(values) % size
    means = (padded.sum(1) / counts).tolist()
    return {
        "values": [round(value, 6) for value in means],
        "most": [round(value, 6) for value in padded.amax(1).tolist()],
        "size": size,
    }
