"""Two readings of one word, side by side: what it reads in each, and where they differ.

Words of two texts are aligned in order by difflib: equal words, and, where as many were replaced
as stand in their place, the replaced ones, are each other's counterparts.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RegardError
from .words import Word

NOISE = 0.02
"""A head whose flip rests on less weight than this is not counted as flipping."""


class Pair(NamedTuple):
    """Counterparts: numbers of words in the first and the second text; None where it has none."""

    one: int | None
    two: int | None


class Move(NamedTuple):
    """What one head gives a pair of counterparts, in each text; 0 where one has none."""

    layer: int
    head: int
    pair: Pair
    one: float
    two: float


class Flip(NamedTuple):
    """A head whose most read word in the second text is not the counterpart of that in the first.

    It is noise where less than NOISE decides: where either word takes less than that, or the lead
    that changed hands, that of `one` in the first text plus that of `two` in the second, is less.

    one, two: the word most read in each. weights: that of `one` in the first text and of its
    counterpart in the second; of `two`'s counterpart in the first and of `two` in the second.
    """

    layer: int
    head: int
    one: int
    two: int
    weights: tuple[float, float, float, float]

    @property
    def noise(self) -> bool:
        one, back, there, two = self.weights
        return min(one, two, one - there + two - back) < NOISE


@dataclass(frozen=True, eq=False)
class Reading:
    """What one word reads. kind as in `report.looking.Part`. word: the reader among the words of
    its own text, or −1 where it belongs to another text than the words it reads. labels: the words'
    names, as `words.label` gives them.

    heads: (layer, head); weights float32 (heads, words).
    """

    model: str
    text: str
    kind: str
    words: tuple[Word, ...]
    labels: tuple[str, ...]
    word: int
    heads: tuple[tuple[int, int], ...]
    weights: Tensor

    @property
    def tops(self) -> list[int]:
        """The word that each head reads most, special tokens and itself apart; −1 if none."""
        aside = torch.tensor(
            [w.special or i == self.word for i, w in enumerate(self.words)],
            dtype=torch.bool,
            device="cpu",
        )
        best = self.weights.masked_fill(aside, -1).max(1)
        return best.indices.where(best.values > 0, -1).tolist()


@dataclass(frozen=True, eq=False)
class Versus:
    """Two readings, aligned. same_heads: whether their heads have the same numbers, so that they
    can be compared one by one. before, after (heads, pairs): 0 where a pair lacks a word. name:
    the reading word."""

    one: Reading
    two: Reading
    pairs: tuple[Pair, ...]
    same_heads: bool
    before: Tensor
    after: Tensor
    name: str

    @property
    def means(self) -> list[tuple[Pair, float, float]]:
        """Each pair with its mean weight over the heads of each reading."""
        means = self.before.mean(0).tolist(), self.after.mean(0).tolist()
        return list(zip(self.pairs, *means, strict=True))

    @property
    def moved(self) -> float:
        """The share of what the word reads that moved elsewhere: half of Σ |after − before|.

        The mean over heads; from the means, where heads cannot be compared one by one.
        """
        one, two = self.before, self.after
        if not self.same_heads:
            one, two = one.mean(0), two.mean(0)
        return float((two - one).abs().sum(-1).mean() / 2)

    def moves(self, top: int, special: bool = True, per_head: bool = False) -> list[Move]:
        """The `top` largest changes, of all heads or of each; none where heads do not compare."""
        if not self.same_heads:
            return []
        change = (self.after - self.before).abs()
        if not special:
            change = change.masked_fill(
                torch.tensor([self.special(p) for p in self.pairs], dtype=torch.bool, device="cpu"),
                -1,
            )
        places = change if per_head else change.flatten()[None]
        found = []
        for row, cells in enumerate(places.topk(min(top, places.shape[1])).indices.tolist()):
            for cell in cells:
                head, pair = (row, cell) if per_head else divmod(cell, len(self.pairs))
                if float(change[head, pair]) >= 0:
                    weights = float(self.before[head, pair]), float(self.after[head, pair])
                    found.append(Move(*self.one.heads[head], self.pairs[pair], *weights))
        return found

    @property
    def flips(self) -> list[Flip]:
        """The heads that flip, but for noise; the surest first: by the smaller of the two largest
        weights."""
        if not self.same_heads:
            return []
        first = {p.one: i for i, p in enumerate(self.pairs) if p.one is not None}
        second = {p.two: i for i, p in enumerate(self.pairs) if p.two is not None}
        found = []
        for row, (head, one, two) in enumerate(
            zip(self.one.heads, self.one.tops, self.two.tops, strict=True)
        ):
            if one < 0 or two < 0 or first[one] == second[two]:
                continue
            cells = first[one], second[two]
            weights = [
                float(side[row, cell]) for cell in cells for side in (self.before, self.after)
            ]
            found.append(Flip(*head, one, two, (weights[0], weights[1], weights[2], weights[3])))
        found = [flip for flip in found if not flip.noise]
        return sorted(found, key=lambda f: -min(f.weights[0], f.weights[3]))

    def special(self, pair: Pair) -> bool:
        """Whether it is a pair of special tokens."""
        number, words = (pair.one, self.one.words) if pair.one is not None else (
            pair.two, self.two.words
        )  # fmt: skip
        assert number is not None
        return words[number].special


def align(one: Sequence[Word], two: Sequence[Word]) -> list[Pair]:
    """Every word of both texts in one pair, in order."""
    texts = [[(w.special, w.text.casefold()) for w in words] for words in (one, two)]
    pairs = []
    matcher = difflib.SequenceMatcher(None, texts[0], texts[1], autojunk=False)
    for tag, i0, i1, j0, j1 in matcher.get_opcodes():
        if tag == "equal" or (tag == "replace" and i1 - i0 == j1 - j0):
            pairs += [Pair(i, j) for i, j in zip(range(i0, i1), range(j0, j1), strict=True)]
        else:
            pairs += [Pair(i, None) for i in range(i0, i1)]
            pairs += [Pair(None, j) for j in range(j0, j1)]
    return pairs


def counterpart(one: Sequence[Word], two: Sequence[Word], word: int) -> int:
    """The counterpart of a word of the first text; RegardError if it has none."""
    for pair in align(one, two):
        if pair.one == word and pair.two is not None:
            return pair.two
    raise RegardError(f"the word {one[word].text!r} has no counterpart in the second text")


def compare(one: Reading, two: Reading, name: str) -> Versus:
    """Both readings, aligned word by word and head by head."""
    pairs = align(one.words, two.words)
    sides = []
    for reading, numbers in ((one, [p.one for p in pairs]), (two, [p.two for p in pairs])):
        columns = torch.tensor(
            [-1 if n is None else n for n in numbers], dtype=torch.int64, device="cpu"
        )
        sides.append(reading.weights[:, columns.clamp(min=0)] * (columns >= 0))
    return Versus(one, two, tuple(pairs), one.heads == two.heads, sides[0], sides[1], name)
