"""As test_hidden, of linear attention: the future, padding, other documents, what was forgotten."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from regard import Documents, Padding, linear_attention

BATCH, HEADS, KV_HEADS, TOKENS, DIM = 2, 4, 2, 200, 8
BAD = [math.nan, math.inf, -math.inf]
ENGINES = ["chunked", "recurrent", "reference"]
IDS = torch.arange(TOKENS) // 70  # documents of 70 tokens


def drawn() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, n, TOKENS, DIM, generator=rng) * 0.3 for n in (HEADS, 2, 2)]


def gates(*more: int) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return -torch.rand(BATCH, HEADS, TOKENS, *more, generator=rng) / 8


FORMS: dict[str, dict[str, Any]] = {
    "elu": {},
    "identity": {"feature_map": None, "normalise": False},
    "gates": {"feature_map": None, "decay": gates()},
    "gates by channel": {"feature_map": None, "decay": gates(DIM)},
    "delta rule": {"feature_map": None, "beta": gates().exp(), "decay": gates()},
}
# The mask, the token that is bad, and the rows that do not see it
HIDING = {
    "the future": ({}, 130, slice(0, 130)),
    "later documents": ({"mask": Documents(IDS)}, 100, slice(0, 70)),
    "earlier documents": ({"mask": Documents(IDS)}, 100, slice(140, None)),
    "padding": ({"mask": Padding(torch.arange(TOKENS) != 100)}, 100, slice(0, None)),
    "no causality": ({"mask": Documents(IDS), "causal": False}, 100, slice(140, None)),
}


def run(tensors: list[Tensor], engine: str, request: dict[str, Any], rows: slice) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = linear_attention(*leaves, **request, engine=engine)
    grads = torch.autograd.grad(out[:, :, rows].sin().sum(), leaves)
    return [out.detach(), *grads]


@pytest.mark.sample(1, most=2)
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("where", HIDING)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_is_what_it_is_without_what_it_does_not_see(engine, form, where, part):
    asked, token, rows = HIDING[where]
    request = FORMS[form] | asked
    if request.get("causal") is False and (
        engine == "recurrent" or {"decay", "beta"} & set(request)
    ):
        pytest.skip("without causality nothing decays, and none goes token by token")
    found = []
    for bad in (0.5, *BAD):
        tensors = drawn()
        tensors[1 if part == "key" else 2][:, :, token, 3] = bad
        found.append(run(tensors, engine, request, rows))
    for bad, (out, *grads) in zip(BAD, found[1:], strict=True):
        assert torch.equal(out[:, :, rows], found[0][0][:, :, rows]), bad
        # Later rows see the keys before the bad one, too: their 0 · NaN is in those gradients
        for a, b in list(zip(grads, found[0][1:], strict=True))[: 1 if not asked else 3]:
            assert torch.equal(a[:, :, rows], b[:, :, rows]), bad
        if where == "padding":
            assert all(g.isfinite().all() for g in grads)
            assert not grads[1 if part == "key" else 2][:, :, token].any()


@pytest.mark.sample(2)
@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", BAD)
def test_a_row_that_sees_it_is_as_token_by_token(form, part, bad):
    tensors = drawn()
    tensors[["query", "key", "value"].index(part)][0, :, 60, 3] = bad
    request = FORMS[form] | {"mask": Documents(IDS)}
    outs = [linear_attention(*tensors, **request, engine=engine) for engine in ENGINES]
    vanished = form == "elu" and bad == -math.inf and part != "value"  # φ(−∞) is 0
    assert outs[0][0].isfinite().all() == vanished
    assert outs[0][0, :, 70:].isfinite().all()
    assert outs[0][1].isfinite().all()
    for out in outs[:2]:
        torch.testing.assert_close(out, outs[2], rtol=1e-3, atol=1e-4, equal_nan=True)
