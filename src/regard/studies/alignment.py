"""Hand-made word alignments, and the error of others against them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

Links = frozenset[tuple[int, int]]


class Aligned(NamedTuple):
    """A sentence pair as words, and its links (source, target), from 0: sure, and possible (the
    sure ones among them)."""

    source: list[str]
    target: list[str]
    sure: Links
    possible: Links


class Counts(NamedTuple):
    """What the error is made of: links made, sure ones, made that are sure, made that are
    possible."""

    made: int
    sure: int
    made_sure: int
    made_possible: int


def read_alignments(text: Path, gold: Path) -> list[Aligned]:
    """Lines "source ||| target" of words, and lines of links "1-2" (sure) and "1p2" (possible)."""
    lines = zip(
        text.read_text("utf-8").splitlines(), gold.read_text("utf-8").splitlines(), strict=False
    )
    found = []
    for said, links in lines:
        source, _, target = said.partition("|||")
        sure, possible = set(), set()
        for one, kind, other in re.findall(r"(\d+)([-p])(\d+)", links):
            pair = (int(one) - 1, int(other) - 1)
            possible.add(pair)
            if kind == "-":
                sure.add(pair)
        found.append(Aligned(source.split(), target.split(), frozenset(sure), frozenset(possible)))
    return found


def counts(made: Iterable[tuple[int, int]], pair: Aligned) -> Counts:
    """Those of one sentence pair."""
    links = frozenset(made)
    return Counts(len(links), len(pair.sure), len(links & pair.sure), len(links & pair.possible))


def error_rate(found: Sequence[Counts]) -> float:
    """1 − (|A ∩ S| + |A ∩ P|) / (|A| + |S|), of all pairs together. Och and Ney 2003, eq. 37."""
    made, sure, made_sure, made_possible = map(sum, zip(*found, strict=True))
    return 1 - (made_sure + made_possible) / max(1, made + sure)


def diagonal(pair: Aligned) -> list[tuple[int, int]]:
    """Each target word linked to the source word at the same share of its sentence."""
    source, target = len(pair.source), len(pair.target)
    return [(min(source - 1, j * source // target), j) for j in range(target)]
