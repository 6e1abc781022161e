"""Times calls against each other: in turns, in one process, and only while nothing else runs.

A round gives each side one turn: it runs untimed for a moment, so that the threads of the side
before it come to rest, then some calls are timed, and their median is the side's time in that
round. Every other round goes backwards. A round in which other processes used the cores is
discarded and repeated: a ratio is only ever taken between turns of the same quiet round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from ...errors import RegardError

SETTLE = 0.04  # seconds of untimed calls at the start of a turn
TIMED = 0.02  # seconds that the timed calls of a turn should fill
CALLS = 32  # and at most so many of them
LONG = 0.5  # a call of this many seconds needs neither
PAUSE = 0.5  # seconds to wait after a discarded round


class NeverQuiet(RegardError):
    """Other processes used the cores in every round, or in too many of them."""


@dataclass(frozen=True)
class Clock:
    """What timing needs to know of the world; a test gives its own.

    others: the CPU-seconds that other processes have used on our cores, ever growing.
    """

    others: Callable[[], float]
    cores: int
    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def allowed(self, wall: float) -> float:
        """The CPU-seconds that others may use in `wall` seconds: a tenth of one core.

        And two ticks of 10 ms, in which the kernel counts.
        """
        return 0.02 + 0.1 * wall


class Ratio(NamedTuple):
    """Of the rounds: the median, and the lowest and highest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Seconds a call, of each side in each kept round, and how many rounds were discarded."""

    rounds: Mapping[str, list[float]]
    discarded: int

    def seconds(self, side: str) -> float:
        """The median of the rounds."""
        return median(self.rounds[side])

    def ratio(self, side: str, to: str) -> Ratio:
        """The time of one side over that of another, within each round."""
        both = zip(self.rounds[side], self.rounds[to], strict=True)
        ratios = [mine / theirs for mine, theirs in both]
        return Ratio(median(ratios), min(ratios), max(ratios))


def alternate(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Clock,
    told: Callable[[int, int], None] = lambda kept, discarded: None,
) -> Timing:
    """Time the sides in `rounds` quiet rounds. NeverQuiet if there are not that many.

    told: after each round, how many were kept and how many discarded.
    """
    lengths = {name: _timed(run, clock) for name, run in sides.items()}
    kept: dict[str, list[float]] = {name: [] for name in sides}
    patience, loads = 2 * rounds + 3, []
    done = 0
    while done < rounds:
        order = list(sides)[:: -1 if done % 2 else 1]
        start, before = clock.now(), clock.others()
        for name in order:
            lengths[name] = _turn(sides[name], lengths[name], clock)
        wall, load = clock.now() - start, clock.others() - before
        if load <= clock.allowed(wall):
            done += 1
            for name in sides:
                kept[name].append(lengths[name])
        else:
            loads.append(load / wall)
            if len(loads) > patience:
                raise NeverQuiet(
                    f"other processes used {median(loads):.1f} of {clock.cores} cores in "
                    f"{len(loads)} of {len(loads) + done} rounds"
                )
            clock.sleep(PAUSE)
        told(done, len(loads))
    return Timing(kept, len(loads))


def _turn(run: Callable[[], Any], length: float, clock: Clock) -> float:
    """Seconds a call, in one turn of a side whose call took `length` before."""
    if length >= LONG:
        return _timed(run, clock)
    start = clock.now()
    while clock.now() - start < SETTLE:
        run()
    calls = min(max(math.ceil(TIMED / max(length, 1e-9)), 1), CALLS)
    return median(_timed(run, clock) for _ in range(calls))


def _timed(run: Callable[[], Any], clock: Clock) -> float:
    start = clock.now()
    run()
    return clock.now() - start
