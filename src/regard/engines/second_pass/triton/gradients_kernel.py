"""Triton: gradients of some keys and queries of a call, under the log-sum-exp and D of all keys.

A program owns a block of queries, or of keys, and walks the other side's (Dao 2023, algorithm 2,
with the queries' gradients in a kernel of their own, so that nothing is added by atomics, and the
bits are the same in every run). Sums are float32.
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from .effect_kernel import factors
from .scores_kernel import WIDEN, dots, queries, scores


@triton.jit
def _kind(x, like):
    """What is multiplied by `like`: in its dtype, as matrix instructions take two of a kind."""
    if WIDEN:
        return x.to(tl.float32)
    else:
        return x.to(like.dtype)


@triton.jit
def _state(tiles, b, h, q_block, k_block, MASKED: tl.constexpr):
    """Of a tile: 0, nothing of it is shown; 1, some; 2, all."""
    if MASKED:
        row = b * tiles.by_item + h * tiles.by_head + q_block
        return tl.load(tiles.entries + row * tiles.k_blocks + k_block).to(tl.int32)
    else:
        return 2


@triton.jit
def _rows(block, tiles, call, values, b, h, bh, form, DV: tl.constexpr):
    """A block's (rows, which there are, queries, gradients of out, D, lse where it is a number)."""
    rows = block * form.M + tl.arange(0, form.M) - tiles.q_lead
    row_in = (rows >= 0) & (rows < call.q_len)
    query = queries(call.query + b * call.q_b + h * call.q_h, rows, row_in, call, form)
    dims = tl.arange(0, DV)
    own = values.grad + b * values.g_b + h * values.g_h
    own = own + rows[:, None].to(tl.int64) * values.g_n + dims[None, :] * values.g_d
    g = tl.load(own, mask=row_in[:, None] & (dims < values.dim)[None, :], other=0)
    at = bh * call.q_len + rows
    delta = tl.load(values.delta + at, mask=row_in, other=0)
    lse = tl.load(call.lse + at, mask=row_in, other=float("-inf"))
    # A blind row's lse is −inf, and −inf − (−inf) is NaN; all its scores are −inf, so any number
    # does
    return rows, row_in, query, g, delta, tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def _slopes(
    query, g, delta, lse, k, v, call, mask, biases, values, rows, row_in, start, b, h, bh, state,
    form, DROPOUT: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """(weights as they mix values, slopes of the scores before their scale), each (M, N)."""
    cols = start + tl.arange(0, form.N)
    col_in = (cols >= 0) & (cols < call.k_len)
    s, _ = scores(
        query, k, call.table, call, mask, biases, rows, cols, row_in, col_in, b, h, state - 1, form
    )
    hidden = s == float("-inf")
    # The lse is that of all keys: exp gives the weights themselves, without a sum of these few keys
    p = tl.where(hidden, 0.0, tl.exp(s - lse[:, None]))
    dims = tl.arange(0, DV)
    beside = v + cols[None, :].to(tl.int64) * values.v_n + dims[:, None] * values.v_d
    value = tl.load(beside, mask=col_in[None, :] & (dims < values.dim)[:, None], other=0)
    dp = tl.dot(_kind(g, value), _kind(value, value), input_precision="ieee")
    mixed = p
    if DROPOUT:
        # Drawn anew from the seed and positions, as the forward drew them: no mask was kept
        kept = factors(
            values.seed, rows + call.query_start, start + call.key_start, bh, values.keep, form.N
        )
        dp = dp * kept
        mixed = p * kept
    # Hidden pairs apart: their dp may be NaN or ∞, and 0 · NaN is no 0
    slope = tl.where(hidden, 0.0, p * (dp - delta[:, None]))
    if form.SOFTCAP:
        # `scores` returned what the cap had made of them. 1 − tanh² needs the cap alone, without
        # biases
        raw = dots(query, k, call.table, call, cols, col_in, form) * call.scale
        capped = 1 - 2 / (tl.exp(2 * (raw / call.softcap)) + 1)
        slope = slope * (1 - capped * capped)
    return mixed, slope


@triton.jit
def of_queries(
    call, mask, biases, tiles, values, d_query, form, DROPOUT: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """See `gradients.part_backward`, which gives it its arguments. d_query is contiguous."""
    pid = tl.program_id(0)
    # Last blocks first: under a causal mask they have most keys, and what is long should not end
    # last
    block = tiles.q_blocks - 1 - pid % tiles.q_blocks
    bh = (pid // tiles.q_blocks).to(tl.int64)
    b = bh // call.heads
    h = bh % call.heads
    k = call.key + b * call.k_b + (h // call.group) * call.k_h
    v = values.value + b * values.v_b + (h // call.group) * values.v_h
    rows, row_in, query, g, delta, lse = _rows(block, tiles, call, values, b, h, bh, form, DV)
    dims = tl.arange(0, form.D)
    total = tl.zeros([form.M, form.D], tl.float32)
    for turn in range(tiles.k_blocks):
        state = _state(tiles, b, h, block, turn, form.MASKED)
        if state > 0:
            start = turn * form.N - tiles.k_lead
            _, slope = _slopes(
                query, g, delta, lse, k, v, call, mask, biases, values, rows, row_in, start, b, h,
                bh, state, form, DROPOUT, DV,
            )  # fmt: skip
            cols = start + tl.arange(0, form.N)
            there = ((cols >= 0) & (cols < call.k_len))[:, None] & (dims < call.dim)[None, :]
            own = k + cols[:, None].to(tl.int64) * call.k_n + dims[None, :] * call.k_d
            keys = tl.load(own, mask=there, other=0)
            total += tl.dot(_kind(slope, keys), _kind(keys, keys), input_precision="ieee")
    at = (bh * call.q_len + rows)[:, None] * call.dim + dims[None, :]
    tl.store(d_query + at, total * call.scale, row_in[:, None] & (dims < call.dim)[None, :])


@triton.jit
def of_keys(
    call, mask, biases, tiles, values, d_key, d_value, form, DROPOUT: tl.constexpr,
    DV: tl.constexpr,
):  # fmt: skip
    """The same of keys and values, of all heads that share them."""
    pid = tl.program_id(0)
    turn = pid % tiles.k_blocks
    owner = (pid // tiles.k_blocks).to(tl.int64)
    kv_heads = call.heads // call.group
    b = owner // kv_heads
    kv = owner % kv_heads
    k = call.key + b * call.k_b + kv * call.k_h
    v = values.value + b * values.v_b + kv * values.v_h
    start = turn * form.N - tiles.k_lead
    dims = tl.arange(0, form.D)
    v_dims = tl.arange(0, DV)
    keys_total = tl.zeros([form.N, form.D], tl.float32)
    values_total = tl.zeros([form.N, DV], tl.float32)
    for n in range(call.group * tiles.q_blocks):
        # One program sums all heads that share a key: atomics would add in an order of their own
        h = kv * call.group + n // tiles.q_blocks
        block = n % tiles.q_blocks
        bh = b * call.heads + h
        state = _state(tiles, b, h, block, turn, form.MASKED)
        if state > 0:
            rows, row_in, query, g, delta, lse = _rows(
                block, tiles, call, values, b, h, bh, form, DV
            )
            mixed, slope = _slopes(
                query, g, delta, lse, k, v, call, mask, biases, values, rows, row_in, start, b, h,
                bh, state, form, DROPOUT, DV,
            )  # fmt: skip
            query = _kind(query, query)
            g = _kind(g, query)
            keys_total += tl.dot(tl.trans(_kind(slope, query)), query, input_precision="ieee")
            values_total += tl.dot(tl.trans(_kind(mixed, g)), g, input_precision="ieee")
    cols = start + tl.arange(0, form.N)
    col_in = (cols >= 0) & (cols < call.k_len)
    at = (owner * call.k_len + cols)[:, None]
    there = col_in[:, None] & (dims < call.dim)[None, :]
    tl.store(d_key + at * call.dim + dims[None, :], keys_total * call.scale, there)
    there = col_in[:, None] & (v_dims < values.dim)[None, :]
    tl.store(d_value + at * values.dim + v_dims[None, :], values_total, there)
