"""Linear attention's Triton kernels, interpreted, on the shared cases; and that they compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import at
from linear_cases import FORMS
from regard import Documents, NoEngine, linear_attention
from regard.ops.linear.triton import launch as linear
from regard.ops.linear.triton.launch_bf16 import TILES

# An interpreted kernel takes a second: few and short sequences, chunks of 16 tokens
SMALL = at(37, batch=1, heads=2, kv_heads=1, dim=5, v_dim=3)
TWO = at(20, batch=2, heads=2, kv_heads=2, dim=3, v_dim=4)
TINY = at(17, batch=1, heads=1, kv_heads=1, dim=1, v_dim=1)
WIDE = at(18, batch=1, heads=1, kv_heads=1, dim=66, v_dim=67)  # two blocks of each
BACK = (
    "elu", "elu, gated", "identity", "retention", "scalar gate of heads", "gla", "gla of heads",
    "gates of 0 and 1", "channels of 0 and 1", "delta", "gated delta", "channel delta",
    "channel delta of 0 and 1",
)  # fmt: skip
MASKED = [
    "elu, both", "identity, documents with gaps", "gla, documents", "gla, left padding",
    "delta, documents of items", "delta, padding", "channel delta, both", "channel delta, nothing",
]  # fmt: skip
SWEPT = ("elu", "retention", "gla", "gated delta", "channel delta")


def jobs() -> dict[str, tuple]:
    """What the workers do: (module, function, arguments)."""
    where, jobs = "interpreted_linear", {}
    whole = torch.float32
    for form in FORMS:
        sizes = TWO if " of heads" in form else SMALL
        jobs[form] = (where, "check", form, sizes, whole, form in BACK)
    for n, name in enumerate(MASKED):
        jobs[name] = (where, "check", name, TWO if n % 2 else SMALL, whole, n % 3 == 0)
    for n, form in enumerate(SWEPT):
        for dtype in (torch.bfloat16, torch.float16):
            back = (dtype == torch.bfloat16) == (n % 2 > 0)
            jobs[f"{form}, {dtype}"] = (where, "check", form, TWO, dtype, back)
        back = form in ("retention", "channel delta")
        jobs[f"{form}, wide"] = (where, "check", form, WIDE, whole, back)
        jobs[f"{form}, tiny"] = (where, "check", form, TINY, whole, False)
        one = at(1, batch=1, heads=1, kv_heads=1, dim=4)
        jobs[f"{form}, one token"] = (where, "check", form, one, whole, form == "gated delta")
    for name in ("pieces", "same_bits", "bad_numbers", "auto", "states"):
        jobs[name] = (where, name)
    return jobs


JOBS = jobs()


@pytest.mark.triton
@pytest.mark.parametrize("job", JOBS)
def test_interpreted(job, interpreting):
    interpreting(JOBS[job])


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from regard.kernels.cuda import linear, recurrence, recurrence_back, recurrence_bf16

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *given, num_warps=4, num_stages=3, **constants):
        names = self.kernel.arg_names
        numbers = {int: "i32", float: "fp32"}
        types = {n: "*" + NAMES[g.dtype] if isinstance(g, torch.Tensor) else numbers[type(g)]
                 for n, g in zip(names, given)}
        source = ASTSource(self.kernel, types | dict.fromkeys(constants, "constexpr"),
                           {(names.index(n),): value for n, value in constants.items()})
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        fits = made.metadata.shared <= 227 * 1024 and len(made.asm["cubin"]) > 0
        print(self.kernel.__name__, "wgmma" in made.asm["ptx"], fits)

for module, names in ((recurrence, "pairs inverse walk read"),
                      (recurrence_back, "give walk_back products gradients"),
                      (recurrence_bf16, "sums pairs solve scan read")):
    for name in names.split():
        setattr(module, name, Compiled(getattr(module, name)))

query, key = torch.zeros(1, 4, 256, 64), torch.zeros(1, 2, 256, 64)
value, beta, memory = key.bfloat16(), torch.zeros(1, 2, 256), torch.zeros(1, 2, 64, 64)
linear.forward(query, key, value, key, beta, memory, False)
linear.backward(query, key, value, key[..., :1], None, memory, query, memory, False)
query, key = query.bfloat16(), key.bfloat16()
linear.forward(query, key, value, key.float(), beta, memory, False, 0.5)
"""


def test_no_scan_of_one_stage():
    """Triton 3.6 makes one that touches memory that is not there."""
    scans = [tiles for kernel, tiles in TILES.items() if kernel.startswith("scan")]
    assert len(scans) == 4
    assert all(tile.stages > 1 for tiles in scans for tile in tiles.values())


@pytest.mark.triton
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
    forward = ["pairs", "pairs", "inverse", "walk", "read"]
    back = ["pairs", "walk", "walk_back", "give", "products", "gradients"]
    made = [f"{name} True True" for name in forward + back]
    made += [
        "sums False True",
        *(f"{name} True True" for name in ("pairs", "solve", "scan", "read")),
    ]
    assert done.stdout.splitlines() == made, done.stderr


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def test_says_what_it_cannot_run():
    for given, reason in (
        ((ones(1, 2, 5, 4), ones(1, 1, 5, 4), ones(1, 1, 5, 257)), "v_dim is 257; it takes at"),
        ((*[ones(1, 2, 5, 300)] * 2, ones(1, 2, 5, 4)), "the keys have 300 features; it takes at"),
        ((ones(1, 2, 0, 4),) * 3, "the call is empty; it needs at least one of everything"),
        ((ones(1, 2, 3, 4, dtype=torch.float64),) * 3, "the call is float64; it computes in float"),
    ):
        (said,) = (r for r in linear.why_not(*given) if "triton" not in r)
        assert said.startswith(reason)


def test_named_it_never_falls_back():
    with pytest.raises(NoEngine, match=r"^triton cannot run .*: query is on cpu; it runs on cuda"):
        linear_attention(*[ones(1, 2, 5, 4)] * 3, engine="triton")
    packed = {"causal": False, "mask": Documents(torch.zeros(5, dtype=torch.long))}
    with pytest.raises(NoEngine, match="it runs on cuda"):
        linear_attention(*[ones(1, 2, 5, 4)] * 3, **packed, engine="triton")


def test_a_missing_triton_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(linear, "INSTALLED", False)
    assert linear.why_not(*[ones(1, 2, 5, 4)] * 3) == [
        'triton is not installed; pip install "regard[cuda]"'
    ]
