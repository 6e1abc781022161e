"""TopBlocks: the highest blocks, chosen where they matter."""

import itertools
from functools import reduce

import pytest
import torch
from torch import Tensor

import regard.engines.second_pass.strips
import zoo
from cases import Case, at
from naive_masks import PLACES, grid, naively, place
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
from regard.sparse import BlockSparse, TopBlocks

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


@pytest.mark.sample(1, most=2)
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
