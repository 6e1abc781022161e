"""The instructions of a lowered mask, and what their operands are: one table for every reader."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Op(IntEnum):
    """Instructions. Operands are integers: `t` is an index into the program's tensors.

    query and key are positions in the sequence; // and % round down, also below 0.
    """

    FULL = 0
    CAUSAL = 1
    WINDOW = 2  # n, ahead
    FIRST = 3  # n
    DOCUMENTS = 4  # t: query ids (batch, q_len), t: key ids (batch, k_len)
    PADDING = 5  # t: keep (batch, k_len)
    EDGES = 6  # t: (n, 2) positions of query and key
    DENSE = 7  # t: bool, broadcastable to (batch, heads, q_len, k_len)
    TILES = 8  # t: cells (batch, heads, rows, cols) int32, t: bits (mixed cells, side, side / 8)
    HEADS = 9  # t: bool (heads,)
    STEP = 10  # n: (query − key) % n == 0
    CHUNK = 11  # n: query // n == key // n
    PHASE = 12  # n, lo, hi: lo ≤ key % n < hi
    # t: bool (batch, heads, rows, cols), block, first row, first col:
    # layout[query // block − first row, key // block − first col]
    BLOCKS = 13
    QUERIES = 14  # lo, hi: lo ≤ query < hi
    AND = 16
    OR = 17
    NOT = 18

    @property
    def form(self) -> Form:
        """What its operands are."""
        return FORMS.get(self, _NONE)


@dataclass(frozen=True)
class Form:
    """An instruction's operands: first the tensors, then the numbers.

    tensors: for each, what its leading dimensions count: "b" batch items (or 1 for all of them),
    "h" heads (likewise).
    """

    tensors: tuple[str, ...] = ()
    numbers: int = 0

    @property
    def operands(self) -> int:
        """How many integers follow the op in a program."""
        return len(self.tensors) + self.numbers


_NONE = Form()
FORMS = {
    Op.WINDOW: Form(numbers=2),
    Op.FIRST: Form(numbers=1),
    Op.DOCUMENTS: Form(("b", "b")),
    Op.PADDING: Form(("b",)),
    Op.EDGES: Form(("",)),
    Op.DENSE: Form(("bh",)),
    Op.TILES: Form(("bh", "")),
    Op.HEADS: Form(("h",)),
    Op.STEP: Form(numbers=1),
    Op.CHUNK: Form(numbers=1),
    Op.PHASE: Form(numbers=3),
    Op.BLOCKS: Form(("bh",), numbers=3),
    Op.QUERIES: Form(numbers=2),
}
TILE_SIDE = 64  # of the cells into which a predicate is evaluated
EMPTY_CELL, FULL_CELL = -2, -1  # a cell's value is one of these, or its row in `bits`
