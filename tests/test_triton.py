"""The Triton kernels, interpreted, on the shared cases; and that they compile for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard import (
    Causal,
    Distances,
    Entropy,
    First,
    Full,
    LogSumExp,
    Map,
    MaxScore,
    NormTopK,
    Padding,
    Received,
    RegardError,
    Rows,
    TopK,
    Window,
    attention,
    explain,
)
from regard.call.checked import Call
from regard.engines.second_pass.triton import mask_records as instructions
from regard.engines.second_pass.triton import read as reading
from regard.engines.second_pass.triton import tile_grid as geometry
from regard.engines.second_pass.triton.arguments import Shared

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"  # where `hopper` compiles
# In turn over the cases, as an interpreted kernel takes a second
SETS = [
    [Received(), MaxScore()],
    [Entropy(), Map(16, 16)],
    [Received((90, 120), "group_mean"), LogSumExp(), Rows([-1, -3])],
    [TopK(2), TopK(1)],
    [Distances(3), Map(3, 200, "max")],
]
# Every instruction of a mask, every kind of bias, strides, and what a score may be
CHOSEN = [
    "full", "causal", "window ahead", "sinks and window", "documents", "padding", "heads", "edges",
    "dense", "predicate by head", "block sparse", "dilated", "fixed", "chunks", "longformer",
    "alibi", "relative", "bias that hides", "two biases",
    "softcap and bias", "sinks alone", "placed patterns", "placed before 0", "placed relative",
    "huge scores", "transposed", "sliced", "expanded",
]  # fmt: skip
EVERY = ["40 × 3", "one item"]
NARROW = ["dim 1, v_dim 1", "dim 80, v_dim 80", "dim 256, v_dim 256", "alibi of 6 heads"]


def jobs() -> dict[str, tuple]:
    """What the workers do: (module, function, arguments)."""
    jobs: dict[str, tuple] = {}
    for n, name in enumerate(CHOSEN):
        jobs[name] = ("interpreted", "check", name, torch.float32, SETS[n % len(SETS)], (64, 64))
    for n, name in enumerate(EVERY):
        blocks = [(16, 16), (32, 64)][n]
        every = ("interpreted", "check", name, torch.float32, None, blocks)
        jobs[f"every observer: {name}"] = every
    for n, name in enumerate(NARROW):
        dtype = (torch.float16, torch.bfloat16)[n % 2]
        asked = SETS[(n + 3) % len(SETS)]
        jobs[f"{name} {dtype}"] = ("interpreted", "check", name, dtype, asked, (32, 64))
    for name in (
        "shards", "same_bits", "bad_numbers", "hidden_numbers", "ties", "given_inaccurate",
        "inside_attention",
    ):  # fmt: skip
        jobs[name] = ("interpreted", name)
    return jobs


JOBS = jobs()


@pytest.mark.sample(0)
@pytest.mark.triton
@pytest.mark.parametrize("job", JOBS)
def test_interpreted(job, interpreting):
    assert not interpreting(JOBS[job])


COMPILE = """
import torch
from hopper import compiling

from regard import *
from regard.call.checked import Call
from regard.cache import Pages
from regard.engines.second_pass.triton import effect, read
from regard.engines.second_pass.triton import effect_kernel, few_queries_kernel, read_kernel
from regard.engines.second_pass.triton import rows_kernel, top_k_kernel

def report(kernel, made):
    print(kernel.__name__, "wgmma" in made.asm["ptx"], len(made.asm["cubin"]) > 0)

from regard.engines.decode import engine as decode
from regard.engines.decode import attend_kernel as decode_kernel

kernels = {rows_kernel: "sum_rows weigh_rows", read_kernel: "weigh", top_k_kernel: "list_keys",
           effect_kernel: "weigh_edges list_edges", few_queries_kernel: "weigh_few join_few",
           decode_kernel: "attend_chunk join_chunks"}
with compiling(kernels, report):
    query = torch.zeros(1, 4, 256, 64, dtype=torch.bfloat16)
    call = Call.checked(query, query[:, :2], None, mask=Causal() & (Window(64) | First(4)))
    asked = [TopK(8), Received(), Entropy(), Map(16, 16), Rows([1])]
    lse = torch.zeros(1, 4, 256)
    read.read(call, asked, lse, False)
    value = query[:, :2]
    wide = torch.zeros(1, 4, 256, 128, dtype=torch.bfloat16)  # no square tiles
    call = Call.checked(wide, wide[:, :2], value, mask=Causal(), dropout=Dropout(0.1, 3))
    effect.effect(call, lse, query, 8, query)
    pages = Pages(torch.arange(4).view(1, 4), torch.tensor([256]))
    pool = torch.zeros(4, 2, 64, 64, dtype=torch.bfloat16)
    asked = [TopK(8), Received(), Entropy(), MaxScore(), Map(16, 16), Distances(), Rows([-1])]
    call = Call.checked(query[:, :, :2], pool, None, mask=Causal(), bias=ALiBi(), pages=pages)
    read.read(call, asked, lse[:, :, :2].clone(), False)
    for sinks in (None, torch.zeros(4)):
        decode.attend(Call.checked(query[:, :, :2], pool, pool, sinks=sinks, pages=pages))
    wide = wide.float()
    decode.attend(Call.checked(wide[:, :, :2], wide[:, :2], wide[:, :2], mask=Causal()))
