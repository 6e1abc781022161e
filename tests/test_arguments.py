"""Every argument of `attention` reaches the engine, whoever looks on and passes the call on."""

import inspect

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from regard import Causal, Dropout, NoEngine, TopK, attention
from regard.cache import Pages
from regard.ops.attend import Request
from test_nn import drawn


class Function(TorchFunctionMode):
    """A mode as torch.device(…) and `watch` are: it passes every call on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Dispatch(TorchDispatchMode):
    """Looks at ops, so that the engine goes through its registered op."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Subclass(torch.Tensor):
    """A tensor as libraries derive them."""


QUERY, KEY, VALUE = drawn(2, 4, 5, 8), drawn(2, 2, 6, 8, seed=1), drawn(2, 2, 6, 8, seed=2)
ORDER = torch.tensor([[1, 0], [0, 1]])  # of pages: another than without
GIVEN = {
    "mask": Causal(),
    "bias": drawn(5, 6),
    "scale": 0.7,
    "softcap": 0.5,
    "sinks": drawn(4),
    "dropout": Dropout(0.5, 3),
    "query_start": 3,
    "key_start": 2,
    "pages": Pages(ORDER, torch.tensor([12, 7])),
    "observe": [TopK(2)],
    "return_lse": True,
    "engine": "reference",
}
# What an argument changes is seen only beside these
BESIDE = {"query_start": {"mask": Causal()}, "key_start": {"mask": Causal(), "query_start": 4}}


def numbers(answer) -> list:
    """Tensors, and the fields of results."""
    if isinstance(answer, tuple):
        return [n for each in answer for n in numbers(each)]
    return [answer.weights, answer.indices] if hasattr(answer, "weights") else [answer]


def test_all_are_covered():
    signature = inspect.signature(attention).parameters
    named = [n for n, p in signature.items() if p.kind is p.KEYWORD_ONLY]
    assert list(GIVEN) == named
    # What type checkers know of
    assert {*Request.__annotations__, "observe", "return_lse"} == {*named}


@pytest.mark.parametrize("how", ["mode", "subclass", "registered op"])
@pytest.mark.parametrize("name", GIVEN)
def test_an_argument_arrives(name, how):
    request = BESIDE.get(name, {}) | {name: GIVEN[name]}
    right = attention(QUERY, KEY, VALUE, **request)
    if name != "engine":  # it says who computes, not what
        without = attention(QUERY, KEY, VALUE, **BESIDE.get(name, {}))
        pairs = list(zip(numbers(right), numbers(without), strict=False))
        unlike = [a.shape != b.shape or not torch.equal(a, b) for a, b in pairs]
        assert any(unlike) or len(numbers(right)) > len(numbers(without))
    if how == "subclass":
        tensors = [t.as_subclass(Subclass) for t in (QUERY, KEY, VALUE)]
        given = attention(*tensors, **request)
    else:
        with Function() if how == "mode" else Dispatch():
            given = attention(QUERY, KEY, VALUE, **request)
    assert len(numbers(given)) == len(numbers(right))
    for ours, theirs in zip(numbers(given), numbers(right), strict=True):
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs)


@pytest.mark.parametrize("look", [Function, Dispatch])
def test_a_named_engine_arrives(look):
    with look(), pytest.raises(NoEngine, match="cpu: query is float64"):
        attention(QUERY.double(), KEY.double(), VALUE.double(), engine="cpu")
