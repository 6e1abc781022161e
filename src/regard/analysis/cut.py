"""Cuts, as a person writes them ("3.1: it→trophy"), and what the rest of the model makes of them.

A cut edge's score is −inf, so the row's other weights grow to fill its place; a cut head adds
nothing. The model then runs on, so later layers read what the cut left (activation patching's
"knockout": Geva et al. 2023, section 4).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call.masks import Edges, Full, Heads, Mask
from ..capture.layers import Cut
from ..capture.recording import Recording
from ..errors import RegardError
from .compare import Reading, Versus, compare
from .probe import Probe
from .words import Words, find, from_word, label

_SPEC = re.compile(r"\s*(\d+)(?:\.(\d+))?\s*(?::(.*))?", re.DOTALL)
_ARROW = re.compile(r"→|->")


@dataclass(frozen=True)
class Edge:
    """What one --cut names: a layer, its head (None: all), and a word reading another (or all)."""

    layer: int
    head: int | None
    source: str | None = None
    target: str | None = None

    @classmethod
    def parse(cls, spec: str) -> Edge:
        """ "3.1: it→trophy", "3.1: it->trophy", "3: it→trophy" or "3.1"; words may be quoted."""
        found = _SPEC.fullmatch(spec)
        if not found:
            raise RegardError(f'--cut {spec!r}: write "3.1: it→trophy", "3.1" or "3: it→trophy"')
        layer, head, words = int(found[1]), int(found[2]) if found[2] else None, found[3]
        if words is None:
            return cls(layer, head)
        ends = [
            [_unquoted(words[: arrow.start()]), _unquoted(words[arrow.end() :])]
            for arrow in _ARROW.finditer(words)
        ]
        whole = [pair for pair in ends if all(pair)]
        if len(whole) != 1:
            raise RegardError(
                f'--cut {spec!r}: after the colon stands one word reading another: "it→trophy"'
            )
        return cls(layer, head, whole[0][0], whole[0][1])

    def __str__(self) -> str:
        head = f"{self.layer}" if self.head is None else f"{self.layer}.{self.head}"
        return head if self.source is None else f"{head}: {self.source}→{self.target}"


def _unquoted(text: str) -> str:
    """A word without the spaces and quotes around it; "" if its quotes do not close."""
    text = text.strip()
    if text[:1] in "\"'" and len(text) > 1:
        return text[1:-1] if text[-1] == text[0] else ""
    return "" if text in ('"', "'") else text


@dataclass(frozen=True)
class Removed:
    """A cut as made: its words by number (None for whole heads), and the weight that was there.

    weights: of each head that is cut, (head, word weight of the edge before).
    """

    edge: Edge
    source: int | None
    target: int | None
    weights: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Moved:
    """How a word's final vector changed.

    cosine: between before and after. change: ‖after − before‖ / ‖before‖.
    """

    word: int
    cosine: float
    change: float


@dataclass(frozen=True)
class NextToken:
    """The next token's distribution, of a causal model: the tokens likeliest before or after.

    tokens: (token, probability before, after). kl: KL(before ‖ after) in nats.
    """

    tokens: tuple[tuple[str, float, float], ...]
    kl: float


@dataclass(frozen=True)
class Changed:
    """What cuts changed. moved: every word, the largest change first. readings: of the words asked
    for, what they read before ("one") and after ("two"). next: of a causal model only."""

    model: str
    text: str
    words: Words
    cuts: tuple[Removed, ...]
    moved: tuple[Moved, ...]
    readings: tuple[tuple[int, Versus], ...]
    next: NextToken | None


def cuts_of(
    probe: Probe, recording: Recording, edges: Sequence[Edge]
) -> tuple[list[Cut], list[Removed]]:
    """The edges as cuts of the model's own layers and tokens. recording: of a run of the probe."""
    cuts, removed = [], []
    for edge in edges:
        if not edge.layer < len(recording.layers):
            raise RegardError(
                f"--cut {edge}: the model has layers 0 to {len(recording.layers) - 1}"
            )
        layer = recording.layers[edge.layer]
        if not layer.pattern:
            raise RegardError(f"--cut {edge}: layer {edge.layer} has no pattern: {layer.reason}")
        if edge.head is not None and not edge.head < layer.heads:
            raise RegardError(f"--cut {edge}: the layer has heads 0 to {layer.heads - 1}")
        heads = list(range(layer.heads)) if edge.head is None else [edge.head]
        mask: Mask = Full() if edge.head is None else Heads(heads)
        if edge.source is None or edge.target is None:
            removed.append(Removed(edge, None, None, ()))
        else:
            ends = find(probe.words, edge.source).number, find(probe.words, edge.target).number
            source, target = (probe.words[end] for end in ends)
            mask = Edges([(q, k) for q in source.tokens for k in target.tokens]) & mask
            was = from_word(recording, edge.layer, source, probe.words)[:, ends[1]]
            held = tuple((head, float(was[head])) for head in heads)
            removed.append(Removed(edge, *ends, held))
        cuts.append(Cut(layer.name, mask))
    return cuts, removed


