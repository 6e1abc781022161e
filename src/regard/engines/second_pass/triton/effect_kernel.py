"""Triton: of each row, the edges whose removal would change a differentiated scalar most.

Removing key j leaves the other weights p / (1 − pⱼ), so the scalar changes, to first order, by
−pⱼ (dpⱼ − D) / (1 − pⱼ), with dpⱼ = g · vⱼ and D = g · out, g being the scalar's gradient.

As the longest list of a row of weights (`top_k_kernel`), in two steps: `weigh_edges` keeps of each
row the largest size of each leaf of keys, and chooses leaves; `list_edges` computes the effects of
their keys again, by the row's own sum, and lists the largest.

1 − p loses its digits where p is nearly 1, which one key of a row can be. So in the first step a
key of p > 1/2 stands above all others, and rows of blocks that hold one choose a leaf more; its p
is the first step's (`largest`), by the same scores as the row's sum.
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from .scores_kernel import (
    WIDEN,
    band_entry,
    band_tiles,
    changed,
    dots,
    in_band,
    queries,
    visible,
)
from .top_k_kernel import (
    FLOOR,
    LOG2E,
    MOST,
    choose,
    keys_of_leaves,
    lanes,
    row_products,
    tiles_of_rows,
)

_ABSENT = tl.constexpr(-1)  # below the bits of every size, which are not negative
_FINITE = tl.constexpr(0x7F7FFFFF)  # the bits of the largest number


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
def factors_of(seed, query, key, row, keep):
    """As `factors`, of pairs in any order: query (R, 1), key (R, C) in positions."""
    group = key // 4
    zero = group * 0
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed), group, query + zero, zero + row.to(tl.int32), zero
    )  # fmt: skip
    number = key % 4
    word = tl.where(number < 2, tl.where(number == 0, w0, w1), tl.where(number == 2, w2, w3))
    return tl.where(word.to(tl.int64) >= tl.load(seed + 1), keep, 0.0)


@triton.jit
def _gradients(values, rows, row_in, b, h, DV: tl.constexpr):
    """(M, DV): the gradients of the rows' outputs, and D, their products with the outputs."""
    dims = tl.arange(0, DV)
    far = rows[:, None].to(tl.int64)
    here = row_in[:, None] & (dims < values.dim)[None, :]
    own = values.grad + b * values.g_b + h * values.g_h
    g = tl.load(own + far * values.g_n + dims[None, :] * values.g_d, mask=here, other=0)
    own = values.out + b * values.o_b + h * values.o_h
    o = tl.load(own + far * values.o_n + dims[None, :] * values.o_d, mask=here, other=0)
    return g, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)


