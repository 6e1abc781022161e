"""What test_triton_effect.py has its workers do, in which Triton interprets its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import regard.engines.second_pass.weigh
import test_effect
from cases import Case, assert_within, at
from interpreted import case_of
from regard import Causal, Dropout, Effect, TopK, attention
from regard.call.checked import Call
from regard.engines.second_pass import effect as by_torch
from regard.engines.second_pass.triton import effect as measuring
from regard.engines.second_pass.triton import read as reading


def check(name: str, dtype: torch.dtype, k: int, blocks: tuple[int, int]) -> None:
    """What is listed, and how much, against the closed form in float64."""
    case = case_of(name)
    tensors, request = case.tensors(dtype=dtype), case.request(dtype)
    out, lse = attention(*tensors, **request, engine="reference", return_lse=True)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    call = Call.checked(*tensors, **request)
    found = measuring.effect(call, lse, out, k, grad, blocks)
    assert [t.shape for t in found] == [(*lse.shape, k)] * 3
    assert [t.dtype for t in found] == [torch.int32, torch.float32, torch.float32]
    near = 1e-4 if dtype == torch.float32 else 5e-3  # `out` is rounded
    compare(case, dtype, call, grad, k, near, *found)


def compare(
    case: Case, dtype: torch.dtype, call: Call, grad: Tensor, k: int, near: float,
    indices: Tensor, effect: Tensor, weights: Tensor,
) -> None:  # fmt: skip
    exactly = replace(case, layout=lambda t: t.to(dtype).double())
    truth, every = test_effect.closed_form(exactly, grad.double())
    best = truth.abs().sort(-1, descending=True).values[..., :k]
    # 1 − p loses digits where a weight is nearly 1
    sure = ((1 - every).amin(-1) > (1e-3 if near < 1e-3 else 0.1))[..., None]
    listed = effect.abs()[..., : best.shape[-1]].double()
    torch.testing.assert_close(listed * sure, best * sure, rtol=10 * near, atol=near)
    shown = indices >= 0
    cols = (indices.long() - call.place.key_start).clamp(min=0)
    wanted = truth.gather(-1, cols) * shown
    torch.testing.assert_close(effect.double() * sure, wanted * sure, rtol=10 * near, atol=near)
    wanted = every.gather(-1, cols) * shown
    torch.testing.assert_close(weights.double(), wanted, rtol=near, atol=near / 10)


def alone_and_ties() -> None:
    """A row's only key has the whole effect; of equal effects the lower key is listed."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 40, 16).unbind()
    call = Call.checked(query * 30, key, value, mask=Causal())
    out, lse = attention(query * 30, key, value, mask=Causal(), engine="tiled", return_lse=True)
    # As another kernel's lse may be off
    indices, effect, weights = measuring.effect(call, lse + 2e-6, out, 2, value, (16, 16))
    torch.testing.assert_close(effect[0, 0, 0, 0], -(out * value)[0, 0, 0].sum())
    assert indices[0, 0, 0].tolist() == [0, -1]
    assert (effect[0, 0, 0, 1], weights[0, 0, 0].tolist()) == (0, [1, 0])
    same = torch.ones(1, 1, 40, 16)
    call = Call.checked(query * 0, key, same)
    indices, effect, _ = measuring.effect(
        call, torch.full((1, 1, 40), 40.0).log(), same, 3, same, (16, 16)
    )
    assert indices.unique(dim=2).tolist() == [[[[0, 1, 2]]]]


def nearly_alone() -> None:
    """Where one key has nearly all of a row, its effect and those beside it are plain torch's."""
    torch.manual_seed(1)
    query, key, value, grad = torch.randn(4, 1, 1, 70, 16).unbind()
    tensors = (query * 8, key, value)

    def measured(by: Callable, kind: torch.dtype) -> list[Tensor]:
        given = [t.to(kind) for t in tensors]
        out, lse = attention(*given, engine="reference", return_lse=True)
        return by(Call.checked(*given), lse, out, grad.to(kind))

    def plainly(call: Call, lse: Tensor, out: Tensor, grad: Tensor) -> list[Tensor]:
        return list(by_torch.measure(call, lse, out, grad[None], 3))

    def ours(call: Call, lse: Tensor, out: Tensor, grad: Tensor) -> list[Tensor]:
        return list(measuring.effect(call, lse, out, 3, grad, (32, 32)))

    exact, plain = measured(plainly, torch.float64), measured(plainly, torch.float32)
    found = measured(ours, torch.float32)
    heaviest = exact[2].amax(-1)
    assert (heaviest > 1 - 1e-4).any()
    assert ((heaviest > 0.5) & (heaviest < 0.9)).any()
    assert torch.equal(found[0], exact[0])
    for mine, near, truth in zip(found[1:], plain[1:], exact[1:], strict=True):
        assert_within(mine, near, truth)


def bad_numbers() -> None:
    """A NaN among the values shows in the rows that see it."""
    query, key, value = torch.randn(3, 1, 2, 20, 16).unbind()
    out, lse = attention(query, key, value, mask=Causal(), engine="tiled", return_lse=True)
    value[0, 1, 7, 3] = out[0, 1, 7:, 3] = torch.nan
    call = Call.checked(query, key, value, mask=Causal())
    _, effect, _ = measuring.effect(call, lse, out, 3, torch.ones_like(out))
    rows = effect.isnan().any(-1)
    assert rows[0, 1].nonzero().flatten().tolist() == list(range(7, 20))
    assert not rows[0, 0].any()


def inside_attention() -> None:
    """As `weigh` uses it on a GPU, in a backward pass; what it cannot measure is read in torch."""
    tensors = Case("", at(33, 50, batch=1)).tensors(dtype=torch.float32)
    asked = [Effect(3), Effect(100), TopK(2)]
    request = {"mask": Causal(), "engine": "tiled", "observe": asked, "dropout": Dropout(0.3, 5)}

    def run() -> tuple[list[Tensor], tuple]:
        given = [t.clone().requires_grad_() for t in tensors]
        out, seen = attention(*given, **request)
        out.square().sum().backward()
        return [out, *(t.grad for t in given)], seen

    plain, wanted = run()
    before, measure, ks = regard.engines.second_pass.weigh.kernel_refuses, measuring.effect, []

    def counted(call: Call, lse: Tensor, out: Tensor, k: int, grad: Tensor) -> tuple:
        ks.append(k)
        return measure(call, lse, out, k, grad)

    try:
        regard.engines.second_pass.weigh.kernel_refuses, measuring.effect = reading.why_not, counted
        ours, seen = run()
    finally:
        regard.engines.second_pass.weigh.kernel_refuses, measuring.effect = before, measure
    assert ks == [3]
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(seen[:2], wanted[:2], strict=True):
        for name in ("effects", "weights"):
            a, b = getattr(mine, name), getattr(theirs, name)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
