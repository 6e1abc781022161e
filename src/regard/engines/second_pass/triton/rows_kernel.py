"""Triton: what is read of whole rows of weights: their sums, and the rows themselves."""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from .scores_kernel import band_entry, band_tiles, changed, dots, in_band, keys_of, scores, visible
from .top_k_kernel import LOG2E

LARGE = tl.constexpr(32.0)


@triton.jit
def sum_rows(
    q, k, lse, sinks, before,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, dim, heads, group, q_len, k_len, scale, softcap,
    query_start, key_start, slopes, relative, relative_width, relative_zero,
    bias0, b0_b, b0_h, b0_q, b0_k, bias1, b1_b, b1_h, b1_q, b1_k,
    records, length, integers, octets, table, table_b, page_size, lengths,
    tiles, tile_counts, tiles_b, tiles_h, behind, ahead, q_lead, k_lead, q_blocks, k_blocks,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    RELATIVE: tl.constexpr, DENSE: tl.constexpr, MASKED: tl.constexpr, KINDS: tl.constexpr,
    BAND: tl.constexpr, PAGED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What columns divide by: the weights' own sum in blocks with a large lse, elsewhere 1."""
    pid = tl.program_id(0)
    block = q_blocks - 1 - pid % q_blocks
    bh = (pid // q_blocks).to(tl.int64)
    b = bh // heads
    h = bh % heads
    rows = block * M + tl.arange(0, M) - q_lead
    row_in = (rows >= 0) & (rows < q_len)
    given = tl.load(lse + bh * q_len + rows, mask=row_in, other=float("-inf"))
    blind = given == float("-inf")
    safe = tl.where(blind, 0.0, given)
    summed = tl.full([M], 1.0, tl.float32)
    if tl.max((tl.abs(safe) > LARGE).to(tl.int32), 0) > 0:
        summed = tl.zeros([M], tl.float32)
        if SINKS:
            summed = tl.exp(tl.load(sinks + h) - given)
        k, table, end = keys_of(k, k_b, k_h, b, h // group, k_len, table, table_b, lengths, PAGED)
        dims = tl.arange(0, D)
        own = q + b * q_b + h * q_h + rows[:, None].to(tl.int64) * q_n + dims[None, :] * q_d
        query = tl.load(own, mask=row_in[:, None] & (dims < dim)[None, :], other=0)
        list_at = (b * tiles_b + h * tiles_h + block) * k_blocks
        count = k_blocks
        if BAND:
            begin, count, low, high = band_tiles(
                block, behind, ahead, q_lead, k_lead, q_len, query_start, key_start, k_blocks, M, N
            )
        elif MASKED:
            count = tl.load(tile_counts + b * tiles_b + h * tiles_h + block)
        unit = LOG2E
        if not (SOFTCAP or ALIBI or RELATIVE or DENSE > 0):
            unit = scale * LOG2E
        shift = safe * LOG2E
        for turn in range(count):
            entry = turn * 2 + 1
            if BAND:
                entry = band_entry(begin + turn, low, high, behind, ahead, k_lead, key_start, N)
            elif MASKED:
                entry = tl.load(tiles + list_at + turn)
            cols = (entry >> 1) * N + tl.arange(0, N) - k_lead
            col_in = (cols >= 0) & (cols < end)
            s = dots(query, k, k_n, k_d, dim, cols, col_in, table, page_size, k_b, PAGED, D)
            if SOFTCAP or ALIBI or RELATIVE or DENSE > 0:
                s = changed(
                    s * scale, rows[:, None], cols[None, :], row_in[:, None], col_in[None, :], b,
                    h, softcap, query_start, key_start, slopes, relative, relative_width,
                    relative_zero, bias0, b0_b, b0_h, b0_q, b0_k, bias1, b1_b, b1_h, b1_q, b1_k,
                    SOFTCAP, ALIBI, RELATIVE, DENSE,
                )  # fmt: skip
            shown = row_in[:, None] & col_in[None, :]
            if BAND:
                shown = shown & in_band(
                    rows[:, None], cols[None, :], behind, ahead, query_start, key_start
                )
            elif MASKED:
                if (entry & 1) == 0:
                    shown = shown & visible(
                        records, length, integers, octets, rows[:, None], cols[None, :],
                        row_in[:, None], col_in[None, :], b, h, query_start, key_start, KINDS, M,
                        N,
                    )  # fmt: skip
            summed += tl.sum(tl.where(shown, tl.exp2(s * unit - shift[:, None]), 0.0), 1)
        summed = tl.where(blind, 1.0, summed)
    tl.store(before + bh * q_len + rows, summed, row_in)


@triton.jit
def weigh_rows(
    q, k, lse, wanted, n,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, dim, heads, group, q_len, k_len, scale, softcap,
    query_start, key_start, slopes, relative, relative_width, relative_zero,
    bias0, b0_b, b0_h, b0_q, b0_k, bias1, b1_b, b1_h, b1_q, b1_k,
    records, length, integers, octets, table, table_b, page_size, lengths,
    out, row_blocks, k_blocks,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, RELATIVE: tl.constexpr, DENSE: tl.constexpr,
    MASKED: tl.constexpr, KINDS: tl.constexpr, PAGED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """exp(score − lse) of the rows in `wanted` (n,): out (batch, heads, n, k_len)."""
    pid = tl.program_id(0)
    tile = pid % k_blocks
    bh = (pid // k_blocks // row_blocks).to(tl.int64)
    b = bh // heads
    h = bh % heads
    numbers = (pid // k_blocks % row_blocks) * M + tl.arange(0, M)
    row_in = numbers < n
    rows = tl.load(wanted + numbers, mask=row_in, other=0)
    dims = tl.arange(0, D)
    own = q + b * q_b + h * q_h + rows[:, None].to(tl.int64) * q_n + dims[None, :] * q_d
    query = tl.load(own, mask=row_in[:, None] & (dims < dim)[None, :], other=0)
    given = tl.load(lse + bh * q_len + rows, mask=row_in, other=float("-inf"))
    safe = tl.where(given == float("-inf"), 0.0, given)
    cols = tile * N + tl.arange(0, N)
    k, table, end = keys_of(k, k_b, k_h, b, h // group, k_len, table, table_b, lengths, PAGED)
    col_in = cols < end
    s, shown = scores(
        query, k, k_n, k_d, dim, rows, cols, row_in, col_in, b, h,
        0, scale, softcap, query_start, key_start, slopes, relative, relative_width, relative_zero,
        bias0, b0_b, b0_h, b0_q, b0_k, bias1, b1_b, b1_h, b1_q, b1_k, records, length, integers,
        octets, table, page_size, k_b, SOFTCAP, ALIBI, RELATIVE, DENSE, MASKED, KINDS, PAGED, M, N,
        D,
    )  # fmt: skip
    e = tl.where(shown, tl.exp(s - safe[:, None]), 0.0)
    to = out + (bh * n + numbers)[:, None] * k_len + cols[None, :]
    tl.store(to, e, row_in[:, None] & (cols < k_len)[None, :])
