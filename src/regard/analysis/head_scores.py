"""What each head does with positions and with repeated tokens: scores, and their sums by strips.

A score is a mean over the tokens that read: special tokens are left out, and so is every token
that does not see what the score asks about. Weights are taken a strip of rows at a time, or, of
long calls, not at all: `head_sums`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..call.geometry import Span
from ..capture.recorded_layer import Chunk, RecordedLayer
from ..engines.second_pass.weigh import whole_rows

SCORES = {
    "previous": "weight on the token before; special tokens are none",
    "next": "weight on the token after; special tokens are none",
    "first": "weight on the first key, the usual sink, of every later token",
    "self": "weight on the token itself",
    "duplicate": "sum of the weights on earlier copies of the same token",
    "induction": "sum of the weights on the tokens that follow earlier copies of the same token "
    "(the induction stripe), in this text",
    "induction_random": "the same on random tokens, 25 of them four times over: prefix matching, "
    "Olsson et al. 2022",
    "separator": "sum of the weights on special tokens after the first",
    "punctuation": "sum of the weights on tokens of nothing but punctuation or line ends",
    "entropy": "entropy of the weights over the keys, in nats",
    "entropy_share": "entropy divided by the logarithm of how many keys are seen: 1 is uniform",
    "distance": "sum of weight times how many tokens away the key stands",
}
"""Each score and its definition."""
PLACES = tuple(SCORES)[:9]
"""Those that are shares of a head's mass."""
_OF_CROSS = ("first", "separator", "punctuation", "entropy", "entropy_share")

_HELD = 2**20  # weights that are held at once, and as many numbers again a few times


@dataclass(frozen=True, eq=False)
class TokenKinds:
    """Of each token of a text: a number that equal tokens share, whether it is special, and
    whether it is punctuation. int64, bool, bool (tokens,)."""

    same: Tensor
    special: Tensor
    punctuation: Tensor

    @classmethod
    def of(cls, about: dict[str, Any]) -> TokenKinds | None:
        """Those of a recording's text; None where it names no tokens."""
        tokens = about.get("tokens")
        if not isinstance(tokens, list):
            return None
        numbers: dict[str, int] = {}
        same = [numbers.setdefault(token, len(numbers)) for token in tokens]
        special = about.get("special") or [False] * len(tokens)
        text, offsets = about.get("text"), about.get("offsets")
        said = tokens if text is None or offsets is None else [text[a:b] for a, b in offsets]
        marks = [not mark and _punctuation(word) for word, mark in zip(said, special, strict=True)]
        return cls(
            torch.tensor(same, dtype=torch.int64, device="cpu"),
            torch.tensor(special, dtype=torch.bool, device="cpu"),
            torch.tensor(marks, dtype=torch.bool, device="cpu"),
        )

    def __len__(self) -> int:
        return len(self.same)


def _punctuation(said: str) -> bool:
    bare = said.strip().strip("Ġ▁Ċ").removeprefix("##")
    if not bare:
        return "\n" in said or "Ċ" in said
    return all(unicodedata.category(char).startswith("P") for char in bare)


@dataclass(frozen=True, eq=False)
class Strip:
    """Some rows of a layer: weights (heads, rows, keys), who is seen (heads or 1, rows, keys),
    and the positions of rows and keys."""

    weights: Tensor
    seen: Tensor
    rows: Tensor
    keys: Tensor

    def of_rows(self, some: Tensor) -> Strip:
        """Those rows alone, by a bool tensor."""
        if some.all():
            return self
        return Strip(self.weights[:, some], self.seen[:, some], self.rows[some], self.keys)

    @cached_property
    def distance(self) -> Tensor:
        """How far each key stands from each row: float32 (rows, keys)."""
        return (self.rows[:, None] - self.keys).abs().float()


