"""Triton: which tiles of keys a block of queries walks, and what it sees there."""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import triton
import triton.language as tl

from ..second_pass.triton.scores_kernel import (
    band_entry,
    band_tiles,
    changed,
    dots,
    in_band,
    visible,
)
from .mix_kernel import not_finite


@triton.jit
def tiles_of(block, b, h, end, tiles, call, form, LISTED: tl.constexpr):
    """(the first, how many, the place of the list, the positions of the block's first and last).

    Without a list every tile is walked. end: how many keys the item has.
    """
    begin = 0
    low = 0
    high = 0
    count = (end + form.N - 1) // form.N
    line = b * tiles.by_item + h * tiles.by_head + block
    if form.BAND:
        # A band's tiles follow from the block's number: no list is made, and none is loaded
        begin, past, low, high = band_tiles(block, tiles, call, form)
        count = tl.maximum(tl.minimum(begin + past, count) - begin, 0)
    elif LISTED:
        count = tl.load(tiles.counts + line)
    return begin, count, line * tiles.k_blocks, low, high


@triton.jit
def entry_of(turn, begin, line, low, high, tiles, call, form, LISTED: tl.constexpr):
    """2 · a tile's number, + 1 where the mask shows all of it for certain."""
    if form.BAND:
        return band_entry(begin + turn, low, high, tiles, call, form)
    elif LISTED:
        return tl.load(tiles.entries + line + turn)
    else:
        return (begin + turn) * 2 + (0 if form.MASKED else 1)


@triton.jit
def seen_scores(
    query, k, table, call, mask, biases, tiles, rows, cols, row_in, col_in, b, h, whole, form
):
    """(scores, seen), each (M, N): −inf where the mask or a bias hides. Arguments as `scores`'."""
    s = dots(query, k, table, call, cols, col_in, form) * call.scale
    rows = rows[:, None]
    cols = cols[None, :]
    row_in = row_in[:, None]
    col_in = col_in[None, :]
    s = changed(s, call, biases, rows, cols, row_in, col_in, b, h, form)
    shown = row_in & col_in
    if form.BAND:
        shown = shown & in_band(rows, cols, tiles, call)
    elif form.MASKED:
        if whole == 0:
            shown = shown & visible(
                mask, call, rows, cols, row_in, col_in, b, h, form.KINDS, form.M, form.N
            )
    # Biases hide by −inf, too: who is seen is asked of the score, not of the mask alone
    s = tl.where(shown, s, float("-inf"))
    return s, s != float("-inf")


@triton.jit
def spoiled(at, inside):
    """1 if a number there is not finite, else 0."""
    held = tl.load(at, mask=inside, other=0)
    return tl.max(tl.max(not_finite(held).to(tl.int32), 1), 0)


@triton.jit
def lines_at(base, item, head, token, dim, b, h, tokens, dims):
    """Pointers (tokens, dims) of a tensor with these strides."""
    own = base + b * item + h * head
    return own + tokens[:, None].to(tl.int64) * token + dims[None, :] * dim
