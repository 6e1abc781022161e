"""`regard scan` on a terminal: heads ranked by behaviour, with intervals and examples."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from ..analysis.head_scores import PLACES, SCORES
from ..analysis.heads import HeadScores
from ..analysis.scan import Scan, ScannedHead
from .heads_terminal import WIDTH, definitions, label, relations, table
from .screen import clean, counted, fit, head_label, word_name

_LISTED = 3


def print_scan(found: Scan, console: Console) -> None:
    """Print what was found on ``console``."""
    for line in lines(found):
        console.print(line, no_wrap=True, overflow="crop", crop=True, highlight=False)


def lines(found: Scan) -> Iterator[Text]:
    """All that is printed."""
    said = f"{clean(found.model)} on {clean(found.corpus)}: {counted(found.texts, 'text')}"
    said += f", {found.skipped:,} too long" if found.skipped else ""
    yield Text(fit(said, WIDTH).rstrip(), style="bold")
    yield Text()
    yield Text("largest means over texts, ± half the 95 % interval (bootstrap)", style="bold")
    for name in PLACES:
        heads = [_value(one, name) for one in found.ranked(name)[:_LISTED]]
        yield Text(f"{label(name):<19}{''.join(heads) or '–'}".rstrip())
    yield Text()
    yield Text("the strongest reading of the first head of each", style="bold")
    for name in PLACES:
        for one in found.ranked(name)[:1]:
            yield _example(one, name)
    yield Text()
    plain = [one.head for one in found.heads]
    yield from table(plain)
    if found.sentences:
        yield Text()
        yield from relations(HeadScores(found.model, None, 0, plain, found.sentences))
    yield Text()
    yield from definitions(list(SCORES))


def _value(one: ScannedHead, name: str) -> str:
    value, interval = one.head.scores[name] or 0.0, one.intervals[name]
    margin = None if interval is None else (interval.high - interval.low) / 2
    said = f"{head_label(one.head.layer, one.head.head)} {value:.2f}"
    return f"{said + ('' if margin is None else f' ±{margin:.3f}'):<18}"


def _example(one: ScannedHead, name: str) -> Text:
    line = f"{label(name):<19}{head_label(one.head.layer, one.head.head):<6}"
    for best in one.examples[:1]:
        pair = f"{word_name(best.word)} reads {word_name(best.read)}"
        line += f"{fit(pair, 26)} {best.weight:.2f}  text {best.text}"
    return Text(fit(line, WIDTH).rstrip())
