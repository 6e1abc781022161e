"""Triton: of each row, the edges whose removal would change a differentiated scalar most.

Removing key j leaves the other weights p / (1 − pⱼ), so the scalar changes, to first order, by
−pⱼ (dpⱼ − D) / (1 − pⱼ), with dpⱼ = g · vⱼ and D = g · out, g being the scalar's gradient. A
program takes one block of queries of one head and walks its tiles twice: first for each row's own
sum, which 1 − p needs exactly, then for the effects. Lists live in registers.
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from .read_kernel import LEAST, MOST
from .scores_kernel import WIDEN, queries, scores

_ABSENT = tl.constexpr(-1)  # below the bits of every size, which are not negative


@triton.jit
def _insert(best, names, effects, weights, new, effect, p, cols, K: tl.constexpr):
    """As `weighing.insert`, with what stands beside each number: its effect and its weight."""
    slots = tl.arange(0, K)[None, :]
    top = tl.max(new, 1)
    least = tl.min(best, 1)
    while tl.max((top > least).to(tl.int32), 0) > 0:
        name = tl.min(tl.where(new == top[:, None], cols[None, :], MOST), 1)
        there = cols[None, :] == name[:, None]
        # Of the least ones held, that of the highest key makes room
        worst = best == least[:, None]
        last = tl.max(tl.where(worst, names, -2), 1)
        slot = tl.min(tl.where(worst & (names == last[:, None]), slots, K), 1)
        put = (slots == slot[:, None]) & (top > least)[:, None]
        best = tl.where(put, top[:, None], best)
        names = tl.where(put, name[:, None], names)
        effects = tl.where(put, tl.sum(tl.where(there, effect, 0.0), 1)[:, None], effects)
        weights = tl.where(put, tl.sum(tl.where(there, p, 0.0), 1)[:, None], weights)
        new = tl.where(there, LEAST, new)
        top = tl.max(new, 1)
        least = tl.min(best, 1)
    return best, names, effects, weights


@triton.jit
def factors(seed, query, first, row, keep, N: tl.constexpr):
    """Dropout's factors of a tile, 0 or `keep`. Philox 4×32-10, Salmon et al. 2011.

    seed: the seed, and below what a word drops. query (M,): positions; first: that of the first
    key, a multiple of 4. row: batch · heads + head.
    """
    group = (first // 4 + tl.arange(0, N // 4))[None, :] + query[:, None] * 0
    counter = query[:, None] + group * 0
    zero = group * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed), group, counter, zero + row.to(tl.int32), zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, [query.shape[0], N]).to(tl.int64)
    return tl.where(words >= tl.load(seed + 1), keep, 0.0)


@triton.jit
def remove(
    call, mask, biases, tiles, values, names_out, effects_out, weights_out, listed, form,
    DROPOUT: tl.constexpr, TOP: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """See `effect.effect`, which gives it its arguments. `listed` edges a row, in TOP slots."""
    M: tl.constexpr = form.M
    N: tl.constexpr = form.N
    MASKED: tl.constexpr = form.MASKED
    SINKS: tl.constexpr = form.SINKS
    q_len = call.q_len
    q_blocks = tiles.q_blocks
    pid = tl.program_id(0)
    # Late blocks see the most under a causal mask: they go first
    block = q_blocks - 1 - pid % q_blocks
    bh = (pid // q_blocks).to(tl.int64)
    b = bh // call.heads
    h = bh % call.heads
    k = call.key + b * call.k_b + (h // call.group) * call.k_h
    v = values.value + b * values.v_b + (h // call.group) * values.v_h
    v_dims = tl.arange(0, DV)
    slots = tl.arange(0, TOP)[None, :]
    rows = block * M + tl.arange(0, M) - tiles.q_lead
    row_in = (rows >= 0) & (rows < q_len)
    query = queries(call.query + b * call.q_b + h * call.q_h, rows, row_in, call, form)
    far = rows[:, None].to(tl.int64)
    here = row_in[:, None] & (v_dims < values.dim)[None, :]
    own = values.grad + b * values.g_b + h * values.g_h
    g = tl.load(own + far * values.g_n + v_dims[None, :] * values.g_d, mask=here, other=0)
    own = values.out + b * values.o_b + h * values.o_h
    o = tl.load(own + far * values.o_n + v_dims[None, :] * values.o_d, mask=here, other=0)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if WIDEN:
        g = g.to(tl.float32)
    given = tl.load(call.lse + bh * q_len + rows, mask=row_in, other=float("-inf"))
    blind = given == float("-inf")
    safe = tl.where(blind, 0.0, given)
    list_at = (b * tiles.by_item + h * tiles.by_head + block) * tiles.k_blocks
    count = tiles.k_blocks
    if MASKED:
        count = tl.load(tiles.counts + b * tiles.by_item + h * tiles.by_head + block)

    total = tl.zeros([M], tl.float32)
    if SINKS:
        total = tl.where(blind, 0.0, tl.exp(tl.load(call.sinks + h) - safe))
    seen = tl.zeros([M], tl.int32)
    for turn_ahead in range(count):
        entry = turn_ahead * 2 + 1
        if MASKED:
            entry = tl.load(tiles.entries + list_at + turn_ahead)
        cols = (entry >> 1) * N + tl.arange(0, N) - tiles.k_lead
        col_in = (cols >= 0) & (cols < call.k_len)
        s, shown = scores(
            query, k, call.table, call, mask, biases, rows, cols, row_in, col_in, b, h, entry & 1,
            form,
        )  # fmt: skip
        total += tl.sum(tl.where(shown, tl.exp(s - safe[:, None]), 0.0), 1)
        seen += tl.sum((s != float("-inf")).to(tl.int32), 1)
    total = tl.where(blind, 1.0, total)
    alone = (seen == 1)[:, None]
    if SINKS:
        alone = alone & (seen < 0)[:, None]  # a sink always stands beside the key

    best = tl.zeros([M, TOP], tl.int32) + tl.where(slots < listed, _ABSENT, MOST)
    names = tl.full([M, TOP], -1, tl.int32)
    effects = tl.zeros([M, TOP], tl.float32)
    weights = tl.zeros([M, TOP], tl.float32)
    for turn in range(count):
        entry = turn * 2 + 1
        if MASKED:
            entry = tl.load(tiles.entries + list_at + turn)
        start = (entry >> 1) * N - tiles.k_lead
        cols = start + tl.arange(0, N)
        col_in = (cols >= 0) & (cols < call.k_len)
        s, shown = scores(
            query, k, call.table, call, mask, biases, rows, cols, row_in, col_in, b, h, entry & 1,
            form,
        )  # fmt: skip
        beside = v + cols[None, :].to(tl.int64) * values.v_n + v_dims[:, None] * values.v_d
        given_to = tl.load(beside, mask=col_in[None, :] & (v_dims < values.dim)[:, None], other=0)
        if WIDEN:
            given_to = given_to.to(tl.float32)
        dp = tl.dot(g, given_to, input_precision="ieee")
        if DROPOUT:
            dp = dp * factors(
                values.seed, rows + call.query_start, start + call.key_start, bh, values.keep, N
            )
        hidden = s == float("-inf")
        p = tl.where(hidden, 0.0, tl.exp(s - safe[:, None]) / total[:, None])
        # Of a row's only key 1 − p is 0: what rounding leaves of it must not divide
        left = tl.where(alone, 0.0, 1.0 - p)
        effect = tl.where(left > 0.0, p * (delta[:, None] - dp) / left, -delta[:, None])
        # Sizes are not negative: their bits are in order, NaN last
        size = effect.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        best, names, effects, weights = _insert(
            best, names, effects, weights, tl.where(hidden, _ABSENT, size), effect, p, cols, TOP
        )

    # Largest first; of equal ones the lower key
    held = tl.where(slots < listed, best, LEAST)
    at = (bh * q_len + rows) * listed
    for place in range(listed):
        first = tl.max(held, 1)
        name = tl.min(tl.where(held == first[:, None], names, MOST), 1)
        chosen = (held == first[:, None]) & (names == name[:, None])
        absent = first == _ABSENT
        effect = tl.sum(tl.where(chosen, effects, 0.0), 1)
        weight = tl.sum(tl.where(chosen, weights, 0.0), 1)
        tl.store(names_out + at + place, tl.where(absent, -1, name + call.key_start), row_in)
        tl.store(effects_out + at + place, tl.where(absent, 0.0, effect), row_in)
        tl.store(weights_out + at + place, tl.where(absent, 0.0, weight), row_in)
        # Empty slots have one name: they may all go only once nothing else is left
        held = tl.where(chosen & (absent == 0)[:, None], LEAST, held)
