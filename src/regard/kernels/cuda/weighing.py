"""Triton: one pass over the tiles of the weights, for all observers at once.

A program takes every n-th block of queries of one head and, for each, the tiles of keys that the
mask does not empty, in ascending order. Rows (top k, entropy, maximum) live in registers: sums and
maxima by lane, so that nothing passes between threads until a block ends. Columns are added to a
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

from .tiles import changed, dots, keys_of, scores, visible

LARGE = tl.constexpr(32.0)
HIDDEN = tl.constexpr(-2139095041)  # ordered(−inf)
LEAST = tl.constexpr(-(2**31))
MOST = tl.constexpr(2**31 - 1)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e30)  # the power of a hidden weight: finite, so that 0 · FLOOR is 0


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
def enter(best, names, new, cols, K: tl.constexpr):
    """As `insert`, in floats: best, names (M, K); new (M, N), of which NaN is passed over."""
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
        new = tl.where(cols[None, :] == name[:, None], FLOOR, new)
        top = tl.max(new, 1)
        least = tl.min(best, 1)
    return best, names


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
def weigh(
    q, k, lse, sinks, before,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, dim, heads, group, q_len, k_len, scale, softcap,
    query_start, key_start, slopes, relative, relative_width, relative_zero,
    bias0, b0_b, b0_h, b0_q, b0_k, bias1, b1_b, b1_h, b1_q, b1_k,
    records, length, integers, octets, table, table_b, page_size, lengths,
    tiles, tile_counts, tiles_b, tiles_h, q_lead, k_lead, q_blocks, k_blocks, splits,
    mass_out, entropy_out, score_out, names_out, listed_out, listed,
    columns_out, counts_out, counts_b, counts_h, first_row, last_row,
    cells_out, cell_size, first_cell, cell_cols,
    past_out, future_out, edges, bins,
    SHARD: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    RELATIVE: tl.constexpr, DENSE: tl.constexpr, MASKED: tl.constexpr, KINDS: tl.constexpr,
    PAGED: tl.constexpr, ENTROPY: tl.constexpr, SCORE: tl.constexpr, TOP: tl.constexpr,
    RECEIVED: tl.constexpr, EVEN: tl.constexpr, MAP: tl.constexpr, MAX: tl.constexpr,
    NR: tl.constexpr, NC: tl.constexpr, BINS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """See `reading.read`, which gives it its arguments. A flag of 0 leaves an observer out.

    TOP, BINS: powers of two that hold the largest k and the bins. NR × NC: cells of the map in a
    tile (a cell of more columns than a tile is gathered over its tiles). EVEN: all
    tiles end where the keys do, or before.
    """
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or RELATIVE or DENSE > 0)
    COLUMNS: tl.constexpr = RECEIVED or MAP or BINS > 0
    CELLS: tl.constexpr = MAP and not MAX and N // NC >= 8  # cells that sum up what lanes hold
    G: tl.constexpr = NC if CELLS else 1
    pid = tl.program_id(0)
    split = pid % splits
    bh = (pid // splits).to(tl.int64)
    b = bh // heads
    h = bh % heads
    q = q + b * q_b + h * q_h
    k, table, end = keys_of(k, k_b, k_h, b, h // group, k_len, table, table_b, lengths, PAGED)
    dims = tl.arange(0, D)
    slots = tl.arange(0, TOP if TOP > 0 else 2)[None, :]
    bars = tl.arange(0, BINS if BINS > 0 else 2)
    past = tl.zeros([BINS if BINS > 0 else 2], tl.float32)
    future = past
    counts_here = (b < counts_b) & (h < counts_h)
    unit = LOG2E
    if PLAIN:
        unit = scale * LOG2E
    # Late blocks see the most under a causal mask: they go first
    for turn in range((q_blocks - split + splits - 1) // splits):
        block = q_blocks - 1 - split - turn * splits
        rows = block * M + tl.arange(0, M) - q_lead
        row_in = (rows >= 0) & (rows < q_len)
        own = q + rows[:, None].to(tl.int64) * q_n + dims[None, :] * q_d
        query = tl.load(own, mask=row_in[:, None] & (dims < dim)[None, :], other=0)
        given = tl.load(lse + bh * q_len + rows, mask=row_in, other=float("-inf"))
        blind = given == float("-inf")
        safe = tl.where(blind, 0.0, given)
        taken = tl.zeros([M], tl.float32)
        if SINKS:
            taken = tl.exp(tl.load(sinks + h) - given)
        list_at = (b * tiles_b + h * tiles_h + block) * k_blocks
        count = k_blocks
        if MASKED:
            count = tl.load(tile_counts + b * tiles_b + h * tiles_h + block)

        factor = tl.full([M], 1.0, tl.float32)
        if COLUMNS:
            if not SHARD:
                divisor = tl.load(before + bh * q_len + rows, mask=row_in, other=1.0)
                factor = 1.0 / divisor
        # A weight is 2 to the power of its score · unit − shift; rows that see nothing have none
        shift = tl.where(blind, -FLOOR, safe * LOG2E)

        mass = tl.zeros([M, 4], tl.float32)
        spread = tl.zeros([M, 4], tl.float32)
        highest = tl.full([M, 4], float("-inf"), tl.float32)
        best = tl.zeros([M, TOP if TOP > 0 else 2], tl.float32) + tl.where(
            slots < listed, FLOOR, float("inf")
        )
        names = tl.full([M, TOP if TOP > 0 else 2], -1, tl.int32)
        least = tl.full([M], FLOOR, tl.float32)
        gathered = tl.zeros([NR, NC], tl.int32 if MAX else tl.float32)
        last_cell = -1
        counted = (rows >= first_row) & (rows < last_row)
        all_counted = tl.sum(counted.to(tl.int32), 0)
        counting = tl.where(counted, factor, 0.0)
        for turn_at in range(count):
            entry = turn_at * 2 + 1
            if MASKED:
                entry = tl.load(tiles + list_at + turn_at)
            start = (entry >> 1) * N - k_lead
            cols = start + tl.arange(0, N)
            col_in = (cols >= 0) & (cols < end)
            s = dots(query, k, k_n, k_d, dim, cols, col_in, table, page_size, k_b, PAGED, D)
            if not PLAIN:
                s = changed(
                    s * scale, rows, cols, row_in, col_in, b, h, softcap, query_start, key_start,
                    slopes, relative, relative_width, relative_zero, bias0, b0_b, b0_h, b0_q,
                    b0_k, bias1, b1_b, b1_h, b1_q, b1_k, SOFTCAP, ALIBI, RELATIVE, DENSE,
                )  # fmt: skip
            log = s * unit - shift[:, None]
            mixed = (entry & 1) == 0
            if not EVEN:
                mixed = mixed | (start < 0) | (start + N > end)
            elif not MASKED:
                mixed = False
            if mixed:
                shown = row_in[:, None] & col_in[None, :]
                if MASKED:
                    if (entry & 1) == 0:
                        shown = shown & visible(
                            records, length, integers, octets, rows, cols, row_in, col_in, b, h,
                            query_start, key_start, KINDS, M, N,
                        )  # fmt: skip
                log = tl.where(shown, log, FLOOR)
                if SCORE:
                    s = tl.where(shown, s, float("-inf"))
                if RECEIVED:
                    if counts_here:
                        to = ((b * counts_h + h) * splits + split) * k_len + cols
                        seen = tl.sum((shown & counted[:, None]).to(tl.int32), 0)
                        tl.atomic_add(counts_out + to, seen, col_in, sem="relaxed")
            else:
                if RECEIVED:
                    if counts_here:
                        to = ((b * counts_h + h) * splits + split) * k_len + cols
                        tl.atomic_add(counts_out + to, all_counted, col_in, sem="relaxed")
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
            if TOP > 0:
                top = tl.max(lanes(log, True, 1), 1)
                if tl.max((top > least[:, None]).to(tl.int32)) > 0:
                    best, names = enter(best, names, log, cols, TOP)
                    least = tl.min(best, 1)
            p = e * factor[:, None]
            if RECEIVED:
                to = (bh * splits + split) * k_len + cols
                sums = tl.sum(e * counting[:, None], 0)
                tl.atomic_add(columns_out + to, sums, col_in, sem="relaxed")
            if MAP:
                if MAX:
                    # Weights are not negative: their bits are in order, NaN last
                    p_bits = p.to(tl.int32, bitcast=True) & 0x7FFFFFFF
                    pooled = pool(p_bits, MAX, NR, M // NR, NC, N // NC)
                elif CELLS:
                    pooled = pool(tl.sum(parts, 2) * factor[:, None], MAX, NR, M // NR, NC, 1)
                else:
                    pooled = pool(p, MAX, NR, M // NR, NC, N // NC)
                cell = (start + key_start) // cell_size
                if NC == 1:
                    kept = tl.where(cell == last_cell, gathered, 0)
                    pooled = tl.maximum(kept, pooled) if MAX else kept + pooled
                    gathered = pooled
                    last_cell = cell
                cell_ids = cell - first_cell + tl.arange(0, NC)
                line = (bh * q_blocks + block) * NR + tl.arange(0, NR)
                to_cells = cells_out + line[:, None] * cell_cols + cell_ids[None, :]
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
                        total = tl.sum(tl.sum(tl.where(there, p, 0.0), 1), 0)
                        past += tl.where(bars == bin_at, total, 0.0)
                    if (nearest < 0) & (-nearest >= low) & (-most < high):
                        there = (back < 0) & (-back >= low) & (-back < high)
                        total = tl.sum(tl.sum(tl.where(there, p, 0.0), 1), 0)
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
            tl.store(score_out + at, tl.where(row_mass == row_mass, row_high, row_mass), row_in)
        if TOP > 0:
            # Largest first; of equal ones the lower key
            held_best = tl.where(slots < listed, best, float("-inf"))
            for place in range(listed):
                first = tl.max(held_best, 1)
                name = tl.min(tl.where(held_best == first[:, None], names, MOST), 1)
                weight = tl.exp2(first) / own_sum
                absent = first <= FLOOR
                to = at * listed + place
                tl.store(names_out + to, tl.where(absent, -1, name + key_start), row_in)
                # of a row of NaN, none is listed
                lost = absent & (own_sum == own_sum)
                tl.store(listed_out + to, tl.where(lost, 0.0, weight), row_in)
                gone = (held_best == first[:, None]) & (names == name[:, None])
                # Empty slots have one name: they may all go only once nothing else is left
                held_best = tl.where(gone & (absent == 0)[:, None], float("-inf"), held_best)
        # What the next block adds to the columns comes after what this one has added
        tl.debug_barrier()
    if BINS > 0:
        to = (bh * splits + split) * BINS + bars
        tl.store(past_out + to, past)
        tl.store(future_out + to, future)


@triton.jit
def sum_rows(
    q, k, lse, sinks, before,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, dim, heads, group, q_len, k_len, scale, softcap,
    query_start, key_start, slopes, relative, relative_width, relative_zero,
    bias0, b0_b, b0_h, b0_q, b0_k, bias1, b1_b, b1_h, b1_q, b1_k,
    records, length, integers, octets, table, table_b, page_size, lengths,
    tiles, tile_counts, tiles_b, tiles_h, q_lead, k_lead, q_blocks, k_blocks,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    RELATIVE: tl.constexpr, DENSE: tl.constexpr, MASKED: tl.constexpr, KINDS: tl.constexpr,
    PAGED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
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
        if MASKED:
            count = tl.load(tile_counts + b * tiles_b + h * tiles_h + block)
        unit = LOG2E
        if not (SOFTCAP or ALIBI or RELATIVE or DENSE > 0):
            unit = scale * LOG2E
        shift = safe * LOG2E
        for turn in range(count):
            entry = turn * 2 + 1
            if MASKED:
                entry = tl.load(tiles + list_at + turn)
            cols = (entry >> 1) * N + tl.arange(0, N) - k_lead
            col_in = (cols >= 0) & (cols < end)
            s = dots(query, k, k_n, k_d, dim, cols, col_in, table, page_size, k_b, PAGED, D)
            if SOFTCAP or ALIBI or RELATIVE or DENSE > 0:
                s = changed(
                    s * scale, rows, cols, row_in, col_in, b, h, softcap, query_start, key_start,
                    slopes, relative, relative_width, relative_zero, bias0, b0_b, b0_h, b0_q,
                    b0_k, bias1, b1_b, b1_h, b1_q, b1_k, SOFTCAP, ALIBI, RELATIVE, DENSE,
                )  # fmt: skip
            shown = row_in[:, None] & col_in[None, :]
            if MASKED:
                if (entry & 1) == 0:
                    shown = shown & visible(
                        records, length, integers, octets, rows, cols, row_in, col_in, b, h,
                        query_start, key_start, KINDS, M, N,
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
