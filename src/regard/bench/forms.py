"""The forms of linear attention: what each is given beside query, key and value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator
from torch.nn.functional import logsigmoid

from .problems import Problem


def _retention(p: Problem, rng: Generator) -> dict[str, Any]:
    decay = torch.log1p(
        -(2.0 ** (-5 - torch.arange(p.kv_heads, dtype=torch.float32, device="cpu")))
    )
    return {"feature_map": None, "decay": decay}


def _gla(p: Problem, rng: Generator) -> dict[str, Any]:
    gate = torch.randn(
        p.batch, p.kv_heads, p.k_len, p.dim, generator=rng, dtype=torch.float32, device="cpu"
    )
    return {"feature_map": None, "decay": logsigmoid(gate) / 16}


def _delta(p: Problem, rng: Generator) -> dict[str, Any]:
    gate, beta = torch.randn(
        2, p.batch, p.kv_heads, p.k_len, generator=rng, dtype=torch.float32, device="cpu"
    )
    return {"feature_map": None, "decay": logsigmoid(gate) / 16, "beta": beta.sigmoid()}


FORMS: dict[str, Callable[[Problem, Generator], dict[str, Any]]] = {
    "elu": lambda p, rng: {},  # Katharopoulos et al. 2020
    "retention": _retention,  # Sun et al. 2023
    "gla": _gla,  # Yang et al. 2024
    "delta": _delta,  # gated: Yang et al. 2025
}
