"""Pooled tiles by Triton, interpreted, on the shared cases; and that they compile for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard import RegardError
from regard.call.checked import Call
from regard.engines.second_pass.pooled import Rectangle
from regard.engines.second_pass.triton import pooled

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"  # where `hopper` compiles
# Every instruction of a mask is tested in test_triton.py, by the same function
CHOSEN = [
    "full", "causal", "sinks and window", "an item of padding", "predicate by head", "nothing",
    "alibi", "relative", "bias that hides", "two biases", "softcap", "sinks alone",
    "all at once", "placed", "placed before 0", "huge scores", "sliced", "6 heads of 2",
]  # fmt: skip
NARROW = ["dim 24, v_dim 1", "dim 80, v_dim 80", "alibi of 6 heads"]


def jobs() -> dict[str, tuple]:
    """What the workers do: (module, function, arguments)."""
    where, jobs = "interpreted_pooled", {}
    for n, name in enumerate(CHOSEN):
        jobs[name] = (where, "check", name, torch.float32, n)
    for n, name in enumerate(NARROW):
        dtype = (torch.float16, torch.bfloat16)[n % 2]
        jobs[f"{name} {dtype}"] = (where, "check", name, dtype, n)
    for name in ("long_cells", "bad_numbers", "same_bits"):
        jobs[name] = (where, name)
    return jobs


JOBS = jobs()
SHORT = ("causal", "alibi", "dim 80, v_dim 80 torch.bfloat16", "same_bits")


@pytest.mark.triton
@pytest.mark.parametrize(
    "job", [pytest.param(j, marks=() if j in SHORT else pytest.mark.slow) for j in JOBS]
)
def test_interpreted(job, interpreting):
    assert not interpreting(JOBS[job])


@pytest.mark.triton
def test_says_what_it_cannot_pool():
    call = Call.checked(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), None)
    assert pooled.why_not(call, [Rectangle(0, 21, 0, 0)]) == []
    said = "a tile reaches beyond 2²⁸ of the call; it counts positions in int32"
    assert pooled.why_not(call, [Rectangle(0, 0, 0, 0), Rectangle(0, 22, 0, 0)]) == [said]
    assert pooled.why_not(call, [Rectangle(0, 0, -(2**30), 0)]) == [said]
    double = Call.checked(call.query.double(), call.key.double(), None)
    with pytest.raises(RegardError, match=r"cannot pool tiles of .* float64"):
        pooled.pooled(double, torch.zeros(1, 2, 5), [Rectangle(0, 0, 0, 0)], False)


COMPILE = """
import torch
from hopper import compiling

from regard import *
from regard.call.checked import Call
from regard.engines.second_pass.pooled import Rectangle
from regard.engines.second_pass.triton import pooled, pooled_kernel

def report(kernel, made):
    print("wgmma" in made.asm["ptx"], len(made.asm["cubin"]) > 0)

with compiling({pooled_kernel: "pool_rectangles"}, report):
    query = torch.zeros(1, 4, 256, 64, dtype=torch.bfloat16)
    lse = torch.zeros(1, 4, 256)
    call = Call.checked(query, query[:, :2], None, mask=Causal() & (Window(64) | First(4)))
    for zoom in (0, 3, 9):
        pooled.pooled(call, lse, [Rectangle(1, zoom, 0, 0)], zoom == 3)
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
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True"] * 6
