"""As test_hidden, where somebody looks at the ops: under torch.compile; and of FlexAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from regard import Causal, Padding, TopK, attention, explain
from regard.call.checked import Call
from regard.engines import flex
from regard.engines.cpu import native
from test_hidden import BAD, HIDING, drawn

KEPT = torch.arange(200) % 5 != 2


@pytest.fixture(autouse=True)
def anew():
    """A function is compiled a few times at most, and here is one for all cases."""
    torch._dynamo.reset()


REQUESTS: dict[str, dict[str, Any]] = {
    "padding": {"mask": Padding(KEPT[None])},
    "padding and the future": {"mask": Padding(KEPT[None]) & Causal()},
    "a bias of −∞": HIDING["a bias of −∞"](40),
}


def given(bad: float) -> list[Tensor]:
    query, key, value = drawn(40, torch.float32)
    return [query, *(t.masked_fill(~KEPT[:, None], bad) for t in (key, value))]


@pytest.mark.sample(1)
@pytest.mark.parametrize("request_of", REQUESTS)
@pytest.mark.parametrize("engine", ["tiled", "cpu", "sdpa"])
def test_under_a_compiler(engine, request_of):
    """Our engines are opaque ops there, which look inside: out, gradients and what is observed."""
    request = REQUESTS[request_of]
    if engine == "cpu" and not native.AVAILABLE:
        pytest.skip("this installation was built without the compiled kernels")

    def call(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, (top,) = attention(*qkv, **request, engine=engine, observe=[TopK(3)])
        return out, top.weights

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = []
    for bad in (0.5, *BAD):
        leaves = [t.requires_grad_() for t in given(bad)]
        out, weights = compiled(*leaves)
        out.sin().sum().backward()
        found.append([out.detach(), weights, *(t.grad for t in leaves)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("request_of", REQUESTS)
def test_under_torch_func(request_of):
    """PyTorch's kernel under a transform: gradients of what is seen."""
    request, found = REQUESTS[request_of], []
    for bad in (0.5, *BAD):
        grads = torch.func.grad(
            lambda *t: attention(*t, **request, engine="sdpa").sin().sum(), argnums=(0, 1, 2)
        )(*given(bad))
        found.append(grads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize(
    "name, dtype, backend",
    [
        ("the future", torch.float32, "aot_eager"),
        ("padding", torch.bfloat16, "aot_eager"),
        ("a bias of −∞", torch.float64, "aot_eager"),
        pytest.param("padding", torch.float32, "inductor", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_compiled_kernel_gives_what_it_gives_alone(name, dtype, backend):
    """PyTorch's: rows that see a bad number too, and gradients, to the bit; grouped heads."""
    request = HIDING[name](40)

    def call(*qkv: Tensor) -> Tensor:
        return attention(*qkv, **request, engine="sdpa")

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for bad in (0.5, torch.nan):
        found = []
        for run in (call, compiled):
            query, key, value = drawn(40, dtype)
            key[0, :, 3, 2] = value[1, :, 20] = bad
            leaves = [t.requires_grad_() for t in (query, key, value)]
            out = run(*leaves)
            found.append([out.detach(), *torch.autograd.grad(out.float().sin().sum(), leaves)])
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.isnan(), b.isnan()), bad
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), bad


def test_who_does_not_look_there_is_named():
    """An exported program holds PyTorch's op, which multiplies what is hidden by 0."""
    (said,) = explain(*given(0.5), mask=Causal())["hidden"]
    assert said.endswith("in an exported program it does not look")

    class Attends(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(query, key, value, **REQUESTS["padding"], engine="sdpa")

    exported = torch.export.export(Attends(), tuple(given(0.5)))
    assert "scaled_dot_product" in str(exported.graph)
    run = exported.module()
    assert run(*given(0.5)).isfinite().all()
    assert run(*given(torch.nan)).isnan().any()


@pytest.mark.parametrize("bad", BAD)
def test_flex_hides_a_key_by_a_bias(bad):
    """Its function of a score: what a bias of −∞ hides has that score, whatever it was."""
    request = REQUESTS["a bias of −∞"]
    found = []
    for number in (0.5, bad):
        query, key, _ = given(number)
        call = Call.checked(query, key, given(0.5)[2], **request)
        found.append(flex.attend(call, flex_attention))
    for a, b in zip(*found, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)
