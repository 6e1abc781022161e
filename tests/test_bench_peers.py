"""The sides of `regard bench`: each peer against float64, and what is refused or wrong."""

import shutil
import sys
from dataclasses import replace

import pytest
import torch

from regard import Causal, Documents, Entropy, First, Full, Map, Received, TopK, Window
from regard.lab.bench import accuracy as checking
from regard.lab.bench import peers, suites
from regard.lab.bench.accuracy import Truth
from regard.lab.bench.inputs import FORMS, Inputs
from regard.lab.bench.problems import TYPES, Problem
from regard.lab.bench.sides import Refused
from regard.sparse import BlockSparse, Dilated


def problem(**more) -> Problem:
    sizes = dict(q_len=96, k_len=96, dim=16, heads=4, kv_heads=4)
    return Problem(**(sizes | more))


PACKED = Documents.from_cu_seqlens(torch.tensor([0, 20, 50, 96]))
OBSERVED = (TopK(5), Received(), Entropy(), Map(16, 16))
PROBLEMS = {
    "full": problem(),
    "causal": problem(mask=Causal(), batch=2),
    "grouped": problem(mask=Causal(), kv_heads=2),
    "decode": problem(mask=Causal(), q_len=1, kv_heads=2, batch=2),
    "a few queries": problem(mask=Causal(), q_len=5),
    "window": problem(mask=Causal() & Window(9)),
    "sinks": problem(mask=Causal() & (Window(9) | First(4))),
    "documents": problem(mask=Causal() & PACKED),
    "blocks": problem(mask=Causal() & suites.blocks(192), q_len=192, k_len=192),
    "backward": problem(mask=Causal(), backward=True),
    "backward, grouped": problem(backward=True, kv_heads=2, batch=2),
    "observed": problem(mask=Causal(), observe=OBSERVED),
    "observed, ragged": problem(mask=Causal(), observe=OBSERVED, q_len=83, k_len=83, kv_heads=2),
    **{form: problem(mask=Causal(), form=form, kv_heads=2) for form in FORMS},
}
each_problem = pytest.mark.parametrize("name", PROBLEMS)


def answered(inputs: Inputs, make=peers.ours, engine: str = "tiled"):
    side = make(inputs, engine)
    return side.read(side.run())


@pytest.fixture
def in_parts(monkeypatch):
    """Small problems are checked as large ones are."""
    monkeypatch.setattr(checking, "WHOLE", 1)
    monkeypatch.setattr(checking, "RUN", 8)
    monkeypatch.setattr(checking, "STRIP", 2000)
    monkeypatch.setattr(checking, "TOKENS", 30)


@pytest.mark.parametrize("type", TYPES)
@each_problem
def test_right_results_pass(name, type, in_parts):
    inputs = Inputs(replace(PROBLEMS[name], type=type))
    assert Truth(inputs).fault(answered(inputs)) is None


@each_problem
def test_the_whole_is_checked_where_it_is_small(name):
    inputs = Inputs(PROBLEMS[name])
    truth = Truth(inputs)
    answer = answered(inputs)
    assert truth.fault(answer) is None
    for part in answer:
        wrong = dict(answer)
        wrong[part] = answer[part].clone()
        if part == "TopK keys":
            wrong[part][-1, -1, 40, 0] = wrong[part][-1, -1, 40, 4]
        else:
            wrong[part].flatten()[-1] += 0.01
        assert truth.fault(wrong).startswith(f"{part} is off by "), part


@pytest.mark.parametrize("row", [0, 7, 48, 95])
def test_some_rows_of_a_large_problem_are_checked(in_parts, row):
    inputs = Inputs(problem(mask=Causal()))
    answer = answered(inputs)
    answer["out"][0, 3, row, 3] += 0.01
    assert "out is off by" in Truth(inputs).fault(answer)


def test_columns_are_checked_over_all_rows(in_parts):
    inputs = Inputs(PROBLEMS["observed"])
    for name in ("Received", "Map"):
        answer = answered(inputs)
        answer[name][-1, -1].flatten()[2] += 0.01
        assert Truth(inputs).fault(answer).startswith(f"{name} is off by ")


@each_problem
def test_nan_anywhere_is_wrong(name):
    inputs = Inputs(PROBLEMS[name])
    answer = answered(inputs)
    first = next(iter(answer))
    answer[first] = answer[first].clone()
    answer[first][0, 1, 0, 0] = torch.nan
    assert Truth(inputs).fault(answer) == f"{first} holds NaN or infinity"


def test_the_bar_is_that_of_the_dtype():
    inputs = Inputs(problem())
    exact = Truth(inputs)._rows(checking.RowRange(0, 0, 0, 96), torch.float64)[0]["out"]
    answer = answered(inputs)
    answer["out"][:, :1] = (exact + 3e-6).float()
    assert "bar" in Truth(inputs).fault(answer)
    high = Inputs(problem(type="fp32-high"))  # two bfloat16 a number are right there
    assert Truth(high).fault(answer) is None
    answer["out"][:, :1] = (exact + 3e-3).float()
    assert "bar" in Truth(high).fault(answer)


