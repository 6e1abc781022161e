"""The strongest links of a whole text, and what heads do whatever the text says.

All of it is gathered in one pass over the word weights. Of each head the strongest links of each
kind are kept, to words beside the reader, to content words and to function words: from these follow
the strongest over any choice of heads, so heads that do one thing only can be left out once they
are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .function_words import is_content
from .parts import Part
from .tables import tables
from .words import Link, Word, from_word, strongest_of

if TYPE_CHECKING:
    from ..capture.recording import Recording

KNOWN = 0.5
"""A head has a known behaviour where it gives this share to one place, on average over words."""
LEAST_READERS = 4
"""… over at least so many words that have such a place."""

_POSITIONS = {"previous": -1, "self": 0, "next": 1}
_ALIKE = 4  # so many times the links asked for are kept of each head: the same words recur
_HEADS = 3  # heads named of a pair


class Behaviour(NamedTuple):
    """Heads of one part that mostly read one place: "previous", "next", "self", "first" (key) or
    "separator" (the special tokens after the first).

    ``heads``: (layer, head, the mean weight it gives there), the largest first; the mean is over
    ``readers`` words.
    """

    place: str
    part: Part
    heads: list[tuple[int, int, float]]
    readers: int


class Pair(NamedTuple):
    """Two words with the heads in which the first reads the second, the strongest first."""

    source: int
    target: int
    heads: list[Link]


@dataclass
class Summary:
    """The strongest links of a text.

    ``near`` and ``far``: links between neighbouring words and between others, over all heads.
    ``pairs`` groups far links to content words by pair of words, each pair at its strongest place;
    ``function_pairs`` those to other words, ``near_pairs`` the near links; what ``behaviours``
    explain is left out of these three.
    """

    near: list[Link] = field(default_factory=list)
    far: list[Link] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    function_pairs: list[Pair] = field(default_factory=list)
    near_pairs: list[Pair] = field(default_factory=list)
    behaviours: list[Behaviour] = field(default_factory=list)

    @property
    def kinds(self) -> dict[str, list[Pair]]:
        """The pairs by kind."""
        return {
            "content": self.pairs,
            "function": self.function_pairs,
            "neighbour": self.near_pairs,
        }


def gather(
    recording: Recording,
    parts: Sequence[Part],
    words: Sequence[Word],
    top: int,
    step: Callable[[int], object],
) -> Summary:
    """The ``top`` strongest of each kind. A part's special tokens and sinks are no targets.

    ``step`` is told how many rows of how many layers were read.
    """
    found = Summary()
    kinds: dict[str, list[Link]] = {"near": [], "content": [], "function": []}
    for part in parts:
        best = _part(recording, part, top * _ALIKE, step, found.behaviours)
        for kind, links in kinds.items():
            links += best[kind].links(part)
    known = _Known(found.behaviours)
    found.near = strongest_of(kinds["near"], top)
    found.far = strongest_of([*kinds["content"], *kinds["function"]], top)
    found.pairs, found.function_pairs, found.near_pairs = (
        [_pair(recording, parts, link, known) for link in _distinct(kinds[kind], words, top, known)]
        for kind in ("content", "function", "near")
    )
    return found


class _Known:
    """What the heads' behaviours explain: all links of a positional head, and those of a head that
    reads the first key to that key. (The separators are special tokens, never listed.)"""

    def __init__(self, behaviours: Iterable[Behaviour]) -> None:
        self.heads: set[tuple[int, int]] = set()
        self.firsts: set[tuple[int, int, int]] = set()
        for behaviour in behaviours:
            for layer, head, _ in behaviour.heads:
                if behaviour.place in _POSITIONS:
                    self.heads.add((layer, head))
                elif behaviour.place == "first":
                    self.firsts.add((layer, head, behaviour.part.keys.first))

    def explains(self, link: Link) -> bool:
        """Whether the link says nothing that the head's behaviour does not."""
        return (link.layer, link.head) in self.heads or (
            link.layer, link.head, link.target
        ) in self.firsts  # fmt: skip


def _distinct(links: Iterable[Link], words: Sequence[Word], top: int, known: _Known) -> list[Link]:
    """The strongest link of each pair of words, the same two words elsewhere being one pair."""
    best: dict[tuple[str, str], Link] = {}
    free = [link for link in links if not known.explains(link)]
    for link in strongest_of(free, len(free)):
        if len(best) < top:
            best.setdefault((words[link.source].text, words[link.target].text), link)
    return list(best.values())


def _pair(recording: Recording, parts: Sequence[Part], link: Link, known: _Known) -> Pair:
    """The pair of words of a link, with the heads that have it."""
    part = next(part for part in parts if link.layer in part.layers)
    reader = part.readers.words[link.source - part.readers.first]
    place = link.target - part.keys.first
    rows = [
        from_word(recording, layer, reader, part.keys.words, heads)[:, place]
        for layer, heads in part.layers.items()
    ]
    weights = torch.cat(rows).masked_fill(part.sinks[:, place], 0)
    links = [
        Link(*head, link.source, link.target, weight)
        for head, weight in zip(part.heads, weights.tolist(), strict=True)
        if weight > 0
    ]
    new = [one for one in links if not known.explains(one)]
    return Pair(link.source, link.target, strongest_of(new, _HEADS))


