"""Small models for studies, and the loop that trains them: Adam, a batch drawn at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..call.biases import ALiBi
from ..call.masks import Causal, Mask, Window
from ..nn.blocks import FeedForward
from ..nn.linear import DeltaAttention, LinearAttention
from ..nn.multihead import MultiHeadAttention
from ..nn.positions import LearnedPositions, Rotary, SinusoidalPositions

IGNORED = -100  # a target that is not learned
Batch = tuple[Tensor, Tensor]


class Recurrent(nn.Module):
    """torch's LSTM, GRU or RNN in the place of attention: (batch, length, dim) to the same.

    state: how wide it is inside, if not dim.
    """

    def __init__(self, kind: str, dim: int, state: int | None = None) -> None:
        super().__init__()
        state = state or dim
        made = {"batch_first": True, "device": "cpu", "dtype": torch.float32}
        self.cell: Any = getattr(nn, kind)(dim, state, **made)
        self.out = nn.Linear(state, dim, device="cpu", dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.cell(x)[0])
        return out


class Attending(nn.Module):
    """Causal attention of a mask."""

    def __init__(self, dim: int, heads: int, mask: Mask, bias: Any, rotary: Rotary | None) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(dim, heads, rotary=rotary, device="cpu")
        self.mask, self.bias = mask, bias

    def forward(self, x: Tensor, observe: Any = None) -> Any:
        return self.attention(x, mask=self.mask, bias=self.bias, observe=observe)


class SmallLM(nn.Module):
    """A decoder of `depth` blocks: norm, mixer, add; norm, feed-forward, add (if it has one).

    mixer: softmax, window, linear, delta, LSTM, GRU, RNN. positions: none, learned, sinusoidal,
    rotary, ALiBi: only of softmax and window. window: of that mixer. state: of recurrences.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int = 64,
        depth: int = 2,
        heads: int = 2,
        *,
        mixer: str = "softmax",
        positions: str = "rotary",
        length: int = 512,
        window: int = 16,
        feed_forward: bool = True,
        state: int | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        self.embedding = nn.Embedding(vocabulary, dim, **made)
        nn.init.normal_(self.embedding.weight, std=0.02)
        added: dict[str, Callable[[], nn.Module]] = {
            "learned": lambda: LearnedPositions(length, dim, **made),
            "sinusoidal": lambda: SinusoidalPositions(dim),
        }
        self.positions = added[positions]() if positions in added else None

        def mix() -> nn.Module:
            if mixer in ("LSTM", "GRU", "RNN"):
                return Recurrent(mixer, dim, state)
            if mixer in ("linear", "delta"):
                return {"linear": LinearAttention, "delta": DeltaAttention}[mixer](
                    dim, heads, device="cpu"
                )
            mask = Causal() & Window(window) if mixer == "window" else Causal()
            rotary = Rotary(dim // heads) if positions == "rotary" else None
            return Attending(dim, heads, mask, ALiBi() if positions == "ALiBi" else None, rotary)

        self.mixers = nn.ModuleList(mix() for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, **made) for _ in range(2 * depth + 1))
        self.forwards = nn.ModuleList(
            FeedForward(dim, device="cpu") for _ in range(depth if feed_forward else 0)
        )
        self.head = nn.Linear(dim, vocabulary, bias=False, **made)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, length) to logits (batch, length, vocabulary)."""
        return self.head(self.hidden(self.embedding(ids)))  # type: ignore[no-any-return]

    def hidden(self, x: Tensor) -> Tensor:
        """Embedded tokens (batch, length, dim) to what the head reads."""
        x = x if self.positions is None else self.positions(x)
        for number, mixer in enumerate(self.mixers):
            x = x + mixer(self.norms[2 * number](x))
            if len(self.forwards):
                x = x + self.forwards[number](self.norms[2 * number + 1](x))
        out: Tensor = self.norms[-1](x)
        return out


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the targets that count, in nats."""
    ids, targets = batch
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def fit(
    model: nn.Module,
    draw: Callable[[int], Batch],
    steps: int,
    *,
    rate: float = 3e-3,
    each: Callable[[int, float], object] = lambda step, loss: None,
    until: float = 0.0,
) -> list[float]:
    """Train: the loss of every step. Warm-up over a tenth, then a cosine to a tenth of the rate.

    draw: the batch of a step. each: called after each. until: a running mean that ends it early.
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
        loss = loss_of(model, draw(step))
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


def right(model: nn.Module, batch: Batch) -> Tensor:
    """Whether the likeliest token is the target: bool, of the targets that count."""
    ids, targets = batch
    with torch.no_grad():
        found = model(ids).argmax(-1)
    return (found == targets)[targets != IGNORED]
