"""Sparse patterns: each against its definition, what engines skip for them, and TopBlocks."""

import itertools
from dataclasses import dataclass
from functools import reduce

import pytest
import torch
from torch import Tensor

import regard.engines.second_pass.strips
import zoo
from cases import Case, at
from regard import (
    Causal,
    Cut,
    Dense,
    Documents,
    First,
    Full,
    Heads,
    Mask,
    Padding,
    Received,
    RegardError,
    TopK,
    Window,
    attention,
    piecewise,
)
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
from test_masks import PLACES, check, grid, naively, place, tiles

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


@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("mask", PATTERNS.values(), ids=PATTERNS)
def test_every_pattern_is_its_definition(mask, where):
    check(mask, place(1, 1, 66, 133, **where), TILES)


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


JOINED = {
    "alone": lambda t, here: t,
    "causal": lambda t, here: Causal() & t,
    "or a window": lambda t, here: Causal() & (t | Window(9) | First(3)),
    "all but": lambda t, here: Causal() & ~t,
    "by de Morgan": lambda t, here: ~(~Causal() | ~t),
    "or a prefix": lambda t, here: Causal() & t | First(30),
    "padded": lambda t, here: Padding(torch.arange(here.k_len) >= torch.tensor([[0], [17]])) & t,
    "documents": lambda t, here: Causal() & t & Documents(*shared_ids(here)),
    "by head": lambda t, here: Heads([1]) & Causal() & t | Heads([0, 2, 3]) & Window(20) & t,
    "dense": lambda t, here: t & Dense(sparse_flags(here)),
    "own block hidden": lambda t, here: t & ~Window(15, ahead=15),
    "where nothing is": lambda t, here: t & ~Full(),
}


