"""Which tokens of a padded batch are padding, as its mask says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from .masks import And, Dense, Mask, Padding


def kept(
    mask: Mask, sizes: tuple[int, int], diagonal: int | None, added: Sequence[Tensor] = ()
) -> Tensor | None:
    """bool (batch or 1, k_len): the keys that a mask does not hide as padding; None: it hides none.

    sizes: q_len, k_len; diagonal: the index of the first query's own key, or None to read no mask
    but `Padding`. added: biases (batch,
    heads, 1, k_len), sizes may be 1, that hide keys by −inf, as torch's modules do.
    """
    parts = [*_shown(mask, sizes, diagonal)]
    if diagonal is not None:
        parts += [p for bias in added for p in _dense(bias > -torch.inf, sizes, diagonal)]
    return reduce(torch.logical_and, parts) if parts else None


def _shown(mask: Mask, sizes: tuple[int, int], diagonal: int | None) -> Iterator[Tensor]:
    """What each part of a mask shows that hides keys as padding does."""
    if isinstance(mask, And):
        yield from _shown(mask.left, sizes, diagonal)
        yield from _shown(mask.right, sizes, diagonal)
    elif isinstance(mask, Padding) and mask.keep.shape[-1] == sizes[1]:
        yield torch.atleast_2d(mask.keep).bool()
    elif isinstance(mask, Dense) and diagonal is not None:
        yield from _dense(mask.visible, sizes, diagonal)


def _dense(visible: Tensor, sizes: tuple[int, int], diagonal: int) -> Iterator[Tensor]:
    """Of visible (batch, heads, q_len, k_len), sizes may be 1: the keys that some query sees.

    Where tokens do not see themselves (strictly causal), one that nobody sees may yet be real.
    """
    visible = visible[(None,) * (4 - visible.dim())]
    if visible.shape[2] not in (1, sizes[0]) or visible.shape[3] not in (1, sizes[1]):
        return
    visible = visible.any(1).expand(-1, -1, sizes[1])
    if visible.shape[1] == 1 or bool(visible.diagonal(diagonal, 1, 2).any(-1).all()):
        yield visible.any(1)
