"""Outcomes written down: times, ratios, the machine; one object for JSON; a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from . import saved
from .runner import OURS, Outcome, Settings
from .suites import SUITES, Entry
from .timing import Ratio

COSTS = ("plain", "half")
"""The peers of which not the ratio is told but the cost: ours over them."""
NAMES = {"plain": "unobserved"}
"""How a peer is told, where that is not its name."""


def legend(settings: Settings) -> str:
    """What the figures are."""
    return (
        f"ratio: the peer's time over ours, the median of {_count(settings.rounds, 'quiet round')} "
        "in turns; range: the lowest and highest of them. ×: our time over that of ours without "
        "observers, or of half the tokens."
    )


def discarded(outcomes: Iterable[Outcome], settings: Settings) -> str:
    """How many rounds there were, and how many of them did not count."""
    timed = [o.timing for o in outcomes if o.timing is not None]
    lost = sum(t.discarded for t in timed)
    return f"{lost} of {lost + settings.rounds * len(timed)} rounds discarded: other load."


def seconds(value: float) -> str:
    """Three digits, and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value / 1e-6)} µs"


def number(value: float) -> str:
    """A ratio in three digits."""
    return _three(value)


def span(ratio: Ratio) -> str:
    """The lowest and the highest round."""
    return f"{number(ratio.low)}–{number(ratio.high)}"


def told(outcome: Outcome, peer: str) -> Ratio | None:
    """What is told of a peer: the cost of those in `COSTS`, else the ratio."""
    return outcome.cost(peer) if peer in COSTS else outcome.ratio(peer)


def why_not(outcome: Outcome, side: str) -> tuple[str, str]:
    """Why a side has no time: in a word, and the reason."""
    if side in outcome.wrong:
        return "wrong", outcome.wrong[side]
    if side in outcome.refused:
        return "refused", outcome.refused[side]
    return "not timed", outcome.busy or f"ours was {why_not(outcome, OURS)[0]}"


class Notes:
    """Why there is no time, each reason once, numbered."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, outcome: Outcome, side: str) -> str:
        """A word in the place of a side's time, and the number of the reason."""
        word, why = why_not(outcome, side)
        return f"{word} [{self.numbers.setdefault(why, len(self.numbers) + 1)}]"

    def __iter__(self) -> Iterator[str]:
        return (f"[{n}] {why}" for why, n in self.numbers.items())


def about(machine: Mapping[str, Any]) -> str:
    """The machine and the versions, in a line."""
    isa = ", ".join(machine["isa"]) or "no known vector extension"
    kernels = f", kernels {machine['kernels']}" if machine["kernels"] else ", no kernels"
    bound = {"true": "bound", "false": "not bound"}.get(machine["bound"], machine["bound"])
    parts = [
        f"{machine['processor']}, {_count(machine['cores'], 'core')} ({isa})",
        f"{machine['memory_gib']:.0f} GiB",
        f"{_count(machine['threads'], 'thread')}, {bound}",
        f"regard {machine['regard']}{kernels}",
        f"torch {machine['torch']}",
        f"onnxruntime {machine['onnxruntime']}" if machine["onnxruntime"] else "",
        f"Python {machine['python']}",
        machine["system"],
        machine["date"],
    ]
    return " · ".join(part for part in parts if part)


def overtaken(outcomes: Iterable[Outcome]) -> dict[str, int | None]:
    """From which of the lengths on each form of linear attention is faster than exact attention.

    None: at none of those that were timed. Forms that were not timed against it are left out.
    """
    ratios: dict[str, dict[int, float]] = {}
    for outcome in outcomes:
        problem, ratio = outcome.entry.problem, outcome.ratio("causal")
        if problem.form is not None and ratio is not None:
            form = f"{problem.type} {problem.form}"
            ratios.setdefault(form, {})[problem.k_len] = ratio.median
    found: dict[str, int | None] = {}
    for form, at in ratios.items():
        found[form] = None
        for length in sorted(at, reverse=True):
            if at[length] < 1:
                break
            found[form] = length
    return found


def overtaking(outcomes: Iterable[Outcome]) -> str:
    """The same in a sentence; empty where linear attention was not timed against it."""
    said = [
        f"{form} from {length} tokens on" if length else f"{form} at no length timed"
        for form, length in overtaken(outcomes).items()
    ]
    return f"Linear attention is faster than exact attention: {', '.join(said)}." if said else ""


def listing(entries: Sequence[Entry]) -> Iterator[str]:
    """The suites, their shapes, and the peers of each."""
    suite = ""
    for entry in entries:
        if entry.suite != suite:
            suite = entry.suite
            yield f"{suite}: {SUITES[suite].__doc__}"
        peers = ", ".join(NAMES.get(peer, peer) for peer in entry.peers)
        yield f"  {'·' if entry.quick else ' '} {entry.name:<34} {peers}"
    yield "· is among those of --quick"


def as_dict(
    outcomes: Sequence[Outcome], machine: Mapping[str, Any], settings: Settings
) -> dict[str, Any]:
    """One object, fit for JSON: what `regard bench --help` documents."""
    return {
        "machine": dict(machine),
        "engine": settings.engine,
        "rounds": settings.rounds,
        "entries": [_entry(outcome) for outcome in outcomes],
        "overtaken": overtaken(outcomes),
    }