def strips(
    layer: RecordedLayer, batch: int = 0, chunks: Sequence[Chunk] | None = None
) -> Iterator[Strip]:
    """A layer's weights, as many rows at a time as fit into `_HELD`; of these calls alone."""
    for chunk in layer.chunks if chunks is None else chunks:
        call, lse = layer.call(chunk, batch), layer.lse(chunk, batch)
        place = call.place
        step = max(_HELD // max(place.heads * place.k_len, 1), 1)
        for start in range(0, place.q_len, step):
            stop = min(start + step, place.q_len)
            weights = whole_rows(call, lse, (start, stop))[0].float()
            seen = call.program.visible(Span(start, stop, 0, place.k_len))[0]
            rows, keys = (
                torch.arange(first, first + count, dtype=torch.int64, device="cpu")
                for first, count in (
                    (place.query_start + start, stop - start), (place.key_start, place.k_len),
                )
            )  # fmt: skip
            yield Strip(weights, seen.expand(-1, stop - start, place.k_len), rows, keys)


class Tally:
    """Sums and counts of each score over the rows of a layer: float64 (heads,) each."""

    def __init__(self, heads: int, cross: bool, kinds: TokenKinds | None) -> None:
        self.cross, self.kinds = cross, kinds
        names = _OF_CROSS if cross else SCORES
        self.sums, self.counts = (
            {name: torch.zeros(heads, dtype=torch.float64, device="cpu") for name in names}
            for _ in range(2)
        )

    def add(self, strip: Strip) -> None:
        """Add some rows."""
        if not self.cross and self.kinds is not None:
            strip = strip.of_rows(~self.kinds.special[strip.rows])
        if not len(strip.rows):
            return
        later = strip if self.cross else strip.of_rows(strip.rows > strip.keys[0])
        self.count("first", later.weights[:, :, 0], later.seen[:, :, 0])
        self._spread(strip)
        if self.kinds is not None:
            kinds = self.kinds
            self._onto("separator", strip, kinds.special[strip.keys] & (strip.keys > 0))
            self._onto("punctuation", strip, kinds.punctuation[strip.keys])
        if not self.cross:
            for name, by in (("previous", -1), ("next", 1), ("self", 0)):
                self._neighbour(name, strip, by)
            self.sum("distance", torch.einsum("hrk,rk->hr", strip.weights, strip.distance))
            self._copies(strip)

    def merge(self, other: Tally) -> None:
        """Add the rows of another text, or another item of a batch."""
        for name in self.sums:
            self.sums[name] += other.sums[name]
            self.counts[name] += other.counts[name]

    def means(self) -> dict[str, Tensor]:
        """Each score (heads,) in float64; NaN where no token reads what it asks about."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}

    def sum(self, name: str, numbers: Tensor) -> None:
        """Numbers (heads, rows), all of which count."""
        self.sums[name] += numbers.double().sum(1)
        self.counts[name] += numbers.shape[1]

    def count(self, name: str, numbers: Tensor, there: Tensor) -> None:
        """Numbers (heads, rows), 0 but where `there` (heads or 1, rows) counts them."""
        self.sums[name] += numbers.double().sum(1)
        self.counts[name] += there.sum(1)

    def _spread(self, strip: Strip) -> None:
        """Entropy, and its share of the most that it could be."""
        self.spread(torch.special.entr(strip.weights).sum(-1), strip.seen.sum(-1))

    def spread(self, entropy: Tensor, many: Tensor) -> None:
        """Entropy (heads, rows) of rows that see so many keys (heads or 1, rows)."""
        self.sum("entropy", entropy)
        most = many.clamp(min=2).double().log()
        self.count("entropy_share", (entropy.double() / most) * (many > 1), many > 1)

    def _onto(self, name: str, strip: Strip, keys: Tensor) -> None:
        """What is read of some keys, a bool tensor."""
        if keys.any():
            there = strip.seen[:, :, keys].any(-1)
            self.count(name, strip.weights[:, :, keys].sum(-1), there)

    def _neighbour(self, name: str, strip: Strip, by: int) -> None:
        """What is read of the token so many places on."""
        at = strip.rows + by - strip.keys[0]
        has = (at >= 0) & (at < len(strip.keys))
        if self.kinds is not None:
            has &= ~self.kinds.special[(strip.rows + by).clamp(0, len(self.kinds) - 1)]
        here = has.nonzero().flatten()
        self.count(name, strip.weights[:, here, at[here]], strip.seen[:, here, at[here]])

    def _copies(self, strip: Strip) -> None:
        """What is read of earlier copies of a token, and of what follows those."""
        if self.kinds is None:
            return
        same, mine = self.kinds.same, self.kinds.same[strip.rows][:, None]
        before = strip.keys < strip.rows[:, None]
        follows = same[(strip.keys - 1).clamp(min=0)] == mine
        follows &= before & (strip.keys > 0)
        for name, keys in (
            ("duplicate", before & (same[strip.keys] == mine)),
            ("induction", follows),
        ):
            there = (strip.seen & keys).any(-1)
            self.count(name, torch.einsum("hrk,rk->hr", strip.weights, keys.float()), there)


def behaviour(scores: dict[str, float | None], least: float = 0.5) -> str | None:
    """The share of a head's mass that is largest, where it is half or more; else None."""
    shares = [(value, name) for name in PLACES if (value := scores.get(name)) is not None]
    value, name = max(shares, default=(0.0, ""), key=lambda one: one[0])
    return name if value >= least else None


def as_numbers(means: dict[str, Tensor], head: int) -> dict[str, float | None]:
    """One head's scores by name, all of them; None where there is none."""
    found: dict[str, float | None] = dict.fromkeys(SCORES)
    for name, values in means.items():
        value = float(values[head])
        found[name] = value if value == value else None
    return found


def texts_of(about: dict[str, Any], layers: Sequence[RecordedLayer], layer: RecordedLayer) -> tuple[
    dict[str, Any], dict[str, Any]
]:  # fmt: skip
    """What is known of the text that a layer's queries are of, and of that of its keys."""
    decoder = about.get("decoder")
    if not isinstance(decoder, dict):
        one = {} if any(x.kind == "cross" for x in layers) else about
        return one, one
    if layer.kind == "cross":
        return decoder, about
    mine = decoder if "decoder" in layer.name.split(".") else about
    return mine, mine
