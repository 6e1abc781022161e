"""Triton: gradients of a block of queries, or of keys and values, where another kernel's are not
finite.

As in engine `tiled`: of a hidden pair the slope is 0, whatever stands there; what is not finite and
seen reaches all that it belongs to. Weights come from the log-sum-exp (Dao et al. 2022, app. B).
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from ..second_pass.triton.scores_kernel import WIDEN, keys_of, queries
from .mix_kernel import mix, not_finite, product
from .tile_kernel import entry_of, lines_at, seen_scores, spoiled, tiles_of


@triton.jit
def _slopes(query, g, delta, safe, k, v, table, call, mask, biases, tiles, values, rows, cols,
            row_in, col_in, b, h, whole, form, DV: tl.constexpr):  # fmt: skip
    """(weights, slopes of the scores, seen) of a tile, each (M, N); 0 where hidden."""
    s, seen = seen_scores(
        query, k, table, call, mask, biases, tiles, rows, cols, row_in, col_in, b, h, whole, form
    )
    dims = tl.arange(0, DV)
    own = v + cols[None, :].to(tl.int64) * values.v_n + dims[:, None] * values.v_d
    value = tl.load(own, mask=col_in[None, :] & (dims < values.dim)[:, None], other=0)
    if WIDEN:
        g = g.to(tl.float32)
        value = value.to(tl.float32)
    dp = tl.dot(g, value, input_precision="ieee")
    p = tl.where(seen, tl.exp(s - safe[:, None]), 0.0)
    return p, tl.where(seen, p * (dp - delta[:, None]), 0.0), seen


@triton.jit
def _of_rows(call, values, slopes, b, h, rows, row_in, form, DV: tl.constexpr):
    """(queries, their gradient's g, g · out, lse without −inf) of a block of rows."""
    query = queries(call.query + b * call.q_b + h * call.q_h, rows, row_in, call, form)
    dims = tl.arange(0, DV)
    here = row_in[:, None] & (dims < values.dim)[None, :]
    at = lines_at(slopes.grad, slopes.g_b, slopes.g_h, slopes.g_n, slopes.g_d, b, h, rows, dims)
    g = tl.load(at, mask=here, other=0)
    at = lines_at(slopes.out, slopes.o_b, slopes.o_h, slopes.o_n, slopes.o_d, b, h, rows, dims)
    delta = tl.sum(g.to(tl.float32) * tl.load(at, mask=here, other=0).to(tl.float32), 1)
    given = tl.load(call.lse + (b * call.heads + h) * call.q_len + rows, mask=row_in, other=0.0)
    return query, g, delta, tl.where(given == float("-inf"), 0.0, given)


@triton.jit
def mend_queries(call, mask, biases, tiles, values, slopes, form, asked):
    """The gradient of a block of queries: see `launch.mend_gradients`."""
    M: tl.constexpr = form.M
    N: tl.constexpr = form.N
    D: tl.constexpr = form.D
    pid = tl.program_id(0)
    block = tiles.q_blocks - 1 - pid % tiles.q_blocks
    bh = (pid // tiles.q_blocks).to(tl.int64)
    b = bh // call.heads
    h = bh % call.heads
    rows = block * M + tl.arange(0, M)
    row_in = rows < call.q_len
    dims = tl.arange(0, D)
    dim_in = (dims < call.dim)[None, :]
    here = row_in[:, None] & dim_in
    to = lines_at(
        slopes.d_query, slopes.dq_b, slopes.dq_h, slopes.dq_n, slopes.dq_d, b, h, rows, dims
    )
    wanted = 1
    kept = row_in
    if asked.TELLS:  # the last row sees all keys, and is right: see `forward_kernel`
        last = call.q_len - 1 + tl.arange(0, 1)
        at = lines_at(
            slopes.d_query, slopes.dq_b, slopes.dq_h, slopes.dq_n, slopes.dq_d, b, h, last, dims
        )
        wanted = spoiled(at, dim_in)
        kept = rows < call.q_len - 1
    if wanted > 0:
        wanted = spoiled(to, here)
    if wanted > 0:
        k, table, end = keys_of(call, b, h // call.group, form)
        v = values.value + b * values.v_b + (h // call.group) * values.v_h
        query, g, delta, safe = _of_rows(call, values, slopes, b, h, rows, row_in, form, asked.DV)
        begin, count, line, low, high = tiles_of(block, b, h, end, tiles, call, form, False)
        d_query = tl.zeros([M, D], tl.float32)
        for turn in range(count):
            entry = entry_of(turn, begin, line, low, high, tiles, call, form, False)
            cols = (entry >> 1) * N + tl.arange(0, N)
            col_in = cols < end
            _, ds, _ = _slopes(
                query, g, delta, safe, k, v, table, call, mask, biases, tiles, values, rows, cols,
                row_in, col_in, b, h, entry & 1, form, asked.DV,
            )  # fmt: skip
            own = k + cols[:, None].to(tl.int64) * call.k_n + dims[None, :] * call.k_d
            keys = tl.load(own, mask=col_in[:, None] & dim_in, other=0)
            # Of a pair that is seen the slope is not finite itself
            d_query += product(ds, tl.where(not_finite(keys), 0, keys), keys)
        tl.store(to, d_query * call.scale, kept[:, None] & dim_in)


@triton.jit
def mend_keys(call, mask, biases, tiles, values, slopes, form, asked):
    """The gradients of a block of keys and values, over all heads that read them."""
    M: tl.constexpr = form.M
    N: tl.constexpr = form.N
    D: tl.constexpr = form.D
    DV: tl.constexpr = asked.DV
    pid = tl.program_id(0)
    block = pid % tiles.k_blocks
    owner = (pid // tiles.k_blocks).to(tl.int64)
    kv_heads = call.heads // call.group
    b = owner // kv_heads
    kv_head = owner % kv_heads
    cols = block * N + tl.arange(0, N)
    col_in = cols < call.k_len
    dims = tl.arange(0, D)
    dim_in = (dims < call.dim)[None, :]
    v_dims = tl.arange(0, DV)
    v_in = (v_dims < values.dim)[None, :]
    to_key = lines_at(
        slopes.d_key, slopes.dk_b, slopes.dk_h, slopes.dk_n, slopes.dk_d, b, kv_head, cols, dims
    )
    to_value = lines_at(
        slopes.d_value, slopes.dv_b, slopes.dv_h, slopes.dv_n, slopes.dv_d, b, kv_head, cols, v_dims
    )
    wanted = 1
    kept = col_in
    if asked.TELLS:  # all rows see the first key, whose gradients are right
        first = tl.arange(0, 1)
        at = lines_at(
            slopes.d_key, slopes.dk_b, slopes.dk_h, slopes.dk_n, slopes.dk_d, b, kv_head, first,
            dims,
        )  # fmt: skip
        wanted = spoiled(at, dim_in)
        at = lines_at(
            slopes.d_value, slopes.dv_b, slopes.dv_h, slopes.dv_n, slopes.dv_d, b, kv_head, first,
            v_dims,
        )  # fmt: skip
        wanted = tl.maximum(wanted, spoiled(at, v_in))
        kept = col_in & (cols > 0)
    if wanted > 0:
        wanted = spoiled(to_key, col_in[:, None] & dim_in)
        wanted = tl.maximum(wanted, spoiled(to_value, col_in[:, None] & v_in))
    if wanted > 0:
        k, table, _ = keys_of(call, b, kv_head, form)
        v = values.value + b * values.v_b + kv_head * values.v_h
        d_key = tl.zeros([N, D], tl.float32)
        d_value = tl.zeros([N, DV], tl.float32)
        for turn in range(call.group * tiles.q_blocks):
            h = kv_head * call.group + turn // tiles.q_blocks
            q_block = turn % tiles.q_blocks
            begin, count, line, low, high = tiles_of(
                q_block, b, h, call.k_len, tiles, call, form, False
            )
            if (block >= begin) & (block < begin + count):
                rows = q_block * M + tl.arange(0, M)
                row_in = rows < call.q_len
                query, g, delta, safe = _of_rows(call, values, slopes, b, h, rows, row_in, form, DV)
                entry = entry_of(block - begin, begin, line, low, high, tiles, call, form, False)
                p, ds, seen = _slopes(
                    query, g, delta, safe, k, v, table, call, mask, biases, tiles, values,
                    rows, cols, row_in, col_in, b, h, entry & 1, form, DV,
                )  # fmt: skip
                turned = tl.trans(seen.to(tl.int32)) > 0
                d_value += mix(tl.trans(p), g, turned)
                query = tl.where(not_finite(query), 0, query)
                d_key += product(tl.trans(ds), query, query)
        tl.store(to_key, d_key * call.scale, kept[:, None] & dim_in)
        tl.store(to_value, d_value, kept[:, None] & v_in)
