"""Strips: the scores of a block of queries against all keys that it may see, one at a time.

A strip holds at most about `BUDGET` numbers whatever the length, so whoever walks the strips works
in O(N) memory. Key tiles that the mask empties are never computed; tiles that it shows whole are
never masked. Shared by the `tiled` engine and by the second pass (`weigh`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.geometry import Span
from .. import hidden

BUDGET = 2**21  # numbers in a strip: more would leave the caches, fewer rows starve the matmul
MOST_ROWS, LEAST_ROWS = 256, 16
TILE_KEYS = 128


@dataclass(eq=False)
class Strip:
    """Scores (batch, heads, rows, cols) of some queries against the keys in `runs`.

    part: batch, heads and queries of the call; kv: its kv heads. runs: half-open key ranges,
    ascending; cols counts them through. Hidden pairs score −inf; `hidden` has (first col, bool
    tensor) of each mixed range. query (batch, kv heads, group · rows, dim), scaled, and key (batch,
    kv heads, cols, dim) are what the scores came from; capped, if asked for, the scores before the
    biases.
    """

    part: Span
    kv: slice
    runs: list[tuple[int, int]]
    query: Tensor
    key: Tensor
    scores: Tensor
    hidden: list[tuple[int, Tensor]] = field(default_factory=list)
    capped: Tensor | None = None

    @property
    def here(self) -> tuple[slice, slice, slice]:
        """The strip's rows in a tensor (batch, heads, q_len, …)."""
        return self.part.batch, self.part.heads, slice(self.part.q0, self.part.q1)

    def dropout(self, call: Call) -> Tensor:
        """Dropout's factors for the strip's weights."""
        assert call.dropout is not None
        parts = [call.dropout.factor(span, call.place, call.working) for _, span in self.spans()]
        return torch.cat(parts, -1)

    def grouped(self, weights: Tensor) -> Tensor:
        """(batch, heads, rows, n) as (batch, kv heads, group · rows, n)."""
        return weights.reshape(weights.shape[0], self.key.shape[1], -1, weights.shape[-1])

    @property
    def cols(self) -> int:
        """How many keys the strip holds."""
        return sum(k1 - k0 for k0, k1 in self.runs)

    def spans(self) -> Iterator[tuple[int, Span]]:
        """(first col, span) of each run."""
        at = 0
        for k0, k1 in self.runs:
            yield at, Span(self.part.q0, self.part.q1, k0, k1, self.part.batch, self.part.heads)
            at += k1 - k0

    def add(self, total: Tensor, part: Tensor, dim: int) -> None:
        """Add to the strip's keys of a tensor that counts all keys along dim, in place."""
        for at, span in self.spans():
            length = span.k1 - span.k0
            total.narrow(dim, span.k0, length).add_(part.narrow(dim, at, length))

    def keys(self) -> Tensor:
        """The key index of each col: (cols,) int64."""
        parts = [
            torch.arange(k0, k1, device=self.scores.device, dtype=torch.int64)
            for k0, k1 in self.runs
        ]
        return torch.cat(parts)


