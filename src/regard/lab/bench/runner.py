"""Runs entries: prepares the sides, checks what they compute, then times them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...engines import ENGINES
from ...errors import NoEngine, RegardError
from . import machine
from .accuracy import Truth
from .inputs import Inputs
from .peers import PEERS, engine_of, ours
from .problems import Problem
from .sides import Contestant, Refused
from .suites import Entry
from .timing import Clock, NeverQuiet, Ratio, Timing, alternate

OURS = "ours"
Told = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to run: the engine of ours, and how many quiet rounds an entry needs.

    within: seconds after which no entry is begun; None: all are.
    """

    engine: str = "auto"
    rounds: int = 7
    within: float | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("auto", *ENGINES):
            known = ", ".join(ENGINES)
            raise RegardError(f"no engine is named {self.engine!r}; there are auto, {known}")


@dataclass
class Outcome:
    """What came of an entry. A side without a time has its reason in `refused` or `wrong`.

    engine: the one that ours took. wrong: side → what is wrong with its result. refused: side →
    why it cannot run. busy: why there are no times at all.
    """

    entry: Entry
    engine: str = ""
    timing: Timing | None = None
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    busy: str = ""

    @property
    def failed(self) -> bool:
        """Whether ours is wrong, or there was no quiet to time it in."""
        return OURS in self.wrong or bool(self.busy)

    def seconds(self, side: str) -> float | None:
        """The median time of a side."""
        timing = self._timing(side)
        return None if timing is None else timing.seconds(side)

    def ratio(self, peer: str) -> Ratio | None:
        """The peer's time over ours."""
        timing = self._timing(peer)
        return None if timing is None else timing.ratio(peer, OURS)

    def cost(self, peer: str) -> Ratio | None:
        """Our time over that of the peer."""
        timing = self._timing(peer)
        return None if timing is None else timing.ratio(OURS, peer)

    def _timing(self, side: str) -> Timing | None:
        return self.timing if self.timing is not None and side in self.timing.rounds else None


def run(
    entries: Sequence[Entry], settings: Settings, clock: Clock, told: Told = lambda what: None
) -> Iterator[Outcome]:
    """What comes of each entry. NeverQuiet if there was no quiet for the first that was timed."""
    quiet, start = False, clock.now()
    for number, entry in enumerate(entries, 1):
        if settings.within is not None and clock.now() - start > settings.within:
            return
        told_of = partial(_told, told, f"{number} of {len(entries)}: {entry.name}")
        outcome = measure(entry, settings, clock, told_of)
        if outcome.busy and not quiet:
            raise NeverQuiet(
                f"the machine is not quiet: {outcome.busy} of {entry.name}; stop them and run again"
            )
        quiet = quiet or outcome.timing is not None
        yield outcome


def _told(told: Told, where: str, what: str) -> None:
    told(f"{where}, {what}")


def measure(
    entry: Entry, settings: Settings, clock: Clock, told: Told = lambda what: None
) -> Outcome:
    """What comes of one entry. What is wrong, or too noisy, is told without a time."""
    outcome = Outcome(entry)
    with _torch_set(entry.problem):
        told("checking")
        inputs = Inputs(entry.problem)
        try:
            outcome.engine = engine_of(inputs, settings.engine)
        except NoEngine as error:
            outcome.refused[OURS] = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            return outcome
        sides = _right(inputs, settings.engine, outcome)
        if OURS in outcome.wrong:
            return outcome

        def progress(kept: int, discarded: int) -> None:
            noisy = f", {discarded} discarded" if discarded else ""
            told(f"round {kept} of {settings.rounds}{noisy}")

        try:
            runs = {name: side.run for name, side in sides.items()}
            outcome.timing = alternate(runs, settings.rounds, clock, progress)
        except NeverQuiet as error:
            outcome.busy = str(error)
    return outcome


def _right(inputs: Inputs, engine: str, outcome: Outcome) -> dict[str, Contestant]:
    """The sides that can run the problem and are right; the others are noted in the outcome."""
    truth = Truth(inputs)
    makers: dict[str, Any] = {OURS: ours} | {name: PEERS[name] for name in outcome.entry.peers}
    sides = {}
    # What a side starts on its first call, such as threads, it starts here
    with machine.everywhere(machine.cores()):
        for name, make in makers.items():
            try:
                side = make(inputs, engine)
            except Refused as why:
                outcome.refused[name] = str(why)
                continue
            answer = side.run()
            fault = None if side.read is None else truth.fault(side.read(answer))
            if fault is None:
                sides[name] = side
            else:
                outcome.wrong[name] = fault
                if name == OURS:
                    break
    return sides


@contextmanager
def _torch_set(problem: Problem) -> Iterator[None]:
    """torch's threads and precision as asked for, while this is open."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(problem.threads or threads)
    torch.set_float32_matmul_precision(problem.precision)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
