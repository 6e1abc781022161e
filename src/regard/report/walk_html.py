"""`regard walk --html`: the walk as one page that a teacher can show, which loads nothing.

All of it is plain markup, escaped here; the script only shows the steps one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from ..analysis.walk_result import Walk, WalkText
from .inline_page import check_html, document, write_page
from .screen import clean, word_name
from .walk_steps import Line, Step, WeightRow, checks, chosen_line, head_line, head_name, steps
from .walk_terminal import vector

CELLS = 128
"""So many numbers of a vector are drawn."""

_WHY = {
    "token": "A model reads no letters. The text is cut into tokens; each is a number, and the "
    "number names a row in a table of vectors, which were learned.",
    "vector": "Each layer adds to the vector of each word, from what it reads in the others: what "
    "began as a row of a table comes to depend on the whole text.",
    "project": "Three learned matrices make three shorter vectors for this head: what the word "
    "looks for (query), what each word offers to be found by (key) and what it hands over (value).",
    "compare": "The product q·k is large where query and key point the same way. Softmax turns "
    "the products into shares that sum to 1: the attention weights.",
    "mix": "What the head gives is the mean of the values, weighted by the attention weights.",
    "write": "All heads of the layer do the same beside each other. One matrix, W_O, turns what "
    "they found back into vectors of the model's length, and these add up. A share is what a head "
    "gives along the sum; a negative one pulls the other way.",
    "new": "The result is added to the vector that came in. The word's vector now holds something "
    "of what its heads have read.",
}
_BODY = """<header>
{header}
<nav hidden><button id="first">one by one</button>
<button id="back" aria-label="step back">←</button>
<button id="next" aria-label="next step">→</button><button id="all">all</button>
<span id="place" aria-live="polite"></span></nav>
</header>
<main>
{main}
</main>"""


def write_walk(walk: Walk, path: Path, top: int = 3) -> None:
    """Write the page to ``path``."""
    check_html(path)
    write_page(path, walk_html(walk, top))


def walk_html(walk: Walk, top: int = 3) -> str:
    """The page."""
    page = files(__package__).joinpath("page")
    style, script = (page.joinpath(f"walk.{kind}").read_text("utf-8") for kind in ("css", "js"))
    title = f"{walk.token.word} in head {head_name(walk)} · regard walk"
    main = [_step(number, step) for number, step in enumerate(steps(walk, top), 1)]
    body = _BODY.format(
        header="\n".join(_header(walk)), main="\n".join([*main, _checks(walk, len(main) + 1)])
    )
    return document(_text(title), body, style, script)


def _text(said: str) -> str:
    """Text as markup: nothing in it is obeyed, by the browser or by whoever copies it."""
    return escape(clean(said))


def _name(said: str) -> str:
    return f'<span class="name">{escape(word_name(said))}</span>'


def _header(walk: Walk) -> Iterator[str]:
    """The texts, shaded by what the head reads, and the model."""
    sides = [walk.source] if walk.source is walk.reader else [walk.source, walk.reader]
    for side in sides:
        yield f'<p class="text">{"".join(_words(walk, side))}</p>'
    yield f'<p class="about">{_text(head_line(walk))}, {_text(walk.module)}</p>'
    chosen = chosen_line(walk)
    if chosen:
        yield f'<p class="about">{_text(chosen)}</p>'


def _words(walk: Walk, side: WalkText) -> Iterator[str]:
    weights = side.words.sum_tokens(walk.weighing.weights) if side is walk.source else None
    reached = 0
    for i, word in enumerate(side.words):
        if word.start > reached:
            yield _text(" ".join(("." + side.text[reached : word.start] + ".").split())[1:-1])
        classes = ["word"]
        if weights is not None:
            classes += [f"w{min(8, round(float(weights[i]) * 8 + 0.3))}"]
        if word.special or word.text.isspace():
            classes.append("special")
        if side is walk.reader and side.first + i == walk.word:
            classes.append("reads")
        hint = "" if weights is None else f' title="{float(weights[i]):.3f}"'
        yield f'<span class="{" ".join(classes)}"{hint}>{escape(word_name(word.text))}</span>'
        if word.start == word.end:
            yield " "
        reached = max(reached, word.end)


def _step(number: int, step: Step) -> str:
    vectors = [part for row in step.rows if (part := row.value) is not None]
    vectors += [part for line in step.lines if (part := line.vector) is not None]
    most = max((float(part[:CELLS].abs().amax()) for part in vectors), default=1.0)
    alike = step.title != "token"  # a norm between its vectors: each to its own scale
    lines = "\n".join(_line(line, most if alike else 0.0) for line in step.lines)
    body = _table(step, most) if step.rows else lines
    return (
        f'<section class="step"><h2><b>{number}</b>{escape(step.title)}</h2>\n'
        f'<p class="said">{_text(step.said)}</p>\n<p class="why">{_text(_WHY[step.title])}</p>\n'
        f'<div class="scroll"><table>{body}</table></div></section>'
    )


def _line(line: Line, most: float) -> str:
    cells = [f"<td>{_name(line.label)}</td>"]
    if line.vector is None:
        cells.append(f'<td class="note" colspan="5">{_text(line.note)}</td>')
    else:
        cells.append(f"<td>{_strip(line.vector, most)}</td>")
        cells.append(f'<td class="vec">{escape(vector(line.vector, 36))}</td>')
        cells += [f'<td class="num">{escape(number)}</td>' for number in line.numbers]
        cells.append(f'<td class="note">{_text(line.note)}</td>')
    strong = ' class="strong"' if line.strong else ""
    return f"<tr{strong}>{''.join(cells)}</tr>"


def _table(step: Step, most: float) -> str:
    names = "".join(f'<th class="num">{_text(name)}</th>' for name in step.header)
    rows = "\n".join(_row(row, most) for row in step.rows)
    return f"<tr><th></th>{names}<th></th><th>value</th><th></th></tr>\n{rows}"


def _row(row: WeightRow, most: float) -> str:
    kind = "sum" if row.kind == "sum" else "" if row.kind == "word" else "aside"
    cells = [f"<td>{_name(row.name)}</td>"]
    cells += [f'<td class="num">{_text(cell)}</td>' for cell in row.cells]
    if row.kind == "sum":
        total = row.cells[-1] == "1.000"
        sign = '<span class="good">✓</span>' if total else '<span class="bad">✗</span>'
        cells.append(f"<td>{sign}</td>")
    elif row.weight is not None:
        cells.append(f"<td>{_bar(row.weight)}</td>")
    if row.value is not None:
        cells.append(f"<td>{_strip(row.value, most)}</td>")
        cells.append(f'<td class="vec">{escape(vector(row.value, 28))}</td>')
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _bar(share: float) -> str:
    width = max(0.0, min(1.0, share)) * 100
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="frame" width="100" height="10"/>'
        f'<rect class="plus" width="{width:.1f}" height="10"/></svg>'
    )


def _strip(values: Tensor, most: float) -> str:
    """The numbers as cells, orange above 0 and blue below, deepest at `most` (0: their largest)."""
    numbers = values[:CELLS].tolist()
    most = most or max((abs(x) for x in numbers), default=0.0) or 1.0
    cells = "".join(
        f'<rect class="{"plus" if x > 0 else "minus"}" x="{i}" width="1" height="1" '
        f'opacity="{abs(x) / most:.2f}"/>'
        for i, x in enumerate(numbers)
        if abs(x) / most >= 0.005
    )
    first = f"the first {CELLS} of {len(values)} numbers" if len(values) > CELLS else "its numbers"
    return (
        f'<svg class="strip" viewBox="0 0 {max(1, len(numbers))} 1" preserveAspectRatio="none" '
        f'role="img"><title>{first}, orange above 0, blue below; deepest {most:.2f}</title>'
        f'<rect class="frame" width="{len(numbers)}" height="1"/>{cells}</svg>'
    )


def _checks(walk: Walk, number: int) -> str:
    items = "\n".join(
        f'<li class="{"good" if fine else "bad"}">{"✓" if fine else "✗"} {_text(said)}</li>'
        for fine, said in checks(walk)
    )
    return (
        f'<section class="step"><h2><b>{number}</b>check</h2>\n<p class="said">the numbers above '
        "were computed step by step, and compared with the model</p>\n"
        f'<ul class="checks">{items}</ul></section>'
    )
