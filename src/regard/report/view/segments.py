"""What heads read of the segments of a text: documents, turns, functions, or ranges of tokens."""

from __future__ import annotations

import re
from typing import Any

from ...capture.recording import Recording
from ...capture.segments import Segments
from ...errors import RegardError
from .page_facts import KINDS, SAMPLED

MOST = 400
"""Segments that are shown."""
_RANGES = re.compile(r"\s*\d+\s*[-–:]\s*\d+\s*(,\s*\d+\s*[-–:]\s*\d+\s*)*")


def found(recording: Recording, given: str) -> Segments:
    """The segments that a pattern begins, or ranges such as "0-120, 120-300" (the last left out).

    RegardError where there are none, or more than can be shown.
    """
    if not given.strip():
        raise RegardError("give a pattern at which each segment begins, or ranges: 0-120, 120-300")
    count = len(recording.about.get("tokens") or ())
    if _RANGES.fullmatch(given):
        ranges = [re.findall(r"\d+", pair) for pair in given.split(",")]
        pairs = [(int(first), int(last)) for first, last in ranges]
        if len(pairs) > MOST or any(not first < last for first, last in pairs):
            raise RegardError(f"give at most {MOST} ranges, each first-last, the first smaller")
        return recording.segments([(first, last) for first, last in pairs])
    text = recording.about.get("text")
    if not isinstance(text, str) or not count:
        raise RegardError("a pattern needs a recorded text; give ranges of tokens: 0-120, 120-300")
    places = 0
    try:
        for places, _ in enumerate(re.finditer(given, text), 1):
            if places > MOST:
                raise RegardError(f"the pattern matches more than {MOST} places; narrow it")
    except re.error as error:
        raise RegardError(f"the pattern {given!r} is none: {error}") from None
    if not places:
        kind = next((name for name, pattern in KINDS.items() if pattern == given), None)
        raise RegardError(
            f"the text {f'has no {kind}' if kind else f'nowhere matches {given!r}'}; choose "
            "another kind, give a pattern of your own, or ranges of tokens: 0-120, 120-300"
        )
    return recording.segments(given)


def rows_of(recording: Recording, number: int, token: list[int] | None) -> tuple[list[int], str]:
    """The queries whose reading is shared out, and what they are called: a word's, or all's.

    All are those of the generated tokens, where the recording knows them, else `SAMPLED` of the
    text, spread evenly.
    """
    layer = recording.layer(number)
    if token is not None:
        return [row for row in token if 0 <= row < layer.q_len], "word"
    begun = recording.about.get("generated")
    if isinstance(begun, int):
        first = max(begun - layer.query_start, 0)
        if first < layer.q_len:
            step = -(-(layer.q_len - first) // SAMPLED)
            return list(range(first, layer.q_len, step)), "generated"
    step = max(1, layer.q_len // SAMPLED)
    return list(range(layer.q_len - 1, -1, -step))[:SAMPLED], "sampled"


def shares(
    recording: Recording, given: str, number: int, token: list[int] | None, batch: int
) -> dict[str, Any]:
    """Of a layer: {names, ranges, shares [head][segment], rows, kind}, means over the rows."""
    segments = found(recording, given)
    rows, kind = rows_of(recording, number, token)
    if not rows:
        raise RegardError("this layer has no query of that token")
    read = segments.shares(number, None, rows, batch).mean(1)
    if not bool(read.isfinite().all()):
        raise RegardError(f"a weight of layer {number} is not a number")
    return {
        "names": segments.names,
        "ranges": segments.ranges,
        "shares": [[round(share, 6) for share in head] for head in read.tolist()],
        "rows": len(rows),
        "kind": kind,
    }