def below(
    outcomes: Sequence[Outcome], machine: Mapping[str, Any], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What has fallen below the last saved run, fit for JSON; null if there is none of here."""
    if before is None or saved.other(before, machine):
        return {"below": None}
    found = [pair for pair in saved.paired(outcomes, before) if pair.below]
    return {
        "below": [b._asdict() | {"now": _ratio(b.now), "was": _ratio(b.was)} for b in found],
    }


def comparison(outcomes: Sequence[Outcome], before: Mapping[str, Any]) -> Iterator[str]:
    """One table, in 80 columns: each figure that both runs have, then and now."""
    pairs = saved.paired(outcomes, before)
    yield f"a peer's time / ours, median and range; saved on {before['machine']['date']}"
    yield f"{'shape':<30} {'peer':<11} {'saved':>16} {'now':>16}"
    for pair in pairs:
        was, now = (f"{number(r.median)} ({span(r)})" for r in (pair.was, pair.now))
        mark = "▼" if pair.below else "▲" if pair.above else " "
        yield f"{pair.name:<30} {pair.peer:<11} {was:>16} {now:>16} {mark}".rstrip()
    worse, better = sum(pair.below for pair in pairs), sum(pair.above for pair in pairs)
    yield (
        f"{_count(len(pairs), 'figure')}: ▼ {worse} below, ▲ {better} above, in every round; the "
        "others within the spread"
    )


def fallen(
    outcomes: Sequence[Outcome],
    machine: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    wanted: int,
) -> Iterator[str]:
    """The same in sentences, after those that say what was left out."""
    if left := wanted - len(outcomes):
        yield f"{_count(left, 'shape')} left out, as the minute is over: name suites to time them."
    if before is None:
        yield "There is no saved run to compare with: --save keeps one."
        return
    if differs := saved.other(before, machine):
        yield f"Not compared with the saved run, which had {', '.join(differs)}."
        return
    pairs = saved.paired(outcomes, before)
    found = [pair for pair in pairs if pair.below]
    yield (
        f"{len(found)} of {_count(len(pairs), 'figure')} below the last saved run, of "
        f"{before['machine']['date']}{':' if found else '.'}"
    )
    for b in found:
        was = f"{number(b.was.median)} ({span(b.was)})"
        yield f"  {b.name} {b.peer} {number(b.now.median)} ({span(b.now)}), was {was}"


def _entry(outcome: Outcome) -> dict[str, Any]:
    entry, timing = outcome.entry, outcome.timing
    return {
        "suite": entry.suite,
        "name": entry.name,
        "problem": entry.problem.described(),
        "engine": outcome.engine or None,
        **_side(outcome, OURS),
        "discarded": timing.discarded if timing is not None else None,
        "busy": outcome.busy or None,
        "peers": [
            {"name": peer, **_side(outcome, peer), "ratio": _ratio(outcome.ratio(peer))}
            for peer in entry.peers
        ],
    }


def _side(outcome: Outcome, side: str) -> dict[str, Any]:
    rounds = outcome.timing.rounds.get(side, []) if outcome.timing is not None else []
    return {
        "seconds": outcome.seconds(side),
        "rounds": list(rounds),
        "refused": outcome.refused.get(side),
        "wrong": outcome.wrong.get(side),
    }


def _ratio(ratio: Ratio | None) -> dict[str, float] | None:
    return None if ratio is None else ratio._asdict()


def markdown(
    outcomes: Sequence[Outcome], machine: Mapping[str, Any], settings: Settings, command: str
) -> str:
    """The page: the machine, a table a suite, and the reasons where there is no time."""
    lines = [
        "# Benchmarks",
        "",
        f"Written by `{command}`. [How to run and read it](bench.md).",
        "",
        f"{about(machine)}.",
        "",
        f"{legend(settings)} Every result was first checked against float64. "
        f"{discarded(outcomes, settings)}",
        *(["", said] if (said := overtaking(outcomes)) else []),
    ]
    for suite, group in groupby(outcomes, key=lambda o: o.entry.suite):
        lines += ["", *_table(suite, list(group))]
    return "\n".join(lines) + "\n"


def _table(suite: str, outcomes: Sequence[Outcome]) -> list[str]:
    peers = list(dict.fromkeys(peer for o in outcomes for peer in o.entry.peers))
    notes = Notes()

    def cell(outcome: Outcome, peer: str) -> str:
        ratio, time = told(outcome, peer), outcome.seconds(peer)
        if ratio is None or time is None:
            return notes.of(outcome, peer) if peer in outcome.entry.peers else ""
        times = "×" if peer in COSTS else ""
        return f"{seconds(time)} · **{times}{number(ratio.median)}** ({span(ratio)})"

    head = ["shape", "ours", "engine", *(NAMES.get(peer, peer) for peer in peers)]
    lines = [f"## {suite}: {SUITES[suite].__doc__}", "", _row(head), _row(["---"] * len(head))]
    for outcome in outcomes:
        mine = outcome.seconds(OURS)
        shown = notes.of(outcome, OURS) if mine is None else seconds(mine)
        cells = [outcome.entry.shape.replace("/", " "), shown, outcome.engine]
        lines.append(_row([*cells, *(cell(outcome, peer) for peer in peers)]))
    if notes.numbers:
        lines += ["", *(f"{note}  " for note in notes)]
    return lines


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _three(value: float) -> str:
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )
