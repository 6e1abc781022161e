"""Small models for studies, and the loop that trains them: Adam, a batch drawn at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import LanguageModel, ModelConfig

IGNORED = -100  # a target that is not learned
Batch = tuple[Tensor, Tensor]


def small_lm(vocabulary: int, dim: int, depth: int = 2, heads: int = 2, **choices: Any) -> Any:
    """A `LanguageModel`, drawn anew by torch's generator; choices: as in `ModelConfig`."""
    return LanguageModel(
        ModelConfig(vocab=vocabulary, dim=dim, depth=depth, heads=heads, **choices)
    )


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the targets that count, in nats."""
    ids, targets = batch
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def fit(
    model: nn.Module,
    draw: Callable[[], Batch],
    steps: int,
    *,
    rate: float = 3e-3,
    each: Callable[[int, float], object] = lambda step, loss: None,
    until: float = 0.0,
) -> list[float]:
    """Train: the loss of every step. Warm-up over a tenth, then a cosine to a tenth of the rate.

    draw: gives a batch. each: called after each. until: a running mean that ends it early.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    warm = max(1, steps // 10)

    def share(step: int) -> float:
        done = (step - warm) / max(1, steps - warm)
        return (step + 1) / warm if step < warm else 0.55 + 0.45 * float(np.cos(np.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        loss = loss_of(model, draw())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        each(step, losses[-1])
        if len(losses) >= 20 and sum(losses[-20:]) / 20 < until:
            break
    model.eval()
    return losses
