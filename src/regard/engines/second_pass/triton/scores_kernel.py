"""Triton: who sees whom in a tile, and the scores of a tile."""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from ....call.opcodes import FULL_CELL, TILE_SIDE, Op
from .mask_records import WORDS

# The interpreter multiplies the bits of bfloat16 as if they were integers
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))
_ONE = tl.constexpr(1)  # first, as the interpreter gives KINDS as a plain number
_WORDS = tl.constexpr(WORDS)
_SIDE = tl.constexpr(TILE_SIDE)
_FULL_CELL = tl.constexpr(FULL_CELL)
_FULL = tl.constexpr(int(Op.FULL))
_CAUSAL = tl.constexpr(int(Op.CAUSAL))
_WINDOW = tl.constexpr(int(Op.WINDOW))
_FIRST = tl.constexpr(int(Op.FIRST))
_DOCUMENTS = tl.constexpr(int(Op.DOCUMENTS))
_PADDING = tl.constexpr(int(Op.PADDING))
_EDGES = tl.constexpr(int(Op.EDGES))
_DENSE = tl.constexpr(int(Op.DENSE))
_TILES = tl.constexpr(int(Op.TILES))
_HEADS = tl.constexpr(int(Op.HEADS))
_STEP = tl.constexpr(int(Op.STEP))
_CHUNK = tl.constexpr(int(Op.CHUNK))
_PHASE = tl.constexpr(int(Op.PHASE))
_BLOCKS = tl.constexpr(int(Op.BLOCKS))
_QUERIES = tl.constexpr(int(Op.QUERIES))
_AND = tl.constexpr(int(Op.AND))
_OR = tl.constexpr(int(Op.OR))
_NOT = tl.constexpr(int(Op.NOT))


@triton.jit
def _modulo(a, n):
    """a modulo n > 0, below 0 too: % of integers is C's on a GPU and Python's elsewhere."""
    return ((a % n) + n) % n


@triton.jit
def _quotient(a, n):
    """a // n rounded down."""
    return (a - _modulo(a, n)) // n


