"""The word weights of a part by blocks of reading words, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .words import Words

if TYPE_CHECKING:
    from ..capture.recording import Recording

_TILE = 1 << 22  # weights held at once: 16 MB in float32


def tables(
    recording: Recording, layers: dict[int, list[int]], readers: Words, keys: Words
) -> Iterator[tuple[range, Iterator[Tensor]]]:
    """Blocks of readers, each with its word weights layer by layer: float32 (heads, block, keys).

    ``layers``: the heads to compute of each layer. What is yielded is the caller's to write in.
    """
    most = max(recording.layers[layer].heads for layer in layers)
    size = max(1, _TILE // max(1, most * len(keys.of_token)))
    for start in range(0, len(readers), size):
        rows = range(start, min(start + size, len(readers)))
        yield (
            rows,
            (
                _table(recording, layer, heads, readers, keys, rows)
                for layer, heads in layers.items()
            ),
        )


def _table(
    recording: Recording, layer: int, heads: list[int], readers: Words, keys: Words, rows: range
) -> Tensor:
    table = torch.zeros(len(heads), len(rows), len(keys), dtype=torch.float32, device="cpu")
    stop = readers[rows[-1]].tokens.stop
    size = max(1, _TILE // max(1, recording.layers[layer].heads * len(keys.of_token)))
    for first in range(readers[rows[0]].tokens.start, stop, size):
        last = min(first + size, stop)
        weights = recording.weights(layer, rows=slice(first, last))
        if len(heads) < len(weights):
            weights = weights[heads]
        table.index_add_(1, readers.of_token[first:last] - rows.start, keys.sum_tokens(weights))
    return table / readers.sizes[rows.start : rows.stop, None]
