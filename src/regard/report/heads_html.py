"""`regard heads --html`: every head's scores as one page, to be sorted by any of them."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from pathlib import Path

from ..analysis.head_scores import PLACES
from ..analysis.heads import Head, HeadScores
from .heads_terminal import label
from .inline_page import check_html, document, write_page
from .screen import clean, counted, head_label

_BODY = """<header>
<p class="about">{about}</p>
{text}
</header>
<main>
<section class="step"><h2>heads</h2>
<p class="why">Means over the tokens that read; special tokens do not count as readers. A click on
a column sorts by it.</p>
<div class="scroll"><table id="heads"><thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody></table></div></section>
<section class="step"><h2>definitions</h2>
<div class="scroll"><table>{definitions}</table></div></section>
</main>"""


def write_heads(found: HeadScores, path: Path) -> None:
    """Write the page to ``path``."""
    check_html(path)
    write_page(path, heads_html(found))


def heads_html(found: HeadScores) -> str:
    """The page."""
    page = files(__package__).joinpath("page")
    style = "".join(page.joinpath(f"{name}.css").read_text("utf-8") for name in ("walk", "heads"))
    script = page.joinpath("heads.js").read_text("utf-8")
    names = [*found.definitions, *(["relation"] if found.sentences else [])]
    said = f"{counted(len(found.heads), 'head')}, {counted(found.tokens, 'token')}"
    if found.sentences:
        said += f", dependencies of {counted(found.sentences, 'sentence')}"
    body = _BODY.format(
        about=f"<b>{_text(found.model)}</b>: {said}",
        text="" if found.text is None else f'<p class="text">{_text(found.text)}</p>',
        head="".join(_column(name) for name in ("head", *names)),
        rows="\n".join(_row(one, found) for one in found.heads),
        definitions="".join(
            f"<tr><td>{_text(label(name))}</td><td>{_text(what)}</td></tr>"
            for name, what in found.definitions.items()
        ),
    )
    return document(_text(f"{found.model} · regard heads"), body, style, script)


def _text(said: str) -> str:
    return escape(clean(said))


def _column(name: str) -> str:
    return f'<th class="num" aria-sort="none"><button>{_text(label(name))}</button></th>'


def _row(one: Head, found: HeadScores) -> str:
    cells = [f'<td class="num" data-value="{one.layer}.{one.head:05}">'
             f"{head_label(one.layer, one.head)}</td>"]  # fmt: skip
    cells += [_cell(name, one.scores[name]) for name in found.definitions]
    if found.sentences:
        cells.append(_relation(one))
    return f"<tr>{''.join(cells)}</tr>"


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return '<td class="num special">–</td>'
    shade = min(8, round(value * 8)) if name in PLACES else 0
    kind = f"num w{shade}" if shade else "num"
    return f'<td class="{kind}" data-value="{value:.9g}">{value:.2f}</td>'


def _relation(one: Head) -> str:
    r = one.relation
    if r is None:
        return '<td class="special">–</td>'
    said = f"{r.name} → {r.to}: {r.share:.0%}, offset {r.offset:+d}: {r.baseline:.0%}"
    kind = "strong" if r.share > r.baseline else "special"
    return f'<td class="{kind}" data-value="{r.share - r.baseline:.9g}">{_text(said)}</td>'