class Strips:
    """Iterates over the strips of a call."""

    def __init__(
        self, call: Call, rows: tuple[int, int] | None = None, keep_capped: bool = False
    ) -> None:
        """rows: only these queries of the call (start, stop). keep_capped: see `Strip`."""
        self.call, self.keep_capped = call, keep_capped
        place = call.place
        self.group = place.heads // place.kv_heads
        self.first, self.last = rows or (0, place.q_len)
        self.rows = MOST_ROWS
        while self.rows > LEAST_ROWS and self.rows * self.group * place.k_len > BUDGET:
            self.rows //= 2
        self.some, self.every = (None, None)
        self.begun = self.first - self.first % self.rows  # where the tiles below begin
        if not call.program.full and self.last > self.first and place.k_len:
            program = call.program
            if rows is not None:  # a row of a long call asks for no other row's tiles
                stop = min(-(-self.last // self.rows) * self.rows, place.q_len)
                program = program.part(Span(self.begun, stop, 0, place.k_len))
            self.some, self.every = program.classes(self.rows, TILE_KEYS)
        self.parts = self._parts()
        self.key = call.key.to(call.working).contiguous()
        self.careful = hidden.beside_biases(call)

    def _parts(self) -> list[tuple[slice, slice]]:
        """Chunks of (batch, kv heads): as many as the budget holds.

        A mask that differs between batch items takes them one by one, so that an item's bits do not
        depend on its neighbours' tiles.
        """
        place = self.call.place
        # A single matrix is multiplied by other code than several: never let the batch decide that
        alone = self.call.program.by_batch or place.kv_heads == 1
        one = max(min(self.rows, self.last - self.first) * self.group * place.k_len, 1)
        heads = max(min(place.kv_heads, BUDGET // one), 1)
        items = 1
        if heads == place.kv_heads and not alone:
            items = max(min(place.batch, BUDGET // (one * heads)), 1)
        return [
            (slice(b, min(b + items, place.batch)), slice(h, min(h + heads, place.kv_heads)))
            for b in range(0, place.batch, items)
            for h in range(0, place.kv_heads, heads)
        ]

    def __iter__(self) -> Iterator[Strip]:
        """The strips, all rows of one part after another. A block that sees nothing gives none."""
        step = self.rows
        for batch, kv in self.parts:
            for q0 in range(self.first - self.first % step, self.last, step):
                # From multiples of the step on, as the mask's tiles count, wherever `rows` begins
                q0, q1 = max(q0, self.first), min(q0 + step - q0 % step, self.last)
                heads = slice(kv.start * self.group, kv.stop * self.group)
                part = Span(q0, q1, 0, self.call.place.k_len, batch, heads)
                runs, mixed = self._runs(part)
                if runs:
                    yield self._strip(part, kv, runs, mixed)

    def _runs(self, part: Span) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Key ranges that are not empty, and those among them that are mixed."""
        place = self.call.place
        if self.some is None or self.every is None:
            return ([(0, place.k_len)] if place.k_len else []), []
        row = (part.q0 - self.begun) // self.rows

        def of(grid: Tensor) -> Tensor:
            batch = part.batch if grid.shape[0] > 1 else slice(None)
            heads = part.heads if grid.shape[1] > 1 else slice(None)
            return grid[batch, heads, row]

        # A tile that one head sees is computed for all heads of the part: one product. The mask is
        # asked element by element only where not all of them see all of it
        shown = of(self.some).flatten(0, 1).any(0)
        whole = of(self.every).flatten(0, 1).all(0)
        return _ranges(shown, place.k_len), _ranges(shown & ~whole, place.k_len)

    def _strip(
        self, part: Span, kv: slice, runs: list[tuple[int, int]], mixed: list[tuple[int, int]]
    ) -> Strip:
        call = self.call
        query = self.rows_of(call.query, part) * call.scale
        key = take(runs, self.key[part.batch, kv], 2)
        scores = product(query, key.mT)
        scores = scores.reshape(len(scores), -1, part.q1 - part.q0, scores.shape[-1])
        strip = Strip(part, kv, runs, query, key, scores)
        if call.softcap is not None:
            scores.div_(call.softcap).tanh_().mul_(call.softcap)
            strip.capped = scores.clone() if self.keep_capped else None
        # Biases, then masks: what is hidden is −inf whatever is added to it
        for at, span in strip.spans():
            for bias in call.biases:
                added, cols = bias.tile(span, scores.dtype), slice(at, at + span.k1 - span.k0)
                scores[..., cols] += added
                # A score of NaN, or +inf, and −∞ make NaN; but a bias of −∞ hides
                if self.careful and bias.dense:
                    scores[..., cols].masked_fill_(added == -torch.inf, -torch.inf)
            for k0, k1 in mixed:
                if span.k0 <= k0 < span.k1:
                    inner = Span(part.q0, part.q1, k0, k1, part.batch, part.heads)
                    unseen = ~call.program.visible(inner)
                    col = at + k0 - span.k0
                    scores[..., col : col + k1 - k0].masked_fill_(unseen, -torch.inf)
                    strip.hidden.append((col, unseen))
        return strip

    def rows_of(self, tensor: Tensor, part: Span) -> Tensor:
        """The strip's rows of (batch, heads, q_len, n), as (batch, kv heads, group · rows, n)."""
        rows = tensor[part.batch, part.heads, part.q0 : part.q1].to(self.call.working)
        return rows.unflatten(1, (-1, self.group)).flatten(2, 3)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right for (batch, kv heads, m, n) and (batch, kv heads, n, p).

    A single matrix goes as its two halves: the code for several gives the same bits on any number
    of threads.
    """
    if left.shape[0] * left.shape[1] != 1:
        return left @ right
    rows = left.shape[2]
    halves = torch.nn.functional.pad(left, (0, 0, 0, rows % 2)).unflatten(2, (2, -1))[0, 0]
    return (halves @ right[0, 0].expand(2, -1, -1)).flatten(0, 1)[None, None, :rows]


def take(runs: list[tuple[int, int]], tensor: Tensor, dim: int) -> Tensor:
    """The keys in `runs` of a tensor that counts all keys along dim."""
    parts = [tensor.narrow(dim, k0, k1 - k0) for k0, k1 in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _ranges(flags: Tensor, length: int) -> list[tuple[int, int]]:
    """Runs of set tiles as ranges of keys."""
    edge = flags.new_zeros(1)
    change = torch.cat([edge, flags, edge]).diff().nonzero().flatten().tolist()
    return [
        (start * TILE_KEYS, min(stop * TILE_KEYS, length))
        for start, stop in zip(change[::2], change[1::2], strict=True)
    ]


class StripWeights:
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
        self.exp = self.log.exp()  # of a row that sees nothing 0: it is −inf − 0, not −inf − −inf
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