def test_a_result_of_another_shape_is_wrong():
    inputs = Inputs(problem())
    out = answered(inputs)["out"]
    said = Truth(inputs).fault({"out": out[..., :1]})
    assert said == "out is (1, 1, 96, 1) where (1, 1, 96, 16) is right"


PAIRS = [
    *((p, peer) for p in ("full", "causal", "grouped", "decode", "a few queries", "window")
      for peer in ("sdpa", "eager", "onnxruntime", "plain")),
    *((p, peer) for p in ("sinks", "documents", "blocks") for peer in ("sdpa", "eager")),
    *((p, peer) for p in ("backward", "backward, grouped") for peer in ("sdpa", "eager")),
    *((p, peer) for p in ("observed", "observed, ragged")
      for peer in ("plain", "sdpa", "materialised")),
]  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize("type", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name, peer", PAIRS)
def test_peers_are_right(name, peer, type):
    inputs = Inputs(replace(PROBLEMS[name], type=type))
    if peer == "onnxruntime":
        pytest.importorskip("onnxruntime", reason='needs pip install "regard[bench]"')
        if type == "bf16":
            with pytest.raises(Refused, match="its CPU operators take float32 and float16"):
                peers.onnxruntime(inputs, "auto")
            return
    answer = answered(inputs, peers.PEERS[peer])
    assert Truth(inputs).fault(answer) is None
    expected = {"materialised": set(answered(inputs))}.get(peer, {"out"})
    if not inputs.problem.backward:
        assert set(answer) == expected


def test_what_onnxruntime_cannot_do_is_refused():
    pytest.importorskip("onnxruntime", reason='needs pip install "regard[bench]"')
    for name, reason in (
        ("documents", "its operators have no such mask for 4 heads of 4"),
        ("backward", "it has no backward pass"),
    ):
        with pytest.raises(Refused, match=reason):
            peers.onnxruntime(Inputs(PROBLEMS[name]), "auto")
    many = problem(mask=Causal(), q_len=3, batch=2)
    with pytest.raises(Refused, match="batch_size must be 1"):
        peers.onnxruntime(Inputs(many), "auto")


@pytest.mark.parametrize("missing", ["onnxruntime", "onnx"])
def test_what_is_not_installed_is_refused_with_its_extra(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "regard.lab.bench.ort", raising=False)
    monkeypatch.delattr("regard.lab.bench.ort", raising=False)
    said = rf'{missing} is not installed: pip install "regard\[bench\]"'
    with pytest.raises(Refused, match=said):
        peers.onnxruntime(Inputs(problem()), "auto")


def test_weights_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(peers, "available_bytes", lambda: 2**20)
    large = Inputs(problem(q_len=512, k_len=512))
    for peer in (peers.eager, peers.materialised):
        with pytest.raises(Refused, match="its weights would take 0 GiB, 4 times at its peak"):
            peer(large, "auto")


@pytest.mark.parametrize(
    "mask",
    [
        Full(), Causal(), Causal() & Window(9), Window(4, ahead=3), ~Causal(), First(7) | Window(2),
        Causal() & PACKED, Documents(torch.tensor([0, -1, 1, 1] * 24)),
        BlockSparse(torch.arange(36).view(6, 6) % 5 < 2, 16),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("queries", [96, 5, 1])
def test_masks_for_flex(mask, queries):
    if queries < 96 and ("Documents" in str(mask) or "Block" in str(mask)):
        return  # they are laid out for 96 queries
    inputs = Inputs(problem(mask=mask, q_len=queries))
    i, j = torch.arange(queries)[:, None], torch.arange(96)
    shown = peers.flex_mask(mask, 96 - queries)(torch.tensor(0), torch.tensor(0), i, j)
    shown = shown.expand(queries, 96)
    assert torch.equal(shown, inputs.visible[0, 0].expand(queries, 96))


def test_a_mask_that_flex_is_not_told_is_refused():
    with pytest.raises(Refused, match=r"no mask_mod is written here for Dilated\(3, 2\)"):
        peers.flex_mask(Causal() & Dilated(3, 2), 0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention is compiled by g++")
def test_flex_is_compiled_and_right():
    inputs = Inputs(problem(mask=Causal() & Window(20), kv_heads=2))
    assert Truth(inputs).fault(answered(inputs, peers.flex)) is None


def test_what_flex_cannot_do_is_refused():
    with pytest.raises(Refused, match="FlexAttention does not support backward on CPU"):
        peers.flex(Inputs(problem(backward=True, mask=Causal())), "auto")


def test_without_a_compiler_flex_is_refused():
    import torch._inductor.config as inductor

    with (
        inductor.patch({"cpp.cxx": (None, "/no/compiler"), "force_disable_caches": True}),
        pytest.raises(Refused, match="No working C\\+\\+ compiler found"),
    ):
        peers.flex(Inputs(problem(q_len=40, k_len=56)), "auto")
