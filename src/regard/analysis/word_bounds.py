"""Where words begin and end in a text: by UAX #29, with a few rules on top."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..errors import RegardError

# Scripts without spaces that UAX #29 joins: it parts Han, hiragana, Thai, Khmer and the like itself
_UNSPACED = r"[\p{scx=Katakana}\p{sc=Bopomofo}\p{sc=Tibetan}\p{lb=AK}\p{lb=AS}]+"
_SPACED = r"[[\p{L}\p{M}\p{N}]--[\p{lb=ID}\p{lb=CJ}\p{lb=NS}\p{lb=SA}]]"
_HYPHEN = rf"(?V1)(?<={_SPACED})[-\u2010\u2011](?={_SPACED})"


def pieces_of(
    text: str,
    spans: Sequence[tuple[int, int]],
    special: Sequence[bool],
    cuts: Sequence[int],
) -> list[tuple[int, int]]:
    """The stretches of ``text`` that words are made of, in order; a run of one sign stays one."""
    fixed = {*cuts, *(at for span, mark in zip(spans, special, strict=True) if mark for at in span)}
    pieces: list[tuple[int, int]] = []
    sign, start = "", 0
    for stop in sorted(_bounds(text, {low for low, high in spans if low < high}) | fixed):
        low, high = strip(text, start, stop)
        start = stop
        if low == high:
            continue
        piece = text[low:high]
        if piece == sign and pieces[-1][1] == low and low not in fixed:
            pieces[-1] = pieces[-1][0], high
        else:
            pieces.append((low, high))
        sign = "" if any(map(str.isalnum, piece)) else piece
    return pieces


def _bounds(text: str, marks: set[int]) -> set[int]:
    """Where a word may begin or end: by UAX #29, but for hyphens, and for ``marks``, the starts of
    tokens, in scripts without spaces."""
    try:
        import regex
        from unicode_segmentation_rs import graphemes, split_word_bounds
    except ImportError as error:
        raise RegardError('words need an extra: pip install "regard[look]"') from error
    bounds = set(accumulate(map(len, split_word_bounds(text))))
    for hyphen in regex.finditer(_HYPHEN, text):
        bounds -= {hyphen.start(), hyphen.end()}
    if not text.isascii():
        for run in regex.finditer(_UNSPACED, text):
            bounds |= marks.intersection(range(run.start(), run.end() + 1))
        bounds.intersection_update(accumulate(map(len, graphemes(text, True))))
        bounds.update(*(gap.span() for gap in regex.finditer(r"[\s\x1c-\x1f]+", text)))
    return bounds


def strip(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without the whitespace at its edges; an empty one stands at its end."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end
