"""The weights that linear attention implies: w with out_i = Σ_j w_ij v_j, a strip of rows at once.

A strip's queries walk back through the chunks. Before chunk c they stand as `carried`: their
features, decayed and, with the delta rule, stripped of what later keys overwrote, such that
carried · S is what they read of the state S there. With the chunk's matrices (`chunks`):

    weights of its keys = (carried · to_endᵀ) solve(beta)     (plain: carried · to_endᵀ)
    carried before it   = through ∘ carried − (carried · to_endᵀ) reads

O(N · strip) memory. What arrives at the front reads the state that was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...call.geometry import Span
from .recurrence import Flow
from .within_chunk import CHUNK, ChunkTerms, ungrouped

BUDGET = 2**21  # numbers in a strip
MOST_CHUNKS = 4  # of rows in a strip


@dataclass(eq=False)
class ImpliedRows:
    """A strip of the implied matrix.

    part: batch, heads and queries; keys 0 … k1. kv: its state heads. weights (batch, heads, rows,
    k1): signed, not divided. arrived (batch, heads, rows, features): what reads the given state.
    """

    part: Span
    kv: slice
    weights: Tensor
    arrived: Tensor


def parts(flow: Flow, rows: int) -> Iterator[tuple[slice, slice]]:
    """Chunks of (batch, state heads): as many as the budget holds."""
    batch, state_heads, k_len = flow.key.shape[:3]
    one = max(rows * (flow.query.shape[1] // state_heads) * k_len, 1)
    heads = max(min(state_heads, BUDGET // one), 1)
    for b in range(batch):
        for h in range(0, state_heads, heads):
            yield slice(b, b + 1), slice(h, min(h + heads, state_heads))


def everywhere(flow: Flow) -> Iterator[ImpliedRows]:
    """Strips without causality: each query reads all keys. Hidden pairs are not 0 here."""
    group = flow.query.shape[1] // flow.key.shape[1]
    rows = max(1, min(256, BUDGET // max(group * flow.key.shape[2], 1)))
    for batch, kv in parts(flow, rows):
        heads = slice(kv.start * group, kv.stop * group)
        key = flow.key[batch, kv].repeat_interleave(group, 1)
        for q0 in range(0, flow.query.shape[2], rows):
            query = flow.query[batch, heads, q0 : q0 + rows]
            span = Span(q0, q0 + query.shape[2], 0, key.shape[2], batch, heads)
            yield ImpliedRows(span, kv, query @ key.mT, query)


def causal(flow: Flow) -> Iterator[ImpliedRows]:
    """Strips of the recurrence."""
    tokens, group = flow.query.shape[2], flow.query.shape[1] // flow.key.shape[1]
    if not tokens:
        return
    most = BUDGET // (CHUNK * group * tokens)
    step = max(1, min(MOST_CHUNKS, most))
    for batch, kv in parts(flow, step * CHUNK):
        heads = slice(kv.start * group, kv.stop * group)
        decay, beta = (None if t is None else t[batch, kv] for t in (flow.decay, flow.beta))
        walk = ChunksBackward(
            ChunkTerms(flow.query[batch, heads], flow.key[batch, kv], decay, beta)
        )
        for first in range(0, walk.count, step):
            last = min(first + step, walk.count)
            weights, arrived = walk.back(first, last)
            q0, q1 = first * walk.size, min(last * walk.size, tokens)
            weights = ungrouped(weights, group)[:, :, : q1 - q0, :q1]
            arrived = ungrouped(arrived, group)[:, :, : q1 - q0]
            yield ImpliedRows(Span(q0, q1, 0, q1, batch, heads), kv, weights, arrived)


class ChunksBackward:
    """Back from chunk to chunk, with what the delta rule needs of each computed once."""

    def __init__(self, run: ChunkTerms) -> None:
        self.run, self.size, self.count = run, run.size, run.key.shape[2]
        self.reads = self.solving = None
        if run.beta is not None:
            self.solving = run.solve(torch.diag_embed(run.beta[..., 0]))
            self.reads = self.solving @ run.reading

    def back(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows of the chunks first … last − 1: (weights of all keys before last, arrived).

        (…, rows · group, last · size) and (…, rows · group, features).
        """
        run, tall = self.run, self.size * self.run.group
        shape = (*run.pairs.shape[:2], (last - first) * tall, last * self.size)
        weights = run.pairs.new_zeros(shape)
        carried = run.from_start[:, :, 0, :0]
        for c in reversed(range(first, last)):
            block, carried = self._through(c, carried, own=True)
            weights[:, :, (c - first) * tall :, c * self.size : (c + 1) * self.size] = block
        if self.solving is None:
            weights[..., : first * self.size], carried = self._straight(first, carried)
            return weights, carried
        for c in reversed(range(first)):
            block, carried = self._through(c, carried)
            weights[..., c * self.size : (c + 1) * self.size] = block
        return weights, carried

    def _through(self, c: int, carried: Tensor, own: bool = False) -> tuple[Tensor, Tensor]:
        """One chunk back: (weights of its keys, carried before it); own: its rows come first."""
        run = self.run
        block = carried @ run.to_end[:, :, c].mT
        if run.through is not None:
            carried = carried * run.through[:, :, c, None]
        if own:
            block = torch.cat([run.pairs[:, :, c], block], 2)
            carried = torch.cat([run.from_start[:, :, c], carried], 2)
        if self.solving is None or self.reads is None:
            return block, carried
        return block @ self.solving[:, :, c], carried - block @ self.reads[:, :, c]

    def _straight(self, first: int, carried: Tensor) -> tuple[Tensor, Tensor]:
        """All chunks before first at once: without the delta rule they only decay."""
        run = self.run
        key = run.to_end[:, :, :first]
        if run.sums is not None and first:
            total = run.sums.prefix[:, :, :first, -1]  # log decay through each chunk
            after = total.flip(2).cumsum(2).flip(2)
            later = torch.nn.functional.pad(after[:, :, 1:], (0, 0, 0, 1)).exp()
            key = key * later[..., None, :]
            return carried @ key.flatten(2, 3).mT, carried * after[:, :, :1].exp()
        return carried @ key.flatten(2, 3).mT, carried
