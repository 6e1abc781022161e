"""Triton: attention of one block of queries of one head (Dao et al. 2022, 2023).

Any mask, bias, cap and sinks; keys in order, or in pages that stay where they are. Either every
block is computed, or those are whose output, as another kernel left it, holds a number that is not
finite: no number that a hidden NaN has spoiled ever turns finite again, so what is finite is right.
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from ..second_pass.triton.scores_kernel import keys_of, places, queries
from .mix_kernel import mix
from .tile_kernel import entry_of, lines_at, seen_scores, spoiled, tiles_of


@triton.jit
def attend_rows(call, mask, biases, tiles, values, written, form, asked):
    """See `launch.attend` and `launch.mend`, which give it its arguments."""
    M: tl.constexpr = form.M
    DV: tl.constexpr = asked.DV
    pid = tl.program_id(0)
    # Late blocks see the most under a causal mask: they go first
    block = tiles.q_blocks - 1 - pid % tiles.q_blocks
    bh = (pid // tiles.q_blocks).to(tl.int64)
    b = bh // call.heads
    h = bh % call.heads
    rows = block * M + tl.arange(0, M)
    row_in = rows < call.q_len
    dims = tl.arange(0, DV)
    dim_in = (dims < values.dim)[None, :]
    here = row_in[:, None] & dim_in
    to = lines_at(written.out, written.o_b, written.o_h, written.o_n, written.o_d, b, h, rows, dims)
    wanted = 1
    kept = row_in
    if asked.MEND:
        if asked.TELLS:  # the last row sees all keys: if it is finite, so are all values
            last = call.q_len - 1 + tl.arange(0, 1)
            at = lines_at(
                written.out, written.o_b, written.o_h, written.o_n, written.o_d, b, h, last, dims
            )
            wanted = spoiled(at, dim_in)
            # Nothing is hidden from it: it is right, and other programs may still look at it
            kept = rows < call.q_len - 1
        if wanted > 0:
            wanted = spoiled(to, here)
    if wanted > 0:
        k, table, end = keys_of(call, b, h // call.group, form)
        v = values.value + (h // call.group) * values.v_h
        if not form.PAGED:
            v = v + b * values.v_b
        query = queries(call.query + b * call.q_b + h * call.q_h, rows, row_in, call, form)
        begin, count, line, low, high = tiles_of(block, b, h, end, tiles, call, form, asked.LISTED)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        mixed = tl.zeros([M, DV], tl.float32)
        for turn in range(count):
            entry = entry_of(turn, begin, line, low, high, tiles, call, form, asked.LISTED)
            cols = (entry >> 1) * form.N + tl.arange(0, form.N)
            col_in = cols < end
            s, seen = seen_scores(
                query, k, table, call, mask, biases, tiles, rows, cols, row_in, col_in, b, h,
                entry & 1, form,
            )  # fmt: skip
            own = v + places(cols, col_in, table, call, values.v_b, values.v_n, form)[:, None]
            own = own + dims[None, :] * values.v_d
            value = tl.load(own, mask=col_in[:, None] & dim_in, other=0)
            higher = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that sees nothing yet
            fade = tl.exp(top - safe)
            p = tl.exp(s - safe[:, None])
            total = total * fade + tl.sum(p, 1)
            mixed = mixed * fade[:, None] + mix(p, value, seen)
            top = higher
        if form.SINKS:
            sink = tl.load(call.sinks + h)
            higher = tl.maximum(top, sink)
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            fade = tl.exp(top - safe)
            total = total * fade + tl.exp(sink - safe)
            mixed = mixed * fade[:, None]
            top = higher
        safe = tl.where(top == float("-inf"), 0.0, top)
        mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(to, mixed, kept[:, None] & dim_in)
        at_lse = written.lse + b * written.l_b + h * written.l_h + rows * written.l_n
        tl.store(at_lse, safe + tl.log(total), kept)
