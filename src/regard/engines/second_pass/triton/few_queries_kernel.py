"""Triton: the pass over the weights of few queries and many keys, as in decoding.

Keys are cut into chunks of a fixed length, a program each, so that one query's keys are read by the
whole GPU. The queries of all heads that share a key stand in one tile, so that a key is read once.
What rows gather is written by chunk and joined in order by a second kernel; columns belong to one
program each. No number is added to by two programs: the same input gives the same bits, whatever
the length of the neighbours in the batch.
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from .read_kernel import HIDDEN, LEAST, MOST, insert, ordered, pool, unordered
from .rows_kernel import LARGE
from .scores_kernel import keys_of, queries, scores

_PART = tl.constexpr(64)  # chunks, or listed keys, that are joined at once


@triton.jit
def rows_of_tile(call, chunked, form, Q: tl.constexpr):
    """(chunk, part, batch item, key head, and of each row: query, whether it is one, head).

    M // Q of the heads that share a key head stand in a tile.
    """
    pid = tl.program_id(0)
    chunk = pid % chunked.chunks
    part = pid // chunked.chunks % chunked.parts
    owner = (pid // chunked.chunks // chunked.parts).to(tl.int64)
    b = owner // (call.heads // call.group)
    kv_head = owner % (call.heads // call.group)
    # A row of the tile is a query of one head: Q queries of a head, then those of the next
    lane = tl.arange(0, form.M)
    rows = lane % Q
    of_group = part * (form.M // Q) + lane // Q
    row_in = (rows < call.q_len) & (of_group < call.group)
    h = kv_head * call.group + tl.minimum(of_group, call.group - 1)
    return chunk, part, b, kv_head, rows, row_in, h


@triton.jit
def tiles_of_chunk(chunked, chunk, b, kv_head, CHUNK: tl.constexpr, form):
    """(the first tile that is not empty, one past the last, the classes of the head's tiles)."""
    begin = chunk * CHUNK
    stop = tl.minimum(begin + CHUNK, chunked.k_blocks)
    line = chunked.classes + b * chunked.classes_b + kv_head * chunked.classes_h
    if form.MASKED:
        numbers = begin + tl.arange(0, CHUNK)
        some = tl.load(line + numbers, mask=numbers < chunked.k_blocks, other=0) != 0
        # Only what is empty at both ends is left out: that needs no list of tiles
        begin = tl.min(tl.where(some, numbers, chunked.k_blocks), 0)
        stop = tl.max(tl.where(some, numbers + 1, 0), 0)
    return begin, stop, line


@triton.jit
def weigh_few(call, mask, biases, chunked, before, found, columns, cells, bins, form, gathered):
    """See `few_queries.gather`, which gives it its arguments, and `few_queries.GatheredByFew`.

    M // Q heads stand in a tile. Columns divide by `before`.
    """
    M: tl.constexpr = form.M
    N: tl.constexpr = form.N
    MASKED: tl.constexpr = form.MASKED
    TOP: tl.constexpr = gathered.TOP
    BINS: tl.constexpr = gathered.BINS
    NC: tl.constexpr = gathered.NC
    MAX: tl.constexpr = gathered.MAX
    Q: tl.constexpr = gathered.Q
    G: tl.constexpr = M // Q
    COLUMNS: tl.constexpr = gathered.RECEIVED or gathered.MAP or BINS > 0
    heads = call.heads
    group = call.group
    q_len = call.q_len
    k_blocks = chunked.k_blocks
    chunks = chunked.chunks
    listed = found.listed
    chunk, part, b, kv_head, rows, row_in, h = rows_of_tile(call, chunked, form, Q)
    k, table, end = keys_of(call, b, kv_head, form)
    at = (b * heads + h) * q_len + rows
    own_head = part * G + tl.arange(0, G)
    head_in = own_head < group
    own_head = kv_head * group + own_head
    h = h[:, None]
    query = queries(call.query + b * call.q_b + h * call.q_h, rows, row_in, call, form)
    given = tl.load(call.lse + at, mask=row_in, other=float("-inf"))
    safe = tl.where(given == float("-inf"), 0.0, given)

    begin, stop, line = tiles_of_chunk(chunked, chunk, b, kv_head, gathered.CHUNK, form)
    if gathered.SUMS:  # blocks without a large lse divide by 1, and need no pass
        large = tl.max((row_in & (tl.abs(safe) > LARGE)).to(tl.int32), 0)
        stop = tl.where(large > 0, stop, 0)
    divisor = tl.full([M], 1.0, tl.float32)
    if COLUMNS:
        divisor = tl.load(before + at, mask=row_in, other=1.0)

    slots = tl.arange(0, TOP if TOP > 0 else 2)[None, :]
    bars = tl.arange(0, BINS if BINS > 0 else 2)[None, :]
    mass = tl.zeros([M], tl.float32)
    spread = tl.zeros([M], tl.float32)
    # As ordered integers, so that the largest and its place are found by comparing numbers alone
    highest = tl.full([M], HIDDEN, tl.int32)
    best = tl.zeros([M, TOP if TOP > 0 else 2], tl.int32) + tl.where(slots < listed, HIDDEN, MOST)
    names = tl.full([M, TOP if TOP > 0 else 2], -1, tl.int32)
    past = tl.zeros([G, BINS if BINS > 0 else 2], tl.float32)
    future = past
    for tile in range(begin, stop):
        whole = 1
        if MASKED:
            whole = tl.load(line + tile).to(tl.int32) >> 1
        start = tile * N - chunked.k_lead
        cols = start + tl.arange(0, N)
        col_in = (cols >= 0) & (cols < end)
        s, shown = scores(
            query, k, table, call, mask, biases, rows, cols, row_in, col_in, b, h, whole, form
        )
        log = tl.where(shown, s - safe[:, None], float("-inf"))
        e = tl.exp(log)
        mass += tl.sum(e, 1)
        if gathered.ENTROPY:
            spread += tl.sum(tl.where(log == float("-inf"), 0.0, e * log), 1)
        if gathered.SCORE:
            highest = tl.maximum(highest, tl.max(ordered(s), 1))
        if TOP > 0:
            best, names = insert(best, names, ordered(log), cols, TOP)
        if COLUMNS:
            p = e / divisor[:, None]
            if gathered.RECEIVED:
                counted = ((rows >= columns.first_row) & (rows < columns.last_row))[:, None]
                given_to = tl.sum(tl.reshape(tl.where(counted, p, 0.0), [G, Q, N]), 1)
                to = (b * heads + own_head)[:, None] * call.k_len + cols[None, :]
                tl.store(columns.sums + to, given_to, head_in[:, None] & col_in[None, :])
                seen = tl.sum(tl.reshape((shown & counted).to(tl.int32), [G, Q, N]), 1)
                to = (b * columns.counts_h + own_head)[:, None] * call.k_len + cols[None, :]
                kept = (head_in & (own_head < columns.counts_h))[:, None] & col_in[None, :]
                # Who sees a key is the same for items and heads that share a mask: one of them
                # writes it
                if b < columns.counts_b:
                    tl.store(columns.counts + to, seen, kept)
            if gathered.MAP:
                to = (at * k_blocks + tile)[:, None] * NC + tl.arange(0, NC)[None, :]
                if MAX:
                    # Weights are not negative: their bits are in order, NaN last
                    p_bits = p.to(tl.int32, bitcast=True) & 0x7FFFFFFF
                    pooled = pool(p_bits, MAX, M, 1, NC, N // NC).to(tl.float32, bitcast=True)
                    tl.store(cells + to, pooled, row_in[:, None])
                else:
                    tl.store(cells + to, pool(p, MAX, M, 1, NC, N // NC), row_in[:, None])
            if BINS > 0:
                back = (rows + call.query_start)[:, None] - (cols + call.key_start)[None, :]
                most = q_len - 1 + call.query_start - start - call.key_start
                # The tile's nearest and farthest distance: bins that it cannot reach are passed
                # over
                least = call.query_start - start - call.key_start - N + 1
                for bin_at in range(bins.number):
                    low = tl.load(bins.edges + bin_at)
                    high = tl.load(bins.edges + bin_at + 1)
                    if (most >= low) & (least < high):
                        there = (back >= low) & (back < high)
                        total = tl.sum(tl.where(there, p, 0.0), 1)
                        total = tl.sum(tl.reshape(total, [G, Q]), 1)
                        past += tl.where(bars == bin_at, total[:, None], 0.0)
                    if (least < 0) & (-least >= low) & (-most < high):
                        there = (back < 0) & (-back >= low) & (-back < high)
                        total = tl.sum(tl.where(there, p, 0.0), 1)
                        total = tl.sum(tl.reshape(total, [G, Q]), 1)
                        future += tl.where(bars == bin_at, total[:, None], 0.0)

    to = at * chunks + chunk
    tl.store(found.mass + to, mass, row_in)
    if gathered.ENTROPY:
        tl.store(found.spread + to, spread, row_in)
    if gathered.SCORE:
        tl.store(found.highest + to, highest, row_in)
    if TOP > 0:
        to = to[:, None] * listed + slots
        tl.store(found.best + to, best, row_in[:, None] & (slots < listed))
        tl.store(found.names + to, names, row_in[:, None] & (slots < listed))
    if BINS > 0:
        to = ((b * heads + own_head) * chunks + chunk)[:, None] * BINS + bars
        tl.store(bins.past + to, past, head_in[:, None])
        tl.store(bins.future + to, future, head_in[:, None])


@triton.jit
def join_few(
    lse, sinks, given, past, future, heads, q_len, key_start, chunks, found, past_out, future_out,
    SUMS: tl.constexpr, SHARD: tl.constexpr, SINKS: tl.constexpr, ENTROPY: tl.constexpr,
    SCORE: tl.constexpr, TOP: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One row's chunks (given, past, future) together, in their order.

    SUMS: only what its columns divide by.
    """
    listed = found.listed
    at = tl.program_id(0).to(tl.int64)
    bh = at // q_len
    own_lse = tl.load(lse + at)
    blind = own_lse == float("-inf")
    numbers = tl.arange(0, _PART)
    summed = tl.zeros([1], tl.float32)
    spread_sum = tl.zeros([1], tl.float32)
    top = tl.full([1], HIDDEN, tl.int32)
    for first in range(0, chunks, _PART):
        chunk = first + numbers
        inside = chunk < chunks
        own = at * chunks + chunk
        summed += tl.sum(tl.load(given.mass + own, mask=inside, other=0.0), 0)
        if ENTROPY:
            spread_sum += tl.sum(tl.load(given.spread + own, mask=inside, other=0.0), 0)
        if SCORE:
            top = tl.maximum(
                top, tl.max(tl.load(given.highest + own, mask=inside, other=HIDDEN), 0)
            )
    taken = tl.zeros([1], tl.float32)
    if SINKS:
        taken += tl.exp(tl.load(sinks + bh % heads) - own_lse)
    own_sum = tl.full([1], 1.0, tl.float32)
    if not SHARD:
        own_sum = tl.where(blind, 1.0, summed + taken)
    one = tl.arange(0, 1)
    if SUMS:
        tl.store(found.mass + at + one, tl.where(tl.abs(own_lse) > LARGE, own_sum, 1.0))
    else:
        whole = summed / own_sum
        tl.store(found.mass + at + one, whole)
        if ENTROPY:
            tl.store(found.entropy + at + one, whole * tl.log(own_sum) - spread_sum / own_sum)
        if SCORE:
            tl.store(found.score + at + one, unordered(top))
        if TOP > 0:
            slots = tl.arange(0, TOP)[None, :]
            held = tl.zeros([1, TOP], tl.int32) + tl.where(slots < listed, HIDDEN, MOST)
            held_names = tl.full([1, TOP], -1, tl.int32)
            # Ascending chunks, so that of equal ones the lower key stays
            for first in range(0, chunks * listed, _PART):
                place = first + numbers
                inside = place < chunks * listed
                own = at * chunks * listed + place
                new = tl.load(given.best + own, mask=inside, other=HIDDEN)
                name = tl.load(given.names + own, mask=inside, other=-1)
                held, held_names = insert(held, held_names, new[None, :], name, TOP)
            # Slots beyond the list hold the largest number, for `insert`; the largest is asked for
            # now
            held = tl.where(slots < listed, held, LEAST)
            for place in range(listed):
                largest = tl.max(held, 1)
                name = tl.min(tl.where(held == largest[:, None], held_names, MOST), 1)
                absent = largest == HIDDEN
                to = at * listed + place + one
                weight = tl.exp(unordered(largest)) / own_sum
                tl.store(found.names + to, tl.where(absent, -1, name + key_start))
                tl.store(found.weights + to, tl.where(absent, 0.0, weight))
                gone = (held == largest[:, None]) & (held_names == name[:, None])
                held = tl.where(gone & (absent == 0)[:, None], LEAST, held)
        if BINS > 0:
            if at % q_len == 0:  # bins belong to a head: its first row joins them
                bars = tl.arange(0, BINS)
                behind = tl.zeros([BINS], tl.float32)
                ahead = tl.zeros([BINS], tl.float32)
                for chunk in range(chunks):
                    own = (bh * chunks + chunk) * BINS + bars
                    behind += tl.load(past + own)
                    ahead += tl.load(future + own)
                tl.store(past_out + bh * BINS + bars, behind)
                tl.store(future_out + bh * BINS + bars, ahead)