@triton.jit
def weigh_edges(
    call, mask, biases, tiles, values, before, items, queue, lists, rows_kept, form, edged,
):  # fmt: skip
    """See `effect.effect`, which gives it its arguments. An item is a block of queries of a head.

    before: what the weights of blocks with a large lse sum to, elsewhere 1. rows_kept: D, the rows'
    own sums, and their largest weight.
    """
    M: tl.constexpr = form.M
    N: tl.constexpr = form.N
    WIDTH: tl.constexpr = edged.WIDTH
    # As numbers: what stands right of a % must be one where the interpreter counts the turns
    TILES: tl.constexpr = edged.TILES.value
    FAN: tl.constexpr = edged.FAN.value
    DV: tl.constexpr = edged.DV
    PLAIN: tl.constexpr = not (form.SOFTCAP or form.ALIBI or form.RELATIVE or form.DENSE > 0)
    q_len = call.q_len
    q_blocks = tiles.q_blocks
    v_dims = tl.arange(0, DV)
    lines = (tiles.k_blocks + TILES - 1) // TILES
    leaves = lists.leaves + tl.program_id(0).to(tl.int64) * lines * (M * WIDTH)
    fans = lists.fans + tl.program_id(0).to(tl.int64) * ((lines + FAN - 1) // FAN) * (M * WIDTH)
    own_lanes = tl.arange(0, M)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    unit = LOG2E
    if PLAIN:
        unit = call.scale * LOG2E
    # A queue, as under a mask no two items need be equally long
    item = tl.atomic_add(queue, 1)
    while item < items:
        # Late blocks see the most under a causal mask: they go first
        block = q_blocks - 1 - item % q_blocks
        bh = (item // q_blocks).to(tl.int64)
        b = bh // call.heads
        h = bh % call.heads
        k = call.key + b * call.k_b + (h // call.group) * call.k_h
        v = values.value + b * values.v_b + (h // call.group) * values.v_h
        rows = block * M + tl.arange(0, M) - tiles.q_lead
        row_in = (rows >= 0) & (rows < q_len)
        query = queries(call.query + b * call.q_b + h * call.q_h, rows, row_in, call, form)
        g, delta = _gradients(values, rows, row_in, b, h, DV)
        if WIDEN:
            g = g.to(tl.float32)
        at = bh * q_len + rows
        given = tl.load(call.lse + at, mask=row_in, other=float("-inf"))
        blind = given == float("-inf")
        shift = tl.where(blind, -FLOOR, given * LOG2E)
        factor = 1.0 / tl.load(before + at, mask=row_in, other=1.0)
        rounded = tl.max((factor != 1.0).to(tl.int32), 0) > 0
        list_at = (b * tiles.by_item + h * tiles.by_head + block) * tiles.k_blocks
        count = tiles.k_blocks
        if form.BAND:
            begin, count, low, high = band_tiles(block, tiles, call, form)
        elif form.MASKED:
            count = tl.load(tiles.counts + b * tiles.by_item + h * tiles.by_head + block)

        mass = tl.zeros([M, 4], tl.float32)
        largest = tl.zeros([M, 4], tl.float32)
        leaf = tl.full([M, WIDTH], FLOOR, tl.float32)
        fan = tl.full([M, WIDTH], FLOOR, tl.float32)
        for turn in range(count):
            entry = turn * 2 + 1
            if form.BAND:
                entry = band_entry(begin + turn, low, high, tiles, call, form)
            elif form.MASKED:
                entry = tl.load(tiles.entries + list_at + turn)
            start = (entry >> 1) * N - tiles.k_lead
            cols = start + tl.arange(0, N)
            col_in = (cols >= 0) & (cols < call.k_len)
            s = dots(query, k, call.table, call, cols, col_in, form)
            if not PLAIN:
                s = changed(
                    s * call.scale, call, biases, rows[:, None], cols[None, :], row_in[:, None],
                    col_in[None, :], b, h, form,
                )  # fmt: skip
            beside = v + cols[None, :].to(tl.int64) * values.v_n + v_dims[:, None] * values.v_d
            value = tl.load(beside, mask=col_in[None, :] & (v_dims < values.dim)[:, None], other=0)
            if WIDEN:
                value = value.to(tl.float32)
            dp = tl.dot(g, value, input_precision="ieee")
            if edged.DROPOUT:
                dp = dp * factors(
                    values.seed, rows + call.query_start, start + call.key_start, bh, values.keep,
                    N,
                )  # fmt: skip
            mixed = (entry & 1) == 0
            if not edged.EVEN:
                mixed = mixed | (start < 0) | (start + N > call.k_len)
            elif not form.MASKED:
                mixed = False
            if mixed:
                shown = row_in[:, None] & col_in[None, :]
                if form.BAND:
                    shown = shown & in_band(rows[:, None], cols[None, :], tiles, call)
                elif form.MASKED:
                    if (entry & 1) == 0:
                        shown = shown & visible(
                            mask, call, rows[:, None], cols[None, :], row_in[:, None],
                            col_in[None, :], b, h, form.KINDS, M, N,
                        )  # fmt: skip
                s = tl.where(shown, s, float("-inf"))
            e = tl.exp2(s * unit - shift[:, None])
            mass += tl.sum(lanes(e, False, 1), 1)
            largest = tl.maximum(largest, tl.max(lanes(e, True, 1), 1))
            p = e
            if rounded:
                p = e * factor[:, None]
            size = p * (delta[:, None] - dp) / (1.0 - p)
            # Sizes are not negative: their bits are in order, NaN last
            bits = size.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            bits = tl.where(p > 0.5, tl.maximum(bits, _FINITE), bits)
            bits = tl.where(s == float("-inf"), _ABSENT, bits)
            tops = tl.reshape(lanes(bits, True, WIDTH // 4), [M, WIDTH])
            # As `choose` takes them: NaN is above all, and it has no infinity
            size = tl.minimum(tops, _FINITE).to(tl.float32, bitcast=True)
            size = tl.where(tops > _FINITE + 1, float("inf"), size)
            size = tl.where(tops < 0, FLOOR, size)
            turns = own_lanes * 0 + turn  # a scalar in the interpreter is no mask
            final = turns == count - 1
            if TILES > 1:
                size = tl.maximum(size, tl.where(turn % TILES == 0, FLOOR, leaf))
                leaf = size
            line = turn // TILES
            tl.store(
                leaves + line * (M * WIDTH) + own_lanes, size,
                mask=final | (turns % TILES == TILES - 1),
            )  # fmt: skip
            fan = tl.maximum(size, tl.where(turn % (TILES * FAN) == 0, FLOOR, fan))
            tl.store(
                fans + line // FAN * (M * WIDTH) + own_lanes, fan,
                mask=final | (turns % (TILES * FAN) == TILES * FAN - 1),
            )  # fmt: skip

        total = tl.sum(mass, 1)
        most = tl.max(largest, 1)
        if form.SINKS:
            total += tl.exp(tl.load(call.sinks + h) - given)
        total = tl.where(blind, 1.0, total)
        tl.store(rows_kept.delta + at, delta, row_in)
        tl.store(rows_kept.total + at, total, row_in)
        tl.store(rows_kept.largest + at, most / total, row_in)
        near_one = tl.max((row_in & (most * factor > 0.5)).to(tl.int32), 0)
        tl.debug_barrier()  # `choose` reads what other threads have stored
        choose(
            leaves, fans, (count + TILES - 1) // TILES,
            lists.chosen + bh * q_len * lists.kept, block * M - tiles.q_lead, q_len,
            lists.listed + near_one, lists.kept, M, edged.TURN_ROWS, edged.TOP, WIDTH, FAN,
            edged.FANS,
        )  # fmt: skip
        # What the next block keeps comes after this one has been read
        tl.debug_barrier()
        item = tl.atomic_add(queue, 1)


@triton.jit
def list_edges(
    call, mask, biases, tiles, values, lists, rows_kept, parts, names_out, effects_out,
    weights_out, form, edged,
    TOP: tl.constexpr, R: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The largest effects of R rows, from the keys of their chosen leaves, TOP leaves at a time."""
    LEAF: tl.constexpr = form.N // edged.WIDTH * edged.TILES  # keys of a leaf
    pid = tl.program_id(0)
    bh = (pid // parts).to(tl.int64)
    b = bh // call.heads
    h = bh % call.heads
    q = call.query + b * call.q_b + h * call.q_h
    k = call.key + b * call.k_b + (h // call.group) * call.k_h
    v = values.value + b * values.v_b + (h // call.group) * values.v_h
    rows = pid % parts * R + tl.arange(0, R)
    row_in = rows < call.q_len
    at = bh * call.q_len + rows
    given = tl.load(call.lse + at, mask=row_in, other=0.0)
    shift = tl.where(given == float("-inf"), -FLOOR, given * LOG2E)
    delta = tl.load(rows_kept.delta + at, mask=row_in, other=0.0)[:, None]
    total = tl.load(rows_kept.total + at, mask=row_in, other=1.0)[:, None]
    largest = tl.load(rows_kept.largest + at, mask=row_in, other=0.0)[:, None]
    begin, count, list_at = tiles_of_rows(rows, row_in, b, h, tiles, call, form, R)
    far = rows.to(tl.int64)
    slots = tl.arange(0, TOP)[None, :]
    best = tl.full([R, TOP], _ABSENT, tl.int32)
    names = tl.full([R, TOP], -1, tl.int32)
    effects = tl.zeros([R, TOP], tl.float32)
    weights = tl.zeros([R, TOP], tl.float32)
    seen = tl.zeros([R], tl.int32)
    for ahead_of in range(0, lists.kept, TOP):
        wanted = ahead_of + slots
        leaf = tl.load(
            lists.chosen + at[:, None] * lists.kept + wanted,
            mask=row_in[:, None] & (wanted < lists.kept), other=-1,
        )  # fmt: skip
        # The first TOP are nearly always all; the next are equal ones, or beside a weight near 1
        if tl.max(tl.max(leaf, 1), 0) >= 0:
            cols, col_in = keys_of_leaves(
                leaf, begin, count, list_at, call.k_len, tiles, form, form.N, edged.WIDTH,
                edged.TILES,
            )  # fmt: skip
            token = cols.to(tl.int64)
            s = row_products(
                q + far * call.q_n, call.q_d, row_in, k + token * call.k_n, call.k_d, col_in,
                call.dim, form.D, DEPTH,
            )  # fmt: skip
            own = values.grad + b * values.g_b + h * values.g_h
            dp = row_products(
                own + far * values.g_n, values.g_d, row_in, v + token * values.v_n, values.v_d,
                col_in, values.dim, edged.DV, DEPTH,
            )  # fmt: skip
            if edged.DROPOUT:
                dp = dp * factors_of(
                    values.seed, rows[:, None] + call.query_start, cols + call.key_start, bh,
                    values.keep,
                )  # fmt: skip
            s = s * call.scale
            s = changed(s, call, biases, rows[:, None], cols, row_in[:, None], col_in, b, h, form)
            shown = row_in[:, None] & col_in
            if form.BAND:
                shown = shown & in_band(rows[:, None], cols, tiles, call)
            elif form.MASKED:
                shown = shown & visible(
                    mask, call, rows[:, None], cols, row_in[:, None], col_in, b, h, form.KINDS,
                    R, TOP * LEAF,
                )  # fmt: skip
            shown = shown & (s != float("-inf"))
            seen += tl.sum(shown.to(tl.int32), 1)
            p = tl.exp2(s * LOG2E - shift[:, None]) / total
            p = tl.where(p > 0.5, largest, p)
            left = 1.0 - p
            # Of a row's only key 1 − p is 0: what rounding leaves of it must not divide. Where
            # there are more, leaves of two are chosen
            if not form.SINKS:  # a sink stands beside the key
                left = tl.where((seen == 1)[:, None], 0.0, left)
            effect = tl.where(left > 0.0, p * (delta - dp) / left, -delta)
            # Sizes are not negative: their bits are in order, NaN last
            size = tl.where(shown, effect.to(tl.int32, bitcast=True) & 0x7FFFFFFF, _ABSENT)
            cols = tl.where(shown, cols, MOST)
            held, held_names, held_effects, held_weights = best, names, effects, weights
            best = tl.full([R, TOP], _ABSENT, tl.int32)
            names = tl.full([R, TOP], -1, tl.int32)
            for place in range(lists.listed):
                first = tl.maximum(tl.max(held, 1), tl.max(size, 1))[:, None]
                old = tl.min(tl.where(held == first, held_names, MOST), 1)
                new = tl.min(tl.where(size == first, cols, MOST), 1)
                name = tl.minimum(old, new)[:, None]
                mine = held_names == name
                here = cols == name
                its = tl.sum(tl.where(mine, held_effects, 0.0), 1)
                its += tl.sum(tl.where(here, effect, 0.0), 1)
                its_weight = tl.sum(tl.where(mine, held_weights, 0.0), 1)
                its_weight += tl.sum(tl.where(here, p, 0.0), 1)
                put = (slots == place) & (first > _ABSENT)
                best = tl.where(put, first, best)
                names = tl.where(put, name, names)
                effects = tl.where(slots == place, tl.where(put, its[:, None], 0.0), effects)
                weights = tl.where(slots == place, tl.where(put, its_weight[:, None], 0.0), weights)
                held = tl.where(mine, _ABSENT, held)
                size = tl.where(here, _ABSENT, size)
    absent = names < 0
    to = at[:, None] * lists.listed + slots
    written = row_in[:, None] & (slots < lists.listed)
    tl.store(names_out + to, tl.where(absent, -1, names + call.key_start), written)
    tl.store(effects_out + to, tl.where(absent, 0.0, effects), written)
    tl.store(weights_out + to, tl.where(absent, 0.0, weights), written)
