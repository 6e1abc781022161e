"""Pronouns with two candidates each, from WinoBias, DPR and GAP."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from .links import Item, Span

PRONOUNS = {"he", "she", "him", "her", "his", "hers", "they", "them", "their", "it", "its"}
_MARKED = re.compile(r"\[([^\]]*)\]")
_ARTICLE = re.compile(r"^(?:the|a|an)\s+", re.IGNORECASE)


def winobias(folder: Path, part: str) -> list[Item]:
    """Zhao et al. 2018: one occupation and the pronoun are marked; the other one is found by the
    list of all that are marked anywhere."""
    lines = {
        path.name: path.read_text("utf-8").splitlines() for path in sorted(folder.glob("*.txt.*"))
    }
    marked = (name for text in lines.values() for line in text for name in _MARKED.findall(line))
    known = {_ARTICLE.sub("", name).lower() for name in marked} - PRONOUNS
    pattern = re.compile(
        r"\b(" + "|".join(sorted(map(re.escape, known), key=len, reverse=True)) + r")\b",
        re.IGNORECASE,
    )
    found = []
    for name, text in lines.items():
        if name.endswith(f".{part}"):
            found += [item for line in text if (item := _winobias(line, pattern)) is not None]
    return found


def _winobias(line: str, known: re.Pattern[str]) -> Item | None:
    text, spans = "", []
    for number, piece in enumerate(re.split(r"[\[\]]", line.partition(" ")[2])):
        if number % 2:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    pronouns = [span for span in spans if text[slice(*span)].lower() in PRONOUNS]
    entities = [span for span in spans if span not in pronouns]
    if len(pronouns) != 1 or len(entities) != 1:
        return None
    start, end = entities[0]
    start += len(text[start:end]) - len(_ARTICLE.sub("", text[start:end]))
    right = (start, end)
    others = [m.span() for m in known.finditer(text) if m.end() <= start or m.start() >= end]
    if len(others) != 1:
        return None
    candidates = tuple(sorted((right, others[0])))
    return Item(text, pronouns[0], candidates, candidates.index(right))


def dpr(path: Path) -> list[Item]:
    """Rahman and Ng 2012: sentence, pronoun, candidates, answer; two sentences make a pair."""
    blocks = [block.split("\n") for block in re.split(r"\n\s*\n", path.read_text("utf-8").strip())]
    found = []
    for number, block in enumerate(blocks):
        lines = [line.strip() for line in block]
        if len(lines) == 4:
            text, pronoun, names, answer = lines
            found.append(_dpr(text, pronoun, names, answer, number // 2))
    return [item for item in found if item is not None]


def _dpr(text: str, pronoun: str, names: str, answer: str, pair: int) -> Item | None:
    """None where a candidate is not in the text, or the pronoun stands there more than once."""
    options = [name.strip().lower() for name in names.split(",")]
    at = list(re.finditer(rf"\b{re.escape(pronoun)}\b", text, re.IGNORECASE))
    spans = [_first(text, option) for option in options]
    if len(options) != 2 or len(at) != 1 or answer.lower() not in options or None in spans:
        return None
    candidates = tuple(span for span in spans if span is not None)
    if max(candidates[0][0], candidates[1][0]) < min(candidates[0][1], candidates[1][1]):
        return None
    return Item(text, at[0].span(), candidates, options.index(answer.lower()), pair)


def _first(text: str, name: str) -> Span | None:
    found = re.search(rf"\b{re.escape(_ARTICLE.sub('', name))}\b", text, re.IGNORECASE)
    return None if found is None else found.span()


def gap(path: Path) -> list[Item]:
    """Webster et al. 2018: a pronoun and two names in a passage, of which one is right."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return list(_gap(rows))


def _gap(rows: list[dict[str, str]]) -> Iterator[Item]:
    for row in rows:
        if (row["A-coref"] == "TRUE") == (row["B-coref"] == "TRUE"):
            continue

        def span(name: str, offset: str, row: dict[str, str] = row) -> Span:
            return int(row[offset]), int(row[offset]) + len(row[name])

        candidates = (span("A", "A-offset"), span("B", "B-offset"))
        yield Item(
            row["Text"],
            span("Pronoun", "Pronoun-offset"),
            candidates,
            int(row["B-coref"] == "TRUE"),
        )
