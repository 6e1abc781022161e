"""Another default dtype or device of torch's changes nothing: every buffer names its own."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import regard
from cases import FEW, ON_THE_CPU
from linear_cases import CASES as LINEAR
from regard import (
    Distances,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    Received,
    Rows,
    TopK,
    attention,
    linear_attention,
)
from regard.cache import H2O, KVCache
from test_torch_features import MODULES

# Functions of torch that make a tensor out of numbers, of the default dtype or device
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range",
    "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
OBSERVERS = [TopK(3), Received(), Entropy(), MaxScore(), LogSumExp(), Map(4, 4), Distances()]
DEFAULTS = ["bfloat16", "float16", "float64", "meta"]


@contextmanager
def default(name: str):
    """torch's default dtype, or its default device."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def unnamed(source: str) -> list[tuple[int, str]]:
    """(line, call) of each factory that names no dtype or no device."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module = node.func.value
        if not isinstance(module, ast.Name) or module.id != "torch":
            continue
        named = {keyword.arg for keyword in node.keywords}
        if node.func.attr in FACTORIES and not {"dtype", "device"} <= named and None not in named:
            found.append((node.lineno, ast.unparse(node)))
    return found


def test_every_buffer_names_dtype_and_device():
    root = Path(regard.__file__).parent
    found = {
        f"{path.relative_to(root)}:{line}: {call}"
        for path in root.rglob("*.py")
        for line, call in unnamed(path.read_text())
    }
    assert not found


def test_what_names_neither_is_found():
    source = "torch.zeros(2)\ntorch.ones(2, dtype=d)\ntorch.full(2, 1, dtype=d, device=e)"
    assert [line for line, _ in unnamed(source)] == [1, 2]


def tensors_in(answer):
    """The tensors of results, at any depth."""
    if isinstance(answer, torch.Tensor):
        return [answer]
    if isinstance(answer, list | tuple):
        return [t for each in answer for t in tensors_in(each)]
    fields = getattr(answer, "__dict__", {})
    return [t for each in fields.values() for t in tensors_in(each)]


def assert_same(run, name: str) -> None:
    """`run` gives the same dtypes and bits under torch's own defaults and this one."""
    right = tensors_in(run())
    with default(name):
        given = tensors_in(run())
    assert len(given) == len(right) > 0
    for ours, theirs in zip(given, right, strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.sample(1, most=2)
@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("engine", ON_THE_CPU)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_attention(case, engine, name):
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    if regard.explain(*tensors, **request, return_lse=True)[engine]:
        pytest.skip("not computed by it")

    def run():
        return attention(*tensors, **request, observe=OBSERVERS, return_lse=True, engine=engine)

    assert_same(run, name)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("engine", ["cpu", "tiled", "reference"])
@pytest.mark.parametrize("which", ["all at once", "three biases", "causal"])
def test_gradients(which, engine, name):
    case = next(c for c in FEW if c.name == which)
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)

    def run():
        leaves = [t.clone().requires_grad_() for t in tensors]
        out, (effect,) = attention(*leaves, **request, observe=[regard.Effect(2)], engine=engine)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        return [*grads, effect.effects, effect.indices]

    assert_same(run, name)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_attention(case, name):
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    assert_same(lambda: linear_attention(*tensors, **request), name)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize(
    "make", [KVCache, lambda: KVCache(evict=H2O(16)), lambda: regard.cache.WindowCache(8)]
)
def test_a_cache(make, name):
    drawn = torch.randn(3, 2, 2, 70, 8, generator=torch.Generator().manual_seed(0))

    def run():
        cache = make()
        steps = [slice(0, 60), *(slice(i, i + 1) for i in range(60, 70))]
        return [cache.attend(*drawn[:, :, :, step], observe=[Rows([69])]) for step in steps[:1]] + [
            cache.attend(*drawn[:, :, :, step]) for step in steps[1:]
        ]

    assert_same(run, name)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("make, given", MODULES.values(), ids=MODULES)
def test_modules(make, given, name):
    module = make().eval()
    assert_same(lambda: module(*given), name)
