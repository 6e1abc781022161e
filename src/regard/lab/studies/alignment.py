"""Hand-made word alignments, and the error of others against them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

Links = frozenset[tuple[int, int]]
LINKINGS = ("argmax", "mutual", "grow-diag")


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


def linked(reads: Sequence[int], readers: Sequence[int]) -> dict[str, Links]:
    """Links by each of LINKINGS, of one table of what target words read of source words.

    reads: of each target word, the source word that it reads most; readers: of each source word,
    the target word that reads it most. argmax: the first alone. mutual: what is in both.
    grow-diag: that, and step by step what is in either, lies beside a link, and links a word that
    has none (Koehn et al. 2005, there of two models; Och and Ney 2003).
    """
    one = frozenset((int(i), j) for j, i in enumerate(reads))
    other = frozenset((i, int(j)) for i, j in enumerate(readers))
    return {"argmax": one, "mutual": one & other, "grow-diag": _grown(one & other, one | other)}


def _grown(mutual: Links, either: Links) -> Links:
    found = sorted(mutual)
    sources, targets = {i for i, _ in mutual}, {j for _, j in mutual}
    for i, j in found:  # it grows meanwhile
        for near in ((i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
            alone = near[0] not in sources or near[1] not in targets
            if near in either and alone:
                found.append(near)
                sources.add(near[0])
                targets.add(near[1])
    return frozenset(found)


def diagonal(pair: Aligned) -> list[tuple[int, int]]:
    """Each target word linked to the source word at the same share of its sentence."""
    source, target = len(pair.source), len(pair.target)
    return [(min(source - 1, j * source // target), j) for j in range(target)]
