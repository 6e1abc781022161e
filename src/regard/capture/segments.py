"""Long prompts by segment: what heads read of documents, turns or functions, in O(N) memory."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .recorded_layer import RecordedLayer

HELD = 2**23  # weights that are held at once

Given = str | re.Pattern[str] | Sequence[tuple[int, int]] | Mapping[str, tuple[int, int]]


class Segments:
    """Ranges of a recording's tokens, and what heads read of each.

    names, and ranges (first token, last + 1). A token may be in none, or in several.
    """

    def __init__(
        self,
        ranges: Mapping[str, tuple[int, int]] | Sequence[tuple[str, tuple[int, int]]],
        layer: Callable[[int | str, int | None, int], RecordedLayer],
        generated: int | None,
    ) -> None:
        pairs = list(ranges.items()) if isinstance(ranges, Mapping) else list(ranges)
        self.names: list[str] = [name for name, _ in pairs]
        self.ranges: list[tuple[int, int]] = [(int(first), int(last)) for _, (first, last) in pairs]
        self._layer, self._generated = layer, generated
        for name, (first, last) in zip(self.names, self.ranges, strict=True):
            if not 0 <= first <= last:
                raise RegardError(f"segment {name!r} is {first} … {last}; give (first, last + 1)")

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.names[:4])) + (", …" if len(self) > 4 else "")
        return f"Segments({len(self)}: {shown})"

    def shares(
        self,
        layer: int | str,
        head: int | None = None,
        rows: slice | Sequence[int] | None = None,
        batch: int = 0,
    ) -> Tensor:
        """What each row reads of each segment: (heads, rows, segments), or (rows, segments).

        float32: sums of weights, 0 … 1. rows: by default those of the generated tokens, where the
        recording knows them (`about["generated"]`), else all.
        """
        found = self._layer(layer, head, batch)
        if rows is None and self._generated is not None:
            rows = slice(max(self._generated - found.query_start, 0), None)
        parts = []
        for weights in blocks(found, rows, batch):
            weights = weights if head is None else weights[head]
            parts.append(self._summed(found, weights))
        if not parts:
            shape = (0, len(self)) if head is not None else (found.heads, 0, len(self))
            return torch.zeros(shape, dtype=torch.float32, device="cpu")
        return torch.cat(parts, -2)

    def _summed(self, layer: RecordedLayer, weights: Tensor) -> Tensor:
        """(…, k_len) summed over the keys of each segment: (…, segments)."""
        first = layer.key_start
        sums = [weights[..., max(a - first, 0) : max(b - first, 0)].sum(-1) for a, b in self.ranges]
        return torch.stack(sums, -1) if sums else weights[..., :0]


def blocks(
    layer: RecordedLayer, rows: slice | Sequence[int] | None, batch: int
) -> Iterator[Tensor]:
    """The weights (heads, some rows, k_len) of these rows, as many at a time as fit into `HELD`."""
    n = layer.q_len
    step = max(HELD // max(layer.heads * layer.k_len, 1), 1)
    if rows is None or isinstance(rows, slice):
        first, last, stride = (rows or slice(None)).indices(n)
        if stride != 1:
            raise RegardError(f"rows {rows}: give a slice of step 1, or a list")
        for start in range(first, last, step):
            yield layer.weights(slice(start, min(start + step, last)), batch)
        return
    if any(not -n <= row < n for row in rows):
        raise RegardError(f"rows {list(rows)}: layer {layer.name} has {n} queries")
    wanted = [row % n for row in rows]
    for at in range(0, len(wanted), step):
        yield layer.weights_of(wanted[at : at + step], batch)


def ranges_of(given: Given, about: Mapping[str, Any]) -> list[tuple[str, tuple[int, int]]]:
    """Names and token ranges of segments: ranges as they are, or those that a pattern begins.

    Each match of a pattern begins a segment, which lasts until the next one; it is named by the
    group `name`, else the first group, else all that matched. What stands before the first match is
    the segment "".
    """
    if isinstance(given, Mapping):
        return [(str(name), (first, last)) for name, (first, last) in given.items()]
    if not isinstance(given, str | re.Pattern):
        try:
            return [(f"{first}:{last}", (int(first), int(last))) for first, last in given]
        except (TypeError, ValueError):
            raise RegardError(
                f"segments is {given!r}; give ranges of tokens, such as [(0, 120), (120, 300)], "
                "or a pattern at which each begins"
            ) from None
    text, offsets = about.get("text"), about.get("offsets")
    if not isinstance(text, str) or not isinstance(offsets, list):
        raise RegardError("a pattern needs the text and its tokens' offsets; give ranges of tokens")
    try:
        matches = list(re.finditer(given, text))
    except re.error as error:
        raise RegardError(f"the pattern {given!r} is none: {error}") from None
    if not matches:
        raise RegardError(f"the pattern {given!r} matches nothing in the text")
    ends = list(accumulate((int(last) for _, last in offsets), max))
    cuts = [("", 0)] + [(_name(m), m.start()) for m in matches]
    edges = [0, *(_token_at(ends, at) for _, at in cuts[1:]), len(ends)]
    named = [(name, (edges[n], edges[n + 1])) for n, (name, _) in enumerate(cuts)]
    return [each for each in named if each[0] or each[1][0] < each[1][1]]


def _name(match: re.Match[str]) -> str:
    """What a segment is called by the match that begins it."""
    groups = match.groupdict()
    named = groups.get("name") or next(filter(None, match.groups()), None) or match.group()
    return " ".join(named.split())


def _token_at(ends: Sequence[int], at: int) -> int:
    """The token that covers a character: it may begin with the space before. ends: how far the
    tokens up to each reach."""
    return bisect_right(ends, at)
