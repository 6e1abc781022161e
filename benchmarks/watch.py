"""A long text through a real model: plain, watched, and eager with all its weights.

    python benchmarks/watch.py MODEL TEXT [--tokens 4096 16384] [--rounds 3] [--backward]

MODEL is a folder or hub name of a causal model, TEXT a text file. Plain (sdpa) and watched take
turns in one process; the times are medians. Memory is the peak above what was held after loading.
Eager runs once a length, and only where its weights fit into --eager-gib. --backward measures the
memory of Effect(8) beside an ordinary backward pass instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import regard
from regard import Effect, Entropy, Map, Received, TopK

OBSERVERS = [TopK(8), Received(), Entropy(), Map(256, 256)]


def measured(run: Callable[[], object], base: int) -> tuple[float, float]:
    """(seconds, GiB of the peak above base, the KiB held after loading)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, (_status("VmHWM") - base) / 2**20


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def compare(model: str, ids: torch.Tensor, rounds: int, eager_gib: float) -> dict[str, object]:
    """One length: plain and watched in turns, then eager."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def plain() -> None:
        loaded(ids)

    def watched() -> None:
        with regard.watch(loaded, observe=OBSERVERS):
            loaded(ids)

    times: dict[str, list[tuple[float, float]]] = {"plain": [], "watched": []}
    with torch.no_grad():
        loaded(ids[:, :64])
        base = _status("VmRSS")
        for _ in range(rounds):
            times["plain"].append(measured(plain, base))
            times["watched"].append(measured(watched, base))
        row: dict[str, object] = {"tokens": ids.shape[1]}
        for name, runs in times.items():
            row[name] = {
                "seconds": statistics.median(t for t, _ in runs),
                "gib": max(m for _, m in runs),
            }
        ratios = [w[0] / p[0] for p, w in zip(*times.values(), strict=True)]
        row["ratio"] = statistics.median(ratios)
        row["ratios"] = ratios
        config = loaded.config
        size = 4 * config.num_hidden_layers * config.num_attention_heads * ids.shape[1] ** 2
        if size * 2 < eager_gib * 2**30:
            loaded.set_attn_implementation("eager")
            seconds, gib = measured(lambda: loaded(ids, output_attentions=True), base)
            row["eager"] = {"seconds": seconds, "gib": gib}
    return row


def backward(model: str, ids: torch.Tensor) -> dict[str, object]:
    """Peak memory of a backward pass, ordinary and with Effect(8) on all layers."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def plain() -> None:
        loaded(ids, labels=ids).loss.backward()
        loaded.zero_grad()

    def watched() -> None:
        with regard.watch(loaded, observe=[Effect(8)]) as seen:
            loaded(ids, labels=ids).loss.backward()
        assert all(layer.seen[0].ready for layer in seen)
        loaded.zero_grad()

    base = _status("VmRSS")
    row: dict[str, object] = {"tokens": ids.shape[1]}
    for name, run in (("plain", plain), ("effect", watched)):
        seconds, gib = measured(run, base)
        row[name] = {"seconds": seconds, "gib": gib}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager-gib", type=float, default=8.0)
    parser.add_argument("--backward", action="store_true", help="Effect(8) in a backward pass")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.model)
    ids = tokenizer(asked.text.read_text(), return_tensors="pt").input_ids
    rows = [
        backward(asked.model, ids[:, :n])
        if asked.backward
        else compare(asked.model, ids[:, :n], asked.rounds, asked.eager_gib)
        for n in asked.tokens
    ]
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
    if asked.json:
        print(json.dumps({"machine": machine, "rows": rows}, indent=1))
        return
    print(machine)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
