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
    records, length, integers, octets, rows, cols, row_in, col_in, b, h, query_start, key_start,
    KINDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Bool (M, N): what the program shows of the pairs of rows and cols, indices of the call.

    rows and row_in (M, 1), cols and col_in (1, N), or (M, N) where each row has keys of its own.
    The stack stands in the bits of one integer a pair: bit 0 is its top.
    """
    query = rows + query_start
    key = cols + key_start
    if KINDS == (_ONE << _CAUSAL):  # the most usual of all: a stack of one
        return key <= query
    inside = row_in & col_in
    zeros = tl.zeros([M, N], tl.int32)
    stack = zeros
    for n in range(length):
        at = records + n * _WORDS
        op = tl.load(at).to(tl.int32)
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
                    bits = tl.load(place, mask=inside & (cell >= 0), other=0).to(tl.int32)
                    shown = ((bits >> (bit % 8)) & 1) | (cell == _FULL_CELL).to(tl.int32)
                    leaf = shown
            stack = (stack << 1) | leaf
    return (stack & 1) != 0


@triton.jit
def band_tiles(
    block, behind, ahead, q_lead, k_lead, q_len, query_start, key_start, k_blocks,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Of a mask that shows the keys from query − behind to query + ahead: a block's tiles.

    (the first, how many, the positions of the block's first and last query).
    """
    low = tl.maximum(block * M - q_lead, 0) + query_start
    high = tl.minimum(block * M - q_lead + M, q_len) - 1 + query_start
    origin = key_start - k_lead
    begin = tl.maximum(low - behind - origin, 0) // N
    end = tl.minimum(tl.maximum(high + ahead - origin + N, 0) // N, k_blocks)
    return begin, tl.maximum(end - begin, 0), low, high


@triton.jit
def in_band(rows, cols, behind, ahead, query_start, key_start):
    """What such a mask shows; rows and cols as `visible` takes them."""
    offset = (cols + key_start) - (rows + query_start)
    return (offset <= ahead) & (offset >= -behind)


@triton.jit
def band_entry(tile, low, high, behind, ahead, k_lead, key_start, N: tl.constexpr):
    """As in a list of tiles: 2 · its number, + 1 where the block's queries see all of it."""
    first = tile * N + key_start - k_lead
    whole = (first >= high - behind) & (first + N - 1 <= low + ahead)
    return tile * 2 + whole.to(tl.int32)


@triton.jit
def _added(bias, b_stride, h_stride, q_stride, k_stride, rows, cols, row_in, col_in, b, h):
    """A tile of a dense bias, float32; a stride is 0 where one number serves all."""
    own = bias + b * b_stride + h * h_stride
    own = own + rows.to(tl.int64) * q_stride + cols.to(tl.int64) * k_stride
    return tl.load(own, mask=row_in & col_in, other=0).to(tl.float32)


@triton.jit
def places(cols, col_in, k_row, table, page_size, k_page, PAGED: tl.constexpr):
    """Where the keys of cols begin, from the first one's place; in pages, from the pool's."""
    if PAGED:
        page = tl.load(table + cols // page_size, mask=col_in, other=0).to(tl.int64)
        return page * k_page + (cols % page_size).to(tl.int64) * k_row
    else:
        return cols.to(tl.int64) * k_row


@triton.jit
def keys_of(
    k, k_b, k_h, b, kv_head, k_len, table, table_b, lengths, PAGED: tl.constexpr
):  # fmt: skip
    """(the head's first key, the item's row of the table, how many keys the item has)."""
    k = k + kv_head * k_h
    if PAGED:
        return k, table + b * table_b, tl.load(lengths + b).to(tl.int32)
    else:
        return k + b * k_b, table, k_len


@triton.jit
def dots(
    q, k, k_row, k_dim, dim, cols, col_in, table, page_size, k_page,
    PAGED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """q · kᵀ of a tile, (M, N), without its scale; `scores` says what is what."""
    dims = tl.arange(0, D)
    own = places(cols, col_in, k_row, table, page_size, k_page, PAGED)
    own = k + own[None, :] + dims[:, None] * k_dim
    keys = tl.load(own, mask=col_in[None, :] & (dims < dim)[:, None], other=0)
    if WIDEN:
        q = q.to(tl.float32)
        keys = keys.to(tl.float32)
    return tl.dot(q, keys, input_precision="ieee")


@triton.jit
def changed(
    s, rows, cols, row_in, col_in, b, h, softcap,
    query_start, key_start, slopes, relative, relative_width, relative_zero,
    bias0, b0_b, b0_h, b0_q, b0_k, bias1, b1_b, b1_h, b1_q, b1_k,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, RELATIVE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """What a cap and biases make of scaled scores; rows and cols as `visible` takes them."""
    if SOFTCAP:
        # tanh x = 1 − 2 / (e^2x + 1), off by float32's rounding at 1
        s = softcap * (1 - 2 / (tl.exp(2 * (s / softcap)) + 1))
    offset = (cols + key_start) - (rows + query_start)
    inside = row_in & col_in
    if ALIBI:
        s = s - tl.load(slopes + h) * tl.abs(offset).to(tl.float32)
    if RELATIVE:
        along = relative + h.to(tl.int64) * relative_width + offset + relative_zero
        s = s + tl.load(along, mask=inside, other=0)
    if DENSE > 0:
        s = s + _added(bias0, b0_b, b0_h, b0_q, b0_k, rows, cols, row_in, col_in, b, h)
    if DENSE > 1:
        s = s + _added(bias1, b1_b, b1_h, b1_q, b1_k, rows, cols, row_in, col_in, b, h)
    return s


@triton.jit
def scores(
    q, k, k_row, k_dim, dim, rows, cols, row_in, col_in, b, h, whole, scale, softcap,
    query_start, key_start, slopes, relative, relative_width, relative_zero,
    bias0, b0_b, b0_h, b0_q, b0_k, bias1, b1_b, b1_h, b1_q, b1_k,
    records, length, integers, octets, table, page_size, k_page,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, RELATIVE: tl.constexpr, DENSE: tl.constexpr,
    MASKED: tl.constexpr, KINDS: tl.constexpr, PAGED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """(scores, shown), each (M, N): float32, −inf where hidden; shown by the mask.

    q (M, D): the tile's queries. k: the first of its head's keys; of pages, of the head's part of
    the pool, and `table` is the item's. h: the head, or those of the rows, (M, 1). whole: the mask
    shows all of the tile.
    """
    s = dots(q, k, k_row, k_dim, dim, cols, col_in, table, page_size, k_page, PAGED, D) * scale
    rows = rows[:, None]
    cols = cols[None, :]
    row_in = row_in[:, None]
    col_in = col_in[None, :]
    s = changed(
        s, rows, cols, row_in, col_in, b, h, softcap, query_start, key_start, slopes, relative,
        relative_width, relative_zero, bias0, b0_b, b0_h, b0_q, b0_k, bias1, b1_b, b1_h, b1_q,
        b1_k, SOFTCAP, ALIBI, RELATIVE, DENSE,
    )  # fmt: skip
    shown = row_in & col_in
    if MASKED:
        if whole == 0:
            shown = shown & visible(
                records, length, integers, octets, rows, cols, row_in, col_in, b, h,
                query_start, key_start, KINDS, M, N,
            )  # fmt: skip
    return tl.where(shown, s, float("-inf")), shown
