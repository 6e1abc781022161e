"""Run: what a run of tokens needs of the recurrence within chunks, for all chunks at once.

Within a chunk that begins in state S (features × columns), with U the rows u_t of `flow`:

    out = from_start S + pairs U          U = value                        without beta
    S′  = through ∘ S + to_endᵀ U         U = solve(β value) − reads S     with the delta rule

pairs[i, j] = query_i · key_j, decayed over j + 1 … i (0 for later keys). The delta rule subtracts
from each value what the keys before it have written there, a lower-triangular system: the UT
transform (Yang et al. 2024, DeltaNet, section 3.2; with gates Yang et al. 2025, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decay_sums import Sums

CHUNK = 64  # tokens; a power of two


def chunk_size(tokens: int) -> int:
    """CHUNK, or the least power of two that holds a shorter sequence."""
    size = 1
    while size < min(tokens, CHUNK):
        size *= 2
    return size


def split(tensor: Tensor, size: int) -> Tensor:
    """(batch, heads, tokens, …) as (batch, heads, chunks, size, …), filled up with zeros."""
    pad = -tensor.shape[2] % size
    if pad:
        shape = (*tensor.shape[:2], pad, *tensor.shape[3:])
        tensor = torch.cat([tensor, tensor.new_zeros(shape)], 2)
    return tensor.unflatten(2, (-1, size))


def grouped(query: Tensor, state_heads: int) -> Tensor:
    """(batch, heads, tokens, n) as (batch, state_heads, tokens, group, n)."""
    return query.unflatten(1, (state_heads, -1)).movedim(2, 3)


def ungrouped(rows: Tensor, group: int) -> Tensor:
    """(batch, state_heads, tokens · group, n) as (batch, heads, tokens, n)."""
    return rows.unflatten(2, (-1, group)).movedim(3, 2).flatten(1, 2)


class ChunkTerms:
    """Of query (batch, heads, tokens, features), key (batch, state_heads, tokens, features),
    decay (batch, state_heads, tokens, 1 or features) or None, beta (batch, state_heads, tokens)
    or None. Rows of queries count tokens, and within each the query heads of its group.

    query (…, chunks, size, group, features), key (…, chunks, size, features);
    from_start (…, chunks, size · group, features), to_end like key,
    through (…, chunks, 1 or features) or None; pairs (…, chunks, size · group, size).
    """

    def __init__(
        self, query: Tensor, key: Tensor, decay: Tensor | None, beta: Tensor | None
    ) -> None:
        self.size = chunk_size(key.shape[2])
        self.query = split(grouped(query, key.shape[1]), self.size)
        self.key = split(key, self.size)
        self.group = self.query.shape[4]
        self.sums = None if decay is None else Sums(split(decay, self.size))
        self.beta = None if beta is None else split(beta, self.size)[..., None]
        self.pairs = pairs(self.query, self.key, self.sums, own=True)
        self.through: Tensor | None = None
        self.from_start = self.query.flatten(-3, -2)
        self.reading = self.to_end = self.key
        if self.sums is not None:
            prefix = self.sums.prefix.exp()
            self.from_start = (self.query * prefix[..., None, :]).flatten(-3, -2)
            self.reading = self.key * prefix  # what beta's correction reads the state with
            self.to_end = self.key * self.sums.suffix.exp()
            self.through = prefix[..., -1, :]
        if self.beta is not None:
            self.overlap = pairs(self.key[..., None, :], self.key, self.sums, own=False)
            self.lower = self.beta * self.overlap

    def solve(self, right: Tensor) -> Tensor:
        """(1 + lower)⁻¹ right."""
        return torch.linalg.solve_triangular(self.lower, right, upper=False, unitriangular=True)

    def solved(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """U where S is 0, and what S adds to it is −reads S: (value's shape, key's or None)."""
        if self.beta is None:
            return value, None
        both = self.solve(self.beta * torch.cat([value, self.reading], -1))
        own, reads = both.split([value.shape[-1], self.key.shape[-1]], -1)
        return own, reads

    def states(self, value: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """U (…, chunks, size, columns), the state before each chunk (…, chunks, features,
        columns), the last state, and reads.
        """
        own, reads = self.solved(value)
        added = self.to_end.mT @ own if reads is None else None
        state, before, news = memory, [], []
        for c in range(own.shape[2]):
            before.append(state)
            if added is not None:
                add = added[:, :, c]
            else:
                assert reads is not None
                news.append(own[:, :, c] - reads[:, :, c] @ state)
                add = self.to_end[:, :, c].mT @ news[-1]
            if self.through is not None:
                state = self.through[:, :, c, :, None] * state
            state = state + add
        return torch.stack(news, 2) if news else own, torch.stack(before, 2), state, reads


def pairs(left: Tensor, right: Tensor, sums: Sums | None, own: bool) -> Tensor:
    """left_i · right_j for j < i (own: ≤ i), decayed over j + 1 … i; 0 elsewhere.

    left (…, size, group, n), right (…, size, n) → (…, size · group, size).
    """
    size, group = left.shape[-3:-1]
    if sums is None:
        scores = left.flatten(-3, -2) @ right.mT
        return scores.masked_fill_(_later(size, group, own, scores.device), 0)
    scores = left.new_zeros(*left.shape[:-3], size * group, size)
    for second, first in sums.levels:
        rows, cols = halves(left, right, second, first)
        corner(scores, group, second.shape[-2]).copy_(rows @ cols.mT)
    if own:
        diagonal(scores, group).copy_((left * right[..., None, :]).sum(-1))
    return scores


def pairs_gradient(
    grad: Tensor, left: Tensor, right: Tensor, sums: Sums | None, own: bool,
    d_left: Tensor, d_right: Tensor,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Adds to d_left and d_right; returns the gradients of sums.levels. grad is like the pairs."""
    size, group = left.shape[-3:-1]
    if sums is None:
        grad = grad.masked_fill(_later(size, group, own, grad.device), 0)
        d_left += (grad @ right).unflatten(-2, (size, group))
        d_right += grad.mT @ left.flatten(-3, -2)
        return []
    levels = []
    for second, first in sums.levels:
        half, width = second.shape[-2:]
        rows, cols = halves(left, right, second, first)
        here = corner(grad, group, half)
        d_rows, d_cols = here @ cols, here.mT @ rows
        by_row = (d_rows * rows).unflatten(-2, (half, group)).sum(-2)
        levels.append((fit(by_row, width), fit(d_cols * cols, width)))
        d_rows = d_rows.unflatten(-2, (half, group))
        d_left.unflatten(-3, (-1, 2, half))[..., 1, :, :, :] += d_rows * second.exp()[..., None, :]
        d_right.unflatten(-2, (-1, 2, half))[..., 0, :, :] += d_cols * first.exp()
    if own:
        here = diagonal(grad, group)[..., None]
        d_left += here * right[..., None, :]
        d_right += (here * left).sum(-2)
    return levels


