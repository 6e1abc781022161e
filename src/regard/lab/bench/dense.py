"""Attention and the statistics of its weights as plain torch writes them, materialised.

What eager users run, and what the check computes in float64; apart from the engines on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...call.observers import Entropy, Map, Observer, Received, TopK
from ...call.results import Cells

Answer = dict[str, Tensor]
"""What a side computed, by name: "out", gradients, statistics."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (batch, heads, q_len, dim), weights (batch, heads, q_len, k_len)), in the dtype given.

    visible broadcasts to the weights; None shows every key. Every query must see one.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights


def statistics(observers: tuple[Observer, ...], weights: Tensor) -> Answer:
    """What the observers would see of weights (batch, heads, q_len, k_len), by their names.

    TopK gives its values and "TopK keys", Received and Map their sums.
    """
    found: Answer = {}
    for observer in observers:
        name = type(observer).__name__
        if isinstance(observer, TopK):
            top = weights.topk(min(observer.k, weights.shape[-1]))
            found |= {name: top.values, f"{name} keys": top.indices}
        elif isinstance(observer, Received):
            found[name] = weights.sum(-2)
        elif isinstance(observer, Entropy):
            found[name] = torch.special.entr(weights).sum(-1)
        elif isinstance(observer, Map):
            found[name] = pooled(weights, *sides(observer, weights.shape))
        else:
            raise NotImplementedError(f"{observer}: no plain form of it here")
    return found


def sides(observer: Map, shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a cell of the map of a call with this many queries and keys."""
    rows = Cells.fitting(0, shape[-2], observer.rows)
    cols = Cells.fitting(0, shape[-1], observer.cols)
    return rows.size, cols.size


def pooled(weights: Tensor, rows: int, cols: int) -> Tensor:
    """The mass of each cell of rows × cols; the last ones may be smaller."""
    short = (0, -weights.shape[-1] % cols, 0, -weights.shape[-2] % rows)
    if any(short):
        weights = torch.nn.functional.pad(weights, short)
    return weights.unflatten(-1, (-1, cols)).sum(-1).unflatten(-2, (-1, rows)).sum(-2)
