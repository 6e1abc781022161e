"""Sparse patterns: each against its definition, what engines skip for them, and TopBlocks."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import regard.engines.second_pass.strips
from naive_masks import PLACES, check, grid, naively, place, tiles
from regard import Causal, First, Mask, Padding, Received, RegardError, TopK, attention
from regard.call.checked import Call
from regard.call.geometry import Span
from regard.call.masks import Lowering
from regard.call.opcodes import Op
from regard.engines.second_pass.strips import Strips
from regard.sparse import (
    BigBird,
    BlockSparse,
    Chunks,
    Dilated,
    Fixed,
    Longformer,
    Strided,
    TopBlocks,
)
from test_top_blocks import drawn

rng = torch.Generator().manual_seed(4)
TILES = [(1, 1), (3, 5), (16, 16), (64, 128), (50, 7)]


def flags(*shape: int, share: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=rng) < share


@dataclass(frozen=True)
class Raw(Mask):
    """One instruction alone."""

    op: Op
    numbers: tuple[int, ...]

    def _write(self, to: Lowering) -> None:
        to.write(self.op, *self.numbers)


OPS = {
    "step": (Raw(Op.STEP, (7,)), lambda q, k: (q - k) % 7 == 0),
    "step of 1": (Raw(Op.STEP, (1,)), lambda q, k: True),
    "step of 90": (Raw(Op.STEP, (90,)), lambda q, k: (q - k) % 90 == 0),
    "chunk": (Raw(Op.CHUNK, (20,)), lambda q, k: q // 20 == k // 20),
    "chunk of 1": (Raw(Op.CHUNK, (1,)), lambda q, k: q == k),
    "phase": (Raw(Op.PHASE, (9, 2, 5)), lambda q, k: k % 9 in (2, 3, 4)),
    "no phase": (Raw(Op.PHASE, (9, 4, 4)), lambda q, k: False),
    "every phase": (Raw(Op.PHASE, (64, 0, 64)), lambda q, k: True),
    "queries": (Raw(Op.QUERIES, (80, 101)), lambda q, k: 80 <= q < 101),
    "no queries": (Raw(Op.QUERIES, (9, 9)), lambda q, k: False),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", OPS)
def test_instructions_are_their_definition_to_the_tile(name, where):
    """Elements, and classes that are exact: also at positions below 0."""
    mask, seen = OPS[name]
    for here in (place(1, 2, 66, 133, **where), place(1, 1, 40, 21, query_start=-19)):
        program = mask.lower(here)
        query = range(here.query_start, here.query_start + here.q_len)
        key = range(here.key_start, here.key_start + here.k_len)
        wanted = torch.tensor([[seen(q, k) for k in key] for q in query])[None, None]
        assert torch.equal(program.visible(Span(0, here.q_len, 0, here.k_len)), wanted)
        assert torch.equal(program.visible(Span(5, 30, 7, 21)), wanted[:, :, 5:30, 7:21])
        for block_q, block_k in TILES:
            shown = tiles(wanted, block_q, block_k)
            assert all(map(torch.equal, program.classes(block_q, block_k), shown))


PATTERNS = {
    "dilated": Dilated(4, 7),
    "dilated by 1": Dilated(5, 1),
    "dilated and causal": Causal() & ~Dilated(3, 40),
    "strided": Strided(6),
    "strided by 1": Strided(1),
    "fixed": Fixed(8, 3),
    "fixed whole": Fixed(40, 40),
    "fixed without summary": Fixed(9, 0),
    "longformer": Longformer(10, 3),
    "longformer of a question": Longformer(1, [72, 70, 71, 90]),
    "longformer without a window": Longformer(0, 0),
    "chunks": Chunks(20),
    "chunks that overlap": Chunks(20, 5),
    "chunks that mostly overlap": Chunks(30, 25),
    "chunks as documents": Chunks(30, 1) & Causal(),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("mask", PATTERNS.values(), ids=PATTERNS)
def test_every_pattern_is_its_definition(mask, where):
    check(mask, place(1, 1, 66, 133, **where), TILES)


@pytest.mark.sample(1)
@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("block, items, heads", [(1, 2, 1), (7, 1, 2), (16, 2, 2), (200, 1, 1)])
def test_block_sparse_is_its_layout(block, items, heads, where):
    """Blocks are those of the sequence; tiles that lie inside blocks are told exactly."""
    here = place(2, 2, 66, 133, **where)
    rows, cols = grid(here, block)
    check(BlockSparse(flags(items, heads, rows, cols), block), here, TILES, exact=True)
    check(~BlockSparse(flags(rows, 1), block) & Causal(), here, TILES)
    check(BlockSparse(flags(heads, 1, cols), block), here, TILES, exact=True)


def test_one_layout_serves_every_chunk():
    """first=(0, 0): the layout of the sequence, whatever part of it a call computes."""
    whole, here = flags(1, 1, 11, 11), place(1, 1, 100, 105, query_start=5)
    seen = naively(BlockSparse(whole, 10, first=(0, 0)), here)
    for q0, q1, k0, k1 in ((0, 100, 0, 105), (30, 41, 17, 92), (99, 100, 0, 1)):
        part = place(1, 1, q1 - q0, k1 - k0, query_start=5 + q0, key_start=k0)
        shown = BlockSparse(whole, 10, first=(0, 0)).lower(part)
        span = Span(0, q1 - q0, 0, k1 - k0)
        assert torch.equal(shown.visible(span), seen[:, :, q0:q1, k0:k1])


@pytest.mark.sample(1)
@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("numbers", [(10, 3, 2, 3), (16, 1, 0, 1), (7, 4, 1, 0), (20, 0, 0, 99)])
def test_big_bird(numbers, where):
    """Window and global blocks are where they should be; each other row draws so many more."""
    block, window, whole, drawn = numbers
    here = place(1, 1, 66, 133, **where)
    mask = BigBird(*numbers, seed=5)
    rows, cols = grid(here, block)
    first = (here.query_start // block, here.key_start // block)
    layout = torch.zeros(rows, cols, dtype=torch.bool)
    for r, c in itertools.product(range(rows), range(cols)):
        row, col = r + first[0], c + first[1]
        layout[r, c] = abs(row - col) <= window // 2 or col < whole or 0 <= row < whole
    seen = naively_in_blocks(mask, here, block)
    more = (seen & ~layout).sum(-1)
    assert (seen >= layout).all()
    assert torch.equal(more, (~layout).sum(-1).clamp(max=drawn))
    program, wanted = mask.lower(here), naively(BlockSparse(seen, block), here)
    assert torch.equal(program.visible(Span(0, here.q_len, 0, here.k_len)), wanted)
    for block_q, block_k in TILES:
        shown = tiles(wanted, block_q, block_k)
        assert all(map(torch.equal, program.classes(block_q, block_k), shown))


def naively_in_blocks(mask: Mask, here, block: int) -> Tensor:
    """Which blocks hold a visible pair, from the elements."""
    shown = mask.lower(here).visible(Span(0, here.q_len, 0, here.k_len))[0, 0]
    query = torch.arange(here.q_len) + here.query_start
    key = torch.arange(here.k_len) + here.key_start
    rows, cols = grid(here, block)
    out = torch.zeros(rows, cols, dtype=torch.bool)
    for q, k in shown.nonzero().tolist():
        out[query[q] // block - query[0] // block, key[k] // block - key[0] // block] = True
    return out


def test_big_bird_draws_by_seed_and_position():
    """The same over calls on the same keys, other for another seed, and even over the columns."""
    mask = BigBird(4, 0, 0, 5, seed=1)
    whole = mask.layout(range(1200), range(120))
    assert torch.equal(mask.layout(range(40, 50), range(120)), whole[40:50])
    assert torch.equal(BigBird(4, 0, 0, 5, seed=1).layout(range(1200), range(120)), whole)
    assert not torch.equal(BigBird(4, 0, 0, 5, seed=2).layout(range(1200), range(120)), whole)
    drawn = whole[120:].sum(0)  # rows with no block of their own
    assert drawn.sum() == 1080 * 5
    assert drawn.min() > 15  # mean 45, deviation 6.6
    assert drawn.max() < 75
    alike = (whole[120:, ::4] & whole[120:, 1::4]).sum(-1).double().mean()
    assert alike < 0.2  # the words of one Philox block do not repeat


EMPTY = {"no query": (0, 7), "no key": (5, 0), "neither": (0, 0)}


@pytest.mark.parametrize("q_len, k_len", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("engine", ["reference", "tiled"])
def test_empty_calls(engine, batch, q_len, k_len):
    mask = Causal() & (TopBlocks(2, 3) | BigBird(4) | Strided(3)) & Longformer(3, 1) | Chunks(4, 1)
    tensors = drawn(q_len=q_len, k_len=k_len, batch=batch)
    out, lse, (top, received) = attention(
        *tensors, mask=mask, engine=engine, return_lse=True, observe=[TopK(2), Received()]
    )
    assert out.shape == (batch, 4, q_len, 16)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert received.sum.shape == (batch, 4, k_len)
    assert not top.weights.any()


def test_no_batch():
    mask = Causal() & TopBlocks(2, 3) & Padding(torch.ones(0, 9).bool())
    assert attention(*drawn(q_len=9, batch=0), mask=mask).shape == (0, 4, 9, 16)


COMPILED = {
    "block sparse": lambda: (
        Causal() & BlockSparse(torch.eye(6, 8).bool() | (torch.arange(8) > 5), 8)
    ),
    "fixed": lambda: Causal() & (Fixed(9, 2) | Strided(7) & ~Dilated(3, 5)),
    "longformer": lambda: Longformer(8, [0, 30]),
    "big bird": lambda: BigBird(8, seed=3),
    "chunks": lambda: Chunks(20, 5) & Causal(),
    "top blocks": lambda: Causal() & (TopBlocks(2, 8) | First(2)),
}


@pytest.mark.sample(0)
@pytest.mark.parametrize("engine", ["auto", "tiled"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name, engine):
    """One graph, forward and backward, observers too; also where tensors are looked at."""
    mask = COMPILED[name]()

    def loss(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        out, (top, received) = attention(
            query * 2, key, value, mask=mask, engine=engine, observe=[TopK(3), Received()]
        )
        return (out * out).sum(), top.weights, received.mean

    tensors = [t.float() for t in drawn(q_len=40, k_len=60)]
    torch._dynamo.reset()
    answers = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        value, *seen = function(*leaves)
        value.backward()
        answers.append([value, *seen, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(answers[1], answers[0])


# Of 4,096 causal tokens: the pattern, and how many times what it shows may be computed
WORK = {
    "dilated": (Causal() & Dilated(8, 16), 33),  # a tile computes the gaps of 16 too
    "chunks": (Causal() & Chunks(256), 1.6),
    "chunks that overlap": (Causal() & Chunks(512, 128), 1.3),
    "longformer": (Longformer(256, 32), 2),
    "longformer, causal": (Causal() & Longformer(256, 1), 3),
    "big bird": (BigBird(128), 1),
    "block sparse": (BlockSparse(flags(32, 32, share=0.1), 128), 1),
    "block sparse, causal": (
        Causal() & BlockSparse(flags(32, 32, share=0.1) | torch.eye(32).bool(), 128),
        1.3,
    ),
}


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", WORK)
def test_work_is_what_is_shown(name, monkeypatch):
    """Scores computed, counted: those of the tiles that hold a visible pair, and no others."""
    monkeypatch.setattr(regard.engines.second_pass.strips, "MOST_ROWS", 128)  # square tiles
    mask, most = WORK[name]
    query = torch.zeros(1, 1, 4096, 1)
    call = Call.checked(query, query, None, mask=mask)
    strips = Strips(call)
    computed = torch.zeros(4096, 4096, dtype=torch.bool)
    for strip in strips:
        for _, span in strip.spans():
            computed[span.q0 : span.q1, span.k0 : span.k1] = True
    shown = call.program.visible(Span(0, 4096, 0, 4096))[0, 0]
    some, _ = tiles(shown[None, None], strips.rows, regard.engines.second_pass.strips.TILE_KEYS)
    held = (
        some[0, 0]
        .repeat_interleave(strips.rows, 0)
        .repeat_interleave(regard.engines.second_pass.strips.TILE_KEYS, 1)
    )
    assert torch.equal(computed, held)
    assert computed.sum() <= most * shown.sum()
    assert computed.sum() < 0.5 * 4096**2


def true(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


NEEDS = (
    "this call has queries at 67 … 132 in blocks 1 … 2, keys at 0 … 132 in blocks 0 … 2: "
    "it needs what broadcasts to (2, 2, 2, 3)"
)
MISFITS = {
    "rows": BlockSparse(true(3, 3), 64),
    "cols": BlockSparse(true(2, 2), 64),
    "heads": BlockSparse(true(3, 1, 1), 64),
    "items": BlockSparse(true(3, 1, 1, 1), 64),
    "begins too late": BlockSparse(true(9, 9), 64, first=(2, 0)),
    "ends too early": BlockSparse(true(2, 3), 64, first=(0, 0)),
}


@pytest.mark.parametrize("mask", MISFITS.values(), ids=MISFITS)
def test_layouts_that_do_not_fit(mask):
    with pytest.raises(RegardError) as error:
        (Causal() & ~mask).lower(place())
    assert str(error.value).startswith(str(mask))
    assert NEEDS in str(error.value)
    assert ("begins at block" in str(error.value)) == (mask.first is not None)


WRONG = {
    "a layout of floats": (lambda: BlockSparse(torch.ones(2, 2), 8), "(2, 2), block 8): it is"),
    "a layout of 5 dims": (lambda: BlockSparse(true(1, 1, 1, 1, 1), 8), "(batch, heads, rows, col"),
    "no block": (lambda: BlockSparse(true(1, 1), 0), "give block ≥ 1"),
    "dilated": (lambda: Dilated(0, 2), "Dilated(0, 2): give n ≥ 1 and step ≥ 1"),
    "dilated by 0": (lambda: Dilated(2, 0), "Dilated(2, 0): give n ≥ 1 and step ≥ 1"),
    "strided": (lambda: Strided(0), "Strided(0): give n ≥ 1"),
    "fixed": (lambda: Fixed(3, 4), "Fixed(3, 4): give n ≥ 1 and 0 ≤ summary ≤ n"),
    "longformer": (lambda: Longformer(-1, 0), "Longformer(-1, 0): give numbers ≥ 0"),
    "fewer than no keys": (lambda: Longformer(4, -2), "Longformer(4, -2): give numbers ≥ 0"),
    "a place before 0": (lambda: Longformer(4, [-3, 1]), "positions count from 0"),
    "big bird": (lambda: BigBird(0), "give block ≥ 1 and numbers of blocks ≥ 0"),
    "fewer than none": (lambda: BigBird(8, 3, -1), "BigBird(8, 3, -1, 3, seed=0): give block"),
    "chunks": (lambda: Chunks(4, 4), "Chunks(4, overlap=4): give size ≥ 1 and 0 ≤ overlap < size"),
    "top blocks": (lambda: TopBlocks(0, 8), "TopBlocks(0, 8): give k ≥ 1 and block ≥ 1"),
}


@pytest.mark.parametrize("make, said", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_said(make, said):
    with pytest.raises(RegardError) as error:
        make()
    assert said in str(error.value)


def test_patterns_are_values_that_say_what_they_are():
    said = {
        "(Causal() & (Dilated(4, 7) | Strided(6)))": Causal() & (Dilated(4, 7) | Strided(6)),
        "Fixed(8, 3)": Fixed(8, 3),
        "Longformer(10, [0 … 2])": Longformer(10, 3),
        "Longformer(10, [5, 7 … 8])": Longformer(10, [8, 5, 7, 5]),
        "BigBird(64, 3, 2, 3, seed=0)": BigBird(64),
        "~Chunks(20)": ~Chunks(20),
        "Chunks(20, overlap=5)": Chunks(20, 5),
        "TopBlocks(2, 64)": TopBlocks(2, 64),
        "BlockSparse(layout (4, 1, 3), block 16)": BlockSparse(true(4, 1, 3), 16),
    }
    assert {str(mask): mask for mask in said.values()} == said
    assert Longformer(10, 3) == Longformer(10, [2, 1, 0])
    assert len({hash(m) for m in (BigBird(8), BigBird(8, seed=0), BigBird(8, 3, 2, 3))}) == 1


def test_chunks_cover_a_document():
    """The spans are the chunks of the mask: two positions share a span where it shows the pair."""
    for size, overlap, length in ((20, 5, 133), (20, 0, 133), (7, 6, 30), (50, 3, 20), (4, 2, 10)):
        spans = Chunks(size, overlap).spans(length)
        shared = torch.zeros(length, length, dtype=torch.bool)
        for start, stop in spans:
            shared[start:stop, start:stop] = True
        here = place(1, 1, length, length)
        program = Chunks(size, overlap).lower(here)
        assert torch.equal(program.visible(Span(0, length, 0, length))[0, 0], shared)
        assert spans[-1][1] == length
        assert all(stop < length for _, stop in spans[:-1])  # no chunk is all overlap
    assert Chunks(4).spans(0) == []
    assert Chunks(4, 3).spans(2) == [(0, 2)]
