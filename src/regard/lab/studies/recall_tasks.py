"""Tasks of recall: keys with values to be found again, and a token to be copied over a distance."""

from __future__ import annotations

from typing import Any

import torch

from .learning import IGNORED, Batch, integers


def associative(
    batch: int, pairs: int, length: int, vocabulary: int, generator: torch.Generator
) -> Batch:
    """Multi-query associative recall (Arora et al. 2023, "Zoology"): ids and targets
    (batch, length). Different keys, each with a value behind it; then each key once more, somewhere
    in the rest, where the value is the target. All else is token 0.

    Keys are tokens 1 … (vocabulary − 1) / 2, values those above.
    """
    half = (vocabulary - 1) // 2
    if pairs > half or length < 4 * pairs:
        raise ValueError(f"{pairs} pairs need {pairs} keys and a length of {4 * pairs}")
    draw: dict[str, Any] = dict(generator=generator, dtype=torch.float32, device="cpu")
    keys = torch.rand(batch, half, **draw).argsort(1)[:, :pairs] + 1
    values = integers(half + 1, 2 * half + 1, (batch, pairs), generator)
    ids = torch.zeros(batch, length, dtype=torch.int64, device="cpu")
    targets = torch.full_like(ids, IGNORED)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    room = length - 2 * pairs
    at = torch.rand(batch, room, **draw).argsort(1)[:, :pairs] + 2 * pairs
    ids.scatter_(1, at, keys)
    targets.scatter_(1, at, values)
    return ids, targets


def copying(
    batch: int, count: int, distance: int, vocabulary: int, generator: torch.Generator
) -> Batch:
    """Tokens to be said again in order after `distance` empty ones (Hochreiter and Schmidhuber
    1997; Arjovsky et al. 2016): ids and targets (batch, 2 · count + distance). Token 0 is empty,
    token 1 asks for the next."""
    said = integers(2, vocabulary, (batch, count), generator)
    ids = torch.zeros(batch, 2 * count + distance, dtype=torch.int64, device="cpu")
    targets = torch.full_like(ids, IGNORED)
    ids[:, :count], ids[:, -count:] = said, 1
    targets[:, -count:] = said
    return ids, targets
