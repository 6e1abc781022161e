"""All that a GPU is to say, in the minutes that one is at hand: what is wrong, then each bar.

    python benchmarks/gpu_ready.py FOLDER [--seconds 540] [--jobs 16] [--only PART]... [--dry]

First every check, those most at risk first, --jobs at a time, as compiling takes most of them;
beside them what is measured later is compiled; all that for 0.55 of the time at most, where
measurements follow. Then one measurement at a time. A part is a process
with a time limit of its own: what crashes, hangs or is not reached loses no other. Rows are written
as they come, as lines of JSON, to FOLDER/PART.jsonl, what a part says to FOLDER/PART.log; at the
end, and in FOLDER/summary.txt, what is wrong, missed, failed, or was not reached. Exit code 1 if
there is any. --dry: no GPU; each part at a few tokens, by Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_bars
import gpu_check
import gpu_linear
import gpu_place
import torch
from gpu_place import DRY

Lines = Callable[[], Iterator[Any]]
HERE = Path(__file__).parent
CHECKING = 0.55  # of the time
COMPILING = 280  # seconds that a part may take to compile its kernels


@dataclass(frozen=True)
class Part:
    """Of one process: what it yields, and how many seconds it may take."""

    rows: Lines
    limit: int
    compiles: bool = False  # it is run beside the checks, too, for its kernels


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CHECKS: dict[str, Part] = {
    "gradients bf16": Part(partial(gpu_check.gradients, BF16), 150),
    "pages": Part(gpu_check.in_pages, 150),
    "prompts over pages": Part(gpu_check.prompts_in_pages, 150),
    "effect bf16": Part(partial(gpu_check.effects, BF16), 150),
    "second pass bf16 64": Part(partial(gpu_check.passes, BF16, 64), 200),
    "second pass bf16 128": Part(partial(gpu_check.passes, BF16, 128), 200),
    "gradients f32": Part(partial(gpu_check.gradients, F32), 150),
    "gradients f16": Part(partial(gpu_check.gradients, F16), 150),
    "effect f32": Part(partial(gpu_check.effects, F32), 150),
    "few queries": Part(gpu_check.few, 150),
    "linear bf16": Part(partial(gpu_linear.forms, BF16), 200),
    "linear f32": Part(partial(gpu_linear.forms, F32), 200),
    "second pass f32 64": Part(partial(gpu_check.passes, F32, 64), 200),
    "second pass f16 80": Part(partial(gpu_check.passes, F16, 80), 200),
    "second pass bf16 256": Part(partial(gpu_check.passes, BF16, 256), 200),
    "flex": Part(gpu_check.flexes, 200),
}
BARS: dict[str, Part] = {
    "observed 16384": Part(partial(gpu_bars.observed, 16384), 90, True),
    "effect 8192": Part(partial(gpu_bars.effects, 8192), 60, True),
    "linear 32768": Part(partial(gpu_bars.linear, 32768), 90, True),
    "decode 1": Part(partial(gpu_bars.decoding, 1), 45, True),
    "decode 16": Part(partial(gpu_bars.decoding, 16), 45),
    "host": Part(gpu_bars.host, 45),
    "watch": Part(gpu_bars.watch, 60),
    "effect 32768": Part(partial(gpu_bars.effects, 32768), 45),
    "memory": Part(gpu_bars.memory, 30),
    "grouped": Part(gpu_bars.grouped, 30),
    "observed 32768": Part(partial(gpu_bars.observed, 32768), 90),
    "linear 8192": Part(partial(gpu_bars.linear, 8192), 60),
    "observed 2048": Part(partial(gpu_bars.observed, 2048), 45),
}
PARTS = CHECKS | BARS


def run(name: str, folder: Path, compiling: bool) -> None:
    """One part, in this process: its rows, as they come."""
    place: AbstractContextManager[None] = nullcontext()
    if DRY:
        import gpu_dry

        place = gpu_dry.stand_in()
    if compiling:
        gpu_place.UNTIMED, gpu_place.TIMED = 1, 1
    torch.manual_seed(0)
    path = folder / f"{name}{' compiled' * compiling}.jsonl"
    with place, path.open("w", encoding="utf-8") as file:
        for row in PARTS[name].rows():
            made = {"wrong": row} if isinstance(row, str) else row
            print(json.dumps(made, ensure_ascii=False), file=file, flush=True)


class Runner:
    """Starts parts as processes, within the time that is left."""

    def __init__(self, folder: Path, seconds: float, dry: bool) -> None:
        self.folder, self.end, self.dry = folder, time.monotonic() + seconds, dry
        self.said: dict[str, str] = {}  # of parts: how they ended

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def all(self, parts: list[tuple[str, bool]], jobs: int, share: float = 1.0) -> None:
        """Run parts (name, only to compile), `jobs` at a time, in their order.

        share: of the time that is left.
        """
        until = time.monotonic() + share * self.left
        waiting, running = list(parts), []
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < until:
                running.append(self.begun(*waiting.pop(0), until))
            if time.monotonic() >= until:
                waiting.clear()
            running = [one for one in running if not self.ended(*one)]
            time.sleep(0.05)

    def begun(
        self, name: str, compiling: bool, until: float
    ) -> tuple[str, subprocess.Popen, float]:
        print(f"{self.left:6.0f} s left: {name}{', to compile' * compiling}", flush=True)
        command = [sys.executable, __file__, str(self.folder), "--part", name]
        more = {"REGARD_DRY": "1", "TRITON_INTERPRET": "1"} if self.dry else {}
        full = name + " compiled" * compiling
        with (self.folder / f"{full}.log").open("w") as log:
            process = subprocess.Popen(
                [*command, *["--compile"] * compiling], stdout=log, stderr=log,
                env=os.environ | more, cwd=HERE,
            )  # fmt: skip
        limit = 3600 if self.dry else COMPILING if compiling else PARTS[name].limit
        return full, process, min(until, time.monotonic() + limit)

    def ended(self, name: str, process: subprocess.Popen, until: float) -> bool:
        code = process.poll()
        if code is None and time.monotonic() < until:
            return False
        if code is None:
            process.kill()
            process.wait()
            self.said[name] = "stopped at its time limit"
        else:
            self.said[name] = "" if code == 0 else f"ended with {code}"
        print(f"{self.left:6.0f} s left: {name}: {self.said[name] or 'done'}", flush=True)
        return True


def summary(folder: Path, said: dict[str, str], parts: dict[str, Part]) -> list[str]:
    """What is wrong, missed, failed or was not reached."""
    lines = [f"{name}: {how}" for name, how in said.items() if how]
    for name in parts:
        path = folder / f"{name}.jsonl"
        if name not in said:
            lines.append(f"{name}: not reached")
            continue
        for row in map(json.loads, path.read_text("utf-8").splitlines() if path.exists() else ()):
            for what in ("wrong", "failed"):
                if what in row:
                    lines.append(f"{name}: {what}: {row[what]}")
            if row.get("met") is False:
                got = row.get("ratio", row.get("value", row.get("ms")))
                lines.append(f"{name}: missed: {row['name']}: {got} (bar {row.get('bar', '')})")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--jobs", type=int, default=16, help="checks at a time")
    parser.add_argument("--only", action="append", choices=list(PARTS), metavar="PART")
    parser.add_argument("--dry", action="store_true", help="no GPU: see above")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    if asked.part:
        run(asked.part, folder, asked.compile)
        return 0
    if not asked.dry and not torch.cuda.is_available():
        print("No CUDA GPU is available here; --dry runs each part without one.", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {name: part for name, part in PARTS.items() if name in (asked.only or PARTS)}
    runner = Runner(folder, asked.seconds, asked.dry)
    checks = [(name, False) for name in chosen if name in CHECKS]
    compiled = [(name, True) for name, part in chosen.items() if part.compiles]
    bars = [(name, False) for name in chosen if name in BARS]
    runner.all([*checks[:5], *compiled, *checks[5:]], asked.jobs, CHECKING if bars else 1.0)
    runner.all(bars, 1)
    lines = summary(folder, runner.said, chosen)
    (folder / "summary.txt").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines or ["All parts ran; nothing is wrong, no bar is missed."]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
