"""A recording by words instead of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..call.brief import Brief
from ..errors import RegardError
from .recorded_layer import RecordedLayer
from .segments import blocks


class ByWords(Brief):
    """What words read of words. words: their names; ranges: (first token, last + 1) of each.

    A word weight is the sum over the tokens of the word that is read, and the mean over the tokens
    of the word that reads (Clark et al. 2019, section 4.1).
    """

    def __init__(
        self, ranges: Sequence[tuple[int, int]], tokens: Sequence[str], text: str | None,
        offsets: Sequence[Sequence[int]] | None, layer: Callable[..., RecordedLayer],
    ) -> None:  # fmt: skip
        self.ranges: list[tuple[int, int]] = [(int(first), int(last)) for first, last in ranges]
        if any(not 0 <= a < b <= len(tokens) for a, b in self.ranges):
            raise RegardError(f"words lie within {len(tokens)} tokens, each (first, last + 1)")
        self.words: list[str] = [_name(r, tokens, text, offsets) for r in self.ranges]
        self._layer = layer

    def __str__(self) -> str:
        return f"ByWords({len(self.words)} words)"

    def weights(
        self, layer: int | str, head: int | None = None, rows: Sequence[int] | None = None,
        batch: int = 0,
    ) -> Tensor:  # fmt: skip
        """Word weights (rows, words), or (heads, rows, words), of the words that `rows` names."""
        found = self._layer(layer, head, batch)
        wanted = range(len(self.words)) if rows is None else rows
        shape = (found.heads, 1, len(self.words))
        nothing = torch.zeros(shape, dtype=torch.float32, device="cpu")
        parts = []
        for word in wanted:
            first, last = self.ranges[word]
            start = found.query_start
            tokens = slice(max(first - start, 0), max(last - start, 0))
            given = [self._read(found, w).sum(-2) for w in blocks(found, tokens, batch)]
            total = sum(given, nothing[:, 0])
            parts.append(total / (last - first))
        out = torch.stack(parts, 1) if parts else nothing[:, :0]
        return out if head is None else out[head]

    def _read(self, layer: RecordedLayer, weights: Tensor) -> Tensor:
        """(heads, rows, k_len) summed over the tokens of each word."""
        start = layer.key_start
        word = torch.full((layer.k_len,), len(self.words), dtype=torch.int64, device="cpu")
        for number, (first, last) in enumerate(self.ranges):
            word[max(first - start, 0) : max(last - start, 0)] = number
        out = weights.new_zeros(*weights.shape[:-1], len(self.words) + 1)
        return out.index_add_(-1, word, weights)[..., :-1]


def _name(
    span: tuple[int, int], tokens: Sequence[str], text: str | None,
    offsets: Sequence[Sequence[int]] | None,
) -> str:  # fmt: skip
    """A word as its text has it, else as its tokens name it."""
    first, last = span
    if text is None or offsets is None or int(offsets[first][0]) == int(offsets[last - 1][1]):
        return "".join(tokens[first:last])
    return text[int(offsets[first][0]) : int(offsets[last - 1][1])].strip()
