"""Triton: what is read of whole rows of weights: their sums, and the rows themselves."""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from .scores_kernel import (
    band_entry,
    band_tiles,
    changed,
    dots,
    in_band,
    keys_of,
    queries,
    scores,
    visible,
)
from .top_k_kernel import LOG2E

LARGE = tl.constexpr(32.0)


@triton.jit
def sum_rows(call, mask, biases, tiles, before, form):
    """What columns divide by: the weights' own sum in blocks with a large lse, elsewhere 1."""
    M: tl.constexpr = form.M
    PLAIN: tl.constexpr = not (form.SOFTCAP or form.ALIBI or form.RELATIVE or form.DENSE > 0)
    pid = tl.program_id(0)
    block = tiles.q_blocks - 1 - pid % tiles.q_blocks
    bh = (pid // tiles.q_blocks).to(tl.int64)
    b = bh // call.heads
    h = bh % call.heads
    rows = block * M + tl.arange(0, M) - tiles.q_lead
    row_in = (rows >= 0) & (rows < call.q_len)
    given = tl.load(call.lse + bh * call.q_len + rows, mask=row_in, other=float("-inf"))
    blind = given == float("-inf")
    safe = tl.where(blind, 0.0, given)
    summed = tl.full([M], 1.0, tl.float32)
    # exp(score − lse) carries the rounding of lse: half a last place of a large one is a large
    # factor. Where it is small the sum is 1 to the last bits, and the pass over the keys is saved
    if tl.max((tl.abs(safe) > LARGE).to(tl.int32), 0) > 0:
        summed = tl.zeros([M], tl.float32)
        if form.SINKS:
            summed = tl.exp(tl.load(call.sinks + h) - given)
        k, table, end = keys_of(call, b, h // call.group, form)
        query = queries(call.query + b * call.q_b + h * call.q_h, rows, row_in, call, form)
        list_at = (b * tiles.by_item + h * tiles.by_head + block) * tiles.k_blocks
        count = tiles.k_blocks
        if form.BAND:
            begin, count, low, high = band_tiles(block, tiles, call, form)
        elif form.MASKED:
            count = tl.load(tiles.counts + b * tiles.by_item + h * tiles.by_head + block)
        # exp2 is the processor's own. Without a change of the scores the scale goes into its
        # factor, too
        unit = LOG2E
        if PLAIN:
            unit = call.scale * LOG2E
        shift = safe * LOG2E
        for turn in range(count):
            entry = turn * 2 + 1
            if form.BAND:
                entry = band_entry(begin + turn, low, high, tiles, call, form)
            elif form.MASKED:
                entry = tl.load(tiles.entries + list_at + turn)
            cols = (entry >> 1) * form.N + tl.arange(0, form.N) - tiles.k_lead
            col_in = (cols >= 0) & (cols < end)
            s = dots(query, k, table, call, cols, col_in, form)
            if not PLAIN:
                s = changed(
                    s * call.scale, call, biases, rows[:, None], cols[None, :], row_in[:, None],
                    col_in[None, :], b, h, form,
                )  # fmt: skip
            shown = row_in[:, None] & col_in[None, :]
            if form.BAND:
                shown = shown & in_band(rows[:, None], cols[None, :], tiles, call)
            elif form.MASKED:
                if (entry & 1) == 0:
                    shown = shown & visible(
                        mask, call, rows[:, None], cols[None, :], row_in[:, None],
                        col_in[None, :], b, h, form.KINDS, M, form.N,
                    )  # fmt: skip
            summed += tl.sum(tl.where(shown, tl.exp2(s * unit - shift[:, None]), 0.0), 1)
        summed = tl.where(blind, 1.0, summed)
    tl.store(before + bh * call.q_len + rows, summed, row_in)


@triton.jit
def weigh_rows(call, mask, biases, wanted, n, out, row_blocks, k_blocks, form):
    """exp(score − lse) of the rows in `wanted` (n,): out (batch, heads, n, k_len)."""
    pid = tl.program_id(0)
    tile = pid % k_blocks
    bh = (pid // k_blocks // row_blocks).to(tl.int64)
    b = bh // call.heads
    h = bh % call.heads
    # The rows asked for stand anywhere: a tile is of their numbers, and each loads its own position
    numbers = (pid // k_blocks % row_blocks) * form.M + tl.arange(0, form.M)
    row_in = numbers < n
    rows = tl.load(wanted + numbers, mask=row_in, other=0)
    query = queries(call.query + b * call.q_b + h * call.q_h, rows, row_in, call, form)
    given = tl.load(call.lse + bh * call.q_len + rows, mask=row_in, other=float("-inf"))
    safe = tl.where(given == float("-inf"), 0.0, given)
    cols = tile * form.N + tl.arange(0, form.N)
    k, table, end = keys_of(call, b, h // call.group, form)
    col_in = cols < end
    s, shown = scores(
        query, k, table, call, mask, biases, rows, cols, row_in, col_in, b, h, 0, form
    )
    e = tl.where(shown, tl.exp(s - safe[:, None]), 0.0)
    to = out + (bh * n + numbers)[:, None] * call.k_len + cols[None, :]
    tl.store(to, e, row_in[:, None] & (cols < call.k_len)[None, :])
