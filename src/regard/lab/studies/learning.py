"""Small models for studies, and the loop that trains them: AdamW, a batch drawn at each step.

`regard.training` trains to last: on files, resumable. A study's model is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.models import LanguageModel, ModelConfig
from ..training.optimizers import rate as share_of_rate

IGNORED = -100  # a target that is not learned
Batch = tuple[Tensor, Tensor]


def integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Drawn evenly from low … high − 1: int64, on the CPU."""
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int64, device="cpu")


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
    """Train: the loss of every step. Warm-up over a tenth, then a cosine.

    draw: gives a batch. each: called after each. until: a running mean that ends it early.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * share_of_rate("cosine", step, steps, max(1, steps // 10))
        loss = loss_of(model, draw())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        each(step, losses[-1])
        if len(losses) >= 20 and sum(losses[-20:]) / 20 < until:
            break
    model.eval()
    return losses
