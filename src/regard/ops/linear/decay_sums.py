"""Sums of log decays over stretches of a chunk, each added up from its own terms.

What token j gives to a later token i has decayed by the sum over j + 1 … i. A difference of
cumulative sums would lose its digits where the decays are strong, and have none where one is −inf
(a factor of 0). So the chunk is halved again and again: j stands in the first half and i in the
second of exactly one pair of halves, and the sum is that from j to the first half's end and that
from the second's beginning to i. All are ≤ 0: no exponential overflows (the safe chunking that
Yang et al. 2024, GLA, section 4.3, reach with two levels).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Sums:
    """Of decay (…, tokens, width), tokens a power of two.

    prefix: from the chunk's first token to this one, this one included. suffix: from the next
    token to the chunk's last. levels: for halves of 1, 2, 4, … tokens, (second, first): the
    prefixes within each second half and the suffixes within each first half, both
    (…, pairs of halves, tokens of a half, width).
    """

    def __init__(self, decay: Tensor) -> None:
        prefix, suffix = decay, torch.zeros_like(decay, memory_format=torch.contiguous_format)
        self.levels: list[tuple[Tensor, Tensor]] = []
        half, tokens = 1, decay.shape[-2]
        while half < tokens:
            first, second = prefix.unflatten(-2, (-1, 2, half)).unbind(-3)
            after_first, after_second = suffix.unflatten(-2, (-1, 2, half)).unbind(-3)
            self.levels.append((second, after_first))
            prefix = torch.stack([first, second + first[..., -1:, :]], -3).flatten(-4, -2)
            after_first = after_first + second[..., -1:, :]
            suffix = torch.stack([after_first, after_second], -3).flatten(-4, -2)
            half *= 2
        self.prefix, self.suffix = prefix, suffix

    def gradient(
        self, prefix: Tensor, suffix: Tensor, levels: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """That of decay, from those of the sums; prefix and suffix are overwritten."""
        half = prefix.shape[-2] // 2
        for second, first in reversed(levels):
            by_prefix = prefix.unflatten(-2, (-1, 2, half))
            by_suffix = suffix.unflatten(-2, (-1, 2, half))
            by_prefix[..., 0, -1, :] += by_prefix[..., 1, :, :].sum(-2)
            by_prefix[..., 1, -1, :] += by_suffix[..., 0, :, :].sum(-2)
            by_prefix[..., 1, :, :] += second
            by_suffix[..., 0, :, :] += first
            half //= 2
        return prefix
