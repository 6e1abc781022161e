"""`regard heads` on a terminal: 80 columns, readable without colour and when piped."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from ..analysis.head_scores import PLACES, SCORES
from ..analysis.heads import Head, HeadScores
from ..analysis.relations import FARTHEST, Relation
from .screen import clean, counted, fit, head_label

WIDTH = 80
_SHORT = {
    "previous": "prev", "first": "first", "duplicate": "dup", "induction": "ind",
    "induction_random": "rand", "separator": "sep", "punctuation": "punc",
    "entropy": "nats", "entropy_share": "/ln", "distance": "dist",
}  # fmt: skip
_LISTED = 5  # heads of each score
_HEAD = "bold"


def print_heads(found: HeadScores, console: Console) -> None:
    """Print every head's scores on ``console``."""
    for line in lines(found):
        console.print(line, no_wrap=True, overflow="crop", crop=True, highlight=False)


def lines(found: HeadScores) -> Iterator[Text]:
    """All that is printed."""
    layers = len({one.layer for one in found.heads})
    sizes = ((layers, "layer"), (len(found.heads), "head"), (found.tokens, "token"))
    said = f"{clean(found.model)}: {', '.join(counted(*size) for size in sizes)}"
    yield Text(fit(said, WIDTH).rstrip(), style=_HEAD)
    if found.text is not None:
        yield Text(fit(" ".join(clean(found.text).split()), WIDTH).rstrip(), style="dim")
    yield Text()
    yield Text("heads with the largest share, by score; 3.1: layer 3, head 1", style=_HEAD)
    for name in PLACES:
        yield Text(ranked(name, [(one, one.scores[name] or 0.0) for one in found.ranked(name)]))
    yield Text()
    yield from table(found.heads)
    if found.sentences:
        yield Text()
        yield from relations(found)
    yield Text()
    yield from definitions([short for short in SCORES if _any(found.heads, short)])


def ranked(name: str, heads: Sequence[tuple[Head, float]]) -> str:
    """The first heads by one score, on a line."""
    said = [f"{head_label(one.layer, one.head)} {value:.2f}" for one, value in heads[:_LISTED]]
    return f"{label(name):<19}{'   '.join(f'{one:<9}' for one in said) or '–'}".rstrip()


def label(name: str) -> str:
    """A score's name in words."""
    return name.replace("_", " ").replace("induction random", "induction, random")


def table(heads: Sequence[Head]) -> Iterator[Text]:
    """A line a head, below the scores' short names."""
    yield Text("head  " + "".join(_SHORT.get(n, n).rjust(_wide(n)) for n in SCORES), style=_HEAD)
    for one in heads:
        line = Text(fit(head_label(one.layer, one.head), 6))
        for name in SCORES:
            line.append(*cell(name, one.scores[name]))
        yield line


def cell(name: str, value: float | None) -> tuple[str, str]:
    """A number as it stands in the table, and its style."""
    if value is None:
        return "–".rjust(_wide(name)), "dim"
    if name == "distance":
        return (f"{value:.1f}" if value < 1000 else f"{value:.0f}").rjust(_wide(name)), ""
    if name not in PLACES:
        return f"{value:.2f}".rjust(_wide(name)), ""
    said = f"{value:.2f}" if value >= 0.005 else "·"
    return said.rjust(_wide(name)), "bold yellow" if value >= 0.3 else "" if value >= 0.1 else "dim"


def _wide(name: str) -> int:
    return 8 if name == "distance" else 6


def relations(found: HeadScores) -> Iterator[Text]:
    """The heads that follow a dependency more often than any fixed offset does."""
    above = [(one, one.relation) for one in found.heads if one.relation is not None]
    above = [(one, r) for one, r in above if r.share > r.baseline]
    above.sort(key=lambda pair: pair[1].baseline - pair[1].share)
    yield Text(
        f"dependencies in {counted(found.sentences, 'sentence')}: of each head the relation in "
        "which it is", style=_HEAD,
    )  # fmt: skip
    offset = f"the best fixed offset (up to {FARTHEST} words)"
    yield Text(f"the most above {offset}; both are chosen on half", style=_HEAD)
    yield Text("of the sentences, and measured on the other half", style=_HEAD)
    yield Text("head  relation               followed   offset     of", style=_HEAD)
    for one, r in above:
        yield Text(f"{head_label(one.layer, one.head):<6}{relation_line(r)}")
    if not above:
        yield Text("no head is above it")


def relation_line(r: Relation) -> str:
    """What a head follows, as a line of the table."""
    way = f"{clean(r.name)} → {r.to}"
    return f"{fit(way, 23)}{r.share:>7.0%}{r.baseline:>8.0%} {r.offset:+d}{r.pairs:>8,}"


def _any(heads: Sequence[Head], name: str) -> bool:
    return any(one.scores[name] is not None for one in heads)


def definitions(names: Sequence[str]) -> Iterator[Text]:
    """What each column says, over which tokens."""
    yield Text("means over the tokens that read; special tokens do not count as readers")
    for name in names:
        short = _SHORT.get(name, name)
        for line in textwrap.wrap(
            f"{short:<6} {SCORES[name]}", WIDTH, subsequent_indent=" " * 7
        ):  # fmt: skip
            yield Text(line, style="dim")
