"""tiled's gradients against autograd through the float64 reference, and its memory."""

from contextlib import contextmanager
from functools import cache
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import regard.engines.second_pass.strips
from cases import CASES, DTYPES, FEW, Case, assert_within, at, mapped, plain
from regard import (
    ALiBi,
    Causal,
    Distances,
    Documents,
    Dropout,
    Entropy,
    First,
    Map,
    MaxScore,
    Predicate,
    Received,
    RelativeBias,
    Rows,
    TopK,
    Window,
    attention,
)
from regard.engines import tiled
from regard.engines.second_pass.weigh import _weigh

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def gradients(tensors, request, run) -> list[Tensor]:
    """Of everything that can have one, of a fixed random functional of out and lse."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    tensors = [leaf(t) for t in tensors]
    out, lse = run(*tensors, **mapped(request, leaf))
    rng = torch.Generator().manual_seed(2)
    loss = (out.double() * torch.randn(out.shape, generator=rng)).sum()
    weights = torch.randn(lse.shape, generator=rng)
    loss = loss + (lse.double().masked_fill(lse == -torch.inf, 0) * weights).sum()
    loss.backward()
    return [leaf.grad for leaf in leaves]


def by(engine: str):
    return lambda *tensors, **request: attention(
        *tensors, **request, engine=engine, return_lse=True
    )


@cache
def exact(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return gradients(*case.exactly(dtype), by("reference"))


def typical(error: Tensor) -> Tensor:
    """Root mean square: the one largest among sums over hundreds of rows is chance."""
    return error.square().mean().sqrt()


@cache
def near(case: Case) -> list[Tensor]:
    """What plain torch has in float32: the bar of float64 is that, scaled."""
    return gradients(case.tensors(dtype=torch.float32), case.request(torch.float32), plain)


def assert_double(ours: list[Tensor], simple: list[Tensor], truths: list[Tensor]) -> None:
    for mine, other, truth in zip(ours, simple, truths, strict=True):
        assert_within(mine, other, truth, mine.dtype, error=typical)


@pytest.mark.sample(every=5)
@every_case
def test_tiled_gradients_are_the_references(case):
    """Query, key, value, biases, tables, slopes and sinks; through out and lse."""
    ours = gradients(case.tensors(), case.request(), by("tiled"))
    assert_double(ours, near(case), exact(case, torch.float64))


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("case", [c for c in FEW if c.sizes.q_len > 16], ids=str)
def test_gradients_in_small_strips(case, monkeypatch):
    """With a small budget the small cases, too, take many strips and parts."""
    monkeypatch.setattr(regard.engines.second_pass.strips, "BUDGET", 2**11)
    ours = gradients(case.tensors(), case.request(), by("tiled"))
    assert_double(ours, near(case), exact(case, torch.float64))


OURS = ("cpu", "tiled")
BARS = [
    *(
        (engine, dtype, case)
        for engine in ("cpu", "tiled")
        for dtype in DTYPES[1:3]
        for case in FEW
    ),
    *(("cpu", torch.float32, case) for case in CASES if case not in FEW),
    *(("cpu", torch.float16, case) for case in FEW[::3]),
]


@pytest.mark.sample(1)
@pytest.mark.parametrize("engine, dtype, case", BARS, ids=str)
def test_gradients_meet_the_bar(engine, dtype, case):
    ours = gradients(case.tensors(dtype=dtype), case.request(dtype), by(engine))
    simple = gradients(case.tensors(dtype=dtype), case.request(dtype), plain)
    assert all(t.dtype == dtype for t in ours)
    for mine, theirs, truth in zip(ours, simple, exact(case, dtype), strict=True):
        assert_within(mine, theirs, truth, error=typical)


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_sdpa_gradients_are_the_references(case):
    """Where sdpa takes a call that needs gradients (through out, of query, key and value)."""
    tensors, request = [t.requires_grad_() for t in case.tensors()], case.request()
    if regard.explain(*tensors, **request)["sdpa"]:
        return

    def out_of(engine: str):
        return lambda *leaves: (attention(*leaves, **request, engine=engine), torch.zeros(()))

    ours, truths = (gradients(tensors, {}, out_of(engine)) for engine in ("sdpa", "reference"))
    # Not the bar: torch's kernel takes the weights again from the lse, off by huge scores' rounding
    for mine, truth in zip(ours, truths, strict=True):
        scale = max(float(truth.abs().max()), 1.0) if truth.numel() else 1.0
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-11 * scale)


SMALL = Case("", at(3, 5, batch=1, heads=2, kv_heads=1, dim=2, v_dim=3))
rng = torch.Generator().manual_seed(3)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


CHECKED = {
    "causal": (lambda: {"mask": Causal()}, []),
    "hidden rows": (lambda: {"mask": Causal(), "query_start": -1}, []),
    "dense bias": (lambda bias: {"bias": bias, "mask": Causal() & Window(3)}, [(1, 1, 3, 5)]),
    "bias of keys": (lambda bias: {"bias": bias}, [(2, 1, 5)]),
    "slopes": (lambda slopes: {"bias": ALiBi(slopes)}, [(2,)]),
    "table": (lambda table: {"bias": RelativeBias(table, max_distance=20)}, [(8, 2)]),
    "sinks": (lambda sinks: {"sinks": sinks, "mask": Causal() | First(2)}, [(2,)]),
    "softcap": (lambda: {"softcap": 1.5}, []),
    "dropout": (lambda bias: {"bias": bias, "dropout": Dropout(0.4, 11)}, [(3, 5)]),
    "all": (
        lambda bias, slopes, sinks: {
            "bias": [bias, ALiBi(slopes)], "sinks": sinks, "softcap": 2.0,
            "dropout": Dropout(0.3, 5), "mask": Window(4),
        },
        [(1, 2, 3, 5), (2,), (2,)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("build, shapes", CHECKED.values(), ids=CHECKED)
def test_gradcheck(build, shapes):
    """Against finite differences: through out and lse, which stays finite where a row is hidden."""

    def run(query: Tensor, key: Tensor, value: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        request = build(*more)
        out, lse = attention(query, key, value, **request, engine="tiled", return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    leaves = [t.requires_grad_() for t in (*SMALL.tensors(), *(drawn(*s) for s in shapes))]
    assert torch.autograd.gradcheck(run, leaves, atol=1e-6)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 4), (2, 3)], ids=str)
def test_only_what_asks_gets_a_gradient(wanted):
    query, key, value = SMALL.tensors()
    inputs = [query, key, value, drawn(2, 3, 5), drawn(2)]
    for i in wanted:
        inputs[i].requires_grad_()
    answers = {}
    for engine in ("tiled", "reference"):
        out, lse = attention(
            *inputs[:3], bias=inputs[3], sinks=inputs[4], engine=engine, return_lse=True
        )
        leaves = [inputs[i] for i in wanted]
        answers[engine] = torch.autograd.grad(
            (out * out).sum() + lse.sum(), leaves, allow_unused=True
        )
    for mine, truth in zip(answers["tiled"], answers["reference"], strict=True):
        torch.testing.assert_close(mine, truth if truth is not None else torch.zeros_like(mine))
    assert all(t.grad is None for t in inputs)


def test_no_gradient_is_asked_for():
    query, key, value = SMALL.tensors()
    assert not attention(query, key, value, engine="tiled").requires_grad
    query.requires_grad_()
    with torch.no_grad():
        assert not attention(query, key, value, engine="tiled").requires_grad


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor made, inside our registered ops, too."""

    INSIDE: ClassVar = {
        torch.ops.regard.tiled.default: tiled._tiled,
        torch.ops.regard.tiled_backward.default: tiled._backward,
        torch.ops.regard.weigh.default: _weigh,
    }

    def __init__(self) -> None:
        super().__init__()
        self.most, self.entered = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = self.INSIDE.get(func)
        if op is None:
            out = func(*args, **(kwargs or {}))
        else:
            self.entered.add(func)
            with self:
                out = op._init_fn(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor):
                # What an expanded view shares is not memory
                size = made.untyped_storage().nbytes() // max(made.element_size(), 1)
                self.most = max(self.most, size)
        return out


