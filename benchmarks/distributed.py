"""Time of attention over ranks of this machine beside the formulas' prediction.

    python benchmarks/distributed.py [--length 12288] [--ranks 2 4] [--write docs/distributed.md]

Causal, 8 heads of 64, 4 of keys, float32, batch 1: forward, forward and backward, and the forward
observed by TopK(8), Received() and Entropy(). Each number of ranks is a fresh set of processes on
gloo over loopback, which share the cores; the longest of the ranks counts, the rounds' median.
Predicted is the compute of one process on all cores, as measured here, and the bytes of
docs/distributed.md at the rate that two ranks pass 64 MiB on, as measured here: by heads one after
the other, by gather and ring one beside the other. --write puts the table between the two marks of
a page.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spawned import answers_of

HEADS, KV_HEADS, DIM = 8, 4, 64
KINDS = ("forward", "backward", "observed")
MESSAGE = 2**24  # numbers of 4 bytes that are passed on to measure the rate
BEGIN, END = "<!-- benchmarks/distributed.py: from here -->", "<!-- to here -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=12288)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--how", nargs="+", default=["heads", "gather", "ring"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a page with the two marks")
    asked = parser.parse_args()
    one = together(1, ["heads"], asked.length, asked.rounds)
    found = {n: together(n, asked.how, asked.length, asked.rounds) for n in asked.ranks}
    rates = [times["rate"] for n, times in found.items() if n == 2] or [
        times["rate"] for times in found.values()
    ]
    seconds = {kind: one["heads", kind] for kind in KINDS}
    lines = [
        f"Of one process: forward {seconds['forward']:.2f} s, forward and backward "
        f"{seconds['backward']:.2f} s, observed {seconds['observed']:.2f} s; a rank passes on "
        f"{rates[0] / 2**20:,.0f} MiB/s.",
        "",
        "| ranks | how | forward, s | predicted | with backward, s | predicted | observed, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, times in found.items():
        for how in asked.how:
            cells = [f"{times[how, 'forward']:.2f}"]
            cells.append(f"{predicted(how, size, asked.length, one, rates[0], back=False):.2f}")
            cells.append(f"{times[how, 'backward']:.2f}")
            cells.append(f"{predicted(how, size, asked.length, one, rates[0], back=True):.2f}")
            cells.append(f"{times[how, 'observed']:.2f}")
            lines.append(f"| {size} | {how} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if asked.write:
        page = asked.write.read_text("utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        text = "\n".join(lines)
        asked.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


def predicted(
    how: str, size: int, length: int, one: dict[Any, float], rate: float, *, back: bool
) -> float:
    """Seconds, from the compute of one process on all cores and the bytes that a rank sends."""
    from regard.ops.distributed import formulas

    sizes = formulas.Sizes(size, 1, HEADS, KV_HEADS, length, length, DIM, DIM, 4)
    # The ranks share the cores: a P-th of the work on a P-th of them takes as long as all on all
    forward = beside(how, size, one["heads", "forward"], formulas.forward(how, sizes) / rate)
    if not back:
        return forward
    compute = one["heads", "backward"] - one["heads", "forward"]
    return forward + beside(how, size, compute, formulas.backward(how, sizes) / rate)


def beside(how: str, size: int, compute: float, travel: float) -> float:
    """Seconds of computing and sending, one beside the other as far as the way lets them."""
    if how == "heads":
        return compute + travel
    if how == "gather":  # one group of heads: nothing is computed before it is here
        return compute + travel
    step = compute / size
    return (size - 1) * max(step, travel / (size - 1)) + step


def together(size: int, ways: list[str], length: int, rounds: int) -> dict[Any, float]:
    """Seconds of (how, kind), the longest of the ranks; "rate": bytes/s that a rank passes on."""
    answers = answers_of(size, _rank, ways, length, rounds)
    slowest = {key: max(a[key] for a in answers) for key in answers[0]}
    return slowest | {"rate": min(a["rate"] for a in answers)}


def _rank(
    rank: int, size: int, store: str, ways: list[str], length: int, rounds: int, found: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import regard
    from regard.ops.distributed.collectives import Ranks
    from regard.ops.distributed.layout import Layout, named

    torch.set_num_threads(max((os.cpu_count() or 1) // size, 1))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))["cp"]
    own = Layout(length, named("zigzag", size)).size(rank)
    observe = [regard.TopK(8), regard.Received(), regard.Entropy()]
    mask = regard.Causal()

    def run(how: str, kind: str) -> None:
        wants = kind == "backward"
        q, k, v = (
            torch.randn(1, h, own, DIM, requires_grad=wants) for h in (HEADS, KV_HEADS, KV_HEADS)
        )
        with torch.set_grad_enabled(wants), regard.context_parallel(mesh, how):
            asked = observe if kind == "observed" else None
            answer = regard.attention(q, k, v, mask=mask, observe=asked)
        if wants:
            answer.sum().backward()

    def timed(act: Callable[[], Any]) -> float:
        dist.barrier()
        began = time.perf_counter()
        act()
        return time.perf_counter() - began

    times: dict[Any, list[float]] = {}
    for round_ in range(rounds + 1):
        for how in ways:
            for kind in KINDS:
                seconds = timed(lambda how=how, kind=kind: run(how, kind))
                if round_:  # the first loads what is loaded once
                    times.setdefault((how, kind), []).append(seconds)
    told: dict[Any, float] = {key: statistics.median(each) for key, each in times.items()}
    message, ranks = torch.zeros(MESSAGE, dtype=torch.float32), Ranks(mesh)
    passed = [timed(lambda: ranks.passing(message)()) for _ in range(3)]
    told["rate"] = message.nbytes / statistics.median(passed)
    found.put(told)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
