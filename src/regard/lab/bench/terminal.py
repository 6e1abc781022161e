"""The table of `regard bench` on a terminal: 80 columns, a line a pair, as it is measured."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ...report.screen import fit
from .runner import OURS, Outcome, Settings
from .tables import (
    COSTS,
    NAMES,
    Notes,
    about,
    discarded,
    legend,
    number,
    overtaking,
    seconds,
    span,
    told,
    why_not,
)

_DIM, _HEAD = "dim", "bold"
_BESIDE = 58  # columns of a line beside the shape's


class Table:
    """Prints outcomes one by one."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = max(80, min(console.width, 100))
        self.label = self.width - _BESIDE
        self.suite = ""
        self.notes = Notes()

    def head(self, machine: Mapping[str, Any]) -> None:
        """The machine and the versions."""
        self._wrapped(about(machine))

    def add(self, outcome: Outcome) -> None:
        """The lines of one outcome."""
        if outcome.entry.suite != self.suite:
            self.suite = outcome.entry.suite
            columns = f"{'ours':>8} {'engine':<9} {'peer':<12} {'time':>8} {'ratio':>5} range"
            self._print(Text())
            self._print(Text(f"{fit(self.suite, self.label)} {columns}", style=_HEAD))
        for line in self._lines(outcome):
            self._print(line)

    def foot(self, outcomes: Sequence[Outcome], settings: Settings) -> None:
        """Why there is no time, what the columns mean, and how much was discarded."""
        self._print(Text())
        for note in self.notes:
            self._wrapped(note)
        self._wrapped(overtaking(outcomes))
        self._wrapped(f"{legend(settings)} {discarded(outcomes, settings)}")

    def _lines(self, outcome: Outcome) -> Iterator[Text]:
        label = fit(outcome.entry.shape.replace("/", " "), self.label)
        mine = outcome.seconds(OURS)
        if mine is None:
            why = why_not(outcome, OURS)
            for part in textwrap.wrap(": ".join(why), self.width - self.label - 1):
                yield Text(f"{label} ").append(part, style="bold red")
                label = " " * self.label
            return
        start = f"{label} {seconds(mine):>8} {fit(outcome.engine, 9)}"
        for peer in outcome.entry.peers:
            line = Text(f"{start} {fit(NAMES.get(peer, peer), 12)} ")
            ratio, time = told(outcome, peer), outcome.seconds(peer)
            if ratio is None or time is None:
                yield line.append(self.notes.of(outcome, peer), style="yellow")
            else:
                shown = f"{'×' * (peer in COSTS)}{number(ratio.median)}"
                line.append(f"{seconds(time):>8} ").append(f"{shown:>5}", style=_HEAD)
                yield line.append(f" {span(ratio)}", style=_DIM)
            start = " " * len(start)

    def _wrapped(self, text: str) -> None:
        for line in textwrap.wrap(text, self.width):
            self._print(Text(line, style=_DIM))

    def _print(self, line: Text) -> None:
        self.console.print(line, no_wrap=True, overflow="crop", crop=True, highlight=False)
