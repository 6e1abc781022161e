"""What the kernels take: named tuples of tensors and numbers, which Triton hands on as they are.

A kernel hands `call`, `mask`, `biases` and `form` on to its functions, so an argument more is a
field here and a line where it is read. Each is flat: Triton 3.6 loses what stands behind a tuple
within a tuple. Numbers are specialised as a kernel's own arguments are: 1 is compiled in, and
whether 16 divides them is known.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Flags = TypeVar("Flags", bound=tuple)


@lru_cache(4096, typed=True)
def fixed(flags: Flags) -> Flags:
    """The flags as constants that a kernel is compiled for; the same object for the same flags.

    Constants are compared one by one, at every launch, unless they are the same object.
    """
    from triton.language import constexpr

    made: Any = type(flags)
    return made(*map(constexpr, flags))


def strides(tensor: Tensor) -> tuple[int, int, int, int]:
    """Of a batch item, a head, a token and a dim."""
    item, head, token, dim = tensor.stride()
    return item, head, token, dim


class CallArgs(NamedTuple):
    """Queries and keys. Strides: q_b of a batch item, _h of a head, _n of a token, _d of a dim."""

    query: Tensor
    key: Tensor  # of pages, the pool
    lse: Tensor  # (batch, heads, q_len)
    sinks: Tensor
    q_b: int
    q_h: int
    q_n: int
    q_d: int
    k_b: int  # of pages, from one to the next
    k_h: int
    k_n: int
    k_d: int
    dim: int
    heads: int
    group: int  # heads that share their keys
    q_len: int
    k_len: int
    scale: float
    softcap: float
    query_start: int
    key_start: int
    table: Tensor  # (batch, pages of an item)
    table_b: int
    page_size: int
    lengths: Tensor  # keys of each item


class BiasArgs(NamedTuple):
    """ALiBi's slopes, what stands along the offsets, and dense biases with a stride a dimension."""

    slopes: Tensor
    relative: Tensor  # (heads, relative_width)
    relative_width: int
    relative_zero: int  # where offset 0 stands
    first: Tensor
    first_b: int
    first_h: int
    first_q: int
    first_k: int
    second: Tensor
    second_b: int
    second_h: int
    second_q: int
    second_k: int


class MaskArgs(NamedTuple):
    """The mask's program: see `mask_records`."""

    records: Tensor
    length: int
    integers: Tensor
    octets: Tensor


class TileArgs(NamedTuple):
    """Which tiles of keys a block of queries walks: see `tile_grid.listed_tiles` and `band_of`."""

    entries: Tensor
    counts: Tensor
    by_item: int
    by_head: int
    behind: int
    ahead: int
    q_lead: int
    k_lead: int
    q_blocks: int
    k_blocks: int


class Form(NamedTuple):
    """What every kernel is compiled for."""

    SOFTCAP: bool
    ALIBI: bool
    RELATIVE: bool
    DENSE: int  # how many biases are tensors
    MASKED: bool  # the mask is not full
    KINDS: int  # the ops of its program, as bits
    BAND: bool  # it is a band, and has no program
    PAGED: bool
    SINKS: bool
    M: int  # queries of a tile
    N: int  # keys of a tile
    D: int  # a power of two that holds the dims


class ListArgs(NamedTuple):
    """What a program keeps of its rows for a TopK: see `top_k_kernel`."""

    leaves: Tensor
    fans: Tensor
    chosen: Tensor
    totals: Tensor
    listed: int
    kept: int


class ColumnArgs(NamedTuple):
    """What keys are given by the rows from first_row to last_row, and how many rows see them."""

    sums: Tensor
    counts: Tensor
    counts_b: int  # batch items and heads that have counts of their own
    counts_h: int
    first_row: int
    last_row: int


class CellArgs(NamedTuple):
    """The cells of a map, of `size` keys; the first one's number, and how many there are."""

    out: Tensor
    size: int
    first: int
    cols: int


class BinArgs(NamedTuple):
    """What falls into bins of distances, whose edges are given."""

    past: Tensor
    future: Tensor
    edges: Tensor
    number: int


class Gathered(NamedTuple):
    """What `weigh` is compiled to gather; a flag of 0 leaves an observer out."""

    SHARD: bool
    ENTROPY: bool
    SCORE: bool
    TOP: int  # a power of two that holds the leaves kept of a row
    WIDTH: int
    TILES: int
    FAN: int
    FANS: int
    TURN_ROWS: int
    RECEIVED: bool
    COUNTED: bool  # how many queries see a key is to be counted, too
    ALL_ROWS: bool  # columns add up every row
    EVEN: bool  # all tiles end where the keys do, or before
    MAP: bool
    MAX: bool
    NR: int  # NR × NC cells of the map in a tile; a wider cell is gathered over its tiles
    NC: int
    BINS: int  # a power of two that holds the bins
