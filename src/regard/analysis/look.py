"""What `regard look` shows, as numbers: gathered once, then printed as text or as JSON.

Words are numbered over all texts on end: an encoder's words, then its decoder's. Heads are pairs
(layer, head), the layer being an index into ``recording.layers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RegardError
from .compare import Versus
from .generated import beams_of
from .parts import Part, ReadText, kind_of
from .summary import Summary, gather
from .words import Columns, Found, Link, Word, Words, columns, find, from_word, label, strongest_of

if TYPE_CHECKING:
    from ..capture.recording import Recording
    from .cut import Changed
    from .effect import Effects


@dataclass(frozen=True)
class Row:
    """What one word reads in one part: ``weights`` float32 (heads, words of the part's keys)."""

    part: Part
    word: int
    weights: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean over the heads shown: float32 (words,)."""
        return self.weights.mean(0)

    @property
    def itself(self) -> int:
        """The word's place among the keys; -1 where they are another text's."""
        return self.word - self.part.keys.first if self.part.keys is self.part.readers else -1

    def links(self, top: int, hidden: Tensor | None = None, per_head: bool = False) -> list[Link]:
        """The strongest links from the word, ``top`` in all or of each head.

        ``hidden`` bool, (words,) or (heads, words), is left out.
        """
        weights = self.weights if hidden is None else self.weights.masked_fill(hidden, 0)
        heads = self.part.heads
        values, places = (weights if per_head else weights.flatten()[None]).topk(
            min(top, weights.shape[1] if per_head else weights.numel())
        )
        found = []
        for at, (row, targets) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            for weight, place in zip(row, targets, strict=True):
                pair, target = (at, place) if per_head else divmod(place, weights.shape[1])
                if weight > 0:
                    target += self.part.keys.first
                    found.append(Link(*heads[pair], self.word, target, weight))
        return found


@dataclass(frozen=True)
class Focus:
    """A word asked for, and what it reads in every part in which it reads."""

    found: Found
    rows: list[Row]


class Blank(NamedTuple):
    """A layer without a pattern, and why."""

    layer: int
    name: str
    reason: str


@dataclass
class Look:
    """What `regard look` found.

    ``focuses`` are the words asked for, and ``links`` the strongest of each head from them. Without
    any, ``summary`` has the strongest links over all heads, special tokens and each head's sinks
    apart; ``written`` is what the generated words read, ``probabilities`` those of their tokens,
    ``beams`` what each beam of a search wrote; ``links`` has all of these. ``shown_mass`` is the
    share that ``links`` hold of the mass of all the rows they are of. What else was asked for:
    ``versus`` comparisons with ``other``, what ``cut`` changed, and ``effects``.
    """

    model: str
    sides: list[ReadText]
    words: list[Word]
    labels: list[str]
    generated: range
    probabilities: list[float | None]
    beams: list[dict[str, Any]]
    parts: list[Part]
    blanks: list[Blank]
    top: int
    special: bool
    focuses: list[Focus] = field(default_factory=list)
    written: list[Row] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)
    links: list[Link] = field(default_factory=list)
    shown_mass: float = 0.0
    other: Look | None = None
    versus: list[Versus] = field(default_factory=list)
    cut: Changed | None = None
    effects: list[Effects] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many rows of weights the heads shown have, of words that are no special tokens."""
        return sum(
            len(part.heads) * sum(not word.special for word in part.readers.words)
            for part in self.parts
        )

    @property
    def asked(self) -> bool:
        """Whether more was asked for than what the heads read in one text."""
        return bool(self.other or self.cut or self.effects)


def look(
    recording: Recording,
    *,
    readers: Sequence[str] = (),
    layers: Sequence[int] = (),
    heads: Sequence[int | tuple[int, int]] = (),
    top: int = 8,
    special: bool = True,
    progress: Callable[[float], object] | None = None,
) -> Look:
    """Gather what ``regard look`` shows of a recording whose ``about`` has text and tokens.

    ``readers``: the words whose reading is asked for, as ``find`` takes them. ``layers`` and
    ``heads``: those to show, all if empty; a head is a number, or (layer, head). ``special``:
    whether special tokens are listed. ``progress`` is told the share that is done. Memory stays
    bounded at any length.
    """
    sides, generated = _sides(recording)
    words = [word for side in sides for word in side.words]
    founds = [find(words, name) for name in readers]
    shown = _chosen(recording, layers, heads)
    step = _share(progress, sum(recording.layers[i].q_len for i in shown) * (2 - bool(founds)))
    result = Look(
        model=str(recording.about.get("model", "")),
        sides=sides,
        words=words,
        labels=label(words),
        generated=generated,
        probabilities=(recording.about.get("decoder") or recording.about).get("probabilities", []),
        beams=beams_of(recording.about),
        parts=_parts(recording, sides, shown, step),
        blanks=[
            Blank(i, layer.name, layer.reason)
            for i, layer in enumerate(recording.layers)
            if not layer.pattern
        ],
        top=top,
        special=special,
    )
    for found in founds:
        result.focuses.append(Focus(found, list(rows_of(recording, result.parts, found.number))))
    if founds:
        rows = [row for focus in result.focuses for row in focus.rows]
        for row in rows:
            result.links += row.links(top, None if special else row.part.special, per_head=True)
        total = sum(len(row.part.heads) for row in rows)
    else:
        result.summary = gather(recording, result.parts, words, top, step)
        result.links = [*result.summary.near, *result.summary.far]
        result.written = [
            row
            for number in generated
            if not words[number].special
            for row in rows_of(recording, result.parts, number)
        ]
        for row in result.written:
            result.links += row.links(top, row.part.special | row.part.sinks)
        result.links = strongest_of(list(dict.fromkeys(result.links)), len(result.links))
        total = result.rows
    result.shown_mass = sum(link.weight for link in result.links) / max(1, total)
    return result


def _sides(recording: Recording) -> tuple[list[ReadText], range]:
    """The texts of a recording, and which of their words were generated."""
    sides: list[ReadText] = []
    count = 0
    for about in filter(None, (recording.about, recording.about.get("decoder"))):
        begun, offsets = about.get("generated"), about.get("offsets")
        cuts = [offsets[begun][0]] if offsets and begun and begun < len(offsets) else []
        words = Words.of(about, cuts)
        sides.append(ReadText(about["text"], words, count))
        count += len(words)
    if len(sides) > 1:
        return sides, range(sides[1].first, count)
    if begun is None:
        return sides, range(0)
    first = sum(word.tokens.start < begun for word in sides[0].words)
    return sides, range(first, count)


def _chosen(
    recording: Recording, layers: Sequence[int], heads: Sequence[int | tuple[int, int]]
) -> dict[int, list[int]]:
    """The heads to show of each layer to show."""
    count = len(recording.layers)
    pairs = [head for head in heads if isinstance(head, tuple)]
    for layer in [*layers, *(layer for layer, _ in pairs)]:
        if not 0 <= layer < count:
            raise RegardError(f"no layer {layer}: the model has layers 0 to {count - 1}")
        if not recording.layers[layer].pattern:
            recorded = recording.layers[layer]
            raise RegardError(f"layer {layer} has no pattern: {recorded.reason}")
    wanted = set(layers) or set(range(count))
    with_pattern = [i for i in sorted(wanted) if recording.layers[i].pattern]
    if not with_pattern:
        raise RegardError("the model has no layer with softmax attention, so no pattern to show")
    most = max(recording.layers[i].heads for i in with_pattern)
    for head in heads:
        if not isinstance(head, tuple) and not 0 <= head < most:
            raise RegardError(f"no head {head}: the layers have heads 0 to {most - 1}")
    for layer, number in pairs:
        most = recording.layers[layer].heads
        if layer not in with_pattern or not 0 <= number < most:
            here = "" if layer in with_pattern else ", and is not among those shown"
            raise RegardError(
                f"no head {layer}.{number}: layer {layer} has heads 0 to {most - 1}{here}"
            )
    chosen = {}
    for i in with_pattern:
        every = range(recording.layers[i].heads)
        chosen[i] = [head for head in every if not heads or head in heads or (i, head) in heads]
    return {layer: some for layer, some in chosen.items() if some}


def _parts(
    recording: Recording,
    sides: list[ReadText],
    shown: dict[int, list[int]],
    step: Callable[[int], object],
) -> list[Part]:
    """The shown heads by kind, with what each word receives in them."""
    kinds: dict[str, dict[int, list[int]]] = {}
    for layer, heads in shown.items():
        kinds.setdefault(kind_of(recording.layers[layer], len(sides)), {})[layer] = heads
    parts = []
    for kind, layers in kinds.items():
        readers = sides[1] if kind in ("decoder", "cross") else sides[0]
        keys = sides[1] if kind == "decoder" else sides[0]
        found = [
            columns(recording, layer, keys.words, _only(recording, layer, heads), step)
            for layer, heads in layers.items()
        ]
        joined = Columns(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))
        names = {layer: recording.layers[layer].name for layer in layers}
        parts.append(Part(kind, layers, names, readers, keys, *joined))
    return parts


def _only(recording: Recording, layer: int, heads: list[int]) -> list[int] | None:
    """The heads as words.py takes them: None for all, which one tile serves."""
    return None if len(heads) == recording.layers[layer].heads else heads


def rows_of(recording: Recording, parts: list[Part], number: int) -> Iterator[Row]:
    """What the word reads in each part in which it does."""
    for part in parts:
        place = number - part.readers.first
        if 0 <= place < len(part.readers.words):
            reader = part.readers.words[place]
            weights = [
                from_word(recording, layer, reader, part.keys.words, _only(recording, layer, heads))
                for layer, heads in part.layers.items()
            ]
            yield Row(part, number, torch.cat(weights))


def _share(progress: Callable[[float], object] | None, total: int) -> Callable[[int], object]:
    done = 0

    def step(rows: int) -> None:
        nonlocal done
        done += rows
        if progress:
            progress(done / max(1, total))

    return step
