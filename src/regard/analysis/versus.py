"""`regard look --versus`: what words read in two texts, or in one text in two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import RegardError
from .compare import Reading, Versus, align, compare, counterpart
from .look import Look, Row, look, rows_of

if TYPE_CHECKING:
    from ..capture.recording import Recording


def reading(found: Look, row: Row) -> Reading:
    """A row as `comparing` takes it."""
    keys = row.part.keys
    at = keys.first
    return Reading(
        found.model, keys.text, row.part.kind, tuple(keys.words), tuple(
            found.labels[at : at + len(keys.words)]
        ), row.itself, tuple(row.part.heads), row.weights,
    )  # fmt: skip


def add_versus(
    found: Look,
    recording: Recording,
    other: Recording,
    *,
    layers: Sequence[int] = (),
    heads: Sequence[int | tuple[int, int]] = (),
) -> None:
    """Set ``found.other`` and ``found.versus``: of each word asked for, and in each of its parts.

    Where no word was asked for, every word with a counterpart is compared, and those whose reading
    moved most are kept. ``recording`` is the one that ``found`` is of.
    """
    plain = look(other, layers=layers, heads=heads, top=found.top, special=found.special)
    asked = [focus.found.number for focus in found.focuses]
    if asked:
        names = [plain.labels[counterpart(found.words, plain.words, n)] for n in asked]
        found.other = look(
            other, readers=names, layers=layers, heads=heads, top=found.top, special=found.special
        )
        pairs = [
            (mine.rows, theirs.rows)
            for mine, theirs in zip(found.focuses, found.other.focuses, strict=True)
        ]
        found.versus = [v for mine, theirs in pairs for v in _versus(found, mine, plain, theirs)]
        if not found.versus:
            raise RegardError("the word reads in no part that both models have")
        return
    found.other = plain
    best: list[Versus] = []
    for one, two in align(found.words, plain.words):
        if one is None or two is None or found.words[one].special:
            continue
        mine = list(rows_of(recording, found.parts, one))
        theirs = list(rows_of(other, plain.parts, two))
        best = [*best, *_versus(found, mine, plain, theirs)]
        best = sorted(best, key=lambda v: -v.moved)[: found.top]
    found.versus = best


def _versus(found: Look, mine: list[Row], other: Look, theirs: list[Row]) -> list[Versus]:
    """The rows of the same kind, compared."""
    return [
        compare(reading(found, one), reading(other, two), found.words[one.word].text)
        for one in mine
        for two in theirs
        if one.part.kind == two.part.kind
    ]
