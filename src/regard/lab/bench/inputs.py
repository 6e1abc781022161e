"""The forms of linear attention: what each is given beside query, key and value."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from ...call.checked import Call
from ...call.geometry import Span
from ...call.masks import Causal, Full
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


class Inputs:
    """The tensors of a problem, drawn from a seed, in the shapes that `Problem` says.

    gradient (batch, heads, q_len, dim): that of the output. linear: what a form takes besides.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = p = problem
        rng = torch.Generator().manual_seed(0)

        def drawn(heads: int, length: int) -> Tensor:
            return torch.randn(
                p.batch, heads, length, p.dim, generator=rng, dtype=torch.float32, device="cpu"
            ).to(p.dtype)

        self.query = drawn(p.heads, p.q_len).requires_grad_(p.backward)
        self.key = drawn(p.kv_heads, p.k_len).requires_grad_(p.backward)
        self.value = drawn(p.kv_heads, p.k_len).requires_grad_(p.backward)
        self.gradient = drawn(p.heads, p.q_len)
        self.linear = {} if p.form is None else FORMS[p.form](p, rng)
        if "beta" in self.linear:  # the delta rule is stable for keys no longer than 1
            self.key = torch.nn.functional.normalize(self.key, dim=-1)
        self.call = Call.checked(
            self.query, self.key, self.value, mask=p.mask, observe=p.observe or None
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value."""
        return self.query, self.key, self.value

    @property
    def full(self) -> bool:
        """Whether every query sees every key."""
        p = self.problem
        return p.mask == Full() or (p.mask == Causal() and p.q_len == 1)

    @property
    def causal(self) -> bool:
        """Whether the mask is that of torch's `is_causal`: aligned top-left."""
        return self.problem.mask == Causal() and self.problem.q_len == self.problem.k_len

    @cached_property
    def visible(self) -> Tensor:
        """Who sees whom, whole: bool, broadcastable to (batch, heads, q_len, k_len)."""
        p = self.problem
        return self.call.program.visible(Span(0, p.q_len, 0, p.k_len)).contiguous()

    def first(self, tokens: int, last: bool = False) -> dict[str, Any]:
        """The arguments of `linear_attention` for the first tokens; last: of the last kv head."""
        given = {"key": self.key, "value": self.value} | self.linear
        heads = slice(-1, None) if last else slice(None)
        query = self.query[:, -self.problem.group :] if last else self.query
        cut = {name: _cut(value, tokens, heads) for name, value in given.items()}
        return {"query": query[:, :, :tokens]} | cut


def _cut(value: Any, tokens: int, heads: slice) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value[heads] if value.dim() == 1 else value[:, heads, :tokens]
