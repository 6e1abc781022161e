"""Triton: linear attention's recurrence forward, of bfloat16; names as in `recurrence`.

What goes in is read as it is and goes into the matrix products, which add up in float32; a state is
float32 from chunk to chunk, and rounded where something is multiplied by it. All but the states is
done for all chunks at once:

    `sums`   G: the decays added up from a chunk's first token to each
    `pairs`  with a decay per channel, key_i and query_i · key_j, decayed over j + 1 … i
    `solve`  with the delta rule, A = (1 + diag(beta) overlap)⁻¹ diag(beta), A value and
             A exp(G) key
    `scan`   the state before each chunk, from chunk to chunk; with the delta rule u, too
    `read`   what the queries read: scale · (exp(G) query S + pairs u)

(Yang et al. 2024, DeltaNet, section 3.2; with gates Yang et al. 2025, section 3.3.) A factor is the
exponential of a difference of G; the longest G is 64 times FORGETS, so the difference is right to
some 2⁻¹¹, a quarter of a rounding to bfloat16.
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.
# mypy: ignore-errors

import triton
import triton.language as tl

from .forward_kernel import corner, put, square, tile

# exp of it is 0 in float32: what decays by more is as forgotten, and its sums stay finite
FORGETS = tl.constexpr(-104.0)


@triton.jit
def rows_of(base, rows, row_in, cols, width):
    """(rows, cols) of a matrix of so many columns, 0 outside; in its own dtype."""
    own = base + rows[:, None].to(tl.int64) * width + cols[None, :]
    return tl.load(own, mask=row_in[:, None] & (cols < width)[None, :], other=0)


@triton.jit
def within(sums, rows, row_in, i):
    """(T, T): the factor over j + 1 … i of one decay for all features; at most 1 where j > i."""
    g = tl.load(sums + rows, mask=row_in, other=0)
    return tl.exp(tl.minimum(g[:, None] - g[None, :], 0.0))


@triton.jit
def sums(decay, out, tokens, width, chunks, f_blocks, T: tl.constexpr, F: tl.constexpr):
    """Decays (n, tokens, width) added up from each chunk's first token to each of its tokens."""
    at = tl.program_id(0)
    n = (at // (chunks * f_blocks)).to(tl.int64)
    rows = at // f_blocks % chunks * T + tl.arange(0, T)
    f = at % f_blocks * F + tl.arange(0, F)
    row_in = rows < tokens
    d = tile(decay + n * tokens * width, rows, row_in, f, width)
    d = tl.where(d < FORGETS, FORGETS, d)
    put(out + n * tokens * width, tl.cumsum(d, 0), rows, row_in, f, width)


@triton.jit
def pairs(
    query, key, sums, scores_out, overlap_out, start_out, end_out, tokens, features, group, chunks,
    DELTA: tl.constexpr, T: tl.constexpr, F: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """query_i · key_j for j ≤ i and (DELTA) key_i · key_j for j < i, decayed over j + 1 … i.

    With a decay per channel: j and i meet at the border between the halves that part them. Also
    the queries decayed from the chunk's start, and the keys to its end. A program for each chunk
    of a query head.
    """
    at = tl.program_id(0)
    n = (at // chunks).to(tl.int64)
    mine = n // group
    i = tl.arange(0, T)
    rows = at % chunks * T + i
    row_in = rows < tokens
    query += n * tokens * features
    key += mine * tokens * features
    sums += mine * tokens * features
    scores = tl.zeros([T, T], tl.float32)
    overlap = tl.zeros([T, T], tl.float32)
    for first in range(0, features, F):
        f = first + tl.arange(0, F)
        q = rows_of(query, rows, row_in, f, features).to(tl.float32)
        k = rows_of(key, rows, row_in, f, features).to(tl.float32)
        g = rows_of(sums, rows, row_in, f, features)
        for level in tl.static_range(LEVELS):
            half = 1 << level
            second = ((i // half) % 2 == 1)[:, None]
            last = rows // (2 * half) * (2 * half) + half - 1  # of the first half
            border = rows_of(sums, tl.minimum(last, tokens - 1), row_in, f, features)
            factor = tl.exp(tl.minimum(tl.where(second, g - border, border - g), 0.0))
            a = (q * factor).to(tl.bfloat16)
            b = (k * factor).to(tl.bfloat16)
            here = corner(i, half)
            scores += tl.where(here, tl.dot(a, tl.trans(b)), 0.0)
            if DELTA:
                overlap += tl.where(here, tl.dot(b, tl.trans(b)), 0.0)
        put(start_out + n * tokens * features, q * tl.exp(g), rows, row_in, f, features)
        if n % group == 0:
            end = tl.minimum(at % chunks * T + T, tokens) - 1
            own = sums + tl.cast(end, tl.int64) * features + f
            whole = tl.load(own, mask=f < features, other=0)
            to_end = k * tl.exp(tl.minimum(whole[None, :] - g, 0.0))
            put(end_out + mine * tokens * features, to_end, rows, row_in, f, features)
        scores += tl.where(i[:, None] == i[None, :], tl.sum(q * k, 1)[:, None], 0.0)
    within_tile = i[:, None] * T + i[None, :]
    tl.store(scores_out + at.to(tl.int64) * T * T + within_tile, scores.to(tl.bfloat16))
    if DELTA:
        if n % group == 0:
            to = overlap_out + (mine * chunks + at % chunks) * T * T
            tl.store(to + within_tile, overlap)


@triton.jit
def solve(
    key, value, beta, sums, overlap, new_out, reads_out, tokens, features, columns, chunks,
    KIND: tl.constexpr, T: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u where the state is 0, and what the state is read with: u = new − reads S. A chunk each."""
    at = tl.program_id(0)
    n = (at // chunks).to(tl.int64)
    i = tl.arange(0, T)
    rows = at % chunks * T + i
    row_in = rows < tokens
    key += n * tokens * features
    reads_out += n * tokens * features
    strength = tl.load(beta + n * tokens + rows, mask=row_in, other=0)
    if KIND == 2:
        lower = square(overlap, at, i, T)
        sums += n * tokens * features
    else:
        sums += n * tokens
        lower = tl.zeros([T, T], tl.float32)
        for first in range(0, features, F):
            k = rows_of(key, rows, row_in, first + tl.arange(0, F), features)
            lower = tl.dot(k, tl.trans(k), lower)
        if KIND == 1:
            lower *= within(sums, rows, row_in, i)
    lower = tl.where(i[:, None] > i[None, :], lower * strength[:, None], 0.0)
    # By blocks twice as large each time, as in `recurrence.inverse`
    x = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - tl.where(corner(i, 1), lower, 0.0)
    half = 2
    while half < T:
        part = tl.where(corner(i, half), lower, 0.0)
        right = tl.dot(part, x, input_precision=PRECISION)
        x -= tl.dot(x, right, input_precision=PRECISION)
        half *= 2
    x *= strength[None, :]
    solved = x.to(tl.bfloat16)
    for first in range(0, columns, V):
        v = first + tl.arange(0, V)
        given = rows_of(value + n * tokens * columns, rows, row_in, v, columns)
        put(new_out + n * tokens * columns, tl.dot(solved, given), rows, row_in, v, columns)
    if KIND == 1:
        solved = (x * tl.exp(tl.load(sums + rows, mask=row_in, other=0))[None, :]).to(tl.bfloat16)
    for first in range(0, features, F):
        f = first + tl.arange(0, F)
        k = rows_of(key, rows, row_in, f, features)
        if KIND == 2:
            k = (k * tl.exp(rows_of(sums, rows, row_in, f, features))).to(tl.bfloat16)
        put(reads_out, tl.dot(solved, k), rows, row_in, f, features)


@triton.jit
def scan(
    key, value, sums, reads, memory, states, news, last,
    tokens, features, columns, chunks, f_blocks, v_blocks,
    KIND: tl.constexpr, DELTA: tl.constexpr, T: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The state before each chunk and after the last; with the delta rule u, too (news).

    A program for each block of F features (all of them with the delta rule) and V columns of a
    state: it holds its part in registers from the first chunk to the last. With a decay per channel
    the keys are decayed to their chunk's end.
    """
    at = tl.program_id(0)
    n = (at // (f_blocks * v_blocks)).to(tl.int64)
    f = at // v_blocks % f_blocks * F + tl.arange(0, F)
    v = at % v_blocks * V + tl.arange(0, V)
    i = tl.arange(0, T)
    f_in = f < features
    key += n * tokens * features
    reads += n * tokens * features
    value += n * tokens * columns
    news += n * tokens * columns
    sums += n * tokens * (features if KIND == 2 else 1)
    states += n * chunks * features * columns
    state = tile(memory + n * features * columns, f, f_in, v, columns)
    for chunk in range(chunks):
        rounded = state.to(tl.bfloat16)
        put(states, rounded, f, f_in, v, columns)
        states += features * columns
        rows = chunk * T + i
        row_in = rows < tokens
        end = tl.minimum(chunk * T + T, tokens) - 1
        k = rows_of(key, rows, row_in, f, features)
        u = rows_of(value, rows, row_in, v, columns)
        if DELTA:
            w = rows_of(reads, rows, row_in, f, features)
            u = u - tl.dot(w, rounded)
            put(news, u, rows, row_in, v, columns)
        if KIND == 1:
            whole = tl.load(sums + end)
            g = tl.load(sums + rows, mask=row_in, other=0)
            u = u * tl.exp(tl.minimum(whole - g, 0.0))[:, None]
            state *= tl.exp(whole)
        elif KIND == 2:
            own = sums + tl.cast(end, tl.int64) * features + f
            whole = tl.load(own, mask=f_in, other=0)
            state *= tl.exp(whole)[:, None]
        state = tl.dot(tl.trans(k), u.to(tl.bfloat16), state)
    put(last + n * features * columns, state, f, f_in, v, columns)


@triton.jit
def read(
    query, key, value, sums, scores, states, out, scale,
    tokens, features, columns, group, chunks, v_blocks,
    KIND: tl.constexpr, T: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """What the queries of a chunk read in V columns. value: u with the delta rule.

    With a decay per channel the queries are decayed, and the pairs are `scores`.
    """
    at = tl.program_id(0)
    n = (at // (chunks * v_blocks)).to(tl.int64)
    chunk = at // v_blocks % chunks
    v = at % v_blocks * V + tl.arange(0, V)
    i = tl.arange(0, T)
    rows = chunk * T + i
    row_in = rows < tokens
    mine = n // group
    query += n * tokens * features
    key += mine * tokens * features
    sums += mine * tokens
    states += (mine * chunks + chunk) * features * columns
    mixed = tl.zeros([T, V], tl.float32)
    weights = tl.zeros([T, T], tl.float32)
    for first in range(0, features, F):
        f = first + tl.arange(0, F)
        q = rows_of(query, rows, row_in, f, features)
        state = rows_of(states, f, f < features, v, columns)
        if KIND < 2:
            k = rows_of(key, rows, row_in, f, features)
            weights = tl.dot(q, tl.trans(k), weights)
        mixed = tl.dot(q, state, mixed)
    if KIND == 1:
        g = tl.load(sums + rows, mask=row_in, other=0)
        mixed *= tl.exp(g)[:, None]
        weights *= within(sums, rows, row_in, i)
    if KIND == 2:
        rounded = square(scores, n * chunks + chunk, i, T)
    else:
        rounded = tl.where(i[:, None] >= i[None, :], weights, 0.0).to(tl.bfloat16)
    u = rows_of(value + mine * tokens * columns, rows, row_in, v, columns)
    mixed = tl.dot(rounded, u, mixed)
    put(out + n * tokens * columns, mixed * scale, rows, row_in, v, columns)