def halves(left: Tensor, right: Tensor, second: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Second halves of left and first halves of right, decayed to the border between them.

    (…, pairs of halves, half · group, n) and (…, pairs of halves, half, n).
    """
    half = second.shape[-2]
    rows = left.unflatten(-3, (-1, 2, half))[..., 1, :, :, :] * second.exp()[..., None, :]
    cols = right.unflatten(-2, (-1, 2, half))[..., 0, :, :] * first.exp()
    return rows.flatten(-3, -2), cols


def corner(scores: Tensor, group: int, half: int) -> Tensor:
    """A view: second halves' rows against first halves' columns, of each pair of halves."""
    tiles = scores.unflatten(-2, (-1, 2, half * group)).unflatten(-1, (-1, 2, half))
    return tiles[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def diagonal(scores: Tensor, group: int) -> Tensor:
    """A view (…, size, group): each token with itself."""
    return scores.unflatten(-2, (-1, group)).diagonal(dim1=-3, dim2=-1).mT


def fit(grad: Tensor, width: int) -> Tensor:
    """Summed over the features where one decay serves them all."""
    return grad.sum(-1, keepdim=True) if width == 1 else grad


def _later(size: int, group: int, own: bool, device: torch.device) -> Tensor:
    token = torch.arange(size, device=device, dtype=torch.int64)
    row = token.repeat_interleave(group)[:, None]
    return token > row if own else token >= row
