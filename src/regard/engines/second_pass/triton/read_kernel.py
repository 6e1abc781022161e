"""Triton: one pass over the tiles of the weights, for all observers at once.

A program takes every n-th block of queries of one head and, for each, the tiles of keys that the
mask does not empty, in ascending order. Rows (entropy, maximum) live in registers: sums and maxima
by lane, so that nothing passes between threads until a block ends; the k largest are found by
groups of keys (`listing`). Columns are added to a
buffer of the program's own, so that no two programs add to one number: the buffers are summed
afterwards, in a fixed order. The same input gives the same bits. What a tile does to hide pairs
stands behind a branch that whole tiles do not take, and nothing in the loop keeps Triton from
loading keys ahead: neither a loop of its own that is not behind a branch, nor a barrier.

Columns need each row's own sum before the row has been read. It is 1 to within the rounding of lse,
about |lse| · 2⁻²³: blocks with an |lse| beyond `LARGE` are summed first, by `sum_rows`.
"""
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
    visible,
)
from .top_k_kernel import FLOOR, LOG2E, choose, lanes

HIDDEN = tl.constexpr(-2139095041)  # ordered(−inf)
LEAST = tl.constexpr(-(2**31))
MOST = tl.constexpr(2**31 - 1)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def ordered(x):
    """Floats as integers in the same order: NaN above inf."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes one zero of two
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(bits):
    """`ordered` is its own inverse."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def insert(best, names, new, cols, K: tl.constexpr):
    """The K largest of each row, after those of a tile: best, names (M, K), in no order.

    new (M, N): ordered numbers. A number is taken only if it is larger than the least one held,
    and tiles come in ascending order, so that of equal ones the lower key stays.
    """
    slots = tl.arange(0, K)[None, :]
    top = tl.max(new, 1)
    least = tl.min(best, 1)
    while tl.max((top > least).to(tl.int32), 0) > 0:
        name = tl.min(tl.where(new == top[:, None], cols[None, :], MOST), 1)
        # Of the least ones held, that of the highest key makes room
        worst = best == least[:, None]
        last = tl.max(tl.where(worst, names, -2), 1)
        slot = tl.min(tl.where(worst & (names == last[:, None]), slots, K), 1)
        put = (slots == slot[:, None]) & (top > least)[:, None]
        best = tl.where(put, top[:, None], best)
        names = tl.where(put, name[:, None], names)
        new = tl.where(cols[None, :] == name[:, None], LEAST, new)
        top = tl.max(new, 1)
        least = tl.min(best, 1)
    return best, names


@triton.jit
def pool(
    x, MAX: tl.constexpr, NR: tl.constexpr, SR: tl.constexpr, NC: tl.constexpr, SC: tl.constexpr
):
    """(NR · SR, NC · SC) pooled to (NR, NC): sums, or maxima of integers."""
    if SR > 1:
        x = tl.reshape(x, [NR, SR, NC * SC])
        x = tl.max(x, 1) if MAX else tl.sum(x, 1)
    if SC > 1:
        x = tl.reshape(x, [NR, NC, SC])
        x = tl.max(x, 2) if MAX else tl.sum(x, 2)
    return x


