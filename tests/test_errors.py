"""Wrong input: one RegardError whose message shows the shapes and says what to do."""

import numpy as np
import pytest
import torch

from regard import (
    ALiBi,
    Causal,
    Dense,
    Documents,
    Dropout,
    Effect,
    Entropy,
    Heads,
    NoEngine,
    NormTopK,
    Padding,
    RegardError,
    RelativeBias,
    Rows,
    TopK,
    Window,
    attention,
    explain,
    linear_attention,
    observe,
)
from regard.engines import ENGINES
from regard.nn.functional import scaled_dot_product_attention


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


ARRAY = np.ones((2, 7), dtype=bool)
Q, K, V = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)
SHAPES = {
    "query of 3 dims": (Q[1:], K, V, "each needs 4 dimensions, (batch, heads, length, dim)"),
    "key of 5 dims": (Q, (1, *K), V, "each needs 4 dimensions"),
    "value of 2 dims": (Q, K, (7, 6), "each needs 4 dimensions"),
    "batches": (Q, (3, *K[1:]), V, "query has batch 2, key 3; make them equal"),
    "dims": (Q, (2, 2, 7, 9), V, "query has dim 8, key 9; make them equal"),
    "heads": (Q, (2, 3, 7, 8), (2, 3, 7, 6), "kv_heads 3 must divide heads 4"),
    "more kv_heads": (Q, (2, 8, 7, 8), (2, 8, 7, 6), "kv_heads 8 must divide heads 4"),
    "no kv_heads": (Q, (2, 0, 7, 8), (2, 0, 7, 6), "kv_heads 0 must divide heads 4"),
    "lengths": (Q, K, (2, 2, 6, 6), "key and value must agree in batch, kv_heads and length"),
    "value heads": (Q, K, (2, 4, 7, 6), "key and value must agree"),
}


