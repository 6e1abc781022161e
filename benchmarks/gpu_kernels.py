"""What the compiler makes of the Triton kernels, without a GPU: a table of them for Hopper.

    python benchmarks/gpu_kernels.py [--tokens 16384] [--dims 64 128] [--only PART] [--write FILE]

Registers, spilled numbers, shared memory, and instructions: of the whole kernel, and of its loop
over tiles of keys (what a thread executes for one tile). A change that spills, or lengthens the
loop, is seen here. It needs triton (extra `cuda`), whose own tools read the machine code.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from hopper import compiling

from regard import Causal, Entropy, Full, Map, Padding, Received, TopK
from regard.cache import Pages
from regard.call.checked import Call
from regard.engines.blocks import backward_kernel, forward_kernel
from regard.engines.blocks import launch as blocks
from regard.engines.decode import attend_kernel as attending
from regard.engines.decode import engine as decode
from regard.engines.second_pass.triton import effect as measuring
from regard.engines.second_pass.triton import effect_kernel
from regard.engines.second_pass.triton import few_queries_kernel as few
from regard.engines.second_pass.triton import read as reading
from regard.engines.second_pass.triton import read_kernel as weighing
from regard.engines.second_pass.triton import rows_kernel as rows
from regard.engines.second_pass.triton import top_k_kernel as listing

ASKED = {
    "entropy": [Entropy()],
    "received": [Received()],
    "map": [Map(256, 256)],
    "top": [TopK(8)],
    "all four": [TopK(8), Received(), Entropy(), Map(256, 256)],
}
HEADINGS = (
    "| kernel | gathers | dim | mask | registers | spilled | shared, KiB | all | loop | MMA |"
)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def measured(made: Any) -> str:
    """The columns of a line of the table, of a compiled kernel."""
    registers, code = _read(made.asm["cubin"])
    loop = _loop(code)
    spilled = sum(text.startswith("STL") for _, text in code)
    return (
        f"{registers} | {spilled} | {made.metadata.shared / 1024:.0f} | {len(code)} | "
        f"{len(loop) or '–'} | {sum(map(_multiplies, loop)) or '–'} |"
    )


def _read(cubin: bytes) -> tuple[int, list[tuple[int, str]]]:
    """Registers of a thread, and the code: (address, instruction without its predicate)."""

    def ask(flag: str, path: str) -> str:
        return subprocess.run(
            [TOOLS / "cuobjdump", flag, path], capture_output=True, text=True, check=True
        ).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = ask("-res-usage", file.name), ask("-sass", file.name)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?);", text, re.MULTILINE)
    return int(found[1]), [(int(address, 16), line) for address, line in lines]


def _multiplies(text: str) -> bool:
    """Whether an instruction multiplies matrices: of a warp group, or of a warp (few queries)."""
    return text.startswith(("HGMMA", "HMMA"))


def _loop(code: list[tuple[int, str]]) -> list[str]:
    """The shortest stretch that a branch repeats and that multiplies matrices; empty if none."""
    loops = []
    for at, text in code:
        to = re.search(r"^BRA.* 0x([0-9a-f]+)", text)
        if to and int(to[1], 16) < at:
            body = [t for address, t in code if int(to[1], 16) <= address <= at]
            if any(map(_multiplies, body)):
                loops.append(body)
    return min(loops, key=len, default=[])


def _one_query(tokens: int, dim: int, group: int, mask: Any) -> Call:
    """One query of `group` heads over keys in pages of 64."""
    pool = torch.zeros(tokens // 64, 1, 64, dim, dtype=torch.bfloat16)
    pages = Pages(torch.arange(tokens // 64).view(1, -1), torch.tensor([tokens]))
    query = torch.zeros(1, group, 1, dim, dtype=torch.bfloat16)
    return Call.checked(query, pool, pool, mask=mask, pages=pages)


def _prompt(tokens: int, dim: int, mask: Any) -> Call:
    """A prompt of 512 queries over keys in pages of 64."""
    one = _one_query(tokens, dim, 1, mask)
    query = torch.zeros(1, 1, 512, dim, dtype=torch.bfloat16)
    return Call.checked(query, one.key, one.value, mask=mask, pages=one.pages)


Compiling = Callable[[str, dict[Any, str]], AbstractContextManager[None]]


def observed(tokens: int, dim: int, within: Compiling) -> None:
    """The second pass over many queries."""
    query = torch.zeros(1, 1, tokens, dim, dtype=torch.bfloat16)
    lse = torch.zeros(1, 1, tokens)
    kernels = {weighing: "weigh", rows: "sum_rows", listing: "list_keys"}
    for mask, (name, observers) in product((Full(), Causal()), ASKED.items()):
        with within(f"{name} | {dim} | {mask}", kernels):
            reading.read(Call.checked(query, query, None, mask=mask), observers, lse, False)


def few_queries(tokens: int, dim: int, within: Compiling) -> None:
    """One query: what `decode` computes, and all four."""
    for group, mask in product((1, 8), (Full(), Causal())):
        where = f"one query, {group} heads a key | {dim} | {mask}"
        one = _one_query(tokens, dim, group, mask)
        with within(where, {attending: "attend_chunk join_chunks"}):
            decode.attend(one)
        with within(f"all four, {where}", {few: "weigh_few join_few"}):
            reading.read(one, ASKED["all four"], torch.zeros(1, group, 1), False)


def prompts(tokens: int, dim: int, within: Compiling) -> None:
    """Many queries over pages."""
    for mask in (Full(), Causal()):
        with within(f"512 queries over pages | {dim} | {mask}", {forward_kernel: "attend_rows"}):
            blocks.attend(_prompt(tokens, dim, mask))


def mends(tokens: int, dim: int, within: Compiling) -> None:
    """What hidden numbers spoil."""
    whole, lse = torch.zeros(1, 1, tokens, dim, dtype=torch.bfloat16), torch.zeros(1, 1, tokens)
    keep = Padding(torch.ones(1, tokens, dtype=torch.bool))
    kernels = {forward_kernel: "attend_rows", backward_kernel: "mend_queries mend_keys"}
    for mask in (Causal(), keep):
        call = Call.checked(whole, whole, whole, mask=mask)
        with within(f"mends | {dim} | {type(mask).__name__}()", kernels):
            blocks.mend(call, whole, lse)
            blocks.mend_gradients(call, whole, lse, whole, (whole, whole, whole))


def effects(tokens: int, dim: int, within: Compiling) -> None:
    """Effect(8)."""
    whole, lse = torch.zeros(1, 1, tokens, dim, dtype=torch.bfloat16), torch.zeros(1, 1, tokens)
    kernels = {rows: "sum_rows", effect_kernel: "weigh_edges list_edges"}
    for mask in (Full(), Causal()):
        with within(f"Effect(8) | {dim} | {mask}", kernels):
            call = Call.checked(whole, whole, whole, mask=mask)
            measuring.effect(call, lse, whole, 8, whole)


PARTS = {
    "observed": observed, "few": few_queries, "prompts": prompts, "mends": mends,
    "effects": effects,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--only", choices=list(PARTS), help="a part of the table")
    parser.add_argument("--write", type=Path, help="write the table to this Markdown file, too")
    asked = parser.parse_args()
    lines = [HEADINGS, "|---" * HEADINGS[1:].count("|") + "|"]
    print("\n".join(lines), flush=True)

    def within(where: str, kernels: dict[Any, str]) -> AbstractContextManager[None]:
        def report(kernel: Any, made: Any) -> None:
            lines.append(f"| {kernel.__name__} | {where} | {measured(made)}")
            print(lines[-1], flush=True)

        return compiling(kernels, report)

    for dim in asked.dims:
        for name, part in PARTS.items():
            if asked.only in (None, name):
                part(asked.tokens, dim, within)
    if asked.write:
        head = f"Triton {triton.__version__}, sm_90, bfloat16, {asked.tokens} tokens\n\n"
        asked.write.write_text(head + "\n".join(lines) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
