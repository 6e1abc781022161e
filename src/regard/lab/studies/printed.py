"""A study in print: 80 columns for a terminal, Markdown for the docs, PNG for both."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import RegardError

WIDTH = 80
HOLDS = {True: "holds here", False: "does not hold here"}


def cell(value: Any) -> str:
    """A cell as text; three digits of a float."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A study's JSON for a terminal."""
    yield from _wrapped(f"{found['study']}: {found['claim']}")
    yield ""
    yield from _table(found["columns"], found["rows"])
    yield ""
    for one in found["verdicts"]:
        yield from _wrapped(f"{HOLDS[one['holds']]}: {one['claim']}: {one['figure']}", "  ")
    for note in found["notes"]:
        yield from _wrapped(note)
    yield f"seed {found['seed']}, {found['mode']}, {found['seconds']:.0f} s"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Columns as wide as they need to be; the first gives way where all together do not fit."""
    text = [list(map(cell, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *text, strict=True)]
    widths[0] = max(4, min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    for row in (columns, *text):
        parts = []
        for part, width, right in zip(row, widths, numeric, strict=True):
            part = part if len(part) <= width else part[: width - 1] + "…"
            parts.append(part.rjust(width) if right else part.ljust(width))
        yield "  ".join(parts).rstrip()[:WIDTH]


def markdown(found: Mapping[str, Any]) -> str:
    """A study's section of docs/studies.md."""
    about = found["machine"]
    said = [
        f"## {found['study']}",
        f"**{found['claim']}** {found['method']}",
        *(
            f"- {HOLDS[one['holds']].capitalize()}: {one['claim']}: {one['figure']}."
            for one in found["verdicts"]
        ),
    ]
    columns, rows = found["columns"], found["rows"]
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    table += ["| " + " | ".join(cell(v).replace("|", "\\|") for v in row) + " |" for row in rows]
    notes = " ".join(found["notes"])
    made = (
        f"`{found['command']}` on {about['processor']}, "
        f"{about['cores']} cores, {about['threads']} of torch's threads, torch {about['torch']}, "
        f"{about['date']}. {notes}".strip()
    )
    picture = f"![{found['study']}](studies/{found['study']}.png)"
    said[2:] = ["\n".join(said[2:]), "\n".join(table), picture, made]
    return "\n\n".join(said)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The panels as one PNG. RegardError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RegardError('pictures need matplotlib: pip install "regard[studies]"') from error
    panels = found["panels"]
    figure = Figure(figsize=(5.2 * max(1, len(panels)), 3.8), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels):
        _panel(figure.add_subplot(1, len(panels), number + 1), panel)
    # No version, no date: the same figures are the same bytes
    figure.savefig(path, metadata={"Software": None})


def _panel(ax: Any, panel: Mapping[str, Any]) -> None:
    for number, (name, (xs, ys)) in enumerate(panel["lines"].items()):
        heights = [float("nan") if y is None else y for y in ys]
        if panel["bars"]:
            wide = 0.8 / len(panel["lines"])
            at = [i + (number + 0.5) * wide - 0.4 for i in range(len(xs))]
            ax.bar(at, heights, wide, label=name)
            turn = 30 if len(xs) <= 12 else 90  # many names would overlap
            ax.set_xticks(range(len(xs)), xs, rotation=turn, ha="right", fontsize=8)
        else:
            ax.plot(xs, heights, marker="." if len(xs) < 40 else "", label=name)
    if panel["level"] is not None:
        ax.axhline(panel["level"], linestyle="--", color="grey", linewidth=1)
    if "x" in panel["log"]:
        ax.set_xscale("log")
    if "y" in panel["log"]:
        ax.set_yscale("log")
    ax.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
    if len(panel["lines"]) > 1:
        ax.legend(fontsize=8)
