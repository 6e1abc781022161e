"""Small things that printing needs: safe text, widths in cells, bars, wrapping with shades."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

_NAMES = {"\n": "↵", "\r": "↵", "\t": "⇥", " ": "␣", "\N{NO-BREAK SPACE}": "⍽"}
_JOINERS = "\u200c\u200d"
_EIGHTHS = " ▏▎▍▌▋▊▉"
SHADES = " ░▒▓"
"""How strongly a word is shaded, 0 to 3, where there is no colour."""
STYLES = ("", "underline", "black on color(179)", "bold black on color(214)")
"""The same where there is."""


def clean(text: str) -> str:
    """``text`` with nothing in it that a terminal obeys: controls are shown, not sent."""
    return "".join(_visible(char) for char in text)


def word_name(text: str) -> str:
    """A word as a table shows it; one of whitespace only by the signs for it."""
    if text.isspace():
        return "".join(_NAMES.get(char, "␣") for char in text)
    return clean(text)


def fit(text: str, width: int, *, right: bool = False) -> str:
    """``text`` in exactly ``width`` cells, shortened with an ellipsis or padded."""
    size = cell_len(text)
    if size > width:
        text = set_cell_size(text, max(0, width - 1)).rstrip() + "…"
        size = cell_len(text)
    pad = " " * (width - size)
    return pad + text if right else text + pad


def bar(share: float, width: int, ascii_only: bool = False) -> str:
    """A bar ``share`` of ``width`` cells long, to an eighth of a cell."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    if ascii_only:
        return fit("#" * round(eighths / 8), width)
    return fit("█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else ""), width)


class Bit(NamedTuple):
    """A stretch of text with its shade, 0 to 3; ``line`` where a new line starts before it."""

    text: str
    shade: int = 0
    style: str = ""
    line: bool = False


def wrapped(bits: Iterable[Bit], width: int, colour: bool) -> list[Text]:
    """The bits in lines of ``width`` cells, shaded by style, or by a line of marks below each.

    A line breaks at spaces; where there is none to break at, anywhere.
    """
    lines: list[list[Bit]] = [[]]
    used = 0
    for chunk in _chunks(bits, width):
        size = sum(cell_len(bit.text) for bit in chunk)
        blank = chunk[0].text.isspace()
        if chunk[0].line or (used and used + size > width):
            lines.append([])
            used = 0
        if used or not blank:
            lines[-1] += chunk
            used += size
    out: list[Text] = []
    for line in lines:
        words = Text()
        for bit in line:
            shade = STYLES[bit.shade] if colour else ""
            words.append(bit.text, style=" ".join(filter(None, (bit.style, shade))) or None)
        words.rstrip()
        out.append(words)
        if not colour and any(bit.shade for bit in line):
            marks = "".join(SHADES[bit.shade] * cell_len(bit.text) for bit in line)
            out.append(Text(marks.rstrip()))
    return out


def _chunks(bits: Iterable[Bit], width: int) -> Iterator[list[Bit]]:
    """The bits between two spaces together, as long as they fit a line; longer ones cut."""
    chunk: list[Bit] = []
    for bit in bits:
        for part in _cut(bit, width):
            size = sum(cell_len(held.text) for held in chunk) + cell_len(part.text)
            if chunk and (part.line or part.text.isspace() or size > width):
                yield chunk
                chunk = []
            if part.text.isspace() and not part.line:
                yield [part]
            else:
                chunk.append(part)
    if chunk:
        yield chunk


def _cut(bit: Bit, width: int) -> Iterator[Bit]:
    """The bit, cut where it is longer than a line."""
    text, line = bit.text, bit.line
    while cell_len(text) > width:
        head = set_cell_size(text, width).rstrip(" ") or text[0]
        yield bit._replace(text=head, line=line)
        text, line = text[len(head) :], False
    yield bit._replace(text=text, line=line)


def _visible(char: str) -> str:
    kind = unicodedata.category(char)
    if kind == "Cc":
        code = ord(char)
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"
    if kind in ("Cf", "Cs", "Zl", "Zp") and char not in _JOINERS:
        return "�" if kind != "Cf" else ""
    return char


def grid(
    cells: dict[tuple[int, int], float], title: str, width: int, blanks: Sequence[int] = ()
) -> Iterator[Text]:
    """One number in 0..1 for each (layer, head), layers down and heads across, below ``title``.

    In percent where that fits; else one digit a head, in tenths; else in several bands. Layers
    in ``blanks`` have no pattern.
    """
    layers = sorted({layer for layer, _ in cells} | set(blanks))
    heads = sorted({head for _, head in cells})
    side = max(len(f"layer {layer}") for layer in layers) + 1
    room = width - side
    size = next((size for size in (4, 2, 1) if len(heads) * size <= room), 1)
    if size < 4:
        title = title.replace(", %", ", tenths (1 is 5 to 15 %)")
    yield Text(fit(title, width).rstrip(), style="bold")
    for start in range(0, len(heads), room // size):
        band = heads[start : start + room // size]
        yield Text(" " * side + _numbers(band, size, room), style="dim")
        for layer in layers:
            line = Text(fit(f"layer {layer}", side), style="")
            if layer in blanks:
                line.append(fit(" no pattern", room).rstrip(), style="dim")
            for head in () if layer in blanks else band:
                value = cells.get((layer, head))
                said = "" if value is None else _cell(value, size)
                line.append(said.rjust(size), style=_heat(value or 0.0))
            line.rstrip()
            yield line


def _numbers(heads: Sequence[int], size: int, room: int) -> str:
    """The heads' numbers over their columns: each, or every fifth where they are narrow."""
    if size == 4:
        return "".join(f"h{head}".rjust(size) for head in heads)
    said = ""
    for i, head in enumerate(heads):
        if head % 5 == 0 or i == 0:
            at = (i + 1) * size - 1
            if (len(said) < at or not said) and at + len(f"h{head}") <= room:
                said = said.ljust(at) + f"h{head}"
    return said


def _cell(value: float, size: int) -> str:
    if size == 4:
        return f"{value * 100:.0f}" if value >= 0.005 else "·"
    tenth = int(value * 10 + 0.5)
    return "·" if tenth == 0 else "X" if tenth > 9 else str(tenth)


def _heat(value: float) -> str:
    return "bold yellow" if value >= 0.3 else "" if value >= 0.1 else "dim"


def head_label(layer: int, head: int) -> str:
    """A head as layer.head."""
    return f"{layer}.{head}"


def percent(share: float) -> str:
    """A share as people read it."""
    if 0 < share < 0.001:
        return "less than 0.1 %"
    return f"{share * 100:.1f} %" if share < 0.0995 else f"{share * 100:.0f} %"


def counted(number: int, noun: str) -> str:
    """ "1 head", "2 heads"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
