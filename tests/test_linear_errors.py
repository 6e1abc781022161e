"""Wrong input to linear attention: one RegardError that shows the shapes and says what to do."""

import pytest
import torch

from regard import (
    Causal,
    Documents,
    Effect,
    NoEngine,
    Padding,
    RegardError,
    TopK,
    Window,
    linear_attention,
)
from regard.call.observers import Observer
from regard.linear import Favor, LinearState


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


Q, K, V = (2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 6)
TOKENS = torch.arange(5)
BAD = {
    "a short query": (
        {"query": (2, 4, 3, 8)},
        "causal linear attention takes a query for each key; give the keys "
        "before them as state, or causal=False"
    ),
    "dims": ({"key": (2, 2, 5, 7)}, "query has dim 8, key 7; make them equal"),
    "a map": ({"feature_map": "silu"}, "feature_map is 'silu'; give 'elu', 'identity' (or None)"),
    "a map that drops tokens": (
        {"feature_map": lambda x: x[:, :, :2]},
        "feature_map gave (2, 4, 2, 8) for (2, 4, 5, 8); it "
        "must keep all but the last dimension"
    ),
    "a map that gives no tensor": ({"feature_map": lambda x: 3}, "feature_map gave int for"),
    "a window": (
        {"mask": Causal() & Window(3)}, "linear attention has no single pairs to hide; it takes "
        "Documents, Padding, and both joined by &"
    ),
    "not causal under Causal": (
        {"mask": Causal(), "causal": False}, "mask Causal() and causal=False contradict each other"
    ),
    "a tensor as mask": ({"mask": torch.ones(5, 5)}, "mask is a Tensor; give a regard mask"),
    "decay without order": (
        {"decay": -ones(4), "causal": False}, "decay is an order in time; it needs causal=True"
    ),
    "beta without order": ({"beta": ones(2, 2, 5), "causal": False}, "beta is an order in time"),
    "a factor as decay": (
        {"decay": 0.9 * ones(4)},
        "decay reaches 0.9; it is the natural logarithm of the factor, so "
        "at most 0: give torch.log(factor)"
    ),
    "a number as decay": ({"decay": -0.1}, "decay is -0.1; give a tensor of floats on cpu"),
    "integers as decay": (
        {"decay": -torch.ones(4, dtype=torch.int64)}, "decay is torch.int64 on cpu; give a tensor"
    ),
    "decay of 3 heads": (
        {"decay": -ones(3)},
        "decay is (3,); give one per head (4,), one per token (batch 2, heads 4 "
        "or kv_heads 2, 5), or one more dimension of features"
    ),
    "decay of 4 tokens": ({"decay": -ones(2, 2, 4)}, "decay is (2, 2, 4); give one per head"),
    "decay of 7 channels": (
        {"decay": -ones(2, 2, 5, 7)},
        "decay is (2, 2, 5, 7); its last dimension must be that of the "
        "features, 8"
    ),
    "decay of favor's dim": (
        {"decay": -ones(2, 2, 5, 8), "feature_map": Favor(9)}, "that of the features, 9"
    ),
    "beta of a channel": (
        {"beta": ones(2, 2, 5, 8)}, "beta is (2, 2, 5, 8); give one per token (batch 2, heads 4 or "
        "kv_heads 2, 5)"
    ),
    "the delta rule normalised": (
        {"beta": ones(2, 2, 5), "normalise": True}, "the delta rule (beta) has weights of either "
        "sign: normalise=False"
    ),
    "the identity normalised": (
        {"feature_map": None, "normalise": True},
        "the identity map has weights of either sign, and "
        "their sum may be 0: normalise=False, or feature_map='elu'"
    ),
    "a scale that cancels": (
        {"scale": 0.5}, "scale 0.5 cancels in normalised weights; give normalise=False"
    ),
    "an engine": (
        {"engine": "fast"},
        "no engine is named 'fast'; there are auto, triton, chunked, rec"
    ),
    "a tensor as state": ({"state": ones(3)}, "state is a Tensor; give the LinearState of a call"),
    "a state of other features": (
        {"state": LinearState(ones(2, 2, 9, 6), ones(2, 2, 9))}, "state: memory is (2, 2, 9, 6) "
        "torch.float32 on cpu; this call needs (2, 2, 8, 6) torch.float32 on cpu"
    ),
    "a state of other heads": (
        {"state": LinearState(ones(2, 2, 8, 6), ones(2, 2, 8)), "decay": -ones(4)},
        "this call needs (2, 4, 8, 6)"
    ),
    "a state in float64": (
        {"state": LinearState(ones(2, 2, 8, 6, dtype=torch.float64), ones(2, 2, 8))},
        "memory is (2, 2, 8, 6) torch.float64 on cpu; this call needs (2, 2, 8, 6) torch.float32"
    ),
    "a normaliser of other features": (
        {"state": LinearState(ones(2, 2, 8, 6), ones(2, 2, 7))}, "state: normaliser is (2, 2, 7)"
    ),
    "a state without normaliser": (
        {"state": LinearState(ones(2, 2, 8, 6))}, "state has no normaliser, and this call does norm"
    ),
    "a state with normaliser": (
        {"state": LinearState(ones(2, 2, 8, 6), ones(2, 2, 8)), "feature_map": None},
        "state has a normaliser, and this call does not normalise"
    ),
    "a state without documents": (
        {"state": LinearState(ones(2, 2, 8, 6), ones(2, 2, 8)), "mask": Documents(TOKENS // 2)},
        "state comes from a call without documents; begin with Documents, or leave it out"
    ),
    "a document that comes back": (
        {"mask": Documents(torch.tensor([0, 0, 1, -1, 0]))}, "Documents: an id comes back after "
        "another; a document must be one run of tokens, as its state is forgotten at its end"
    ),
    "a document of before that comes back": (
        {"mask": Documents(torch.tensor([0, 0, 1, 1, 7])),
         "state": LinearState(ones(2, 2, 8, 6), ones(2, 2, 8), torch.tensor([1, 7]))},
        "an id comes back after another"
    ),
    "other documents of keys": (
        {"mask": Documents(TOKENS // 2, TOKENS // 3)}, "give Documents one row of ids, no key_ids"
    ),
    "documents and a state without order": (
        {"mask": Documents(TOKENS), "causal": False,
         "state": LinearState(ones(2, 2, 8, 6), ones(2, 2, 8), torch.tensor([0, 0]))},
        "a state has no document when causal=False; give one or the other"
    ),
    "a state of documents without order": (
        {"mask": Documents(TOKENS), "causal": False, "return_state": True},
        "documents without causality leave no single state: return_state=False"
    ),
    "documents of other length": (
        {"mask": Documents(torch.arange(4))}, "query_ids is (1, 4), this call needs (2, 5)"
    ),
    "padding of other length": ({"mask": Padding(TOKENS[1:] > 0)}, "keep is (1, 4), this call"),
    "effect": ({"observe": [Effect(2)]}, "is defined for softmax; linear attention has none"),
    "an unknown observer": ({"observe": [Observer()]}, "does not read the weights of linear atten"),
    "an observer alone": ({"observe": TopK(2)}, "observe is TopK(k=2) alone; give a list"),
}  # fmt: skip


@pytest.mark.parametrize("given, said", BAD.values(), ids=BAD)
def test_what_does_not_fit(given, said):
    request = {"query": Q, "key": K, "value": V} | given
    tensors = [ones(*request.pop(name)) for name in ("query", "key", "value")]
    with pytest.raises(RegardError) as error:
        linear_attention(*tensors, **request)
    assert said in str(error.value)


def test_the_recurrent_form_needs_an_order():
    with pytest.raises(NoEngine, match=r"recurrent cannot run query .* token by token"):
        linear_attention(ones(*Q), ones(*K), ones(*V), causal=False, engine="recurrent")
