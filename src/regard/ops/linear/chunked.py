"""The chunked form: parallel within chunks, a state from chunk to chunk; O(N) time and memory.

Forward and backward walk segments of a few chunks. The backward keeps only the states between
segments and computes a segment again. Both are opaque registered ops, so that `torch.compile` keeps
them whole. (Hua et al. 2022 for chunks; Yang et al. 2024, GLA and DeltaNet, for gates and the delta
rule.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...engines.op_with_backward import op_with_backward
from .recurrence import Flow, full_precision, with_ones
from .within_chunk import (
    CHUNK,
    ChunkTerms,
    chunk_size,
    fit,
    grouped,
    pairs_gradient,
    split,
    ungrouped,
)

BUDGET = 2**21  # numbers that a segment's largest tensor may hold
MOST_CHUNKS = 32  # of a segment

# Of the registered ops of all forms that have a backward
ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? beta, Tensor memory"
DIFFERENTIABLE = ("query", "key", "value", "decay", "beta", "memory")


def forward(flow: Flow) -> tuple[Tensor, Tensor]:
    """What the queries read (batch, heads, n, columns), and the last memory."""
    mixed, last, _ = torch.ops.regard.linear(
        flow.query, flow.key, flow.value, flow.decay, flow.beta, flow.memory, flow.needs_grad
    )
    return mixed, last


def _segment(query: Tensor, columns: int) -> int:
    """The tokens of a segment: a multiple of the chunk, for what the budget holds."""
    batch, heads, tokens, features = query.shape
    chunk = batch * heads * CHUNK * max(features, columns, CHUNK)
    return chunk_size(tokens) * max(1, min(MOST_CHUNKS, BUDGET // max(chunk, 1)))


def _count(query: Tensor, columns: int) -> int:
    return -(-query.shape[2] // _segment(query, columns))


def _cut(tensor: Tensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor[:, :, start:stop].to(dtype)


class Segments:
    """The tensors of a flow, cut into segments of some chunks; `starts` are their first tokens."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
        columns: int,
    ) -> None:  # fmt: skip
        self.inputs = (query, key, decay, beta)
        self.value, self.dtype, self.columns = value, query.dtype, columns
        self.tokens, self.step = query.shape[2], _segment(query, columns)
        # Nothing to compute: an empty dimension has no chunks
        self.starts = list(range(0, self.tokens, self.step)) if query.shape[0] else []

    def at(self, start: int) -> tuple[ChunkTerms, Tensor]:
        """The chunks of a segment, and its values (…, chunks, size, columns)."""
        stop = min(start + self.step, self.tokens)
        query, key, decay, beta = (_cut(t, start, stop, self.dtype) for t in self.inputs)
        assert query is not None
        assert key is not None
        run = ChunkTerms(query, key, decay, beta)
        value = with_ones(self.value[:, :, start:stop].to(self.dtype), self.columns)
        return run, split(value, run.size)