@triton.jit
def weigh(
    call, mask, biases, tiles, before, splits, items, queue, mass_out, entropy_out, score_out,
    lists, columns, cells, bins, form, gathered,
):  # fmt: skip
    """See `read.read`, which gives it its arguments, and `kernel_tuples.Gathered`.

    Programs take items, the blocks of one split of one head, from a queue until it is empty.
    """
    M: tl.constexpr = form.M
    N: tl.constexpr = form.N
    BAND: tl.constexpr = form.BAND
    MASKED: tl.constexpr = form.MASKED
    WIDTH: tl.constexpr = gathered.WIDTH
    # As numbers: what stands right of a % must be one where the interpreter counts the turns
    TILES: tl.constexpr = gathered.TILES.value
    FAN: tl.constexpr = gathered.FAN.value
    TOP: tl.constexpr = gathered.TOP
    BINS: tl.constexpr = gathered.BINS
    NR: tl.constexpr = gathered.NR
    NC: tl.constexpr = gathered.NC
    MAP: tl.constexpr = gathered.MAP
    MAX: tl.constexpr = gathered.MAX
    SCORE: tl.constexpr = gathered.SCORE
    PLAIN: tl.constexpr = not (form.SOFTCAP or form.ALIBI or form.RELATIVE or form.DENSE > 0)
    COLUMNS: tl.constexpr = gathered.RECEIVED or MAP or BINS > 0
    CELLS: tl.constexpr = MAP and not MAX and N // NC >= 8  # cells that sum up what lanes hold
    G: tl.constexpr = NC if CELLS else 1
    q_len = call.q_len
    k_len = call.k_len
    q_blocks = tiles.q_blocks
    bars = tl.arange(0, BINS if BINS > 0 else 2)
    widths = tl.arange(0, WIDTH)
    unit = LOG2E
    if PLAIN:
        unit = call.scale * LOG2E
    if TOP > 0:
        lines = (tiles.k_blocks + TILES - 1) // TILES
        leaves = lists.leaves + tl.program_id(0).to(tl.int64) * lines * (M * WIDTH)
        fans = lists.fans + tl.program_id(0).to(tl.int64) * ((lines + FAN - 1) // FAN) * (M * WIDTH)
    # A queue, as under a mask no two items need be equally long
    item = tl.atomic_add(queue, 1)
    while item < items:
        split = item % splits
        bh = (item // splits).to(tl.int64)
        b = bh // call.heads
        h = bh % call.heads
        own_q = call.query + b * call.q_b + h * call.q_h
        own_k, own_table, end = keys_of(call, b, h // call.group, form)
        past = tl.zeros([BINS if BINS > 0 else 2], tl.float32)
        future = past
        counts_here = (b < columns.counts_b) & (h < columns.counts_h)
        # Late blocks see the most under a causal mask: they go first
        for turn in range((q_blocks - split + splits - 1) // splits):
            block = q_blocks - 1 - split - turn * splits
            rows = block * M + tl.arange(0, M) - tiles.q_lead
            row_in = (rows >= 0) & (rows < q_len)
            query = queries(own_q, rows, row_in, call, form)
            given = tl.load(call.lse + bh * q_len + rows, mask=row_in, other=float("-inf"))
            blind = given == float("-inf")
            safe = tl.where(blind, 0.0, given)
            taken = tl.zeros([M], tl.float32)
            if form.SINKS:
                taken = tl.exp(tl.load(call.sinks + h) - given)
            list_at = (b * tiles.by_item + h * tiles.by_head + block) * tiles.k_blocks
            count = tiles.k_blocks
            if BAND:
                begin, count, low, high = band_tiles(block, tiles, call, form)
            elif MASKED:
                count = tl.load(tiles.counts + b * tiles.by_item + h * tiles.by_head + block)

            # A weight is 2 to the power of its score · unit − shift; a blind row has none
            shift = safe * LOG2E
            divisor = tl.full([M], 1.0, tl.float32)
            if COLUMNS:
                if not gathered.SHARD:
                    divisor = tl.load(before + bh * q_len + rows, mask=row_in, other=1.0)
            factor = 1.0 / divisor
            rounded = tl.max((divisor != 1.0).to(tl.int32), 0) > 0
            # A blind row's weights are then 2 to the power of −1e30: 0
            shift = tl.where(blind, -FLOOR, shift)

            mass = tl.zeros([M, 4], tl.float32)
            spread = tl.zeros([M, 4], tl.float32)
            highest = tl.full([M, 4], float("-inf"), tl.float32)
            leaf = tl.full([M, WIDTH], FLOOR, tl.float32)
            fan = tl.full([M, WIDTH], FLOOR, tl.float32)
            pooled_before = tl.zeros([NR, NC], tl.int32 if MAX else tl.float32)
            last_cell = -1
            counted = (rows >= columns.first_row) & (rows < columns.last_row)
            all_counted = tl.sum(counted.to(tl.int32), 0)
            counting = tl.where(counted, 1.0, 0.0)
            own_lanes = tl.arange(0, M)[:, None] * WIDTH + widths[None, :]
            for turn_at in range(count):
                entry = turn_at * 2 + 1
                if BAND:
                    entry = band_entry(begin + turn_at, low, high, tiles, call, form)
                elif MASKED:
                    entry = tl.load(tiles.entries + list_at + turn_at)
                start = (entry >> 1) * N - tiles.k_lead
                cols = start + tl.arange(0, N)
                col_in = (cols >= 0) & (cols < end)
                s = dots(query, own_k, own_table, call, cols, col_in, form)
                if not PLAIN:
                    s = changed(
                        s * call.scale, call, biases, rows[:, None], cols[None, :],
                        row_in[:, None], col_in[None, :], b, h, form,
                    )  # fmt: skip
                log = s * unit - shift[:, None]
                mixed = (entry & 1) == 0
                if not gathered.EVEN:
                    mixed = mixed | (start < 0) | (start + N > end)
                elif not MASKED:
                    mixed = False
                if mixed:
                    # Rows outside the call are blind: they need no hiding
                    if not gathered.EVEN:
                        log = tl.where(col_in[None, :], log, FLOOR)
                        if SCORE:
                            s = tl.where(col_in[None, :], s, float("-inf"))
                    if MASKED:
                        if (entry & 1) == 0:
                            if BAND:
                                shown = in_band(rows[:, None], cols[None, :], tiles, call)
                            else:
                                shown = visible(
                                    mask, call, rows[:, None], cols[None, :], row_in[:, None],
                                    col_in[None, :], b, h, form.KINDS, M, N,
                                )  # fmt: skip
                            # Else rows outside the call would see a NaN that nobody sees
                            shown = shown & row_in[:, None]
                            log = tl.where(shown, log, FLOOR)
                            if SCORE:
                                s = tl.where(shown, s, float("-inf"))
                            if gathered.COUNTED:
                                if counts_here:
                                    to = (
                                        (b * columns.counts_h + h) * splits + split
                                    ) * k_len + cols
                                    seen = tl.sum((shown & counted[:, None]).to(tl.int32), 0)
                                    seen -= all_counted  # which is added below
                                    tl.atomic_add(columns.counts + to, seen, col_in, sem="relaxed")
                if gathered.COUNTED:
                    if counts_here:
                        to = ((b * columns.counts_h + h) * splits + split) * k_len + cols
                        tl.atomic_add(columns.counts + to, all_counted, col_in, sem="relaxed")
                if TOP > 0:
                    # Nothing is decided here: a maximum a leaf, kept when its last tile was read
                    tops = tl.reshape(lanes(log, True, WIDTH // 4), [M, WIDTH])
                    turns = own_lanes * 0 + turn_at  # a scalar in the interpreter is no mask
                    final = turns == count - 1
                    if TILES > 1:
                        tops = tl.maximum(tops, tl.where(turn_at % TILES == 0, FLOOR, leaf))
                        leaf = tops
                    line = turn_at // TILES
                    tl.store(
                        leaves + line * (M * WIDTH) + own_lanes, tops,
                        mask=final | (turns % TILES == TILES - 1),
                    )  # fmt: skip
                    fan = tl.maximum(tops, tl.where(turn_at % (TILES * FAN) == 0, FLOOR, fan))
                    tl.store(
                        fans + line // FAN * (M * WIDTH) + own_lanes, fan,
                        mask=final | (turns % (TILES * FAN) == TILES * FAN - 1),
                    )  # fmt: skip
                e = tl.exp2(log)
                parts = lanes(e, False, G)
                mass += tl.sum(parts, 1)
                if gathered.ENTROPY:
                    terms = e * log
                    if form.DENSE > 0:  # a bias of −inf hides too, and 0 · −inf is NaN
                        terms = tl.where(log == float("-inf"), 0.0, terms)
                    spread += tl.sum(lanes(terms, False, 1), 1)
                if SCORE:
                    scaled = s
                    if PLAIN:
                        scaled = s * call.scale
                        if mixed:
                            scaled = tl.where(s == float("-inf"), s, scaled)
                    highest = tl.maximum(highest, tl.max(lanes(scaled, True, 1), 1))
                # Not in the exponent: beside a large shift it would be rounded
                if COLUMNS:
                    if rounded:
                        e = e * factor[:, None]
                if gathered.RECEIVED:
                    to = (bh * splits + split) * k_len + cols
                    if gathered.ALL_ROWS:
                        sums = tl.sum(e, 0)
                    else:
                        sums = tl.sum(e * counting[:, None], 0)
                    # The buffer is this program's own: `atomic` only spares the load before the sum
                    tl.atomic_add(columns.sums + to, sums, col_in, sem="relaxed")
                if MAP:
                    if MAX:
                        # Weights are not negative: their bits are in order, NaN last
                        e_bits = e.to(tl.int32, bitcast=True) & 0x7FFFFFFF
                        pooled = pool(e_bits, MAX, NR, M // NR, NC, N // NC)
                    elif CELLS:
                        own_cells = tl.sum(parts, 2) * factor[:, None]
                        pooled = pool(own_cells, MAX, NR, M // NR, NC, 1)
                    else:
                        pooled = pool(e, MAX, NR, M // NR, NC, N // NC)
                    cell = (start + call.key_start) // cells.size
                    if NC == 1:
                        kept_cells = tl.where(cell == last_cell, pooled_before, 0)
                        pooled = tl.maximum(kept_cells, pooled) if MAX else kept_cells + pooled
                        pooled_before = pooled
                        last_cell = cell
                    cell_ids = cell - cells.first + tl.arange(0, NC)
                    row_cells = (bh * q_blocks + block) * NR + tl.arange(0, NR)
                    to_cells = cells.out + row_cells[:, None] * cells.cols + cell_ids[None, :]
                    cell_in = (cell_ids >= 0) & (cell_ids < cells.cols)
                    if MAX:
                        tl.store(to_cells, pooled.to(tl.float32, bitcast=True), cell_in[None, :])
                    else:
                        tl.store(to_cells, pooled, cell_in[None, :])
                if BINS > 0:
                    back = (rows + call.query_start)[:, None] - (cols + call.key_start)[None, :]
                    most = block * M + M - 1 - tiles.q_lead + call.query_start
                    most = most - start - call.key_start
                    nearest = most - M - N + 2
                    for bin_at in range(bins.number):
                        low = tl.load(bins.edges + bin_at)
                        high = tl.load(bins.edges + bin_at + 1)
                        if (most >= low) & (nearest < high):
                            there = (back >= low) & (back < high)
                            total = tl.sum(tl.sum(tl.where(there, e, 0.0), 1), 0)
                            past += tl.where(bars == bin_at, total, 0.0)
                        if (nearest < 0) & (-nearest >= low) & (-most < high):
                            there = (back < 0) & (-back >= low) & (-back < high)
                            total = tl.sum(tl.sum(tl.where(there, e, 0.0), 1), 0)
                            future += tl.where(bars == bin_at, total, 0.0)

            row_mass = tl.sum(mass, 1)
            own_sum = tl.full([M], 1.0, tl.float32)
            if not gathered.SHARD:
                own_sum = tl.where(blind, 1.0, row_mass + taken)
            at = bh * q_len + rows
            row_mass = row_mass / own_sum
            tl.store(mass_out + at, row_mass, row_in)
            if gathered.ENTROPY:
                entropy = row_mass * tl.log(own_sum) - tl.sum(spread, 1) * LN2 / own_sum
                tl.store(entropy_out + at, entropy, row_in)
            if SCORE:
                # A maximum passes over NaN; a sum does not
                row_high = tl.max(highest, 1)
                high_in = tl.where(row_mass == row_mass, row_high, row_mass)
                tl.store(score_out + at, high_in, row_in)
            if TOP > 0:
                tl.store(lists.totals + at, own_sum, row_in)
                tl.debug_barrier()  # `choose` reads what other threads have stored
                choose(
                    leaves, fans, (count + TILES - 1) // TILES,
                    lists.chosen + bh * q_len * lists.kept, block * M - tiles.q_lead, q_len,
                    lists.listed, lists.kept, M, gathered.TURN_ROWS, TOP, WIDTH, FAN, gathered.FANS,
                )  # fmt: skip
            # What the next block adds to the columns comes after what this one has added
            tl.debug_barrier()
        if BINS > 0:
            to = (bh * splits + split) * BINS + bars
            tl.store(bins.past + to, past)
            tl.store(bins.future + to, future)
        item = tl.atomic_add(queue, 1)
