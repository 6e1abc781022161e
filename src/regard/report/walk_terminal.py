"""`regard walk` on a terminal: one screen of 80 columns, readable without colour and when piped."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from torch import Tensor

from ..analysis.walk_result import Walk, WalkText
from .screen import bar, clean, fit, word_name
from .walk_steps import Line, Step, WeightRow, checks, chosen_line, head_line, steps

_DIM, _HEAD, _GOOD, _BAD = "dim", "bold", "bold green", "bold red"
_NAME = 15  # columns of a name
_VALUE = 15  # the fewest for a value in the table
_ASIDE = 27  # of what is said beside a vector
_ASCII = {
    "×": "x", "÷": "/", "√": "sqrt", "·": "*", "−∞": "-inf", "−": "-", "Σ": "sum", "✓": "ok",
    "✗": "NO", "…": "~", "′": "'", "→": ">", "»": ">",
}  # fmt: skip


def print_walk(
    walk: Walk, console: Console, top: int = 3, pause: Callable[[], object] | None = None
) -> None:
    """Print the walk on ``console``, as wide as it is but no wider than 100 columns.

    ``pause`` is called between two steps.
    """
    page = _Page(walk, console, top)
    for part in page.parts():
        for line in part:
            console.print(line, no_wrap=True, overflow="crop", crop=True, highlight=False)
        if pause and part is not page.last:
            pause()


def vector(values: Tensor, width: int, places: int = 3) -> str:
    """As many of the numbers as fit ``width`` cells: "[ 0.25 -0.69  0.12 …]"."""
    size = float(values.abs().amax()) if values.numel() else 0.0
    places = max(0, places - sum(size >= limit for limit in (10, 100, 1000)))
    numbers = [f"{x:.{places}f}" for x in values[:40].tolist()]
    wide = max(3 + places, *(len(n) for n in numbers[:8])) if numbers else 0
    count = max(1, min(len(numbers), (width - 3) // (wide + 1)))
    shown = " ".join(n.rjust(wide) for n in numbers[:count])
    return f"[{shown}{' …' if count < values.numel() else ''}]"


class _Page:
    def __init__(self, walk: Walk, console: Console, top: int) -> None:
        self.walk, self.top = walk, top
        self.width = max(60, min(console.width, 100))
        self.colour = bool(console.color_system) and not console.no_color
        self.ascii = console.options.ascii_only
        self.last: list[Text] = []

    def parts(self) -> Iterator[list[Text]]:
        """Each step, the first below the head of the page, and the check."""
        top = list(self.head())
        for number, step in enumerate(steps(self.walk, self.top), 1):
            yield [*top, *self.step(number, step)]
            top = []
        self.last = list(self.check())
        yield self.last

    def head(self) -> Iterator[Text]:
        """The texts, the word in brackets, and the head."""
        walk = self.walk
        if walk.source is not walk.reader:
            yield self._around(walk.source, -1, "")
        yield self._around(
            walk.reader, walk.word - walk.reader.first, "» " * bool(walk.reader.first)
        )
        yield self._plain(fit(clean(head_line(walk)), self.width).rstrip(), _DIM)
        for line in textwrap.wrap(clean(chosen_line(walk)), self.width):
            yield self._plain(line, _DIM)

    def _around(self, side: WalkText, at: int, mark: str) -> Text:
        """One line of the text, with what is around the word."""
        text = Text(self._said(mark), style=_DIM)
        if at < 0:
            return text.append(fit(clean(" ".join(side.text.split())), self.width - 2).rstrip())
        word = side.words[at]
        name = f"[{word_name(word.text)}]"
        if word.start == word.end:
            before, after = "", clean(" ".join(side.text.split()))
        else:
            before = clean("".join(" " if c.isspace() else c for c in side.text[: word.start]))
            after = clean("".join(" " if c.isspace() else c for c in side.text[word.end :]))
        room = self.width - cell_len(name) - cell_len(mark) - 1
        keep = max(room - cell_len(after), room // 2)
        while cell_len(before) > keep:
            before = "…" + before[2:] if before.startswith("…") else "…" + before[1:]
        text.append(self._said(before), style="not dim").append(name, style="not dim bold")
        after = fit(after, max(1, room - cell_len(before))).rstrip()
        return text.append(self._said(after), style="not dim")

    def step(self, number: int, step: Step) -> Iterator[Text]:
        """A step: its title, then its lines or its table."""
        title = Text(f"{number} {step.title:<8}", style=_HEAD)
        said = textwrap.wrap(self._said(clean(step.said)), self.width - 10) or [""]
        yield title.append(said[0], style="not bold")
        yield from (Text(" " * 10 + line) for line in said[1:])
        if step.rows:
            yield from self.table(step)
        yield from (self.line(line) for line in step.lines)

    def line(self, line: Line) -> Text:
        """A label, its vector, and a word on it."""
        out = Text("  " + fit(self._said(word_name(line.label)), _NAME + 2) + " ")
        room = self.width - _NAME - 5
        if line.vector is None:
            return out.append(fit(self._said(clean(line.note)), room).rstrip(), style=_DIM)
        aside = _ASIDE
        out.append(self._said(fit(vector(line.vector, room - aside - 2), room - aside - 2)),
                   style="bold" if line.strong else "")  # fmt: skip
        if line.numbers:
            length, share = line.numbers
            out.append(f"  {length:>6} {share:>7}")
            aside -= 16
        note = fit(self._said(clean(line.note)), aside)
        out.append(f"  {note}", style=_DIM)
        out.rstrip()
        return out

    def table(self, step: Step) -> Iterator[Text]:
        """Words down, what becomes of q·k across."""
        cells = [step.header, *(row.cells for row in step.rows)]
        sizes = [
            max(cell_len(self._said(c[i])) for c in cells) + 2 for i in range(len(step.header))
        ]
        room = self.width - _NAME - 2 - sum(sizes)
        gauge = 7 if room >= 9 else 0
        value = room - gauge - 2
        header = " " * (_NAME + 2) + self._cells(step.header, sizes)
        if value >= _VALUE:
            header += " " * (gauge + 2) + "value"
        yield Text(header, style=_DIM)
        for row in step.rows:
            yield self._row(row, sizes, gauge, value)

    def _cells(self, cells: Sequence[str], sizes: Sequence[int]) -> str:
        return "".join(fit(self._said(c), n, right=True) for c, n in zip(cells, sizes, strict=True))

    def _row(self, row: WeightRow, sizes: Sequence[int], gauge: int, value: int) -> Text:
        style = _DIM if row.kind in ("special", "others", "masked", "sink") else ""
        out = Text("  " + fit(self._said(word_name(row.name)), _NAME), style=style)
        out.append(self._cells(row.cells, sizes))
        if row.kind == "sum":
            fine = row.cells[-1] == "1.000"
            return out.append(self._said(" ✓" if fine else " ✗"), style=_GOOD if fine else _BAD)
        if gauge and row.weight is not None:
            out.append(" ").append(bar(row.weight, gauge, self.ascii), style="yellow")
        if value >= _VALUE and row.value is not None:
            out.append(" " + self._said(vector(row.value, value, 2)))
        out.rstrip()
        return out

    def check(self) -> Iterator[Text]:
        """What was compared with the model's own run."""
        for fine, said in checks(self.walk):
            out = Text(
                self._said("✓ " if fine else "✗ "), style="bold green" if fine else "bold red"
            )
            yield out.append(
                fit(self._said(clean(said)), self.width - 3).rstrip(), style="not bold"
            )

    def _plain(self, text: str, style: str) -> Text:
        return Text(self._said(text), style=style)

    def _said(self, text: str) -> str:
        """The text in signs that the terminal has."""
        if self.ascii:
            for sign, plain in _ASCII.items():
                text = text.replace(sign, plain)
        return text
