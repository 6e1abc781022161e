"""The weights of one strip, from its scores and the log-sum-exp."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .call.checked import Call
from .strips import Strip


class Weighed:
    """A strip's weights, exp(score − lse).

    top: the largest score of each row. log: score − lse, −inf where hidden; exp: its exponential.
    weights are exp / total; mass is their sum over the strip.
    A strip holds whole rows, so unless the call is one shard of the keys each row's own sum takes
    the place of the engine's: they differ by rounding, which large scores would magnify.
    """

    def __init__(self, strip: Strip, lse: Tensor, call: Call, shard: bool = False) -> None:
        self.strip, self.part = strip, strip.part
        lse = lse[strip.here]
        blind = lse == -torch.inf
        self.top = strip.scores.amax(-1)
        self.log = strip.scores.sub_(lse.masked_fill(blind, 0)[..., None])
        self.exp = self.log.exp()
        summed = self.exp.sum(-1)
        self.total = torch.ones_like(lse)
        if not shard:
            taken = 0 if call.sinks is None else (call.sinks[strip.part.heads, None] - lse).exp()
            self.total = (summed + taken).masked_fill(blind, 1)
        self.mass = summed / self.total

    @cached_property
    def weights(self) -> Tensor:
        """The weights (batch, heads, rows, cols)."""
        return self.exp / self.total[..., None]

    @cached_property
    def column_sum(self) -> Tensor:
        """What the strip's queries give each of its keys: (batch, heads, cols)."""
        return ((1 / self.total)[..., None, :] @ self.exp).squeeze(-2)