def _computed(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
    memory: Tensor, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(what is read, the last memory, the memory before each segment if they are kept)."""
    columns = memory.shape[-1]
    mixed = query.new_empty(*query.shape[:3], columns)
    between = memory.new_zeros(_count(query, columns) if keep else 0, *memory.shape)
    segments, state = Segments(query, key, value, decay, beta, columns), memory
    with full_precision(query):
        for n, start in enumerate(segments.starts):
            if keep:
                between[n] = state
            run, values = segments.at(start)
            news, before, state, _ = run.states(values, state)
            rows = run.from_start @ before
            rows += run.pairs @ news
            part = mixed[:, :, start : start + segments.step]
            part.copy_(ungrouped(rows.flatten(2, 3), run.group)[:, :, : part.shape[2]])
    return mixed, state.clone() if state is memory else state, between


def _computed_back(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
    memory: Tensor, between: Tensor, grad_mixed: Tensor, grad_last: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of query, key, value, then decay and beta if they are there, and memory."""
    grads = [
        torch.zeros_like(t, memory_format=torch.contiguous_format)
        for t in (query, key, value, decay, beta)
        if t is not None
    ]
    segments = Segments(query, key, value, decay, beta, between.shape[-1])
    grad_state = grad_last
    with full_precision(query):
        for n in reversed(range(len(segments.starts))):
            start = segments.starts[n]
            run, values = segments.at(start)
            part = slice(start, min(start + segments.step, segments.tokens))
            grad = split(grouped(grad_mixed[:, :, part], key.shape[1]), run.size).flatten(3, 4)
            found, grad_state = _of_segment(run, values, between[n], grad, grad_state)
            found[2] = found[2][..., : value.shape[-1]]  # the ones have none
            for total, mine in zip(grads, found, strict=True):
                total[:, :, part] = mine[:, :, : part.stop - part.start]
    return [*grads, grad_state.clone() if grad_state is grad_last else grad_state]


def _of_segment(
    run: ChunkTerms, value: Tensor, memory: Tensor, grad: Tensor, grad_state: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Gradients of one segment: of its inputs, (…, tokens, …), and of the memory before it.

    grad (…, chunks, size · group, columns): of what is read. The order is that of the formulas in
    `chunks`, backwards.
    """
    news, before, _, reads = run.states(value, memory)
    d_query = (grad @ before.mT).unflatten(-2, (run.size, run.group))  # of from_start, for now
    d_pairs, d_news = grad @ news.mT, run.pairs.mT @ grad
    d_before = run.from_start.mT @ grad
    after, by_chunk = [], []
    for c in reversed(range(value.shape[2])):
        after.append(grad_state)
        d_new = d_news[:, :, c] + run.to_end[:, :, c] @ grad_state
        by_chunk.append(d_new)
        if run.through is not None:
            grad_state = run.through[:, :, c, :, None] * grad_state
        grad_state = grad_state + d_before[:, :, c]
        if reads is not None:
            grad_state = grad_state - reads[:, :, c].mT @ d_new
    d_after, d_news = (torch.stack(t[::-1], 2) for t in (after, by_chunk))
    d_to_end = news @ d_after.mT
    d_key = torch.zeros_like(run.key)
    d_value, d_reading, d_beta, d_decay = d_news, d_key.clone(), None, None
    levels: list[tuple[Tensor, Tensor]] = []
    if reads is not None:
        solved = torch.cat([news + reads @ before, reads], -1)
        grads = torch.cat([d_news, -(d_news @ before.mT)], -1)
        d_value, d_reading, d_beta, levels = _of_solved(run, value, solved, grads, d_key)
    if run.sums is None:
        d_key += d_to_end + d_reading
        pairs_gradient(d_pairs, run.query, run.key, None, True, d_query, d_key)
    else:
        assert run.through is not None
        width = run.sums.prefix.shape[-1]
        prefix, suffix = run.sums.prefix.exp(), run.sums.suffix.exp()
        by_query = (d_query * run.from_start.unflatten(-2, (run.size, run.group))).sum(-2)
        d_prefix = fit(by_query + d_reading * run.reading, width).contiguous()
        d_prefix[..., -1, :] += fit((before * d_after).sum(-1), width) * run.through
        d_suffix = fit(d_to_end * run.to_end, width).contiguous()
        d_key += d_to_end * suffix + d_reading * prefix
        d_query = d_query * prefix[..., None, :]
        more = pairs_gradient(d_pairs, run.query, run.key, run.sums, True, d_query, d_key)
        if levels:
            more = [(a + c, b + d) for (a, b), (c, d) in zip(more, levels, strict=True)]
        d_decay = run.sums.gradient(d_prefix, d_suffix, more)
    d_query = ungrouped(d_query.flatten(2, 3).flatten(2, 3), run.group)
    found = [d_query] + [
        t.flatten(2, 3) for t in (d_key, d_value, d_decay, d_beta) if t is not None
    ]
    return found, grad_state


def _of_solved(
    run: ChunkTerms, value: Tensor, solved: Tensor, grad: Tensor, d_key: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Through solved = (1 + lower)⁻¹ beta [value, reading]: gradients of value, reading, beta and
    the sums' levels; that of the keys' overlap is added to d_key.
    """
    assert run.beta is not None
    d_right = torch.linalg.solve_triangular(run.lower.mT, grad, upper=True, unitriangular=True)
    d_lower = -(d_right @ solved.mT)  # its upper half is no one's
    right = torch.cat([value, run.reading], -1)
    d_beta = (d_right * right).sum(-1) + (d_lower.tril(-1) * run.overlap).sum(-1)
    d_value, d_reading = (run.beta * d_right).split([value.shape[-1], run.key.shape[-1]], -1)
    left, d_left = run.key[..., None, :], torch.zeros_like(run.key)[..., None, :]
    levels = pairs_gradient(run.beta * d_lower, left, run.key, run.sums, False, d_left, d_key)
    d_key += d_left[..., 0, :]
    return d_value, d_reading, d_beta, levels


def _shapes(
    query: Tensor, key: Tensor, value: Tensor, decay: Any, beta: Any, memory: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mixed = query.new_empty(*query.shape[:3], memory.shape[-1])
    between = memory.new_empty(_count(query, memory.shape[-1]) if keep else 0, *memory.shape)
    return mixed, memory.new_empty(memory.shape), between


_linear, _backward = op_with_backward(
    "linear",
    f"{ARGUMENTS}, bool keep",
    "(Tensor, Tensor, Tensor)",
    forward=_computed,
    fake=_shapes,
    backward=_computed_back,
    differentiable=DIFFERENTIABLE,
    kept={2: "between"},
    gradients=("Tensor grad_mixed", "Tensor grad_last"),
    unread=("keep",),
)
