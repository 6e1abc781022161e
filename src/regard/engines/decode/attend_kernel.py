"""Triton: attention of few queries over many keys, in order or in pages that stay where they are.

Keys are cut as in the second pass over few queries: a program takes one chunk of a fixed length for
all heads that share its keys, and so reads a key and a value once. It leaves its rows' sum of
weights, their largest score and what they mix; a second kernel joins the chunks in their order
("Flash-Decoding", Dao et al. 2023). The chunk never changes, so an item's bits do not hang on its
neighbours'.
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from ..blocks.mix_kernel import mix
from ..second_pass.triton.few_queries_kernel import rows_of_tile, tiles_of_chunk
from ..second_pass.triton.scores_kernel import keys_of, places, queries, scores

_PART = tl.constexpr(16)  # chunks that are joined at once


@triton.jit
def attend_chunk(call, mask, biases, chunked, values, parts, form, decoded):
    """What each row mixes of one chunk, with its largest score and its sum: into `parts`."""
    M: tl.constexpr = form.M
    N: tl.constexpr = form.N
    DV: tl.constexpr = decoded.DV
    chunk, _, b, kv_head, rows, row_in, h = rows_of_tile(call, chunked, form, decoded.Q)
    k, table, end = keys_of(call, b, kv_head, form)
    v = values.value + kv_head * values.v_h
    if not form.PAGED:
        v = v + b * values.v_b
    at = (b * call.heads + h) * call.q_len + rows
    h = h[:, None]
    query = queries(call.query + b * call.q_b + h * call.q_h, rows, row_in, call, form)
    begin, stop, line = tiles_of_chunk(chunked, chunk, b, kv_head, decoded.CHUNK, form)
    if form.PAGED:  # an item may end long before the longest
        stop = tl.minimum(stop, (end + chunked.k_lead + N - 1) // N)
    dims = tl.arange(0, DV)
    dim_in = dims < values.dim
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, DV], tl.float32)
    for tile in range(begin, stop):
        whole = 1
        if form.MASKED:
            whole = tl.load(line + tile).to(tl.int32) >> 1
        cols = tile * N - chunked.k_lead + tl.arange(0, N)
        col_in = (cols >= 0) & (cols < end)
        s, _shown = scores(
            query, k, table, call, mask, biases, rows, cols, row_in, col_in, b, h, whole, form
        )
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that sees nothing yet
        fade = tl.exp(top - safe)
        p = tl.exp(s - safe[:, None])
        total = total * fade + tl.sum(p, 1)
        own = v + places(cols, col_in, table, call, values.v_b, values.v_n, form)[:, None]
        own = own + dims[None, :] * values.v_d
        value = tl.load(own, mask=col_in[:, None] & dim_in[None, :], other=0)
        # What a bias of −∞ hides is not seen, whatever the mask says
        mixed = mixed * fade[:, None] + mix(p, value, s != float("-inf"))
        top = higher
    to = at * chunked.chunks + chunk
    tl.store(parts.top + to, top, row_in)
    tl.store(parts.total + to, total, row_in)
    to = to[:, None] * values.dim + dims[None, :]
    tl.store(parts.mixed + to, mixed, row_in[:, None] & dim_in[None, :])


@triton.jit
def join_chunks(parts, sinks, out, lse, heads, q_len, chunks, dim, SINKS: tl.constexpr,
                DV: tl.constexpr):  # fmt: skip
    """One row's chunks together, in their order: its output and log-sum-exp."""
    at = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, _PART)
    dims = tl.arange(0, DV)
    dim_in = dims < dim
    top = tl.full([1], float("-inf"), tl.float32)
    for first in range(0, chunks, _PART):
        chunk = first + numbers
        held = tl.load(parts.top + at * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
        top = tl.maximum(top, tl.max(held, 0))
    total = tl.zeros([1], tl.float32)
    if SINKS:
        sink = tl.load(sinks + at // q_len % heads)
        top = tl.maximum(top, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)
    if SINKS:
        total += tl.exp(sink - safe)
    mixed = tl.zeros([DV], tl.float32)
    for first in range(0, chunks, _PART):
        chunk = first + numbers
        inside = chunk < chunks
        own = at * chunks + chunk
        share = tl.exp(tl.load(parts.top + own, mask=inside, other=float("-inf")) - safe)
        total += tl.sum(share * tl.load(parts.total + own, mask=inside, other=0.0), 0)
        own = own[:, None] * dim + dims[None, :]
        part = tl.load(parts.mixed + own, mask=inside[:, None] & dim_in[None, :], other=0.0)
        mixed += tl.sum(share[:, None] * part, 0)
    tl.store(out + at * dim + dims, mixed / tl.where(total == 0, 1.0, total), dim_in)
    tl.store(lse + at + tl.arange(0, 1), safe + tl.log(total))
