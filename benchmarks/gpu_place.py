"""Where the scripts for a GPU compute, and how they take time.

REGARD_DRY=1: on a CPU, by Triton's interpreter, with `gpu_dry` in the place of what only a GPU has.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

DRY = bool(os.environ.get("REGARD_DRY"))
DEVICE = "cpu" if DRY else "cuda"
UNTIMED, TIMED = (1, 2) if DRY else (3, 15)

Calls = Mapping[str, Callable[..., Any]]


def in_turns(calls: Calls, given: Sequence[tuple[Any, ...]]) -> tuple[dict[str, float], list[str]]:
    """(milliseconds of each call, what failed): medians by CUDA events, one call after the other.

    given: arguments, in rotation. A call that fails is left out, and the others go on.
    """
    alive, failed = dict(calls), []
    for name, call in calls.items():
        try:
            for n in range(UNTIMED):
                call(*given[n % len(given)])
            torch.cuda.synchronize()
        except Exception as error:  # of one call: the others are still to be measured
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {error}")
            del alive[name]
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in alive}
    for turn in range(TIMED):
        for name, call in alive.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call(*given[turn % len(given)])
            end.record()
            spans[name].append((begin, end))
    torch.cuda.synchronize()
    return {n: median(b.elapsed_time(e) for b, e in each) for n, each in spans.items()}, failed
