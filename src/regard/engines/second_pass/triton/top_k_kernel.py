"""Triton: the k largest weights of a row, found by groups of keys, in two steps.

The pass over the tiles keeps of each row only the largest weight of each group of keys, a leaf, and
the largest of each `FAN` leaves: a maximum a number, where a list would need a loop of its own in
nearly every tile. The k largest weights lie in the k leaves of largest maxima, and those in the k
fans of largest maxima. `choose` finds them once a block is read, and `list_keys` computes the few
scores of these leaves again and lists the largest.

Ties. A leaf is what one lane holds of a tile, so the leaves of one line (a tile, or a few) lie
between one another, and those of an earlier line before those of a later one. Of equal maxima the
lower keys come first, line by line; within a line it is not known which leaf has the lower key, so
up to WIDTH − 1 more leaves whose maxima equal the k-th are kept, WIDTH the leaves of a line. Then k
leaves or more come surely before any that is left out.
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from .scores_kernel import band_tiles, changed, in_band, keys_of, places, visible

MOST = tl.constexpr(2**31 - 1)
FLOOR = tl.constexpr(-1e30)  # the power of a hidden weight: finite, so that 0 · FLOOR is 0
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def lanes(x, MAX: tl.constexpr, G: tl.constexpr):
    """(M, N) to (M, G, 4): of each of G stretches, what one thread holds of a row, together.

    Threads hold two neighbours of each eight numbers of a row: nothing passes between them.
    """
    x = tl.reshape(x, [x.shape[0], G, x.shape[1] // G // 8, 4, 2])
    if MAX:
        return tl.max(tl.max(x, 4), 2)
    else:
        return tl.sum(tl.sum(x, 4), 2)


@triton.jit
def key_in_tile(lane, number, N: tl.constexpr, WIDTH: tl.constexpr):
    """Where in its tile a leaf's key of that number stands: what `lanes` puts together."""
    return lane // 4 * (4 * N // WIDTH) + number // 2 * 8 + lane % 4 * 2 + number % 2


@triton.jit
def pick(values, ids, wanted, ties, R: tl.constexpr, P: tl.constexpr):
    """Ids (R, P) of each row's `wanted` largest values (R, C), then of those that equal the last.

    ids: (R, C) or (1, C). −1 where there are no more above FLOOR; at most `ties` of the equal ones.
    Largest first, of equal ones the lower id.
    """
    slots = tl.arange(0, P)[None, :]
    picked = tl.full([R, P], -1, tl.int32)
    last = tl.full([R], float("inf"), tl.float32)
    for place in range(wanted):
        last = tl.max(values, 1)
        name = tl.min(tl.where(values == last[:, None], ids, MOST), 1)
        put = (slots == place) & (last > FLOOR)[:, None]
        picked = tl.where(put, name[:, None], picked)
        values = tl.where(ids == name[:, None], float("-inf"), values)
    equal = (tl.max(values, 1) == last) & (last > FLOOR)
    if tl.max(equal.to(tl.int32), 0) > 0:
        for place in range(wanted, wanted + ties):
            name = tl.min(tl.where(values == last[:, None], ids, MOST), 1)
            put = (slots == place) & ((last > FLOOR) & (name < MOST))[:, None]
            picked = tl.where(put, name[:, None], picked)
            values = tl.where(ids == name[:, None], float("-inf"), values)
    return picked