def _part(
    recording: Recording,
    part: Part,
    top: int,
    step: Callable[[int], object],
    behaviours: list[Behaviour],
) -> dict[str, _Best]:
    """The strongest links of each head of a part, by kind; what heads do joins ``behaviours``."""
    readers, keys = part.readers.words, part.keys.words
    content = torch.tensor([is_content(word) for word in keys], dtype=torch.bool, device="cpu")
    columns = {
        "content": content.nonzero().flatten(),
        "function": (~content).nonzero().flatten(),
    }
    best = {kind: _Best(len(part.heads), top) for kind in ("near", *columns)}
    measured = _Measured(part)
    skip = part.special | part.sinks
    speaks = torch.tensor([not word.special for word in readers], dtype=torch.bool, device="cpu")
    for rows, layers in tables(recording, part.layers, readers, keys):
        own = torch.arange(rows.start, rows.stop, dtype=torch.int64, device="cpu")
        at = 0
        for table in layers:
            span = slice(at, at + len(table))
            at += len(table)
            measured.add(span, rows, table)
            table.masked_fill_(skip[span, None], 0)
            table[:, ~speaks[own]] = 0
            if part.readers is part.keys:
                here = own - rows.start
                table[:, here, own] = 0
                beside = torch.stack([own - 1, own + 1], 1).clamp(0, len(keys) - 1)
                best["near"].add(span, rows, table[:, here[:, None], beside], beside)
                table[:, here[:, None], beside] = 0
            for kind, places in columns.items():
                best[kind].add(span, rows, table[:, :, places], places.expand(len(rows), -1))
            step(readers[rows[-1]].tokens.stop - readers[rows[0]].tokens.start)
    behaviours += measured.behaviours()
    return best


class _Best:
    """The strongest links of each head, of one kind, so far."""

    def __init__(self, heads: int, top: int) -> None:
        self.top = top
        self.weights = torch.zeros(heads, top, dtype=torch.float32, device="cpu")
        self.places = torch.zeros(heads, top, 2, dtype=torch.int64, device="cpu")

    def add(self, heads: slice, rows: range, table: Tensor, columns: Tensor) -> None:
        """Weights (heads, rows, cols); which key each of them is of: int64 (rows, cols)."""
        if not table.numel():
            return
        # The strongest links of a head lie in the rows whose strongest are
        lines = table.amax(2).topk(min(self.top, len(rows)), 1).indices
        wide = table.shape[2]
        some = table.gather(1, lines[..., None].expand(-1, -1, wide)).flatten(1)
        weights, cells = some.topk(min(self.top, some.shape[1]), 1)
        row = lines.gather(1, cells // wide)
        places = torch.stack([row + rows.start, columns[row, cells % wide]], 2)
        weights = torch.cat([self.weights[heads], weights], 1)
        places = torch.cat([self.places[heads], places], 1)
        self.weights[heads], kept = weights.topk(self.top, 1)
        self.places[heads] = places.gather(1, kept[..., None].expand(-1, -1, 2))

    def links(self, part: Part) -> list[Link]:
        """As links between words of all texts."""
        return [
            Link(*head, source + part.readers.first, target + part.keys.first, weight)
            for head, weights, places in zip(
                part.heads, self.weights.tolist(), self.places.tolist(), strict=True
            )
            for weight, (source, target) in zip(weights, places, strict=True)
            if weight > 0
        ]


class _Measured:
    """What heads give to places, summed over reading words, special tokens apart."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.special = part.special
        self.after_first = part.special.clone()
        self.after_first[:1] = False
        self.speaks = torch.tensor(
            [not word.special for word in part.readers.words], dtype=torch.bool, device="cpu"
        )
        same = part.readers is part.keys
        names = [*(_POSITIONS if same else ()), "first", "separator"]
        self.counts = dict.fromkeys(names, 0)
        self.sums = {
            name: torch.zeros(len(part.heads), dtype=torch.float64, device="cpu") for name in names
        }

    def add(self, heads: slice, rows: range, table: Tensor) -> None:
        """Add a table (heads, rows, keys)."""
        at = torch.arange(rows.start, rows.stop, dtype=torch.int64, device="cpu")
        at = at[self.speaks[at]]
        here, counted = at - rows.start, heads.start == 0
        for name, by in _POSITIONS.items() if self.part.readers is self.part.keys else ():
            has = (at + by >= 0) & (at + by < table.shape[2])
            has &= ~self.special[(at + by).clamp(0, table.shape[2] - 1)]
            self.sums[name][heads] += table[:, here[has], at[has] + by].double().sum(1)
            self.counts[name] += int(has.sum()) * counted
        later = here if self.part.readers is not self.part.keys else here[at > 0]
        self.sums["first"][heads] += table[:, later, 0].double().sum(1)
        self.counts["first"] += len(later) * counted
        if self.after_first.any():
            self.sums["separator"][heads] += (
                table[:, here][:, :, self.after_first].double().sum((1, 2))
            )
            self.counts["separator"] += len(here) * counted

    def behaviours(self) -> list[Behaviour]:
        """The heads that mostly read one place, by place; each at the place it reads most."""
        enough = {name: count for name, count in self.counts.items() if count >= LEAST_READERS}
        if not enough:
            return []
        means = torch.stack([self.sums[name] / count for name, count in enough.items()])
        most = means.max(0)
        found = []
        for i, (name, count) in enumerate(enough.items()):
            has = ((most.indices == i) & (most.values >= KNOWN)).nonzero().flatten().tolist()
            heads = [(*self.part.heads[head], float(most.values[head])) for head in has]
            if heads:
                heads.sort(key=lambda head: (-head[2], head[:2]))
                found.append(Behaviour(name, self.part, heads, count))
        return found
