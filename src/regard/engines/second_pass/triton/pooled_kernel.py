"""Triton: pooled rectangles of a head's weights, from q, k and a given lse."""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from .read_kernel import pool
from .scores_kernel import keys_of, queries, scores


@triton.jit
def pool_rectangles(
    call, mask, biases, places, out, row_blocks, behind, ahead, form,
    MAX: tl.constexpr, CELL: tl.constexpr, GROUPS: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Of each rectangle, cells of CELL × CELL weights: out (rectangles, row blocks, NR, 128).

    places (rectangles, 4): batch, head, first query, first key. A program has one block of M
    queries, counted from the rectangle's first, and one of GROUPS parts of its columns: NR rows of
    cells, or a part of one that is added up later. NEAR: the mask shows keys from query − behind to
    query + ahead alone, so that blocks beyond are left out; who sees whom the program says.
    """
    M: tl.constexpr = form.M
    N: tl.constexpr = form.N
    NR: tl.constexpr = M // CELL if CELL < M else 1
    NC: tl.constexpr = N // CELL if CELL < N else 1
    STEPS: tl.constexpr = CELL // N if CELL > N else 1  # tiles in a row that one store pools
    WIDE: tl.constexpr = 128 // GROUPS  # columns of cells
    pid = tl.program_id(0)
    part = pid % GROUPS
    block = pid // GROUPS % row_blocks
    t = (pid // GROUPS // row_blocks).to(tl.int64)
    b = tl.load(places + 4 * t).to(tl.int64)
    h = tl.load(places + 4 * t + 1).to(tl.int64)
    q0 = tl.load(places + 4 * t + 2) + block * M
    k0 = tl.load(places + 4 * t + 3) + part * WIDE * CELL
    rows = q0 + tl.arange(0, M)
    row_in = (rows >= 0) & (rows < call.q_len)
    query = queries(call.query + b * call.q_b + h * call.q_h, rows, row_in, call, form)
    given = tl.load(call.lse + (b * call.heads + h) * call.q_len + rows, mask=row_in, other=0)
    given = tl.where(given == float("-inf"), 0.0, given)  # such a row sees nothing
    given = tl.where(given == float("inf"), float("nan"), given)
    k, table, end = keys_of(call, b, h // call.group, form)
    low = tl.maximum(q0, 0) + call.query_start
    high = tl.minimum(q0 + M, call.q_len) - 1 + call.query_start
    to = out + ((t * row_blocks + block) * NR + tl.arange(0, NR)[:, None]) * 128
    to = to + part * WIDE + tl.arange(0, NC)[None, :]
    some = (q0 < call.q_len) & (q0 + M > 0)
    turns = 0
    if some:
        turns = WIDE // NC
    for turn in range(turns):
        cells = tl.zeros([NR, NC], tl.int32 if MAX else tl.float32)
        first = k0 + turn * STEPS * N
        steps = tl.minimum(tl.maximum(end - first + N - 1, 0) // N, STEPS)
        for step in range(steps):
            c0 = first + step * N
            near = c0 + N > 0
            if NEAR:
                near = near & (c0 + call.key_start <= high + ahead)
                near = near & (c0 + N - 1 + call.key_start >= low - behind)
            if near:
                cols = c0 + tl.arange(0, N)
                col_in = (cols >= 0) & (cols < end)
                s, _shown = scores(
                    query, k, table, call, mask, biases, rows, cols, row_in, col_in, b, h, 0, form
                )
                e = tl.where(s == float("-inf"), 0.0, tl.exp(s - given[:, None]))
                if MAX:  # weights are not below 0, so bits compare as they do, and NaN is above
                    bits = e.to(tl.int32, bitcast=True) & 0x7FFFFFFF
                    cells = tl.maximum(cells, pool(bits, True, NR, M // NR, NC, N // NC))
                else:
                    cells += pool(e, False, NR, M // NR, NC, N // NC)
        if MAX:
            tl.store(to + turn * NC, cells.to(tl.float32, bitcast=True))
        else:
            tl.store(to + turn * NC, cells)
