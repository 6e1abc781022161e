"""Two recordings side by side: two prompts, or two models on one prompt, aligned by tokens."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..call.brief import Brief
from ..errors import RegardError

Weights = Callable[..., Tensor]


class Comparison(Brief):
    """Two recordings whose tokens are aligned.

    pairs int64 (n, 2): tokens of the first and the second that are each other's counterparts, in
    order; what one has and the other has not stands in none.
    """

    def __init__(self, one: Weights, two: Weights, tokens: tuple[Sequence[str], Sequence[str]]):
        self._one, self._two = one, two
        self.pairs: Tensor = torch.tensor(
            aligned(*tokens), dtype=torch.int64, device="cpu"
        ).reshape(-1, 2)
        self._sizes = (len(tokens[0]), len(tokens[1]))

    def __str__(self) -> str:
        one, two = self._sizes
        return f"Comparison({one} and {two} tokens, {len(self.pairs)} in both)"

    def weights(
        self,
        layer: int | str | tuple[int | str, int | str],
        head: int | tuple[int, int] | None = None,
        rows: Sequence[int] | None = None,
        batch: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The weights of both, (rows, n) or (heads, rows, n), between tokens that both have.

        rows: places in `pairs`; None: all. layer and head: of both, or one for each. What a row
        gives to tokens without a counterpart is left out, so rows may sum to less than 1.
        """
        pairs = self.pairs if rows is None else self.pairs[list(rows)]
        layers = layer if isinstance(layer, tuple) else (layer, layer)
        heads = head if isinstance(head, tuple) else (head, head)
        found = [
            ask(layers[n], heads[n], pairs[:, n].tolist(), self.pairs[:, n].tolist(), batch)
            for n, ask in enumerate((self._one, self._two))
        ]
        if found[0].shape != found[1].shape:
            raise RegardError(
                f"layer {layer!r} has {found[0].shape[0]} heads in one and {found[1].shape[0]} in "
                "the other; name a head of each, such as head=(3, 1)"
            )
        return found[0], found[1]

    def difference(
        self,
        layer: int | str | tuple[int | str, int | str],
        head: int | tuple[int, int] | None = None,
        rows: Sequence[int] | None = None,
        batch: int = 0,
    ) -> Tensor:
        """The second's weights less the first's, as `weights` gives them."""
        one, two = self.weights(layer, head, rows, batch)
        return two - one


def aligned(one: Sequence[str], two: Sequence[str]) -> list[tuple[int, int]]:
    """Counterparts: what both begin with, what both end with, and between them difflib's blocks.

    Where as many tokens were replaced as stand in their place, those are counterparts, too.
    """
    least = min(len(one), len(two))
    head = next((n for n in range(least) if one[n] != two[n]), least)
    most = least - head
    tail = next((n for n in range(most) if one[-1 - n] != two[-1 - n]), most)
    pairs = [(n, n) for n in range(head)]
    middle = (list(one[head : len(one) - tail]), list(two[head : len(two) - tail]))
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, *middle, False).get_opcodes():
        if kind == "equal" or (kind == "replace" and a1 - a0 == b1 - b0):
            pairs += [(head + a0 + n, head + b0 + n) for n in range(a1 - a0)]
    return pairs + [(len(one) - tail + n, len(two) - tail + n) for n in range(tail)]
