"""Small things that printing needs: safe text, widths in cells, bars, wrapping with shades."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
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
    """The bits in lines of ``width`` cells, shaded by style, or by a line of marks below each."""
    lines: list[list[Bit]] = [[]]
    used = 0
    for bit in bits:
        for part in _parts(bit, width):
            size = cell_len(part.text)
            if part.line or used + size > width:
                lines.append([])
                used = 0
                if part.text.isspace():
                    continue
            if used or not part.text.isspace():
                lines[-1].append(part)
                used += size
    out: list[Text] = []
    for line in lines:
        words = Text()
        for part in line:
            shade = STYLES[part.shade] if colour else ""
            words.append(part.text, style=" ".join(filter(None, (part.style, shade))) or None)
        words.rstrip()
        out.append(words)
        if not colour and any(part.shade for part in line):
            marks = "".join(SHADES[part.shade] * cell_len(part.text) for part in line)
            out.append(Text(marks.rstrip()))
    return out


def _parts(bit: Bit, width: int) -> Iterable[Bit]:
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


def columns_of(rows: Sequence[Sequence[str]], gap: int = 2) -> list[str]:
    """Cells, as wide as they come, padded into columns."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return [
        (" " * gap).join(fit(cell, w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
