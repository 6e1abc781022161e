"""Masks plainly, pair by pair, and the check of their tiles against that."""

import itertools

import torch

from regard import (
    Causal,
    Dense,
    Documents,
    Edges,
    First,
    Full,
    Heads,
    Mask,
    Padding,
    Predicate,
    Window,
)
from regard.call.geometry import Place, Span
from regard.call.masks import And, Not, Or
from regard.sparse import BlockSparse, Chunks, Dilated, Fixed, Longformer, Strided

CPU = torch.device("cpu")


def place(batch=2, heads=2, q_len=66, k_len=133, query_start=None, key_start=0) -> Place:
    start = key_start + k_len - q_len if query_start is None else query_start
    return Place(batch, heads, heads, q_len, k_len, start, key_start, CPU)


# A new mask: one of it here, and its definition in `naive`; of these tiles are classed exactly
LEAVES = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(20),
    "window of 1": Window(1),
    "window ahead": Window(3, ahead=40),
    "first": First(40),
    "first 0": First(0),
    "heads": Heads([1]),
}


def naive(mask: Mask, at: Place):
    """(b, h, i, j) → bool: what the docstrings say, on plain integers."""
    match mask:
        case And():
            left, right = naive(mask.left, at), naive(mask.right, at)
            return lambda *x: left(*x) and right(*x)
        case Or():
            left, right = naive(mask.left, at), naive(mask.right, at)
            return lambda *x: left(*x) or right(*x)
        case Not():
            inner = naive(mask.mask, at)
            return lambda *x: not inner(*x)
        case Full():
            return lambda b, h, i, j: True
        case Causal():
            return lambda b, h, i, j: j + at.key_start <= i + at.query_start
        case Window():
            shift = at.query_start - at.key_start
            return lambda b, h, i, j: i + shift - mask.n < j <= i + shift + mask.ahead
        case First():
            return lambda b, h, i, j: j + at.key_start < mask.n
        case Heads():
            return lambda b, h, i, j: h in mask.heads
        case Documents():
            mine, theirs = (rows(t, at.batch) for t in (mask.query_ids, mask.key_ids))
            return lambda b, h, i, j: mine[b][i] == theirs[b][j] >= 0
        case Padding():
            keep = rows(mask.keep, at.batch)
            return lambda b, h, i, j: keep[b][j]
        case Edges():
            pairs = {tuple(map(int, pair)) for pair in mask.pairs}
            return lambda b, h, i, j: (i + at.query_start, j + at.key_start) in pairs
        case Dense():
            shape = (at.batch, at.heads, at.q_len, at.k_len)
            shown = mask.visible.expand(shape).tolist()
            return lambda b, h, i, j: shown[b][h][i][j]
        case Predicate():
            return lambda b, h, i, j: bool(mask.fn(b, h, i + at.query_start, j + at.key_start))
        case BlockSparse():
            return blocks(mask, at)
    pattern = positional(mask)
    return lambda b, h, i, j: pattern(i + at.query_start, j + at.key_start)


def positional(mask: Mask):
    """(query, key) → bool, both positions in the sequence."""
    match mask:
        case Dilated():
            return lambda q, k: q - k in range(0, mask.n * mask.step, mask.step)
        case Strided():
            return lambda q, k: abs(q - k) < mask.n or (q - k) % mask.n == 0
        case Fixed():
            return lambda q, k: (
                q // mask.n == k // mask.n or k % mask.n in range(mask.n - mask.summary, mask.n)
            )
        case Longformer():
            side = mask.window // 2
            everywhere = {p for start, stop in mask.ranges for p in range(start, stop)}
            return lambda q, k: abs(q - k) <= side or q in everywhere or k in everywhere
        case Chunks():
            starts = range(0, 1000, mask.size - mask.overlap)
            return lambda q, k: any(s <= min(q, k) and max(q, k) < s + mask.size for s in starts)
    raise AssertionError(f"no naive twin of {mask}")