@triton.jit
def visible(
    mask, call, rows, cols, row_in, col_in, b, h,
    KINDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Bool (M, N): what the program shows of the pairs of rows and cols, indices of the call.

    rows and row_in (M, 1), cols and col_in (1, N), or (M, N) where each row has keys of its own.
    The stack stands in the bits of one integer a pair: bit 0 is its top.
    """
    query = rows + call.query_start
    key = cols + call.key_start
    if KINDS == (_ONE << _CAUSAL):  # the most usual of all: a stack of one
        return key <= query
    integers = mask.integers
    octets = mask.octets
    inside = row_in & col_in
    zeros = tl.zeros([M, N], tl.int32)
    stack = zeros
    for n in range(mask.length):
        at = mask.records + n * _WORDS
        op = tl.load(at).to(tl.int32)
        # AND and OR pop two answers and push one: the answers below move down a bit
        if op == _AND:
            stack = (stack >> 1) & (stack | -2)
        elif op == _OR:
            stack = (stack >> 1) | (stack & 1)
        elif op == _NOT:
            stack = stack ^ 1
        else:
            leaf = zeros
            w1 = tl.load(at + 1)
            w2 = tl.load(at + 2)
            w3 = tl.load(at + 3)
            w4 = tl.load(at + 4)
            n1 = w1.to(tl.int32)
            n2 = w2.to(tl.int32)
            n3 = w3.to(tl.int32)
            if (_ONE << _FULL) & KINDS:
                if op == _FULL:
                    leaf = zeros + 1
            if (_ONE << _CAUSAL) & KINDS:
                if op == _CAUSAL:
                    leaf = (key <= query).to(tl.int32)
            if (_ONE << _WINDOW) & KINDS:
                if op == _WINDOW:
                    leaf = ((query - key < n1) & (query - key >= -n2)).to(tl.int32)
            if (_ONE << _FIRST) & KINDS:
                if op == _FIRST:
                    leaf = zeros + (key < n1).to(tl.int32)
            if (_ONE << _STEP) & KINDS:
                if op == _STEP:
                    leaf = (_modulo(query - key, n1) == 0).to(tl.int32)
            if (_ONE << _CHUNK) & KINDS:
                if op == _CHUNK:
                    leaf = (_quotient(query, n1) == _quotient(key, n1)).to(tl.int32)
            if (_ONE << _PHASE) & KINDS:
                if op == _PHASE:
                    phase = _modulo(key, n1)
                    leaf = zeros + ((phase >= n2) & (phase < n3)).to(tl.int32)
            if (_ONE << _QUERIES) & KINDS:
                if op == _QUERIES:
                    leaf = zeros + ((query >= n1) & (query < n2)).to(tl.int32)
            if (_ONE << _DOCUMENTS) & KINDS:
                if op == _DOCUMENTS:
                    mine = tl.load(integers + w1 + b * w2 + rows, mask=row_in, other=-1)
                    theirs = tl.load(integers + w3 + b * w4 + cols, mask=col_in, other=-1)
                    leaf = ((mine == theirs) & (mine >= 0)).to(tl.int32)
            if (_ONE << _PADDING) & KINDS:
                if op == _PADDING:
                    keep = tl.load(octets + w1 + b * w2 + cols, mask=col_in, other=0)
                    leaf = zeros + (keep != 0).to(tl.int32)
            if (_ONE << _HEADS) & KINDS:
                if op == _HEADS:
                    leaf = zeros + (tl.load(octets + w1 + h) != 0).to(tl.int32)
            if (_ONE << _EDGES) & KINDS:
                if op == _EDGES:
                    for edge in range(n2):
                        pair = integers + w1 + edge * 2
                        there = (query == tl.load(pair)) & (key == tl.load(pair + 1))
                        leaf = leaf | there.to(tl.int32)
            if (_ONE << _DENSE) & KINDS:
                if op == _DENSE:
                    w5 = tl.load(at + 5)
                    start = octets + w1 + b * w2 + h * w3
                    own = start + rows * w4 + cols * w5
                    leaf = (tl.load(own, mask=inside, other=0) != 0).to(tl.int32)
            if (_ONE << _BLOCKS) & KINDS:
                if op == _BLOCKS:
                    n5 = tl.load(at + 5).to(tl.int32)
                    row = _quotient(query, n5) - tl.load(at + 6)
                    col = _quotient(key, n5) - tl.load(at + 7)
                    own = octets + w1 + b * w2 + h * w3 + row * w4 + col
                    leaf = (tl.load(own, mask=inside, other=0) != 0).to(tl.int32)
            if (_ONE << _TILES) & KINDS:
                if op == _TILES:
                    w5 = tl.load(at + 5)
                    own = integers + w1 + b * w2 + h * w3 + (rows // _SIDE) * w4 + cols // _SIDE
                    cell = tl.load(own, mask=inside, other=_FULL_CELL)
                    bit = (rows % _SIDE) * _SIDE + cols % _SIDE
                    place = octets + w5 + cell * (_SIDE * _SIDE // 8) + bit // 8
                    # A cell below 0 is wholly shown or hidden, and has no bits
                    bits = tl.load(place, mask=inside & (cell >= 0), other=0).to(tl.int32)
                    shown = ((bits >> (bit % 8)) & 1) | (cell == _FULL_CELL).to(tl.int32)
                    leaf = shown
            stack = (stack << 1) | leaf
    return (stack & 1) != 0


@triton.jit
def band_tiles(block, tiles, call, form):
    """Of a mask that shows the keys from query − behind to query + ahead: a block's tiles.

    (the first, how many, the positions of the block's first and last query).
    """
    low = tl.maximum(block * form.M - tiles.q_lead, 0) + call.query_start
    high = tl.minimum(block * form.M - tiles.q_lead + form.M, call.q_len) - 1 + call.query_start
    origin = call.key_start - tiles.k_lead
    begin = tl.maximum(low - tiles.behind - origin, 0) // form.N
    past = tl.maximum(high + tiles.ahead - origin + form.N, 0) // form.N
    end = tl.minimum(past, tiles.k_blocks)
    return begin, tl.maximum(end - begin, 0), low, high


@triton.jit
def in_band(rows, cols, tiles, call):
    """What such a mask shows; rows and cols as `visible` takes them."""
    offset = (cols + call.key_start) - (rows + call.query_start)
    return (offset <= tiles.ahead) & (offset >= -tiles.behind)


@triton.jit
def band_entry(tile, low, high, tiles, call, form):
    """As in a list of tiles: 2 · its number, + 1 where the block's queries see all of it."""
    first = tile * form.N + call.key_start - tiles.k_lead
    whole = (first >= high - tiles.behind) & (first + form.N - 1 <= low + tiles.ahead)
    return tile * 2 + whole.to(tl.int32)


@triton.jit
def places(cols, col_in, table, call, of_page, of_token, form):
    """Where the keys or values of cols begin, from the first one's place; in pages, the pool's.

    of_page, of_token: the strides from one to the next.
    """
    if form.PAGED:
        page = tl.load(table + cols // call.page_size, mask=col_in, other=0).to(tl.int64)
        return page * of_page + (cols % call.page_size).to(tl.int64) * of_token
    else:
        return cols.to(tl.int64) * of_token


@triton.jit
def keys_of(call, b, kv_head, form):
    """(the head's first key, the item's row of the table, how many keys the item has)."""
    k = call.key + kv_head * call.k_h
    if form.PAGED:
        return k, call.table + b * call.table_b, tl.load(call.lengths + b).to(tl.int32)
    else:
        return k + b * call.k_b, call.table, call.k_len


@triton.jit
def queries(q, rows, row_in, call, form):
    """(M, D): the queries of rows, from their head's first; 0 outside."""
    dims = tl.arange(0, form.D)
    own = q + rows[:, None].to(tl.int64) * call.q_n + dims[None, :] * call.q_d
    return tl.load(own, mask=row_in[:, None] & (dims < call.dim)[None, :], other=0)


@triton.jit
def dots(q, k, table, call, cols, col_in, form):
    """q · kᵀ of a tile, (M, N), without its scale; `scores` says what is what."""
    dims = tl.arange(0, form.D)
    own = places(cols, col_in, table, call, call.k_b, call.k_n, form)
    own = k + own[None, :] + dims[:, None] * call.k_d
    keys = tl.load(own, mask=col_in[None, :] & (dims < call.dim)[:, None], other=0)
    if WIDEN:
        q = q.to(tl.float32)
        keys = keys.to(tl.float32)
    return tl.dot(q, keys, input_precision="ieee")


@triton.jit
def changed(s, call, biases, rows, cols, row_in, col_in, b, h, form):
    """What a cap and biases make of scaled scores; rows and cols as `visible` takes them."""
    if form.SOFTCAP:
        # tanh x = 1 − 2 / (e^2x + 1), off by float32's rounding at 1
        s = call.softcap * (1 - 2 / (tl.exp(2 * (s / call.softcap)) + 1))
    offset = (cols + call.key_start) - (rows + call.query_start)
    inside = row_in & col_in
    if form.ALIBI:
        s = s - tl.load(biases.slopes + h) * tl.abs(offset).to(tl.float32)
    if form.RELATIVE:
        along = biases.relative + h.to(tl.int64) * biases.relative_width + offset
        s = s + tl.load(along + biases.relative_zero, mask=inside, other=0)
    if form.DENSE > 0:
        own = biases.first + b * biases.first_b + h * biases.first_h
        own = own + rows.to(tl.int64) * biases.first_q + cols.to(tl.int64) * biases.first_k
        added = tl.load(own, mask=inside, other=float("-inf")).to(tl.float32)
        s = tl.where(added == float("-inf"), added, s + added)  # NaN − ∞ is NaN
    if form.DENSE > 1:
        own = biases.second + b * biases.second_b + h * biases.second_h
        own = own + rows.to(tl.int64) * biases.second_q + cols.to(tl.int64) * biases.second_k
        added = tl.load(own, mask=inside, other=float("-inf")).to(tl.float32)
        s = tl.where(added == float("-inf"), added, s + added)  # NaN − ∞ is NaN
    return s


@triton.jit
def scores(q, k, table, call, mask, biases, rows, cols, row_in, col_in, b, h, whole, form):
    """(scores, shown), each (M, N): float32, −inf where hidden; shown by the mask.

    q (M, D): the tile's queries. k: the first of its head's keys; of pages, of the head's part of
    the pool, and `table` is the item's. h: the head, or those of the rows, (M, 1). whole: the mask
    shows all of the tile.
    """
    s = dots(q, k, table, call, cols, col_in, form) * call.scale
    rows = rows[:, None]
    cols = cols[None, :]
    row_in = row_in[:, None]
    col_in = col_in[None, :]
    s = changed(s, call, biases, rows, cols, row_in, col_in, b, h, form)
    shown = row_in & col_in
    if form.MASKED:
        if whole == 0:
            shown = shown & visible(
                mask, call, rows, cols, row_in, col_in, b, h, form.KINDS, form.M, form.N
            )
    return tl.where(shown, s, float("-inf")), shown
