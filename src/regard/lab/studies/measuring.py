"""The time and the memory of a call, on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from ...errors import RegardError

ENOUGH = 0.3  # seconds of timed calls
CALLS = 3  # at least so many


def seconds(run: Callable[[], Any], enough: float = ENOUGH) -> float:
    """Seconds a call: the median of some, after one that is not timed."""
    run()
    taken: list[float] = []
    while len(taken) < CALLS or (sum(taken) < enough and len(taken) < 50):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return median(taken)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that the process holds during a call, beyond what it held before: its result
    and all between. Resident memory, proc(5); Linux only."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc else keeps what was freed, and would reuse it
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark
    except OSError as error:
        raise RegardError(
            "peak memory is read from Linux's /proc/self, which is not here"
        ) from error
    before = _held("VmRSS")
    kept = run()
    peak = _held("VmHWM") - before
    del kept
    return max(0, peak)


def _held(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = [one for one in status.splitlines() if one.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