def shared_ids(here) -> list[Tensor]:
    starts = ((here.query_start, here.q_len), (here.key_start, here.k_len))
    return [(torch.arange(n) + start) // 25 for start, n in starts]


def sparse_flags(here) -> Tensor:
    drawn = torch.Generator().manual_seed(7)
    return torch.rand(2, 1, here.q_len, here.k_len, generator=drawn) < 0.03


def choice(matters: Tensor, query: Tensor, key: Tensor, k: int, block: int, here) -> Tensor:
    """The layout that the docstring of TopBlocks describes, block by block, from dense pairs."""
    batch, heads = query.shape[:2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    sides = ((here.query_start, here.q_len), (here.key_start, here.k_len))
    q_blocks, k_blocks = ((torch.arange(n) + start) // block for start, n in sides)
    rows, cols = grid(here, block)
    layout = torch.zeros(batch, heads, rows, cols, dtype=torch.bool)
    for b, h, r in itertools.product(range(batch), range(heads), range(rows)):
        mine = q_blocks == q_blocks[0] + r
        asking = mine & matters[b, h].any(1)
        ranked = []
        for c in range(cols):
            theirs = k_blocks == k_blocks[0] + c
            if matters[b, h][mine][:, theirs].any():
                asked = theirs & matters[b, h].any(0)
                score = query[b, h][asking].mean(0) @ key[b, h][asked].mean(0)
                own = q_blocks[0] + r == k_blocks[0] + c
                ranked.append((not own, -float(score), c))
        for *_, c in sorted(ranked)[:k]:
            layout[b, h, r, c] = True
    return layout


@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("joined", JOINED.values(), ids=JOINED)
@pytest.mark.parametrize("k, block", [(1, 8), (3, 8), (2, 20), (99, 5)])
def test_top_blocks_are_the_highest_where_they_matter(joined, k, block, where):
    query, key, _ = Case("", at(24, 61, dim=5)).tensors()
    query[:, :, 3], key[:, :, 30] = 1e4, -1e4  # one row and one key that pull
    here = Call.checked(query, key, None, **where).place
    matters = naively(joined(Full(), here), here) ^ naively(joined(~Full(), here), here)
    layout = choice(matters, query, key, k, block, here)
    wanted = naively(joined(BlockSparse(layout, block), here), here)
    mask = joined(TopBlocks(k, block), here)
    call = Call.checked(query, key, None, mask=mask, **where)
    shown = call.program.visible(Span(0, 24, 0, 61))
    assert torch.equal(shown.expand_as(wanted), wanted)


def drawn(**sizes) -> tuple[Tensor, ...]:
    return Case("", at(**sizes)).tensors()


def layout_of(mask: Mask, query: Tensor, key: Tensor, **where) -> Tensor:
    program = Call.checked(query, key, None, mask=mask, **where).program
    return next(t for t in program.tensors if t.dim() == 4)


def test_padding_does_not_choose():
    """What is hidden from all enters no mean, be it NaN; a visible NaN is chosen, and surfaces."""
    query, key, value = drawn(q_len=40)
    mask = Causal() & Padding(torch.arange(40) >= 13) & TopBlocks(2, 8)
    clean = layout_of(mask, query, key)
    for tensor in (query, key):
        tensor[:, :, :13] = torch.nan
    assert torch.equal(layout_of(mask, query, key), clean)
    key[0, 0, 20] = torch.nan
    out = attention(query, key, value, mask=mask, engine="tiled")
    assert out[0, :2, 24:].isnan().all()  # the heads of that kv head, from block 3 on
    assert out[1].isfinite().all()
    assert out[0, 2:].isfinite().all()


def test_ties_go_to_the_earlier_block():
    ones = torch.ones(1, 1, 32, 4)
    layout = layout_of(Causal() & TopBlocks(3, 4), ones, ones)[0, 0]
    assert torch.equal(layout, (torch.eye(8) + (torch.arange(8) < 2)).tril().bool() | first_three())


def first_three() -> Tensor:
    """Rows 0 … 2 have no more than three blocks."""
    return torch.ones(8, 8).tril().bool() & (torch.arange(8)[:, None] < 3)


def test_two_choices_are_each_their_own():
    query, key, _ = drawn(q_len=60)
    here = Call.checked(query, key, None).place
    apart = [(Causal() & TopBlocks(*n)).lower(here, query, key) for n in ((2, 8), (3, 16))]
    both = (Causal() & (TopBlocks(2, 8) | TopBlocks(3, 16))).lower(here, query, key)
    span = Span(0, 60, 0, 60)
    assert torch.equal(both.visible(span), apart[0].visible(span) | apart[1].visible(span))


def test_a_choice_needs_query_and_key():
    with pytest.raises(RegardError, match=r"TopBlocks\(2, 8\) chooses by query and key; here"):
        (Causal() & TopBlocks(2, 8)).lower(place())


def test_a_choice_can_be_kept_for_shards_of_the_keys():
    """`choose` on all keys is a mask that positions decide: for pieces, and for the second pass."""
    query, key, value = drawn(q_len=40, k_len=61)
    where = {"query_start": 33, "key_start": 12}
    mask = Causal() & (TopBlocks(2, 8) | First(20))
    kept = TopBlocks(2, 8).choose(query, key, Causal() & ~First(20), **where)
    assert torch.equal(kept.layout, layout_of(mask, query, key, **where))
    whole, lse, (seen,) = attention(
        query, key, value, mask=mask, **where, return_lse=True, observe=[Received()]
    )
    pieces = list(zip(key.split(23, 2), value.split(23, 2), strict=True))
    held = Causal() & (kept | First(20))
    torch.testing.assert_close(piecewise(query, pieces, mask=held, **where)[0], whole)
    start, parts = 12, []
    for part, _ in pieces:
        place = {"query_start": 33, "key_start": start}
        parts += regard.observe(query, part, lse=lse, mask=held, observe=[Received()], **place)
        start += part.shape[2]
    torch.testing.assert_close(reduce(lambda a, b: a.beside(b), parts).sum, seen.sum)
    with pytest.raises(RegardError, match=r"chooses among all keys, and with lse these may be a s"):
        regard.observe(query, key, lse=lse, mask=mask, observe=[Received()], **where)
    torch.testing.assert_close(
        regard.observe(query, key, mask=mask, observe=[Received()], **where)[0].sum, seen.sum
    )


@pytest.mark.parametrize("shape", [(2, 40, 16), (3, 2, 40, 16), (2, 3, 40, 16), (2, 0, 40, 16)])
def test_what_there_is_to_choose_from_must_fit(shape):
    with pytest.raises(
        RegardError, match=r"query \(2, 4, 40, 16\), key .*: give \(batch, heads, l"
    ):
        TopBlocks(2, 8).choose(drawn(q_len=40)[0], torch.zeros(shape))


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


def test_top_blocks_gradients_are_those_of_the_chosen_blocks():
    """Finite differences, and the same numbers as with the layout given: the choice adds none."""
    tensors = [t.requires_grad_() for t in drawn(q_len=9, k_len=11, batch=1, dim=2)]
    mask = Causal() & TopBlocks(2, 3)
    layout = layout_of(mask, *tensors[:2])
    assert 0 < layout.sum() < layout.numel()
    for engine in ("reference", "tiled"):
        assert torch.autograd.gradcheck(
            lambda *t, engine=engine: attention(*t, mask=mask, engine=engine), tensors
        )
        given = Causal() & BlockSparse(layout, 3)
        both = [
            torch.autograd.grad(attention(*tensors, mask=m, engine=engine).sin().sum(), tensors)
            for m in (mask, given)
        ]
        assert all(map(torch.equal, *both))


def test_a_watched_model_can_be_held_to_its_top_blocks():
    """`watch` hands query and key on: all but the chosen blocks cut, and what is left observed."""
    model, x = zoo.plain(), zoo.random(2, 30, 32)
    mask = TopBlocks(2, 5)
    with torch.no_grad(), regard.watch(model, observe=[TopK(30)], cut=[Cut("*", ~mask)]) as seen:
        held = model(x)
        query, key, value = model.blocks[0].heads(x)
        out, (top,) = attention(
            query, key, value, mask=Causal() & mask, query_start=0, observe=[TopK(30)]
        )
        after = x + out.transpose(1, 2).reshape(x.shape)
        query, key, value = model.blocks[1].heads(after)
        out = attention(query, key, value, mask=Causal() & mask, query_start=0)
    torch.testing.assert_close(held, after + out.transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(seen["blocks.0"].seen[0].weights, top.weights)
    assert ((top.indices >= 0).sum(-1) <= 10).all()


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
