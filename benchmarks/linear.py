"""Linear attention from 64k to 1M tokens, and where it overtakes exact attention.

    python benchmarks/linear.py [--lengths 65536 … 1048576] [--heads 1] [--dim 64] [--rounds 3]

For each form the time at each length, forward (with --backward: and backward), and its ratio to the
length before: linear cost is 2 when the length doubles. The lengths take turns, medians. Then
linear and exact attention (causal, engine auto) take turns at growing lengths up to --most: the
first at which linear attention is the faster, and stays so, is printed. One process, with the
threads torch has.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

import regard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMS = ("elu", "favor", "retention", "gla", "delta", "gated delta")


def request(form: str, heads: int, tokens: int, dim: int) -> dict[str, object]:
    """The keyword arguments of a form; gates and strengths in float32."""
    retention = torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float32))))
    if form == "elu":
        return {}
    if form == "favor":
        return {"feature_map": regard.linear.Favor(2 * dim)}
    if form == "retention":
        return {"feature_map": None, "decay": retention}
    if form == "gla":
        return {"feature_map": None, "decay": logsigmoid(torch.randn(1, heads, tokens, dim)) / 16}
    gated = {"decay": logsigmoid(torch.randn(1, heads, tokens))} if form == "gated delta" else {}
    return {"feature_map": None, "beta": torch.rand(1, heads, tokens), **gated}


def tensors(heads: int, tokens: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    query, key, value = (torch.randn(1, heads, tokens, dim) for _ in range(3))
    return [t.to(dtype) for t in (query, normalize(key, dim=-1), value)]


def seconds(run: Callable[[], Tensor], leaves: list[Tensor], backward: bool) -> float:
    for leaf in leaves:
        leaf.requires_grad_(backward)
        leaf.grad = None
    start = time.perf_counter()
    out = run()
    if backward:
        out.sum().backward()
    return time.perf_counter() - start


def growth(form: str, asked: argparse.Namespace) -> list[dict[str, float]]:
    """The form at each length: seconds, and the ratio to the length before.

    The lengths take turns; ratios are those of one round, and their median is told.
    """
    runs: list[Callable[[], float]] = []
    for tokens in asked.lengths:
        leaves = tensors(asked.heads, tokens, asked.dim, DTYPES[asked.dtype])
        given = request(form, asked.heads, tokens, asked.dim)

        def took(leaves: list[Tensor] = leaves, given: dict = given) -> float:
            return seconds(
                lambda: regard.linear_attention(*leaves, **given), leaves, asked.backward
            )

        took()
        runs.append(took)
    # Each length as often as makes as many tokens: a pause of the machine weighs the same in all
    rounds = [
        [statistics.fmean(took() for _ in range(max(asked.lengths) // tokens)) for took, tokens in
         zip(runs, asked.lengths, strict=True)]
        for _ in range(asked.rounds)
    ]  # fmt: skip
    rows: list[dict[str, float]] = []
    for i, tokens in enumerate(asked.lengths):
        rows.append({"tokens": tokens, "seconds": statistics.median(r[i] for r in rounds)})
        if i:
            # As if the length had doubled, whatever the step
            doublings = math.log2(tokens / asked.lengths[i - 1])
            ratios = [(r[i] / r[i - 1]) ** (1 / doublings) for r in rounds]
            rows[-1] |= {"ratio": statistics.median(ratios), "from": min(ratios), "to": max(ratios)}
    return rows


def crossover(form: str, asked: argparse.Namespace) -> dict[str, object]:
    """Linear and exact in turns at 64, 128, … tokens; the first length from which linear wins."""
    rows, tokens = [], 64
    while tokens <= asked.most:
        leaves = tensors(asked.heads, tokens, asked.dim, DTYPES[asked.dtype])
        given = request(form, asked.heads, tokens, asked.dim)
        runs: dict[str, Callable[[], Tensor]] = {
            "linear": lambda leaves=leaves, given=given: regard.linear_attention(*leaves, **given),
            "exact": lambda leaves=leaves: regard.attention(*leaves, mask=regard.Causal()),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(asked.rounds + 1):  # the first of each warms up
            for name, run in runs.items():
                times[name].append(seconds(run, leaves, asked.backward))
        medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
        rows.append({"tokens": tokens, **medians})
        tokens *= 2
    won = None
    for row in reversed(rows):
        if row["linear"] >= row["exact"]:
            break
        won = row["tokens"]
    return {"overtakes_at": won, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(16, 21)])
    parser.add_argument("--most", type=int, default=16384, help="the longest exact attention")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.manual_seed(0)
    found = {
        form: {"growth": growth(form, asked), "crossover": crossover(form, asked)}
        for form in asked.forms
    }
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
    if asked.json:
        print(json.dumps({"machine": machine, "request": vars(asked), "forms": found}, indent=1))
        return
    print(machine)
    print(
        f"{asked.heads} × {asked.dim}, {asked.dtype}, {'with' if asked.backward else 'no'} backward"
    )
    for form, result in found.items():
        print(form)
        for row in result["growth"]:
            ratio = ""
            if "ratio" in row:
                ratio = f"{row['ratio']:6.2f} × when it doubles ({row['from']:.2f}–{row['to']:.2f})"
            print(f"  {row['tokens']:>9,d} tokens {row['seconds']:9.3f} s {ratio}")
        at = result["crossover"]["overtakes_at"]
        print(f"  overtakes exact attention at {at:,d} tokens" if at else "  never overtakes here")


if __name__ == "__main__":
    main()
