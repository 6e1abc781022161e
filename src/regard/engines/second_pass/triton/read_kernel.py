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

from .scores_kernel import band_entry, band_tiles, changed, dots, in_band, keys_of, visible
from .top_k_kernel import FLOOR, LOG2E, choose, lanes

HIDDEN = tl.constexpr(-2139095041)  # ordered(−inf)
LEAST = tl.constexpr(-(2**31))
MOST = tl.constexpr(2**31 - 1)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def ordered(x):
    """Floats as integers in the same order: NaN above inf."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
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
    q, k, lse, sinks, before,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, dim, heads, group, q_len, k_len, scale, softcap,
    query_start, key_start, slopes, relative, relative_width, relative_zero,
    bias0, b0_b, b0_h, b0_q, b0_k, bias1, b1_b, b1_h, b1_q, b1_k,
    records, length, integers, octets, table, table_b, page_size, lengths,
    tiles, tile_counts, tiles_b, tiles_h, behind, ahead, q_lead, k_lead, q_blocks, k_blocks,
    splits, items, queue, mass_out, entropy_out, score_out,
    leaves, fans, chosen, totals, listed, kept,
    columns_out, counts_out, counts_b, counts_h, first_row, last_row,
    cells_out, cell_size, first_cell, cell_cols,
    past_out, future_out, edges, bins,
    SHARD: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    RELATIVE: tl.constexpr, DENSE: tl.constexpr, MASKED: tl.constexpr, KINDS: tl.constexpr,
    BAND: tl.constexpr, PAGED: tl.constexpr, ENTROPY: tl.constexpr, SCORE: tl.constexpr,
    TOP: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, FAN: tl.constexpr, FANS: tl.constexpr,
    TURN_ROWS: tl.constexpr,
    RECEIVED: tl.constexpr, COUNTED: tl.constexpr, ALL_ROWS: tl.constexpr, EVEN: tl.constexpr,
    MAP: tl.constexpr,
    MAX: tl.constexpr, NR: tl.constexpr, NC: tl.constexpr, BINS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """See `reading.read`, which gives it its arguments. A flag of 0 leaves an observer out.

    TOP: a power of two that holds the leaves kept of a row, `listing` says which; BINS: the bins.
    NR × NC: cells of the map in a tile (a cell of more columns than a tile is gathered over its
    tiles). EVEN: all tiles end where the keys do, or before. ALL_ROWS: columns add up every row.
    COUNTED: how many queries see a key is to be counted, too.
    Programs take items, the blocks of one split of one head, from a queue until it is empty.
    """
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or RELATIVE or DENSE > 0)
    COLUMNS: tl.constexpr = RECEIVED or MAP or BINS > 0
    CELLS: tl.constexpr = MAP and not MAX and N // NC >= 8  # cells that sum up what lanes hold
    G: tl.constexpr = NC if CELLS else 1
    dims = tl.arange(0, D)
    bars = tl.arange(0, BINS if BINS > 0 else 2)
    widths = tl.arange(0, WIDTH)
    unit = LOG2E
    if PLAIN:
        unit = scale * LOG2E
    if TOP > 0:
        lines = (k_blocks + TILES - 1) // TILES
        leaves += tl.program_id(0).to(tl.int64) * lines * (M * WIDTH)
        fans += tl.program_id(0).to(tl.int64) * ((lines + FAN - 1) // FAN) * (M * WIDTH)
    item = tl.atomic_add(queue, 1)
    while item < items:
        split = item % splits
        bh = (item // splits).to(tl.int64)
        b = bh // heads
        h = bh % heads
        own_q = q + b * q_b + h * q_h
        own_k, own_table, end = keys_of(
            k, k_b, k_h, b, h // group, k_len, table, table_b, lengths, PAGED
        )
        past = tl.zeros([BINS if BINS > 0 else 2], tl.float32)
        future = past
        counts_here = (b < counts_b) & (h < counts_h)
        # Late blocks see the most under a causal mask: they go first
        for turn in range((q_blocks - split + splits - 1) // splits):
            block = q_blocks - 1 - split - turn * splits
            rows = block * M + tl.arange(0, M) - q_lead
            row_in = (rows >= 0) & (rows < q_len)
            own = own_q + rows[:, None].to(tl.int64) * q_n + dims[None, :] * q_d
            query = tl.load(own, mask=row_in[:, None] & (dims < dim)[None, :], other=0)
            given = tl.load(lse + bh * q_len + rows, mask=row_in, other=float("-inf"))
            blind = given == float("-inf")
            safe = tl.where(blind, 0.0, given)
            taken = tl.zeros([M], tl.float32)
            if SINKS:
                taken = tl.exp(tl.load(sinks + h) - given)
            list_at = (b * tiles_b + h * tiles_h + block) * k_blocks
            count = k_blocks
            if BAND:
                begin, count, low, high = band_tiles(
                    block, behind, ahead, q_lead, k_lead, q_len, query_start, key_start, k_blocks,
                    M, N,
                )  # fmt: skip
            elif MASKED:
                count = tl.load(tile_counts + b * tiles_b + h * tiles_h + block)

            # A weight is 2 to the power of its score · unit − shift; a blind row has none
            shift = safe * LOG2E
            divisor = tl.full([M], 1.0, tl.float32)
            if COLUMNS:
                if not SHARD:
                    divisor = tl.load(before + bh * q_len + rows, mask=row_in, other=1.0)
            factor = 1.0 / divisor
            rounded = tl.max((divisor != 1.0).to(tl.int32), 0) > 0
            shift = tl.where(blind, -FLOOR, shift)

            mass = tl.zeros([M, 4], tl.float32)
            spread = tl.zeros([M, 4], tl.float32)
            highest = tl.full([M, 4], float("-inf"), tl.float32)
            leaf = tl.full([M, WIDTH], FLOOR, tl.float32)
            fan = tl.full([M, WIDTH], FLOOR, tl.float32)
            gathered = tl.zeros([NR, NC], tl.int32 if MAX else tl.float32)
            last_cell = -1
            counted = (rows >= first_row) & (rows < last_row)
            all_counted = tl.sum(counted.to(tl.int32), 0)
            counting = tl.where(counted, 1.0, 0.0)
            own_lanes = tl.arange(0, M)[:, None] * WIDTH + widths[None, :]
            for turn_at in range(count):
                entry = turn_at * 2 + 1
                if BAND:
                    entry = band_entry(
                        begin + turn_at, low, high, behind, ahead, k_lead, key_start, N
                    )
                elif MASKED:
                    entry = tl.load(tiles + list_at + turn_at)
                start = (entry >> 1) * N - k_lead
                cols = start + tl.arange(0, N)
                col_in = (cols >= 0) & (cols < end)
                s = dots(
                    query, own_k, k_n, k_d, dim, cols, col_in, own_table, page_size, k_b, PAGED, D
                )
                if not PLAIN:
                    s = changed(
                        s * scale, rows[:, None], cols[None, :], row_in[:, None], col_in[None, :],
                        b, h, softcap, query_start, key_start, slopes, relative, relative_width,
                        relative_zero, bias0, b0_b, b0_h, b0_q, b0_k, bias1, b1_b, b1_h, b1_q,
                        b1_k, SOFTCAP, ALIBI, RELATIVE, DENSE,
                    )  # fmt: skip
                log = s * unit - shift[:, None]
                mixed = (entry & 1) == 0
                if not EVEN:
                    mixed = mixed | (start < 0) | (start + N > end)
                elif not MASKED:
                    mixed = False
                if mixed:
                    # Rows outside the call are blind: they need no hiding
                    if not EVEN:
                        log = tl.where(col_in[None, :], log, FLOOR)
                        if SCORE:
                            s = tl.where(col_in[None, :], s, float("-inf"))
                    if MASKED:
                        if (entry & 1) == 0:
                            if BAND:
                                shown = in_band(
                                    rows[:, None], cols[None, :], behind, ahead, query_start,
                                    key_start,
                                )  # fmt: skip
                            else:
                                shown = visible(
                                    records, length, integers, octets, rows[:, None],
                                    cols[None, :], row_in[:, None], col_in[None, :], b, h,
                                    query_start, key_start, KINDS, M, N,
                                )  # fmt: skip
                            # Else rows outside the call would see a NaN that nobody sees
                            shown = shown & row_in[:, None]
                            log = tl.where(shown, log, FLOOR)
                            if SCORE:
                                s = tl.where(shown, s, float("-inf"))
                            if COUNTED:
                                if counts_here:
                                    to = ((b * counts_h + h) * splits + split) * k_len + cols
                                    seen = tl.sum((shown & counted[:, None]).to(tl.int32), 0)
                                    seen -= all_counted  # which is added below
                                    tl.atomic_add(counts_out + to, seen, col_in, sem="relaxed")
                if COUNTED:
                    if counts_here:
                        to = ((b * counts_h + h) * splits + split) * k_len + cols
                        tl.atomic_add(counts_out + to, all_counted, col_in, sem="relaxed")
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
                if ENTROPY:
                    terms = e * log
                    if DENSE > 0:
                        terms = tl.where(log == float("-inf"), 0.0, terms)
                    spread += tl.sum(lanes(terms, False, 1), 1)
                if SCORE:
                    scaled = s
                    if PLAIN:
                        scaled = s * scale
                        if mixed:
                            scaled = tl.where(s == float("-inf"), s, scaled)
                    highest = tl.maximum(highest, tl.max(lanes(scaled, True, 1), 1))
                # Not in the exponent: beside a large shift it would be rounded
                if COLUMNS:
                    if rounded:
                        e = e * factor[:, None]
                if RECEIVED:
                    to = (bh * splits + split) * k_len + cols
                    if ALL_ROWS:
                        sums = tl.sum(e, 0)
                    else:
                        sums = tl.sum(e * counting[:, None], 0)
                    tl.atomic_add(columns_out + to, sums, col_in, sem="relaxed")
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
                    cell = (start + key_start) // cell_size
                    if NC == 1:
                        kept_cells = tl.where(cell == last_cell, gathered, 0)
                        pooled = tl.maximum(kept_cells, pooled) if MAX else kept_cells + pooled
                        gathered = pooled
                        last_cell = cell
                    cell_ids = cell - first_cell + tl.arange(0, NC)
                    row_cells = (bh * q_blocks + block) * NR + tl.arange(0, NR)
                    to_cells = cells_out + row_cells[:, None] * cell_cols + cell_ids[None, :]
                    cell_in = (cell_ids >= 0) & (cell_ids < cell_cols)
                    if MAX:
                        tl.store(to_cells, pooled.to(tl.float32, bitcast=True), cell_in[None, :])
                    else:
                        tl.store(to_cells, pooled, cell_in[None, :])
                if BINS > 0:
                    back = (rows + query_start)[:, None] - (cols + key_start)[None, :]
                    most = block * M + M - 1 - q_lead + query_start - start - key_start
                    nearest = most - M - N + 2
                    for bin_at in range(bins):
                        low = tl.load(edges + bin_at)
                        high = tl.load(edges + bin_at + 1)
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
            if not SHARD:
                own_sum = tl.where(blind, 1.0, row_mass + taken)
            at = bh * q_len + rows
            row_mass = row_mass / own_sum
            tl.store(mass_out + at, row_mass, row_in)
            if ENTROPY:
                entropy = row_mass * tl.log(own_sum) - tl.sum(spread, 1) * LN2 / own_sum
                tl.store(entropy_out + at, entropy, row_in)
            if SCORE:
                # A maximum passes over NaN; a sum does not
                row_high = tl.max(highest, 1)
                high_in = tl.where(row_mass == row_mass, row_high, row_mass)
                tl.store(score_out + at, high_in, row_in)
            if TOP > 0:
                tl.store(totals + at, own_sum, row_in)
                tl.debug_barrier()  # `choose` reads what other threads have stored
                choose(
                    leaves, fans, (count + TILES - 1) // TILES, chosen + bh * q_len * kept,
                    block * M - q_lead, q_len, listed, kept, M, TURN_ROWS, TOP, WIDTH, FAN, FANS,
                )  # fmt: skip
            # What the next block adds to the columns comes after what this one has added
            tl.debug_barrier()
        if BINS > 0:
            to = (bh * splits + split) * BINS + bars
            tl.store(past_out + to, past)
            tl.store(future_out + to, future)
        item = tl.atomic_add(queue, 1)