@contextmanager
def largest():
    with Largest() as mode:
        yield mode


N = 4096
LONG_MASKS = {
    "full": lambda: regard.Full(),
    "causal": lambda: Causal(),
    "window": lambda: Causal() & (Window(300) | First(4)),
    "documents": lambda: Documents(torch.arange(N) // 500) & Causal(),
    "predicate": lambda: Predicate(lambda b, h, q, k: (q - k) % 700 < 300),
}


@pytest.mark.sample(0)
@pytest.mark.parametrize("mask", LONG_MASKS.values(), ids=LONG_MASKS)
def test_no_tensor_grows_with_the_square(mask):
    """Forward, every observer, and backward: nothing larger than some 256 rows."""
    leaves = [torch.randn(1, 1, N, 8).requires_grad_() for _ in range(3)]
    sinks = torch.zeros(1, requires_grad=True)
    watchers = [TopK(8), Received(), Entropy(), MaxScore(), Rows([5]), Map(64, 64), Distances()]
    with largest() as mode:
        out, _ = attention(
            *leaves, mask=mask(), bias=ALiBi(), sinks=sinks, engine="tiled", observe=watchers
        )
        out.sum().backward()
    assert mode.entered == set(Largest.INSIDE)
    assert N * 8 <= mode.most <= 2 * 256 * N < N * N / 4
