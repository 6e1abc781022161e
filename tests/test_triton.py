"""The Triton kernels, interpreted, on the shared cases; and that they compile for a GPU."""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from cases import CASES, FEW
from regard import (
    Causal,
    Distances,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    NormTopK,
    Received,
    RegardError,
    Rows,
    TopK,
    explain,
)
from regard.call import Call
from regard.kernels.cuda import instructions, reading

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (extra cuda)"
)
# In turn over the cases, as an interpreted kernel takes a second
SETS = [
    [Received(), MaxScore()],
    [Entropy(), Map(16, 16)],
    [Received((90, 120), "group_mean"), LogSumExp(), Rows([-1, -3])],
    [TopK(2), TopK(1)],
    [Distances(3), Map(3, 200, "max")],
]
ONE_BY_ONE = [c for c in FEW if c.sizes.q_len <= 150 and "dropout" not in c.name]
EVERY = ["6 heads of 1", "3 × 129", "40 × 3"]
NARROW = [c.name for c in CASES if c.name.startswith(("dim ", "6 heads", "12 heads"))]


def jobs() -> dict[str, tuple]:
    """What the workers do: (function of `interpreted`, arguments)."""
    jobs: dict[str, tuple] = {}
    for n, case in enumerate(ONE_BY_ONE):
        jobs[case.name] = ("check", case.name, torch.float32, SETS[n % len(SETS)], (64, 64))
    for n, name in enumerate(EVERY):
        blocks = [(16, 16), (32, 64), (16, 32)][n]
        jobs[f"every observer: {name}"] = ("check", name, torch.float32, None, blocks)
    for n, name in enumerate(NARROW):
        dtype = (torch.float16, torch.bfloat16)[n % 2]
        jobs[f"{name} {dtype}"] = ("check", name, dtype, SETS[(n + 3) % len(SETS)], (32, 64))
    for name in (
        "shards", "same_bits", "bad_numbers", "ties", "given_inaccurate", "inside_attention"
    ):  # fmt: skip
        jobs[name] = (name,)
    return jobs


JOBS = jobs()


@pytest.fixture(scope="module")
def answers(request):
    """A future for each job that this run selects, by two processes in which Triton interprets."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        items = (i for i in request.session.items if "answers" in i.fixturenames)
        asked = [i.callspec.params["job"] for i in items]
        with pytest.MonkeyPatch.context() as patch:
            # Before anything in the processes imports triton, which looks at it once
            patch.setenv("TRITON_INTERPRET", "1")
            futures = {job: pool.submit(work, *JOBS[job]) for job in asked}
        yield futures


def work(function: str, *arguments):
    import interpreted

    return getattr(interpreted, function)(*arguments)


@interpreted
@pytest.mark.parametrize("job", JOBS)
def test_interpreted(job, answers):
    said = answers[job].result()
    function, *arguments = JOBS[job]
    if function == "check":
        assert said == refusal(arguments[0])


def refusal(name: str) -> str:
    """What the kernels cannot do of the shared cases."""
    if name in ("no batch", "no query", "no key", "no key but sinks", "neither query nor key"):
        return "the call is empty; it needs at least one of everything"
    if name == "no dim":
        return "the call is empty; it needs at least one of everything"
    return ""


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from regard import *
from regard.call import Call
from regard.kernels.cuda import reading, weighing

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
         torch.uint8: "u8"}

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *given, num_warps=4, enable_fp_fusion=True, **constants):
        names = self.kernel.arg_names
        types = {n: "*" + NAMES[g.dtype] if isinstance(g, torch.Tensor)
                 else "fp32" if isinstance(g, float) else "i32" for n, g in zip(names, given)}
        source = ASTSource(self.kernel, types | dict.fromkeys(constants, "constexpr"),
                           {(names.index(n),): value for n, value in constants.items()})
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(self.kernel.__name__, "wgmma" in made.asm["ptx"], len(made.asm["cubin"]) > 0)

weighing.weigh, weighing.weigh_rows = Compiled(weighing.weigh), Compiled(weighing.weigh_rows)
query = torch.zeros(1, 4, 256, 64, dtype=torch.bfloat16)
call = Call.checked(query, query[:, :2], None, mask=Causal() & (Window(64) | First(4)))
asked = [TopK(8), Received(), Entropy(), Map(16, 16), Rows([1])]
reading.read(call, asked, torch.zeros(1, 4, 256), False)
"""


@interpreted
def test_compiles_for_a_gpu(tmp_path):
    """To machine code for Hopper, with its matrix instructions, where there is no GPU either."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["weigh True True", "weigh_rows False True"], done.stderr


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
        (call_of(query_start=2**31), "positions are beyond 2³⁰; it counts them in int32"),
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


def test_launches_are_as_few_as_can_be():
    call = call_of()
    asked = [TopK(3), TopK(5), Entropy(), Received(), Map(2, 2), Received(heads="sum"), Rows([0])]
    (one,) = reading.launches(asked, call)
    assert (one.listed, one.received, one.map) == (5, (0, 5), Map(2, 2))
    assert len(reading.launches([*asked, Received((1, 3)), Map(4, 4), Distances()], call)) == 2
    assert reading.launches([LogSumExp(), Rows([1])], call) == []
