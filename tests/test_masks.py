"""Masks, element by element against plain Python, and the tile classes that engines skip by."""

import sys
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from naive_masks import LEAVES, PLACES, check, grid, naively, place
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
    RegardError,
    Window,
    attention,
)
from regard.call.geometry import Place, Span
from regard.call.masks import And, Not, Or
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

rng = torch.Generator().manual_seed(0)
BLOCKS = [(1, 1), (3, 5), (16, 16), (64, 64), (64, 128), (128, 64), (200, 200), (7, 133)]
PAIRS = [(70, 3), (80, 132), (100, 100), (132, 0), (500, 500), (66, 3)]
MASKS = LEAVES | {
    "documents": Documents(
        torch.randint(-1, 3, (2, 66), generator=rng), torch.randint(-1, 3, (1, 133), generator=rng)
    ),
    "sorted documents": Documents(torch.arange(66) // 20, torch.arange(133) // 40),
    "padding": Padding(torch.rand(2, 133, generator=rng) < 0.5),
    "padding in runs": Padding(torch.arange(133) >= torch.tensor([[0], [70]])),
    "edges": Edges(PAIRS),
    "edge tensor, twice the same": Edges(torch.tensor(PAIRS + PAIRS)),
    "a tile of edges": Edges([(67 + q, k) for q in range(16) for k in range(48)]),
    "dense": Dense(torch.rand(2, 2, 66, 133, generator=rng) < 0.5),
    "dense rows": Dense(torch.rand(2, 1, 66, 1, generator=rng) < 0.5),
    "dense keys": Dense(torch.rand(133, generator=rng) < 0.5),
    "dense in blocks": Dense((torch.arange(66)[:, None] // 32 + torch.arange(133) // 32) % 2 == 0),
    "dense of one": Dense(torch.tensor(True)),
    "predicate": Predicate(lambda b, h, q, k: (q + k) % 3 == 0),
    "predicate of all": Predicate(lambda b, h, q, k: (q - k) * (h + 1) < 60 * (b + 1)),
    "predicate of keys": Predicate(lambda b, h, q, k: k >= 64),
    "predicate of heads": Predicate(lambda b, h, q, k: h == 1),
    "sinks and window": Causal() & (Window(9) | First(4)),
    "prefix": Causal() | First(100),
    "deep": ~(~(Causal() | Heads([0])) | ~Window(30, ahead=2)) | (First(9) & ~Edges(PAIRS)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_mask_is_its_definition(mask):
    check(mask, place(), BLOCKS, exact=mask in LEAVES.values())


@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("mask", [*LEAVES.values(), MASKS["deep"], Edges(PAIRS)], ids=str)
def test_positions_are_the_sequences(mask, where):
    check(mask, place(1, 2, 20, 37, **where), [(4, 8), (16, 16)], exact=mask in LEAVES.values())


@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
def test_predicates_see_positions(where):
    check(MASKS["predicate of all"], place(**where), [(64, 64), (50, 30)])


@pytest.mark.parametrize("sizes", [(1, 1), (1, 64), (64, 1), (65, 64), (128, 128), (63, 129)])
@pytest.mark.parametrize("name", ["full", "causal", "predicate", "deep"])
def test_tails_that_fill_no_tile(name, sizes):
    at = place(1, 2, *sizes)
    check(MASKS[name], at, [(64, 64), (16, 128)], exact=name in LEAVES)


def leaves(at: Place) -> st.SearchStrategy[Mask]:
    n = st.integers(1, 40)
    few = st.integers(1, 9)
    flags = st.randoms(use_true_random=False)

    def bools(*shape: int):
        count = torch.Size(shape).numel()
        return flags.map(
            lambda r: torch.tensor([r.random() < 0.5 for _ in range(count)]).view(shape)
        )

    def numbers(size: int):
        row = st.lists(st.integers(-1, 2), min_size=size, max_size=size)
        return st.sampled_from([row, row.map(sorted)]).flatmap(lambda r: r).map(torch.tensor)

    pairs = st.tuples(st.integers(0, 45), st.integers(0, 30))
    dense = st.tuples(*(st.sampled_from([1, s]) for s in (at.batch, at.heads, at.q_len, at.k_len)))
    return st.one_of(
        st.sampled_from([Full(), Causal()]),
        st.builds(Window, n, ahead=st.integers(0, 9)),
        st.builds(First, n),
        st.builds(Dilated, n, n),
        st.builds(Strided, n),
        n.flatmap(lambda m: st.builds(Fixed, st.just(m), st.integers(0, m))),
        st.builds(Longformer, st.integers(0, 20), st.integers(0, 9) | st.sets(n, max_size=3)),
        n.flatmap(lambda m: st.builds(Chunks, st.just(m), st.integers(0, m - 1))),
        few.flatmap(lambda b: st.builds(BlockSparse, bools(1, at.heads, *grid(at, b)), st.just(b))),
        st.builds(Heads, st.lists(st.integers(0, at.heads - 1), max_size=2)),
        st.builds(Documents, numbers(at.q_len), numbers(at.k_len)),
        st.builds(Padding, bools(at.batch, at.k_len)),
        st.builds(Edges, st.lists(pairs, max_size=6)),
        dense.flatmap(lambda shape: bools(*shape)).map(Dense),
        n.map(lambda m: Predicate(lambda b, h, q, k: (q * m + k + b + h) % 3 == 0)),
    )


@st.composite
def trees(draw) -> tuple[Mask, Place]:
    size = st.integers(1, 20)
    at = place(
        draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(size), draw(size),
        draw(st.none() | st.integers(0, 30)), draw(st.integers(0, 10)),
    )  # fmt: skip
    mask = st.recursive(
        leaves(at),
        lambda m: m.map(Not) | st.builds(And, m, m) | st.builds(Or, m, m),
        max_leaves=5,
    )
    return draw(mask), at


@given(trees(), st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=30)
def test_any_tree_of_masks(tree, block_q, block_k):
    check(*tree, [(block_q, block_k)])


@pytest.mark.slow
@given(trees(), st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=70)
def test_more_trees_of_masks(tree, block_q, block_k):
    check(*tree, [(block_q, block_k)])


def test_cu_seqlens():
    packed = Documents.from_cu_seqlens(torch.tensor([0, 3, 3, 7]))
    assert packed.query_ids.tolist() == [0, 0, 0, 2, 2, 2, 2]
    shown = (packed & Causal()).lower(place(1, 1, 7, 7)).visible(Span(0, 7, 0, 7))[0, 0]
    blocks = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(4, 4).tril())
    assert torch.equal(shown, blocks.bool())
    cross = Documents.from_cu_seqlens(torch.tensor([0, 1, 3]), torch.tensor([0, 4, 5]))
    assert cross.lower(place(1, 1, 3, 5)).visible(Span(0, 3, 0, 5))[0, 0].tolist() == [
        [True, True, True, True, False],
        [False, False, False, False, True],
        [False, False, False, False, True],
    ]


def test_a_predicate_is_evaluated_once_for_a_shape():
    asked = []
    mask = Predicate(lambda b, h, q, k: asked.append(q) is None and (q >= k))
    first = mask.lower(place())
    once = len(asked)
    assert once == 2  # rows of cells: O(k_len) elements at a time, never the square
    again = (mask & Full()).lower(place())
    assert len(asked) == once
    assert again.tensors[0] is first.tensors[0]
    mask.lower(place(query_start=0))
    assert len(asked) == 2 * once


def test_a_predicate_keeps_bits_of_mixed_cells_only():
    program = Causal().lower(place(1, 1, 256, 256))
    same = Predicate(lambda b, h, q, k: q >= k).lower(place(1, 1, 256, 256))
    cells, bits = same.tensors
    assert cells.shape == (1, 1, 4, 4)
    assert bits.shape[0] == 4  # the diagonal
    for theirs, ours in zip(program.classes(64, 64), same.classes(64, 64), strict=True):
        assert torch.equal(ours, theirs)


WRONG = {
    "documents": (
        Documents(torch.zeros(5, dtype=torch.long)),
        "query_ids is (1, 5), this call needs (2, 66)",
    ),
    "keys of documents": (
        Documents(torch.zeros(66, dtype=torch.long), torch.zeros(3, 133, dtype=torch.long)),
        "key_ids is (3, 133), this call needs (2, 133)",
    ),
    "documents of one side": (Documents(torch.zeros(66, dtype=torch.long)), "key_ids is (1, 66)"),
    "padding": (Padding(torch.ones(2, 66)), "keep is (2, 66), this call needs (2, 133)"),
    "padding of a batch": (Padding(torch.ones(3, 133)), "keep is (3, 133)"),
    "padding of 3 dims": (Padding(torch.ones(2, 1, 133)), "keep is (2, 1, 133)"),
    "dense": (
        Dense(torch.ones(66, 66, dtype=torch.bool)),
        "(66, 66) does not broadcast to (2, 2, 66, 133)",
    ),
    "dense of 5 dims": (Dense(torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)), "(1, 1, 1, 1, 1)"),
    "dense floats": (Dense(torch.ones(66, 133)), "give bool (True: visible), or pass it as bias"),
    "heads": (Heads([0, 2]), "2"),
    "a predicate's shape": (
        Predicate(lambda b, h, q, k: torch.ones(5, dtype=torch.bool)),
        "it returned (5,) for indices that broadcast to (2, 2, 64, 133)",
    ),
}


@pytest.mark.parametrize("mask, said", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("combined", [lambda m: m, lambda m: ~(Causal() | m)], ids=["", "inside"])
def test_wrong_sizes_are_said(mask, said, combined):
    with pytest.raises(RegardError) as error:
        combined(mask).lower(place())
    assert said in str(error.value)
    assert str(mask) in str(error.value)


@pytest.mark.parametrize(
    "join",
    [lambda: Causal() and Window(3), lambda: Causal() or Window(3), lambda: not Causal()],
    ids=["and", "or", "not"],
)
def test_words_do_not_join_masks(join):
    """`Causal() and Window(3)` would be Window(3)."""
    with pytest.raises(RegardError, match=r"Causal\(\) is neither true nor false: .* & \| ~"):
        join()


HUGE: dict[str, tuple[Callable[[int], Mask], Mask]] = {
    "window": (lambda n: Window(n), Window(500)),
    "ahead": (lambda n: Window(3, ahead=n), Window(3, ahead=500)),
    "first": (lambda n: First(n), Full()),
    "dilated": (lambda n: Dilated(n, 3), Dilated(500, 3)),
    "dilated by": (lambda n: Dilated(3, n), Dilated(1, 1)),
    "strided": (lambda n: Strided(n), Strided(500)),
    "fixed": (lambda n: Fixed(n, 1), Fixed(500, 1)),
    "summary": (lambda n: Fixed(n, n), Full()),
    "chunks": (lambda n: Chunks(n), Chunks(500)),
    "chunks that overlap": (lambda n: Chunks(n, n // 2), Full()),
    "block": (lambda n: BlockSparse(torch.ones(1, 1).bool(), n), Full()),
    "longformer": (lambda n: Longformer(n, 2), Full()),
    "global": (lambda n: Longformer(3, n), Full()),
    "big bird": (lambda n: BigBird(16, n, 0, 0), Full()),
    "global blocks": (lambda n: BigBird(16, 1, n, 0), Full()),
    "random blocks": (lambda n: BigBird(16, 1, 0, n), Full()),
    "top blocks": (lambda n: TopBlocks(n, 16), Full()),
    "one top block": (lambda n: TopBlocks(1, n), Full()),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("engine", ["cpu", "sdpa", "tiled", "reference"])
@pytest.mark.parametrize("n", [2**31, 2**32 + 1, sys.maxsize, 2**63, 2**64], ids=hex)
@pytest.mark.parametrize("huge, same", HUGE.values(), ids=HUGE)
def test_a_number_beyond_every_position(huge, same, n, engine):
    """It is what people write for "no limit", and must not wrap in an engine's integers."""
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 150, 16, generator=rng) for _ in range(3))
    request = {"engine": engine, "return_lse": True}
    answers = attention(query, key, value, mask=Causal() & huge(n), **request)
    right = attention(query, key, value, mask=Causal() & same, **request)
    for ours, theirs in zip(answers, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["cpu", "tiled", "reference"])
def test_documents_of_any_ids(engine):
    """Ids are names: those beyond 32 bits are not those that they would wrap to."""
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 40, 16, generator=rng) for _ in range(3))
    small = torch.randint(-1, 4, (2, 40), generator=rng)
    names = torch.tensor([0, 2**32, 2**33, 2**62, -(2**40)])
    right = attention(query, key, value, mask=Documents(small), engine="reference")
    given = attention(query, key, value, mask=Documents(names[small]), engine=engine)
    torch.testing.assert_close(given, right, rtol=0, atol=1e-5)


def test_masks_say_what_they_are():
    def near(b, h, q, k):
        return q - k < 3

    said = [
        (Causal() & (Window(20) | First(4)), "(Causal() & (Window(20) | First(4)))"),
        (~Window(3, ahead=5), "~Window(3, ahead=5)"),
        (Padding(torch.ones(2, 7).bool()) & Full(), "(Padding(keep (2, 7)) & Full())"),
        (Documents(torch.zeros(2, 9)), "Documents(query_ids (2, 9))"),
        (Dense(torch.ones(1, 9)), "Dense((1, 9))"),
        (Edges([(1, 2), (3, 4)]), "Edges(2 pairs)"),
        (Edges(torch.arange(10).view(5, 2)), "Edges(5 pairs)"),
        (Heads([0, 3]), "Heads([0, 3])"),
        (Predicate(near), "Predicate(near)"),
    ]
    assert [str(mask) for mask, _ in said] == [text for _, text in said]


@pytest.mark.parametrize("make", [lambda: Causal() & Window(3), lambda: ~Heads([0, 2])])
def test_masks_are_values(make):
    assert make() == make()
    assert hash(make()) == hash(make())


def test_edges_of_an_iterator_stay():
    mask = Edges(zip([70, 80], [1, 2], strict=True))
    for _ in range(2):
        assert naively(Edges([(70, 1), (80, 2)]), place()).equal(
            mask.lower(place()).visible(Span(0, 66, 0, 133)).expand(2, 2, -1, -1)
        )
