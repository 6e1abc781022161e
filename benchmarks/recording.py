"""What recording a long text costs beside watching it, and how fast a recording opens.

    python benchmarks/recording.py MODEL [--tokens 32768] [--rounds 1] [--layers 2]

MODEL is a folder or hub name of a causal model; the text is random tokens. In one process take
turns: the model alone, watched (TopK(8), Received(), Entropy(), Distances()), and recorded. Memory
is the peak above what was held after loading. Then the recording is opened, and tiles are read.
With --layers N the model is cut after its first N layers.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import regard
from regard import Distances, Entropy, Received, Recording, TopK

OBSERVERS = [TopK(8), Received(), Entropy(), Distances()]


def measured(run: Callable[[], object], base: int) -> tuple[float, float]:
    """(seconds, GiB of the peak above base, the KiB held after loading)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, (status("VmHWM") - base) / 2**20


def status(name: str) -> int:
    """A line of the process' status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def compare(
    model: Any, ids: torch.Tensor, rounds: int, folder: Path, only: list[str]
) -> dict[str, Any]:
    """Seconds and GiB of each way, in turns, and the ratio of recorded to watched."""

    def plain() -> None:
        model(ids, logits_to_keep=1)

    def watched() -> None:
        with regard.watch(model, observe=OBSERVERS, verify=False):
            model(ids, logits_to_keep=1)

    def recorded() -> None:
        given = {"input_ids": ids, "logits_to_keep": 1}
        regard.record(model, given, folder, overwrite=True, verify=False)

    ways = {"plain": plain, "watched": watched, "recorded": recorded}
    ways = {name: run for name, run in ways.items() if name in only}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with torch.no_grad():
        model(ids[:, :64])
        base = status("VmRSS")
        for _ in range(rounds):
            for name, run in ways.items():
                found[name].append(measured(run, base))
    said: dict[str, Any] = {
        name: {"seconds": [t for t, _ in runs], "gib": max(m for _, m in runs)}
        for name, runs in found.items()
    }
    if {"recorded", "watched"} <= set(found):
        both = zip(found["recorded"], found["watched"], strict=True)
        said["recorded / watched"] = statistics.median(r[0] / w[0] for r, w in both)
        said["gib above watched"] = said["recorded"]["gib"] - said["watched"]["gib"]
    return said


def opened(folder: Path) -> dict[str, Any]:
    """Seconds to open, and milliseconds a tile of each zoom takes, the first and the median."""
    start = time.perf_counter()
    recording = Recording.load(folder)
    found: dict[str, Any] = {"open": time.perf_counter() - start}
    size = sum(path.stat().st_size for path in folder.iterdir())
    found["gib"] = size / 2**30
    tiles = {}
    recording.tile(0, 0, 0, 0, 0)  # what is loaded once
    for zoom in range(recording.zooms(0)):
        last = max(recording.layer(0).q_len // (128 << zoom) - 1, 0)
        times = []
        for head in range(min(recording.layer(0).heads, 6)):
            start = time.perf_counter()
            recording.tile(0, head, zoom, last, last // 2)
            times.append(1e3 * (time.perf_counter() - start))
        tiles[zoom] = {"first ms": times[0], "median ms": statistics.median(times)}
    return found | {"tiles by zoom": tiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, help="run only the first so many layers")
    parser.add_argument("--ways", nargs="+", default=["plain", "watched", "recorded"])
    parser.add_argument("--folder", type=Path, help="where to record; kept")
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    if asked.layers:
        del model.model.layers[asked.layers :]
        model.config.num_hidden_layers = asked.layers
    ids = torch.randint(
        3, model.config.vocab_size, (1, asked.tokens), generator=torch.Generator().manual_seed(0)
    )
    folder = asked.folder or Path(tempfile.mkdtemp()) / "recording"
    found = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "tokens": asked.tokens,
        "layers": len(model.model.layers),
    } | compare(model.eval(), ids, asked.rounds, folder, asked.ways)  # fmt: skip
    if "recorded" in asked.ways:
        found |= opened(folder)
    print(json.dumps(found, indent=1))
    if asked.folder is None:
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
