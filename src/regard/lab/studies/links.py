"""Which of some earlier words a word links to, by weight and by Effect, head by head."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...analysis.effect import edges
from ...analysis.probe import Probe
from ...analysis.text_model import TextModel
from .stats import Interval, mean_interval

Span = tuple[int, int]


class Item(NamedTuple):
    """A word of a text, the candidates that it may link to, and which is right.

    Spans are of characters. pair: items of one number differ in what is right; −1: it has no pair.
    """

    text: str
    reader: Span
    candidates: tuple[Span, ...]
    right: int
    pair: int = -1


class Choice(NamedTuple):
    """The head that was best on one part, and how often it is right on another.

    pairs: of pairs with different answers, the share that is told apart; None without pairs.
    """

    layer: int
    head: int
    share: Interval
    pairs: float | None
    items: int
    hits: list[float]


def by_weight(reader: TextModel, item: Item) -> Tensor:
    """What each head gives each candidate: (layers, heads, candidates), of the reading word's
    tokens the mean, of a candidate's tokens the sum."""
    recording = reader.record(item.text)
    offsets = recording.about["offsets"]
    rows = tokens(offsets, item.reader)
    found = []
    for layer in range(len(recording.layers)):
        weights = recording.weights(layer, rows=slice(rows[0], rows[-1] + 1)).mean(1)
        parts = [weights[:, tokens(offsets, span)].sum(-1) for span in item.candidates]
        found.append(torch.stack(parts, -1))
    return torch.stack(found)


def by_effect(reader: TextModel, item: Item, directions: int = 16) -> Tensor:
    """The same by what removing the edges would do to the reading word's final vector.

    directions: of the vector's change, from which its length is estimated; each is a backward pass.
    """
    probe = Probe(reader, item.text)
    offsets = probe.encoded.offsets
    rows = tokens(offsets, item.reader)
    word = int(probe.words.of_token[rows[0]])
    found: list[Tensor] = []
    for table in edges(probe, word, directions=directions).values():
        mine, at = table.effect[:, rows].abs(), table.indices[:, rows]
        parts = []
        for span in item.candidates:
            wanted = torch.tensor(tokens(offsets, span), dtype=at.dtype, device="cpu")
            parts.append((mine * torch.isin(at, wanted)).flatten(1).sum(-1))
        found.append(torch.stack(parts, -1))
    return torch.stack(found)


def tokens(offsets: Iterable[Sequence[int]], span: Span) -> list[int]:
    """The tokens that share characters with a span."""
    return [i for i, (start, end) in enumerate(offsets) if max(start, span[0]) < min(end, span[1])]


def hits(
    reader: TextModel,
    items: Sequence[Item],
    measure: Callable[[TextModel, Item], Tensor],
    told: Callable[[float], object],
) -> Tensor:
    """Whether each head's strongest candidate is right: bool (items, layers, heads)."""
    found = []
    for number, item in enumerate(items):
        told(number / len(items))
        given = measure(reader, item)
        others = [i for i in range(given.shape[-1]) if i != item.right]
        found.append(given[..., item.right] > given[..., others].amax(-1))
    return torch.stack(found)


def chosen(
    chosen_on: Tensor, reported_on: Tensor, items: Sequence[Item], rng: random.Random
) -> Choice:
    """The best head of one part (ties: the lowest), by how often it is right on the other."""
    shares = chosen_on.double().mean(0)
    layer, head = divmod(int(shares.argmax()), shares.shape[1])
    right = reported_on[:, layer, head].tolist()
    values = [float(one) for one in right]
    pairs: dict[int, list[bool]] = {}
    for item, one in zip(items, right, strict=True):
        if item.pair >= 0:
            pairs.setdefault(item.pair, []).append(one)
    whole = [all(both) for both in pairs.values() if len(both) == 2]
    apart = sum(whole) / len(whole) if whole else None
    return Choice(layer, head, mean_interval(values, rng), apart, len(items), values)


def nearest(item: Item) -> bool:
    """Whether the right candidate is the one nearest before the word (or nearest, if none is)."""

    def distance(span: Span) -> tuple[bool, int]:
        return span[0] > item.reader[0], abs(item.reader[0] - span[0])

    return min(item.candidates, key=distance) == item.candidates[item.right]


def first(item: Item) -> bool:
    """Whether the right candidate is the first in the text."""
    return min(item.candidates) == item.candidates[item.right]


def share(items: Sequence[Item], rule: Callable[[Item], bool]) -> float:
    """How often a rule finds the right candidate."""
    return sum(map(rule, items)) / max(1, len(items))
