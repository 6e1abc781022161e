"""How a call is cut for the kernels: its tiles, leaves of keys, cells of a map, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....call.checked import Call
from ....call.mask_program import Program
from ....call.observers import Map
from ....call.opcodes import Op
from .arguments import Shared, power
from .forms import by_form

MOST_LEAVES = 2048  # of a row: what the pass keeps of it for its list, see `listing`
LEAST_LEAF = 8  # keys
FAN = 16  # leaves
_MOST_INT = 2**31 - 1


@dataclass(frozen=True)
class Leaves:
    """The groups of keys that a TopK is found by: see `listing`."""

    width: int  # leaves of a row in one line
    tiles: int  # of a line
    lines: int
    fans: int  # a power of two that holds the fans of a row
    kept: int  # leaves a row chooses at most

    @classmethod
    def of(cls, listed: int, k_blocks: int, block_k: int, least: int = LEAST_LEAF) -> Leaves:
        """least: keys of a leaf, a power of two."""
        lane = block_k // 4  # keys of a row that a thread holds
        # as small as keeps a row's leaves within MOST_LEAVES: fewer keys to compute again
        size = max(power(-(-k_blocks * block_k // MOST_LEAVES)), least)
        width = max(block_k // size, 4)
        tiles = max(size // lane, 1)
        lines = -(-k_blocks // tiles)
        fans = power(max(-(-lines // FAN), 1) * width)
        return cls(width, tiles, lines, max(fans, width), listed + width - 1)

    def size(self, block_k: int) -> int:
        """Keys of a leaf."""
        return block_k // self.width * self.tiles


@dataclass(frozen=True)
class Grid:
    """The cells of a map in a tile: rows × cols of them, of `size` keys; `width` in all."""

    rows: int
    cols: int
    size: int
    first: int
    width: int

    @classmethod
    def of(cls, wanted: Map, call: Call, blocks: tuple[int, int]) -> Grid:
        rows, cols = wanted.cells(call.place)
        per_tile = max(blocks[1] // cols.size, 1)
        # The kernel numbers a tile's cells from that of its first key
        return cls(max(blocks[0] // rows.size, 1), per_tile, cols.size, cols.first, cols.count)

    def whole(self, cells: Tensor, wanted: Map, call: Call, block_q: int) -> Tensor:
        """The map, of cells (batch, heads, blocks · rows, cols) no higher than a block."""
        place = call.place
        rows, _ = wanted.cells(place)
        height = block_q // self.rows
        begin = (place.query_start - place.query_start % block_q) // height
        per = rows.size // height  # of them in a cell
        ahead = begin % per
        skip = rows.first - (begin - ahead) // per
        if per > 1:
            cells = torch.nn.functional.pad(cells, (0, 0, ahead, -(cells.shape[2] + ahead) % per))
            cells = cells.unflatten(2, (-1, per))
            cells = cells.amax(3) if wanted.reduce == "max" else cells.sum(3)
        return cells.narrow(2, skip, rows.count).contiguous()


def aligned(
    call: Call, blocks: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:  # fmt: skip
    """How far tiles begin before the call's queries and keys, and how many there are of each.

    They begin at multiples of their size in the sequence, so that cells of a map cut none, and
    dropout's groups of four keys neither.
    """
    place = call.place
    lead = (place.query_start % blocks[0], place.key_start % blocks[1])
    lengths = (place.q_len + lead[0], place.k_len + lead[1])
    return lead, (-(-lengths[0] // blocks[0]), -(-lengths[1] // blocks[1]))


Listed = tuple[Tensor, Tensor, int, int]


def listed_tiles(shared: Shared, blocks: tuple[int, int], lead: tuple[int, int]) -> Listed:
    """Each block's tiles that are not empty, ascending, and how many: (…, q blocks, k blocks).

    An entry is 2 · the tile's number, + 1 where the mask shows it whole. Then how many blocks of
    queries lie between two batch items and two heads (0 where all share theirs). Of a mask that is
    full there is no list.
    """
    if not shared.masked:
        return shared.none, shared.none, 0, 0
    program = shared.call.program
    if program.tensors:
        return _listed(program, blocks, lead)
    place = (program.q_len, program.k_len, program.query_start, program.key_start)
    return _listed_by_code(program.device, program.code, place, blocks, lead)


@by_form(16, lambda made: made[0].nbytes)
def _listed_by_code(
    device: torch.device, code: tuple[int, ...], place: tuple[int, int, int, int],
    blocks: tuple[int, int], lead: tuple[int, int],
) -> Listed:  # fmt: skip
    """Of a program that holds no tensor."""
    return _listed(Program(code, (), *place, device), blocks, lead)


def _listed(program: Program, blocks: tuple[int, int], lead: tuple[int, int]) -> Listed:
    table = program.tiles(*blocks, lead)
    number = torch.arange(table.some.shape[-1], dtype=torch.int32, device=table.some.device)
    entry = torch.where(table.some, 2 * number + table.every.to(torch.int32), _MOST_INT)
    batch, heads, q_blocks, _ = entry.shape
    by_head = q_blocks if heads > 1 else 0
    by_item = heads * q_blocks if batch > 1 else 0
    counts = table.some.sum(-1, dtype=torch.int32).contiguous()
    return entry.sort(-1).values.contiguous(), counts, by_item, by_head


FAR = 2**28  # positions of a band stay within it, so that int32 holds their sums


def band_of(shared: Shared) -> tuple[int, int] | None:
    """(behind, ahead) of a mask that shows the keys from query − behind to query + ahead only.

    Its tiles need no list, and who sees whom no program.
    """
    place = shared.call.place
    starts = (place.query_start, place.key_start)
    ends = (place.query_start + place.q_len, place.key_start + place.k_len)
    if not shared.masked or any(abs(n) > FAR for n in (*starts, *ends)):
        return None
    behind = ahead = 2 * FAR
    for op, args in shared.call.program.instructions():
        if op == Op.CAUSAL:
            ahead = min(ahead, 0)
        elif op == Op.WINDOW:
            behind, ahead = min(behind, args[0] - 1), min(ahead, args[1])
        elif op not in (Op.FULL, Op.AND):
            return None
    return behind, ahead


def counts_of(
    shared: Shared, span: tuple[int, int], band: tuple[int, int] | None
) -> Tensor | None:  # fmt: skip
    """How many queries of the span see each key, (1, 1, k_len) int32, where the mask is a band."""
    place = shared.call.place
    if shared.paged or (shared.masked and band is None):
        return None
    rows = (max(span[0], 0), min(span[1], place.q_len))
    start = place.key_start - place.query_start
    return _counts(place.device, place.k_len, start, rows, band or (2 * FAR, 2 * FAR))


@by_form(64, lambda made: made.nbytes)
def _counts(
    device: torch.device, k_len: int, start: int, rows: tuple[int, int], band: tuple[int, int]
) -> Tensor:  # fmt: skip
    """Not to be written to. start: of the keys, from the first query's position."""
    (first, last), (behind, ahead) = rows, band
    # of a key, the first query that sees it, and the last one
    keys = torch.arange(k_len, dtype=torch.int32, device=device)
    keys += start
    seen = (keys + (behind + 1)).clamp_(max=last) - (keys - ahead).clamp_(min=first)
    return seen.clamp_(min=0).view(1, 1, -1)
