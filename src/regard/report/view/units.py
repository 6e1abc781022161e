"""Words as the units of the text: which tokens belong together, and what words read of words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .pieces import Piece


class Units:
    """The words of a text, and each token that is in none.

    starts: the first token of each unit; of: the unit of each token (count,).
    """

    def __init__(self, words: Any, count: int) -> None:
        """words: the tokens (first, last + 1) of each, in order, as a recording names them."""
        reached, self.starts = 0, list[int]()
        for first, last in [*_checked(words, count), (count, count)]:
            self.starts += range(reached, first)  # of no word: alone
            if first < last:
                self.starts.append(first)
            reached = last
        begins = torch.zeros(count, dtype=torch.int64, device="cpu")
        begins[self.starts] = 1
        self.of = begins.cumsum(0) - 1

    def tokens(self, token: int) -> range:
        """The tokens of the unit that holds this one."""
        unit = int(self.of[token])
        more = self.starts[unit + 1 : unit + 2]
        return range(self.starts[unit], more[0] if more else len(self.of))

    def summed(self, values: Tensor, start: int = 0) -> Tensor:
        """Of a value for each token from `start` on, the sum over each unit: (units,)."""
        total = torch.zeros(len(self.starts), dtype=torch.float32, device="cpu")
        return total.index_add_(0, self.of[start : start + len(values)], values.float())

    def mean(self, values: Tensor, start: int = 0) -> Tensor:
        """The same, its mean over the tokens that there are."""
        return self.summed(values, start) / self.summed(torch.ones_like(values), start).clamp(min=1)

    def pieces(self, tokens: list[Piece]) -> list[Piece | int]:
        """The text of each unit at its first token; 0 at those that continue one."""
        joined: list[Piece | int] = [0] * len(tokens)
        for start in self.starts:
            first, *others = (tokens[i] for i in self.tokens(start))
            rest = "".join(p if isinstance(p, str) else "".join(p) for p in others)
            joined[start] = first + rest if isinstance(first, str) else (first[0], first[1] + rest)
        return joined


def _checked(words: Any, count: int) -> list[tuple[int, int]]:
    """Ranges that follow each other within the text; what is none of them is left out."""
    found, reached = [], 0
    for pair in words if isinstance(words, list) else []:
        fits = isinstance(pair, list | tuple) and len(pair) == 2
        if not fits or not all(type(place) is int for place in pair):
            continue
        first, last = pair
        if reached <= first < last <= count:
            found.append((first, last))
            reached = last
    return found
