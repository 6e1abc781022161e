"""On a CUDA GPU: every kernel against float64, then what the weights in sight cost, in stages.

    python benchmarks/gpu.py [--quick | --full] [--only STAGE]... [--write docs/FILE.md]

--quick: a sample of the checks and the main table, for a GPU that is at hand for minutes. --full:
everything. Each line is printed as it comes. A stage that fails is named, the others run, and the
exit code is 1, as where a result is wrong. Without a GPU: one sentence, exit code 2.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

import gpu_check
import gpu_linear
import gpu_times
import torch

import regard

Lines = Callable[[], Iterator[str]]
QUICK: dict[str, Lines] = {
    "check": gpu_check.sampled,
    "observed": partial(gpu_times.observed, (2048, 16384)),
    "decoding": partial(gpu_times.decoding, (32768,), (1,)),
    "memory": partial(gpu_times.memory, 131072),
}
FULL: dict[str, Lines] = {
    "check": gpu_check.checked,
    "check linear": gpu_linear.checked,
    "ceilings": gpu_times.ceilings,
    "observed": partial(gpu_times.observed, (2048, 8192, 16384, 32768)),
    "memory": partial(gpu_times.memory, 131072),
    "effects": partial(gpu_times.effects, (2048, 8192, 32768)),
    "decoding": partial(gpu_times.decoding, (2048, 32768, 131072), (1, 16)),
    "linear": partial(gpu_times.linear, 32768),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a sample, in minutes (the default)")
    size.add_argument("--full", action="store_true", help="everything")
    parser.add_argument(
        "--only", action="append", metavar="STAGE", choices=list(FULL), help=f"of {', '.join(FULL)}"
    )
    parser.add_argument("--write", type=Path, help="write the tables to this Markdown file, too")
    asked = parser.parse_args()
    stages = FULL if asked.full else QUICK
    if missing := [name for name in asked.only or () if name not in stages]:
        parser.error(f"{missing[0]} is a stage of --full alone")
    if not torch.cuda.is_available():
        print("No CUDA GPU is available here, and nothing else is measured.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    text, failed = run({name: stages[name] for name in asked.only or stages})
    if asked.write:
        asked.write.write_text("\n".join([*heading(), *text]) + "\n", "utf-8")
    return int(failed)


def run(stages: dict[str, Lines]) -> tuple[list[str], bool]:
    """(the lines of what was timed, whether a stage failed or found something wrong)."""
    text, failed = [], False
    for name, lines in stages.items():
        begun, count, checks = time.monotonic(), 0, name.startswith("check")
        print(f"== {name}", file=sys.stderr, flush=True)
        try:
            for line in lines():
                count += 1
                print(f"WRONG {line}" if checks else line, flush=True)
                if not checks:
                    text.append(line)
        except Exception as error:  # a kernel that does not compile is no reason to lose the rest
            traceback.print_exc()
            print(f"FAILED {name}: {error}", flush=True)
            text.append(f"{name} failed: {type(error).__name__}")
            failed = True
        text.append("")
        failed = failed or (checks and count > 0)
        spent = time.monotonic() - begun
        print(f"   {name}: {spent:.0f} s, {count} lines", file=sys.stderr, flush=True)
    return text, failed


def heading() -> Iterator[str]:
    import triton

    card = torch.cuda.get_device_properties(0)
    yield "# Benchmarks on a GPU"
    yield ""
    yield f"{card.name}, {card.total_memory / 2**30:.0f} GiB; PyTorch {torch.__version__}, "
    yield f"Triton {triton.__version__}, regard {regard.__version__}; {date.today()}."
    yield f"By `{' '.join(['benchmarks/gpu.py', *sys.argv[1:]])}`: bfloat16, batch 1, "
    yield f"{gpu_times.HEADS} heads, the median of {gpu_times.TIMED} calls by CUDA events, inputs"
    yield "in rotation."
    yield ""


if __name__ == "__main__":
    sys.exit(main())