@pytest.mark.parametrize("query, key, value, said", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("call", [attention, explain], ids=lambda f: f.__name__)
def test_shapes_that_do_not_fit(call, query, key, value, said):
    with pytest.raises(RegardError) as error:
        call(drawn(*query), drawn(*key), drawn(*value))
    for name, shape in (("query", query), ("key", key), ("value", value)):
        assert f"{name} {tuple(shape)} float32 on cpu" in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_mixed_dtypes(which, dtype):
    tensors = dict(query=drawn(*Q), key=drawn(*K), value=drawn(*V))
    tensors[which] = tensors[which].to(dtype)
    with pytest.raises(RegardError, match=r"in one dtype of float64, float32, float16, bfloat16"):
        attention(**tensors)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_is_not_computed(dtype):
    tensors = [torch.ones(shape).to(dtype) for shape in (Q, K, V)]
    with pytest.raises(RegardError, match=r"in one dtype of float64, float32, float16, bfloat16"):
        attention(*tensors)


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_mixed_devices(which):
    tensors = dict(query=drawn(*Q), key=drawn(*K), value=drawn(*V))
    tensors[which] = tensors[which].to("meta")
    with pytest.raises(RegardError, match=f"{which} .* on meta.*: move all of them to one device"):
        attention(**tensors)


REQUESTS = {
    "mask": ({"mask": torch.ones(5, 7).bool()}, "mask is a Tensor", "Dense(tensor)"),
    "mask class": ({"mask": Causal}, "mask is a type", "Causal()"),
    "dense": ({"mask": Dense(drawn(5, 5).bool())}, "(5, 5)", "(2, 4, 5, 7)"),
    "dense floats": ({"mask": Dense(drawn(5, 7))}, "torch.float32", "give bool (True: visible)"),
    "padding": ({"mask": Padding(drawn(2, 5))}, "keep is (2, 5)", "needs (2, 7)"),
    "documents": ({"mask": Documents(drawn(7))}, "query_ids is (1, 7)", "needs (2, 5)"),
    "heads": ({"mask": Causal() & Heads([4])}, "Heads([4])", "heads 0 … 3"),
    "mask elsewhere": (
        {"mask": Padding(drawn(2, 7).to("meta"))}, "keep is on meta", "the query on cpu; move",
    ),
    "bias": ({"bias": drawn(5, 6)}, "bias (5, 6)", "(2, 4, 5, 7)"),
    "bias of 5 dims": ({"bias": drawn(1, 2, 4, 5, 7)}, "(1, 2, 4, 5, 7)", "(2, 4, 5, 7)"),
    "bias of bools": ({"bias": drawn(5, 7).bool()}, "bias is torch.bool", "Dense(tensor)"),
    "bias elsewhere": ({"bias": drawn(5, 7).to("meta")}, "bias is on meta", "move one"),
    "second bias": ({"bias": [ALiBi(), drawn(4)]}, "bias (4,)", "(2, 4, 5, 7)"),
    "a number for bias": ({"bias": 3.0}, "bias", "ALiBi"),
    "a number among biases": ({"bias": [ALiBi(), 3.0]}, "bias", "ALiBi"),
    "slopes": ({"bias": ALiBi(drawn(2))}, "slopes is (2,)", "needs (4,)"),
    "table": ({"bias": RelativeBias(drawn(4, 32))}, "table is (4, 32)", "needs (4, 4)"),
    "small table": ({"bias": RelativeBias(drawn(2, 4))}, "table is (2, 4)", "(buckets ≥ 4, heads)"),
    "softcap": ({"softcap": 0.0}, "softcap is 0.0", "above 0, or None"),
    "softcap NaN": ({"softcap": float("nan")}, "softcap is nan", "a finite number"),
    "scale NaN": ({"scale": float("nan")}, "scale is nan", "a finite number"),
    "scale inf": ({"scale": float("inf")}, "scale is inf", "a finite number"),
    "scale words": ({"scale": "auto"}, "scale is 'auto'", "give a number"),
    "scales": ({"scale": drawn(4)}, "scale is tensor", "give a number"),
    "learned scale": (
        {"scale": drawn(1).requires_grad_()}, "scale is a tensor that needs a gradient",
        "multiply the query by it",
    ),
    "learned softcap": (
        {"softcap": drawn(1).requires_grad_()}, "softcap is a tensor that needs a gradient",
        "a number",
    ),
    "learned dropout": (
        {"dropout": drawn(1).requires_grad_()}, "dropout is a tensor that needs a gradient",
        "a number",
    ),
    "seed": ({"dropout": Dropout(0.1, 2**64)}, "seed is", "64 bits"),
    "causal": ({"causal": True}, "no argument is named causal", "mask=Causal()"),
    "is_causal": ({"is_causal": True}, "no argument is named is_causal", "mask=Causal()"),
    "attn_mask": ({"attn_mask": drawn(5, 7)}, "no argument is named attn_mask", "mask=Dense("),
    "masks": ({"masks": Causal()}, "no argument is named masks", "mask, bias, scale"),
    "half a start": ({"query_start": 1.5}, "query_start is 1.5", "a whole number"),
    "half a key": ({"key_start": 0.5}, "key_start is 0.5", "a whole number"),
    "far": ({"query_start": 2**31}, "queries stand from 2147483648 on", "within ± 2³¹"),
    "far back": ({"query_start": -(2**40)}, "queries stand from", "within ± 2³¹"),
    "far keys": ({"key_start": 2**31 - 3}, "keys from 2147483645 on", "within ± 2³¹"),
    "list for sinks": ({"sinks": [0.0] * 4}, "sinks is a list", "a torch tensor"),
    "huge k": ({"observe": [TopK(10**9)]}, "k is 1000000000", "give fewer"),
    "huge k of norms": ({"observe": [NormTopK(10**9)]}, "k is 1000000000", "give fewer"),
    "huge k of effects": ({"observe": [Effect(10**9)]}, "k is 1000000000", "give fewer"),
    "observer class alone": ({"observe": TopK}, "observe", "[TopK(8)]"),
    "a number for observers": ({"observe": 3}, "observe is 3", "[TopK(8)]"),
    "negative softcap": ({"softcap": -3}, "softcap is -3", "above 0, or None"),
    "sinks": ({"sinks": drawn(2)}, "sinks is (2,)", "one logit a head, (4,)"),
    "sinks elsewhere": ({"sinks": drawn(4).to("meta")}, "on meta", "on cpu"),
    "observer": ({"observe": [TopK(3), "entropy"]}, "observe holds 'entropy'", "TopK(8)"),
    "an observer alone": ({"observe": TopK(3)}, "observe", "[TopK(8)]"),
    "observer class": ({"observe": [Entropy]}, "observe holds", "TopK(8)"),
    "dropout": ({"dropout": 1.0}, "dropout is 1.0", "give 0 ≤ p < 1"),
    "projection": (
        {"observe": [NormTopK(3, drawn(12, 20))]}, "projection is (12, 20)", "(model_dim, 24)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong, shown, advice", REQUESTS.values(), ids=REQUESTS)
def test_requests_that_do_not_fit(wrong, shown, advice):
    with pytest.raises(RegardError) as error:
        attention(drawn(*Q), drawn(*K), drawn(*V), **wrong)
    assert shown in str(error.value)
    assert advice in str(error.value)


def test_whole_numbers_of_other_types():
    """NumPy's, and a tensor of one integer, are what they count."""
    five = Window(np.int64(5), ahead=torch.tensor(2))
    assert five == Window(5, ahead=2)
    assert all(type(n) is int for n in (five.n, five.ahead))
    assert Rows(np.arange(3)) == Rows([0, 1, 2])
    others = {"query_start": np.int32(4), "key_start": torch.tensor(1), "scale": np.float32(0.5)}
    tensors = drawn(*Q), drawn(*K), drawn(*V)
    right = attention(*tensors, mask=five, query_start=4, key_start=1, scale=0.5)
    assert torch.equal(attention(*tensors, mask=five, **others), right)


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_arrays_are_no_tensors(which):
    tensors = dict(query=drawn(*Q), key=drawn(*K), value=drawn(*V))
    tensors[which] = tensors[which].numpy()
    with pytest.raises(RegardError, match=f"{which} is a ndarray; give a torch tensor"):
        attention(**tensors)


def test_a_scale_that_needs_a_gradient_is_not_dropped():
    """By the drop-in, too; torch's own function refuses a tensor."""
    scale = torch.tensor(0.3, requires_grad=True)
    tensors = drawn(2, 4, 7, 8), drawn(*K), drawn(*K)
    for call in (scaled_dot_product_attention, linear_attention):
        more = {"enable_gqa": True} if call is scaled_dot_product_attention else {}
        more |= {"feature_map": None} if call is linear_attention else {}
        with pytest.raises(RegardError, match="multiply the query by it"):
            call(*tensors, scale=scale, **more)


def test_the_lse_of_a_second_pass():
    query, key = drawn(*Q), drawn(*K)
    with pytest.raises(RegardError, match=r"lse is \(2, 4, 7\).*this call needs \(2, 4, 5\)"):
        observe(query, key, lse=drawn(2, 4, 7), observe=[Entropy()])
    with pytest.raises(RegardError, match=r"lse is .* on meta; this call needs .* on cpu"):
        observe(query, key, lse=drawn(2, 4, 5).to("meta"), observe=[Entropy()])
    with pytest.raises(RegardError, match=r"each needs 4 dimensions"):
        observe(query, key[0], observe=[Entropy()])


def test_an_engine_that_is_not_there():
    with pytest.raises(RegardError, match=r"no engine is named 'fast'; there are auto, cpu, sdpa"):
        attention(drawn(*Q), drawn(*K), drawn(*V), engine="fast")


def test_no_engine_lists_every_refusal():
    """The named engine's reasons alone; the call with its shapes, dtype, device and mask."""
    with pytest.raises(NoEngine) as error:
        attention(
            drawn(*Q), drawn(*K), drawn(*V), mask=Causal() & Padding(drawn(2, 7) > 0), softcap=2.0,
            sinks=drawn(4), dropout=Dropout(0.1, 3), bias=ALiBi(), engine="sdpa",
        )  # fmt: skip
    first, *lines = str(error.value).splitlines()
    assert first == (
        "no engine can run attention on query (2, 4, 5, 8) float32 on cpu, key (2, 2, 7, 8), "
        "value (2, 2, 7, 6), mask (Causal() & Padding(keep (2, 7))), alibi bias, softcap, sinks, "
        "dropout"
    )
    (line,) = lines
    assert line.startswith("  sdpa: v_dim 6 is not dim 8")
    for what in ("softcap", "sinks", "dropout"):
        assert f"{what} is given; its kernel takes none" in line


def test_auto_lists_the_refusals_of_all(monkeypatch):
    for name, engine in ENGINES.items():
        monkeypatch.setattr(engine, "why_not", lambda call, name=name: [f"{name} is tired"])
    with pytest.raises(NoEngine) as error:
        attention(drawn(*Q), drawn(*K), drawn(*V))
    lines = str(error.value).splitlines()[1:]
    assert lines == [f"  {name}: {name} is tired" for name in ENGINES]


def test_errors_are_value_errors():
    assert issubclass(RegardError, ValueError)
    assert issubclass(NoEngine, RegardError)


def test_rows_beyond_the_call_are_left_out():
    """Not an error: decode steps keep those rows that the call computes."""
    (rows,) = observe(drawn(*Q), drawn(*K), observe=[Rows([0, 99, -1, -7, 4])])
    assert rows.queries == (6, 4)
    assert rows.weights.shape == (2, 4, 2, 7)