def blocks(mask: BlockSparse, at: Place):
    """Block rows and cols counted from the call's first, or from `first`."""
    row, col = mask.first or (at.query_start // mask.block, at.key_start // mask.block)
    sizes = mask.layout[(None,) * (4 - mask.layout.dim())].shape
    layout = mask.layout.reshape(sizes).tolist()

    def seen(b: int, h: int, i: int, j: int) -> bool:
        cell = (
            b,
            h,
            (i + at.query_start) // mask.block - row,
            (j + at.key_start) // mask.block - col,
        )
        b, h, r, c = (0 if n == 1 else x for x, n in zip(cell, sizes, strict=True))
        return layout[b][h][r][c]

    return seen


def rows(tensor: torch.Tensor, batch: int) -> list:
    return tensor.expand(batch, -1).tolist()


def naively(mask: Mask, at: Place) -> torch.Tensor:
    answer = naive(mask, at)
    everyone = itertools.product(*map(range, (at.batch, at.heads, at.q_len, at.k_len)))
    flat = torch.tensor([answer(*x) for x in everyone], dtype=torch.bool)
    return flat.view(at.batch, at.heads, at.q_len, at.k_len)


def check(mask: Mask, at: Place, blocks, exact: bool = False) -> None:
    """Elements, one item's program, and the classes of tiles, all against the naive answer."""
    program, wanted = mask.lower(at), naively(mask, at)
    whole = Span(0, at.q_len, 0, at.k_len)
    assert torch.equal(program.visible(whole).expand_as(wanted), wanted)
    q0, q1, k0, k1 = at.q_len // 3, at.q_len - at.q_len // 4, at.k_len // 4, at.k_len
    inner = Span(q0, q1, k0, k1, slice(at.batch - 1, at.batch), slice(0, 1))
    part = wanted[at.batch - 1 :, :1, q0:q1, k0:k1]
    assert torch.equal(program.visible(inner).expand_as(part), part)
    for b in range(at.batch):
        item = program.item(b)
        assert not item.by_batch
        assert torch.equal(
            item.visible(whole).expand(1, -1, -1, -1).expand_as(wanted[:1]), wanted[b : b + 1]
        )
    batch, heads = program.spread()
    assert torch.equal(wanted, wanted[:batch].expand_as(wanted))
    assert torch.equal(wanted, wanted[:, :heads].expand_as(wanted))
    for block_q, block_k in blocks:
        some, every = program.classes(block_q, block_k)
        shown, whole_tile = tiles(wanted, block_q, block_k)
        some, every = some.expand_as(shown), every.expand_as(shown)
        assert (some >= shown).all(), f"{mask}: a tile of {block_q} × {block_k} is not empty"
        assert (every <= whole_tile).all(), f"{mask}: a tile of {block_q} × {block_k} is not full"
        if exact:
            assert torch.equal(some, shown)
            assert torch.equal(every, whole_tile)


def tiles(shown: torch.Tensor, block_q: int, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether any and whether all of a tile is visible: (batch, heads, q tiles, k tiles)."""
    tail = (0, -shown.shape[3] % block_k, 0, -shown.shape[2] % block_q)
    answers = []
    for fill in (False, True):
        padded = torch.nn.functional.pad(shown, tail, value=fill)
        padded = padded.unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q)).transpose(3, 4)
        answers.append(padded.flatten(4).all(-1) if fill else padded.flatten(4).any(-1))
    return answers[0], answers[1]


PLACES = {
    "at the end": {},
    "from 0": {"query_start": 0},
    "in the middle": {"query_start": 71, "key_start": 33},
    "before its keys": {"query_start": 5, "key_start": 60},
    "after its keys": {"query_start": 300, "key_start": 1},
}


def grid(at: Place, block: int) -> tuple[int, int]:
    """How many blocks the call's queries, and its keys, stand in."""
    sides = ((at.query_start, at.q_len), (at.key_start, at.k_len))
    return tuple(len({p // block for p in range(start, start + n)}) for start, n in sides)