@triton.jit
def choose(
    leaves, fans, lines, chosen, first_row, q_len, listed, kept,
    M: tl.constexpr, R: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, FAN: tl.constexpr,
    FANS: tl.constexpr,
):  # fmt: skip
    """Puts the leaves of each row of a block into chosen (q_len, kept): line · WIDTH + lane, or −1.

    leaves (lines, M, WIDTH), fans (lines / FAN, M, WIDTH): the maxima. R: rows at a time.
    first_row: the block's first, before 0 where the block begins before the call.
    """
    numbers = tl.arange(0, FANS)[None, :]
    ahead = tl.arange(0, FAN)[None, None, :]
    slots = tl.arange(0, P)[None, :]
    for part in range(M // R):
        row = part * R + tl.arange(0, R)
        at = (numbers // WIDTH * M + row[:, None]) * WIDTH + numbers % WIDTH
        held = (lines + FAN - 1) // FAN * WIDTH
        maxima = tl.load(fans + at, mask=(numbers < held) & (row >= 0)[:, None], other=FLOOR)
        best = pick(maxima, numbers, listed, WIDTH - 1, R, P)[:, :, None]
        line = best // WIDTH * FAN + ahead
        lane = best % WIDTH
        here = (best >= 0) & (line < lines)
        at = (line * M + row[:, None, None]) * WIDTH + lane
        maxima = tl.reshape(tl.load(leaves + at, mask=here, other=FLOOR), [R, P * FAN])
        names = tl.reshape(tl.where(here, line * WIDTH + lane, MOST), [R, P * FAN])
        best = pick(maxima, names, listed, WIDTH - 1, R, P)
        to = first_row + row
        row_in = (to >= 0) & (to < q_len)
        tl.store(
            chosen + to[:, None].to(tl.int64) * kept + slots, best, row_in[:, None] & (slots < kept)
        )


@triton.jit
def keys_of_leaves(
    leaf, begin, count, list_at, end, tiles, form, N: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """(the keys of chosen leaves (R, C), which of them there are), each (R, C · a leaf's keys).

    begin, count: the first tile of a mask that is a band, and how many tiles the row's block has;
    list_at: where their list begins. TILES: of a leaf.
    """
    LEAF: tl.constexpr = N // WIDTH * TILES
    number = tl.arange(0, LEAF)[None, None, :]
    turn = (leaf // WIDTH * TILES)[:, :, None] + number // (N // WIDTH)
    there = (leaf >= 0)[:, :, None] & (turn < count[:, None, None])
    tile = turn
    if form.BAND:
        tile = begin[:, None, None] + turn
    elif form.MASKED:
        tile = tl.load(tiles.entries + list_at[:, None, None] + turn, mask=there, other=0) >> 1
    place = key_in_tile((leaf % WIDTH)[:, :, None], number % (N // WIDTH), N, WIDTH)
    cols = tl.reshape(tile * N + place - tiles.k_lead, [leaf.shape[0], leaf.shape[1] * LEAF])
    there = tl.reshape(there, [leaf.shape[0], leaf.shape[1] * LEAF])
    return cols, there & (cols >= 0) & (cols < end)


@triton.jit
def tiles_of_rows(rows, row_in, b, h, tiles, call, form, R: tl.constexpr):
    """(their blocks' first tile where the mask is a band, how many, where the list begins)."""
    block = (rows + tiles.q_lead) // form.M
    of_block = b * tiles.by_item + h * tiles.by_head + block
    begin = tl.zeros([R], tl.int32)
    count = begin + tiles.k_blocks
    if form.BAND:
        begin, count, _, _ = band_tiles(block, tiles, call, form)
    elif form.MASKED:
        count = tl.load(tiles.counts + of_block, mask=row_in, other=0)
    return begin, count, of_block * tiles.k_blocks


@triton.jit
def row_products(
    mine, step, row_in, theirs, their_step, col_in, dim, D: tl.constexpr, DEPTH: tl.constexpr
):
    """(R, C): of each row's vector, at mine (R,), with vectors of its own, at theirs (R, C).

    step, their_step: from one of their `dim` numbers to the next. DEPTH: of those at a time.
    """
    depth = tl.arange(0, DEPTH)
    found = tl.zeros([theirs.shape[0], theirs.shape[1], DEPTH], tl.float32)
    for low in tl.static_range(0, D, DEPTH):  # unrolled: all keys are asked for at once
        dims = low + depth
        a = tl.load(
            mine[:, None] + dims[None, :] * step,
            mask=row_in[:, None] & (dims < dim)[None, :], other=0,
        )  # fmt: skip
        b = tl.load(
            theirs[:, :, None] + dims[None, None, :] * their_step,
            mask=col_in[:, :, None] & (dims < dim)[None, None, :], other=0,
        )  # fmt: skip
        found += a[:, None, :].to(tl.float32) * b.to(tl.float32)
    return tl.sum(found, 2)


@triton.jit
def list_keys(
    call, mask, biases, tiles, totals, mass, chosen, kept, parts, names_out, listed_out, rest_out,
    sink_out, listed, form,
    TOP: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """The largest weights of R rows from the keys of their chosen leaves, TOP leaves at a time.

    totals (batch, heads, q_len): the rows' sums of exp(score − lse). M, N, tiles: as `weigh` had
    them; mass: what each row's weights sum to. TILES: of a leaf. DEPTH: dims at a time. Of the rows
    also what is not listed, and what the sink takes.
    """
    LEAF: tl.constexpr = form.N // WIDTH * TILES  # keys of a leaf
    pid = tl.program_id(0)
    bh = (pid // parts).to(tl.int64)
    b = bh // call.heads
    h = bh % call.heads
    q = call.query + b * call.q_b + h * call.q_h
    k, table, end = keys_of(call, b, h // call.group, form)
    rows = pid % parts * R + tl.arange(0, R)
    row_in = rows < call.q_len
    at = bh * call.q_len + rows
    given = tl.load(call.lse + at, mask=row_in, other=0.0)
    shift = tl.where(given == float("-inf"), -FLOOR, given * LOG2E)
    total = tl.load(totals + at, mask=row_in, other=1.0)
    begin, count, list_at = tiles_of_rows(rows, row_in, b, h, tiles, call, form, R)
    slots = tl.arange(0, TOP)[None, :]
    best = tl.full([R, TOP], FLOOR, tl.float32)
    names = tl.full([R, TOP], -1, tl.int32)
    for ahead_of in range(0, kept, TOP):
        wanted = ahead_of + slots
        leaf = tl.load(
            chosen + at[:, None] * kept + wanted, mask=row_in[:, None] & (wanted < kept), other=-1
        )
        # The first TOP are nearly always all; the next are equal ones
        if tl.max(tl.max(leaf, 1), 0) >= 0:
            cols, col_in = keys_of_leaves(
                leaf, begin, count, list_at, end, tiles, form, form.N, WIDTH, TILES
            )
            own = k + places(cols, col_in, table, call, call.k_b, call.k_n, form)
            s = row_products(
                q + rows.to(tl.int64) * call.q_n, call.q_d, row_in, own, call.k_d, col_in,
                call.dim, form.D, DEPTH,
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
            log = tl.where(shown, s * LOG2E - shift[:, None], FLOOR)
            log = tl.where(log == log, log, FLOOR)  # NaN is not listed
            cols = tl.where(shown, cols, MOST)
            held, held_names = best, names
            best = tl.full([R, TOP], FLOOR, tl.float32)
            names = tl.full([R, TOP], -1, tl.int32)
            for place_at in range(listed):
                first = tl.maximum(tl.max(held, 1), tl.max(log, 1))
                old = tl.min(tl.where(held == first[:, None], held_names, MOST), 1)
                new = tl.min(tl.where(log == first[:, None], cols, MOST), 1)
                name = tl.minimum(old, new)
                put = (slots == place_at) & (first > FLOOR)[:, None]
                best = tl.where(put, first[:, None], best)
                names = tl.where(put, name[:, None], names)
                held = tl.where(held_names == name[:, None], FLOOR, held)
                log = tl.where(cols == name[:, None], FLOOR, log)
    absent = names < 0
    weight = tl.exp2(best) / total[:, None]
    # of a row of NaN, none is listed
    lost = absent & (total == total)[:, None]
    to = at[:, None] * listed + slots
    mine = row_in[:, None] & (slots < listed)
    tl.store(names_out + to, tl.where(absent, -1, names + call.key_start), mine)
    weight = tl.where(lost, 0.0, weight)
    tl.store(listed_out + to, weight, mine)
    rest = tl.load(mass + at, mask=row_in, other=0.0)
    rest -= tl.sum(tl.where(slots < listed, weight, 0.0), 1)
    tl.store(rest_out + at, tl.where(rest < 0.0, 0.0, rest), row_in)  # NaN stays
    sink = tl.zeros([R], tl.float32)
    if form.SINKS:
        sink = tl.exp(tl.load(call.sinks + h) - given)
    tl.store(sink_out + at, sink, row_in)
