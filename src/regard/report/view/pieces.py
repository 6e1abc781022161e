"""Tokens as the text shows them: each with the white space before it."""

from __future__ import annotations

from typing import Any

Piece = str | tuple[str, str]
"""A token with the white space before it; or what no token covers before it, and the token."""


def displayed(about: dict[str, Any]) -> list[Piece]:
    """One piece a token, from the text where offsets say which characters are whose.

    A token that has no characters of the text (a special one) is shown by its name, without a
    space. Bytes of one character share it: the first shows it, the others are empty.
    """
    tokens = about.get("tokens")
    if not isinstance(tokens, list):
        return []
    names = [str(token) for token in tokens]
    text, offsets = about.get("text"), about.get("offsets")
    if not isinstance(text, str) or not isinstance(offsets, list) or not _fit(offsets, len(names)):
        return [_plain(name) for name in names]
    special = about.get("special")
    marks = special if isinstance(special, list) and len(special) == len(names) else []
    pieces: list[Piece] = []
    reached = 0
    for i, (start, end) in enumerate(offsets):
        if (marks and marks[i]) or (start == end and end >= reached and not _held(offsets, i)):
            pieces.append(names[i])
            reached = max(reached, end)
            continue
        gap = text[reached:start]
        if gap and not gap.isspace():
            pieces.append((gap, text[start:end]))
        else:
            pieces.append(text[reached:end])
        reached = max(reached, end)
    return pieces


def _fit(offsets: list[Any], count: int) -> bool:
    return len(offsets) == count and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(place, int) and place >= 0 for place in pair)
        for pair in offsets
    )


def _held(offsets: list[tuple[int, int]], i: int) -> bool:
    """Whether another token beside has the same characters."""
    return any(
        0 <= j < len(offsets) and tuple(offsets[j]) == tuple(offsets[i]) for j in (i - 1, i + 1)
    )


def _plain(name: str) -> str:
    """A tokenizer's name for a token: its sign for a space becomes one."""
    if name.startswith("##"):
        return name[2:]
    if name[:1] in ("\u0120", "\u2581"):
        return " " + name[1:]
    return name.replace("\u010a", "\n") if name else name
