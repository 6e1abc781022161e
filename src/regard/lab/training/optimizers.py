"""Optimizers by name, and how the learning rate goes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...errors import RegardError

SCHEDULES = ("cosine", "wsd")


def optimizers_of(
    name: str, model: nn.Module, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """adamw: of all parameters; muon: of the matrices between embeddings and head, AdamW the rest.

    Weight decay falls on matrices alone. Muon's step is scaled to AdamW's size, so that one
    learning rate serves both (Liu et al. 2025, section 2.2).
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inner = [(n, p) for n, p in named if p.dim() == 2 and not n.startswith(("embedding", "head"))]
    if name == "adamw":
        return [_adamw(named, lr, weight_decay)]
    if name == "muon":
        muon: Any = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise RegardError(f"torch {torch.__version__} has no Muon; give adamw")
        taken = {n for n, _ in inner}
        rest = [(n, p) for n, p in named if n not in taken]
        first = muon(
            [p for _, p in inner], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        return [first, _adamw(rest, lr, weight_decay)]
    raise RegardError(f"optimizer is {name!r}; give adamw or muon")


def _adamw(
    named: list[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    matrices = [p for n, p in named if p.dim() >= 2 and not n.startswith("embedding")]
    others = [p for n, p in named if p.dim() < 2 or n.startswith("embedding")]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.98),
                             eps=1e-9, fused=True)  # fmt: skip


def rate(schedule: str, step: int, steps: int, warmup: int) -> float:
    """The share of the full learning rate at a step of 0 … steps − 1.

    It rises linearly over `warmup` steps; then cosine: to 0 along half a wave (Loshchilov and
    Hutter 2017); wsd: it stays, and falls to 0 over the last fifth, as 1 − √x (Hägele et al. 2024).
    """
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if schedule == "wsd":
        return 1.0 if share < 0.8 else 1 - math.sqrt((share - 0.8) / 0.2)
    raise RegardError(f"schedule is {schedule!r}; give {' or '.join(SCHEDULES)}")
