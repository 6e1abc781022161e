"""What a step reads: a pure function of (seed, epoch), so that a run can go on anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...errors import RegardError


def chunk_starts(tokens: int, length: int, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Where the chunks (length + 1 tokens) of each batch of an epoch begin, in a text of tokens.

    Each epoch cuts the text at other places, and reads its chunks in another order.
    """
    if tokens < length + 1:
        raise RegardError(f"the text has {tokens} tokens; a chunk needs {length + 1}")
    drawn = np.random.default_rng([seed, epoch])
    spare = (tokens - 1) % length
    starts = np.arange(drawn.integers(spare + 1), tokens - length, length)
    starts = drawn.permutation(starts)
    whole = max(len(starts) // batch, 1)
    return [starts[n * batch : (n + 1) * batch].tolist() for n in range(whole)]


def pair_batches(
    lengths: Sequence[int] | np.ndarray, tokens: int, seed: int, epoch: int
) -> list[list[int]]:
    """Which pairs each batch of an epoch has: pairs of like length together, in random order.

    lengths: of each pair, the longer side. tokens: the most that a batch has, padding included.
    """
    drawn = np.random.default_rng([seed, epoch])
    lengths = np.asarray(lengths)
    # Like lengths stand in random order: no epoch pairs the same sentences
    order = np.lexsort((drawn.random(len(lengths)), lengths))
    batches, batch = [], list[int]()
    for index in order.tolist():
        if batch and int(lengths[index]) * (len(batch) + 1) > tokens:
            batches.append(batch)
            batch = []
        batch.append(index)
    if batch:
        batches.append(batch)
    return [batches[n] for n in drawn.permutation(len(batches))]


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tensor:
    """Rows of tokens as one tensor (rows, longest), int64, `pad` behind the shorter."""
    longest = max(len(row) for row in rows)
    made = np.full((len(rows), longest), pad, dtype=np.int64)
    for n, row in enumerate(rows):
        made[n, : len(row)] = row
    return torch.from_numpy(made).to(device)
