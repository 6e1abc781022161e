"""Intervals by the Poisson bootstrap: of a mean over texts, as they come, in memory for no text.

A bootstrap draws as many texts as there are, with replacement, and takes their mean; of many such
means the middle 95 % are the interval. How often a text is drawn is, for many texts, Poisson with
mean 1, whatever the others (Hanley & MacGibbon 2006; Chamandy et al. 2012): so each text's draws
are made when it is read, from its number alone, and only sums are kept. A run that goes on after a
kill makes the same draws.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

REPLICATES = 200
_MIDDLE = (0.025, 0.975)


class Interval(NamedTuple):
    """Of 95 %."""

    low: float
    high: float


def draws(text: int) -> Tensor:
    """How often each replicate draws a text, by its number: float64 (REPLICATES,)."""
    seeded = torch.Generator(device="cpu").manual_seed(text)
    one = torch.ones(REPLICATES, dtype=torch.float64, device="cpu")
    return torch.poisson(one, generator=seeded)


class Replicates:
    """The replicates of the means of several scores over texts, of all heads of a layer.

    sums float64 (scores, heads, REPLICATES): of the values that were drawn; counts likewise: how
    many; a value that is NaN is none.
    """

    def __init__(self, names: Sequence[str], heads: int) -> None:
        self.names = list(names)
        shape = (len(self.names), heads, REPLICATES)
        self.sums, self.counts = torch.zeros(2, *shape, dtype=torch.float64, device="cpu")

    def add(self, values: Mapping[str, Tensor], drawn: Tensor) -> None:
        """Take in a text: of each score (heads,), drawn so often."""
        for place, name in enumerate(self.names):
            if name in values:
                value = values[name].double()
                known = (value == value)[:, None]
                self.counts[place] += known * drawn
                self.sums[place] += value.nan_to_num(0.0)[:, None] * drawn

    def interval(self, name: str, head: int) -> Interval | None:
        """The middle 95 % of a mean's replicates; None where none has drawn a value."""
        place = self.names.index(name)
        there = self.counts[place, head] > 0
        if not there.any():
            return None
        means = self.sums[place, head][there] / self.counts[place, head][there]
        edges = means.new_tensor(_MIDDLE)
        return Interval(*means.quantile(edges).tolist())

    def to_json(self) -> dict[str, Any]:
        """As JSON says it, exactly. Counts are whole, and the same for all heads but for NaN."""
        return {"sums": _text(self.sums), "counts": _text(self.counts.to(torch.int32))}

    @classmethod
    def from_json(cls, said: Mapping[str, Any], names: Sequence[str], heads: int) -> Replicates:
        """The same again. ValueError where it does not fit."""
        made = cls(names, heads)
        made.sums = _numbers(said["sums"], torch.float64, made.sums.shape)
        made.counts = _numbers(said["counts"], torch.int32, made.sums.shape).double()
        return made


def _text(numbers: Tensor) -> str:
    return base64.b64encode(numbers.numpy().tobytes()).decode()


def _numbers(text: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    data = bytearray(base64.b64decode(text, validate=True))
    return torch.frombuffer(data, dtype=dtype).view(*shape).clone()
