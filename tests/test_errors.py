"""Wrong input: one RegardError whose message shows the shapes and says what to do."""

import pytest
import torch

from regard import (
    ALiBi,
    Causal,
    Dense,
    Distances,
    Documents,
    Dropout,
    Edges,
    Entropy,
    Heads,
    Map,
    NoEngine,
    NormTopK,
    Padding,
    Received,
    RegardError,
    RelativeBias,
    Rows,
    TopK,
    attention,
    explain,
    observe,
)
from regard.engines import ENGINES


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


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


VALUES = {
    "TopK(0)": (lambda: TopK(0), "TopK(k=0): give k ≥ 1"),
    "Map(0, 3)": (lambda: Map(0, 3), "give rows ≥ 1, cols ≥ 1 and reduce sum or max"),
    "Map mean": (lambda: Map(3, 3, "mean"), "give rows ≥ 1, cols ≥ 1 and reduce sum or max"),
    "Received median": (lambda: Received(heads="median"), "each, sum, mean, group_sum or"),
    "Received back": (lambda: Received((5, 3)), "a range (start, stop) of positions"),
    "Distances(0)": (lambda: Distances(0), "give bins ≥ 1, or edges that rise from 0"),
    "Distances from 1": (lambda: Distances((1, 2)), "edges that rise from 0"),
    "Distances down": (lambda: Distances((0, 5, 3)), "edges that rise from 0"),
    "Distances twice": (lambda: Distances((0, 3, 3)), "edges that rise from 0"),
    "Dropout(1)": (lambda: Dropout(1.0), "dropout is 1.0; give 0 ≤ p < 1"),
    "Dropout(-0.1)": (lambda: Dropout(-0.1), "dropout is -0.1; give 0 ≤ p < 1"),
    "triples": (
        lambda: Edges([(1, 2, 3), (4, 5, 6)]),
        "Edges: pairs are (2, 3); give (query, key)",
    ),
    "edges on their side": (
        lambda: Edges(torch.zeros(2, 5)),
        "Edges: pairs are (2, 5); give (query",
    ),
    "NormTopK(0)": (lambda: NormTopK(0), "give k ≥ 1"),
}


@pytest.mark.parametrize("make, said", VALUES.values(), ids=VALUES)
def test_values_that_make_no_sense(make, said):
    with pytest.raises(RegardError) as error:
        make()
    assert said in str(error.value)


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
    assert rows.indices == (6, 4)
    assert rows.weights.shape == (2, 4, 2, 7)