@torch.no_grad()
def cut(probe: Probe, edges: Sequence[Edge], readers: Sequence[str] = (), top: int = 8) -> Changed:
    """Run the model as it is and with the edges cut, and compare.

    readers: the words whose reading is compared; by default those that the edges name.
    """
    with probe.running(keep_qk=True) as before:
        pass
    assert before.recording is not None
    cuts, removed = cuts_of(probe, before.recording, edges)
    with probe.running(keep_qk=True, cut=cuts) as after:
        pass
    assert after.recording is not None
    asked = [find(probe.words, name).number for name in readers]
    numbers = asked or [r.source for r in removed if r.source is not None]
    return Changed(
        probe.reader.name,
        probe.encoded.text,
        probe.words,
        tuple(removed),
        tuple(sorted(_moved(probe, before.final, after.final), key=lambda m: -m.change)),
        tuple(
            (number, _readings(probe, number, before.recording, after.recording))
            for number in dict.fromkeys(numbers)
        ),
        _next(probe, before.logits, after.logits, top),
    )


def _moved(probe: Probe, before: Tensor, after: Tensor) -> list[Moved]:
    found = []
    for number in range(len(probe.words)):
        one, two = (probe.vector(final.double(), number)[0] for final in (before, after))
        cosine = float(F.cosine_similarity(one, two, 0))
        found.append(Moved(number, cosine, float((two - one).norm() / one.norm())))
    return found


def reading(recording: Recording, words: Words, word: int) -> Reading:
    """What a word reads in all heads of a recording of one text."""
    layers = [i for i, layer in enumerate(recording.layers) if layer.pattern]
    weights = torch.cat([from_word(recording, i, words[word], words) for i in layers])
    heads = [(i, head) for i in layers for head in range(recording.layers[i].heads)]
    about = recording.about
    texts, names = (about["model"], about["text"], "self"), tuple(label(words))
    return Reading(*texts, tuple(words), names, word, tuple(heads), weights)


def _readings(probe: Probe, word: int, before: Recording, after: Recording) -> Versus:
    one, two = (reading(recording, probe.words, word) for recording in (before, after))
    return compare(one, two, probe.words[word].text)


def _next(probe: Probe, before: Tensor | None, after: Tensor | None, top: int) -> NextToken | None:
    if before is None or after is None:
        return None
    one, two = (logits[0].double().log_softmax(-1) for logits in (before, after))
    kl = float((one.exp() * (one - two)).sum())
    likely = [int(i) for log in (one, two) for i in log.topk(min(top, len(log))).indices]
    ranked = sorted(set(likely), key=lambda i: -max(float(one[i]), float(two[i])))
    names = [probe.token(i) for i in ranked]
    tokens = zip(names, one[ranked].exp().tolist(), two[ranked].exp().tolist(), strict=True)
    return NextToken(tuple(tokens), kl)