"""


@pytest.mark.triton
def test_compiles_for_a_gpu(tmp_path):
    """To machine code for Hopper, with its matrix instructions, where there is no GPU either."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(BENCHMARKS)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "sum_rows True True",
        "weigh True True",
        "list_keys False True",
        "weigh_rows False True",
        *["sum_rows True True", "weigh_edges True True", "list_edges False True"],
        "weigh_few False True",  # what its columns divide by
        "join_few False True",
        "weigh_few False True",
        "join_few False True",
        "weigh_rows False True",
        *["attend_chunk False True", "join_chunks False True"] * 3,
    ], done.stderr


def call_of(dtype=torch.float32, dim=16, **request) -> Call:
    query = torch.zeros(1, 2, 5, dim, dtype=dtype)
    return Call.checked(query, query, None, **request)


def test_says_what_it_cannot_read():
    flat = torch.zeros(5, 5)
    for call, reason in (
        (call_of(torch.float64), "query is float64; it computes in float32"),
        (call_of(dim=300), "dim is 300; it takes at most 256"),
        (call_of(dim=0), "the call is empty; it needs at least one of everything"),
        (call_of(bias=[flat] * 3), "3 biases are tensors; it takes 2, so add some up before"),
        (call_of(query_start=2**30), "positions are beyond 2³⁰; it counts them in int32"),
    ):
        assert [r for r in reading.why_not(call) if "triton" not in r] == [reason]
    mask = Causal()
    for _ in range(31):
        mask = Causal() & mask
    assert instructions.depth(call_of(mask=mask).program) == 32
    assert "the mask holds 32 answers at once; it takes 31" in reading.why_not(call_of(mask=mask))
    assert reading.refuses(TopK(65)) == ["TopK(k=65) is longer than the 64 that registers hold"]
    assert reading.refuses(NormTopK(2)) == ["NormTopK is not among what it gathers"]
    assert not reading.refuses(TopK(64))
    with pytest.raises(RegardError, match=r"cannot read query \(1, 2, 5, 16\) .*NormTopK is not"):
        reading.read(call_of(), [NormTopK(2)], torch.zeros(1, 2, 5), False)


def test_a_missing_triton_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(reading, "installed", lambda: False)
    with pytest.raises(RegardError, match=r'triton is not installed; pip install "regard\[cuda\]"'):
        reading.read(call_of(), [TopK(1)], torch.zeros(1, 2, 5), False)


def test_explain_says_who_reads():
    query = torch.zeros(1, 2, 5, 16)
    said = explain(query, query, query, observe=[TopK(100), NormTopK(1), Entropy()])
    assert list(said)[-1] == "second pass by triton"
    assert said["second pass by triton"] == [
        "query is on cpu; the kernel runs on cuda",
        "TopK(k=100) is longer than the 64 that registers hold",
        "NormTopK is not among what it gathers",
    ]
    assert "second pass by triton" not in explain(query, query, query)


def test_bands_need_no_list():
    """Who sees how many keys, counted from a band's two numbers and from the mask itself."""
    query, key = torch.zeros(1, 2, 37, 16), torch.zeros(1, 2, 50, 16)
    lse = torch.zeros(1, 2, 37)
    for mask, band in (
        (Causal(), (2**29, 0)),
        (Causal() & Window(7), (6, 0)),
        (Window(5, 3) & Window(9, 2), (4, 2)),
        (Full() & Window(5, 3), (4, 3)),
        (Causal() | First(3), None),
        (~Causal(), None),
        (Causal() & Padding(torch.ones(1, 50, dtype=torch.bool)), None),
    ):
        call = Call.checked(query, key, None, mask=mask, query_start=11, key_start=2)
        shared = Shared(call, lse)
        assert geometry.band_of(shared) == band, mask
        if band is not None:
            shown = _dense(mask)
            for span in ((0, 37), (5, 20)):
                counts = geometry.counts_of(shared, span, band)
                assert torch.equal(counts[0, 0], shown[slice(*span)].sum(0).int()), (mask, span)
    far = Call.checked(query, key, None, mask=Causal(), query_start=2**28)
    assert geometry.band_of(Shared(far, lse)) is None


def _dense(mask):
    """The mask of queries 11 … 47 and keys 2 … 51, by its definition."""
    _, (rows,) = attention(
        torch.zeros(1, 1, 37, 16), *torch.zeros(2, 1, 1, 50, 16), mask=mask, query_start=11,
        key_start=2, observe=[Rows(range(11, 48))], engine="reference",
    )  # fmt: skip
    return rows.weights[0, 0] > 0


def test_launches_are_as_few_as_can_be():
    call = call_of()
    asked = [TopK(3), TopK(5), Entropy(), Received(), Map(2, 2), Received(heads="sum"), Rows([0])]
    (one,) = reading.launches(asked, call)
    assert (one.listed, one.received, one.map) == (5, (0, 5), Map(2, 2))
    assert len(reading.launches([*asked, Received((1, 3)), Map(4, 4), Distances()], call)) == 2
    assert reading.launches([LogSumExp(), Rows([1])], call) == []
