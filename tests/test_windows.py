"""Merging partial results, pieces and chunks of a long document, and what a window cannot see."""

import pytest
import torch
from torch import Tensor

import regard
import zoo
from cases import Case, assert_within, at, floats, mapped
from naive_masks import naively, place
from regard import (
    ALiBi,
    Causal,
    Dropout,
    First,
    Full,
    Heads,
    Padding,
    Received,
    RegardError,
    RelativeBias,
    TopK,
    Window,
    attention,
    merge,
    observe,
    piecewise,
)
from regard.call.checked import Call
from regard.call.geometry import Span
from regard.context import stitch, unseen, unseen_mass, unseen_recorded
from regard.engines import reference
from regard.sparse import BlockSparse, Chunks, Dilated, Fixed, Longformer, Strided, TopBlocks

rng = torch.Generator().manual_seed(9)


def drawn(dtype: torch.dtype = torch.float64, **sizes) -> tuple[Tensor, ...]:
    return Case("", at(**sizes)).tensors(dtype=dtype)


def shards(key: Tensor, value: Tensor, *lengths: int):
    return list(zip(key.split(lengths, 2), value.split(lengths, 2), strict=True))


CUTS = {"one": (60,), "halves": (30, 30), "ragged": (1, 17, 0, 41, 1)}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("engine", ["reference", "tiled", "sdpa"])
def test_merged_shards_are_the_whole(engine, cut):
    """Of keys that are hidden from some rows, and in some shards from all."""
    query, key, value = drawn(q_len=40, k_len=60)
    mask = Causal() & Window(25)
    parts, start = [], 0
    for k, v in shards(key, value, *cut):
        engine = engine if k.shape[2] else "tiled"
        here = {"query_start": 20, "key_start": start, "return_lse": True, "engine": engine}
        parts.append(attention(query, k, v, mask=mask, **here))
        start += k.shape[2]
    plain, whole = (
        attention(*(t.to(dtype) for t in (query, key, value)), mask=mask, return_lse=True,
                  engine="reference")
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    for found in zip(merge(*zip(*parts, strict=True)), plain, whole, strict=True):
        assert_within(*found, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_meets_the_bar(dtype):
    """A merge costs no more than the rounding of its parts."""
    query, key, value = drawn(dtype, q_len=40, k_len=60)
    parts = [
        attention(query, k, v, return_lse=True, engine="reference")
        for k, v in shards(key, value, *CUTS["ragged"])
    ]
    ours = merge(*zip(*parts, strict=True))
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    tensors = [t.double() for t in (query, key, value)]
    exact = attention(*tensors, return_lse=True, engine="reference")
    plain = attention(query, key, value, return_lse=True, engine="reference")
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert_within(mine, theirs, truth, dtype)


def test_merging_is_differentiable_where_rows_are_blind():
    """Row 0 sees nothing anywhere, row 1 only in the second shard: finite gradients, all right."""
    query, key, value = (t.requires_grad_() for t in drawn(q_len=4, k_len=6, batch=1, dim=2))
    shown = torch.ones(4, 6, dtype=torch.bool)
    shown[0], shown[1, :3] = False, False

    def by_parts(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            attention(query, k, v, mask=regard.Dense(m), return_lse=True, engine="tiled")
            for (k, v), m in zip(shards(key, value, 3, 3), shown.split(3, 1), strict=True)
        ]
        out, lse = merge(*zip(*parts, strict=True))
        return out, lse[..., 1:]

    assert torch.autograd.gradcheck(by_parts, (query, key, value))
    out, lse = merge(
        *zip(*[attention(query, k, v, mask=~Full(), return_lse=True, engine="tiled")
               for k, v in shards(key, value, 3, 3)], strict=True)
    )  # fmt: skip
    assert not out.any()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse.exp().sum(), (query, key, value))
    assert not any(g.any() for g in grads)


def test_merging_hides_no_bad_number():
    ones, lse = torch.ones(1, 1, 2, 3), torch.zeros(1, 1, 2)
    bad = ones.clone()
    bad[0, 0, 1, 0] = torch.nan
    out, merged = merge([ones, bad], [lse, lse])
    assert out[0, 0].isnan().tolist() == [[False] * 3, [True, False, False]]
    assert merged.isfinite().all()
    for number in (torch.nan, torch.inf):
        out, merged = merge([ones, ones], [lse, torch.tensor([[[0.0, number]]])])
        assert out[0, 0].isnan().tolist() == [[False] * 3, [True] * 3]
        assert not merged[0, 0, 1].isfinite()


def test_huge_lse_does_not_overflow():
    ones = torch.ones(1, 1, 1, 2)
    out, lse = merge([ones, 3 * ones], [torch.full((1, 1, 1), 1e4)] * 2)
    assert out.tolist() == [[[[2.0, 2.0]]]]
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 1e4) + torch.tensor(2.0).log())


ROW = torch.zeros(1, 2, 3)
WRONG = {
    "nothing": (([], []), "merge: outs [], lses []: give as many lses as outs, and at least one"),
    "one lse": (([torch.zeros(1, 2, 3, 4)] * 2, [ROW]), "give as many lses as outs"),
    "sizes": (([torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)], [ROW] * 2), "(1, 2, 3, 5)"),
    "rows": (([torch.zeros(1, 2, 4, 4)], [ROW]), "its lse (batch, heads, q_len), all of one size"),
    "dims": (([torch.zeros(2, 3, 4)], [ROW]), "each out must be (batch, heads, q_len, v_dim)"),
    "dtypes": (([torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4).half()], [ROW] * 2), "one dtype"),
}


@pytest.mark.parametrize("given, said", WRONG.values(), ids=WRONG)
def test_what_cannot_be_merged_is_said(given, said):
    with pytest.raises(RegardError) as error:
        merge(*given)
    assert said in str(error.value)


REQUESTS = {
    "full": {},
    "rolling": {"mask": Causal() & (Window(12) | First(3))},
    "patterns": {"mask": Causal() & (Fixed(9, 2) | Strided(7)) | Longformer(3, [0, 33])},
    "chunks": {"mask": Chunks(20, 5) & ~Dilated(4, 2)},
    "blocks": {"mask": BlockSparse(torch.rand(6, 8, generator=rng) < 0.5, 8, first=(2, 0))},
    "heads": {"mask": Heads([0, 3]) & Causal()},
    "biases": {"bias": [ALiBi(), RelativeBias(floats(rng, 16, 4).double())], "softcap": 2.0},
    "sinks": {"sinks": floats(rng, 4).double(), "mask": Causal(), "scale": 0.3},
    "dropout": {"dropout": Dropout(0.4, 3), "mask": Causal()},
    "dropout, seed drawn": {"dropout": 0.4},
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_pieces_are_the_whole(request_, cut):
    """Forward and gradients, whatever positions decide; sinks count once, dropout is the same."""
    results = []
    for dtype, whole in ((torch.float64, False), (torch.float32, True), (torch.float64, True)):
        tensors = [t.requires_grad_() for t in drawn(dtype, q_len=40, k_len=60, v_dim=5)]
        query, key, value = tensors
        torch.manual_seed(3)
        if whole:
            request = mapped(request_, lambda t: t.to(dtype))  # noqa: B023
            out, lse = attention(*tensors, **request, return_lse=True, engine="reference")
        else:
            pieces = shards(key, value, *cut)
            out, lse = piecewise(query, pieces, **request_, engine="tiled")
        loss = out.cos().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()
        results.append([out, lse, *torch.autograd.grad(loss, tensors)])
    for found in zip(*results, strict=True):
        assert_within(*(t.detach() for t in found), torch.float64)


def test_pieces_may_come_from_a_stream():
    """A generator, one piece at a time; rounded once, not at each piece."""
    query, key, value = drawn(torch.bfloat16, q_len=40, k_len=60)
    alive = []

    def stream():
        for k, v in shards(key, value, 20, 20, 20):
            alive.append(len(alive))
            yield k, v

    out, lse = piecewise(query, stream(), mask=Causal(), query_start=20)
    assert len(alive) == 3
    assert out.dtype == torch.bfloat16
    exact = attention(*(t.double() for t in (query, key, value)), mask=Causal(), return_lse=True)
    plain = attention(query, key, value, mask=Causal(), return_lse=True, engine="reference")
    for mine, theirs, truth in zip((out, lse), plain, exact, strict=True):
        assert_within(mine, theirs, truth, torch.bfloat16)


def test_what_pieces_cannot_do_is_said():
    query, key, value = drawn(q_len=40, k_len=60)
    pieces = shards(key, value, 30, 30)
    with pytest.raises(RegardError, match=r"TopBlocks\(2, 8\).* chooses among all keys; one piece"):
        piecewise(query, pieces, mask=Causal() & ~TopBlocks(2, 8))
    with pytest.raises(RegardError, match=r"keep is \(1, 60\), this call needs \(2, 30\)"):
        piecewise(query, pieces, mask=Padding(torch.ones(60).bool()))
    with pytest.raises(RegardError, match="there are no pieces; give at least one"):
        piecewise(query, [])


COUNTED = {
    "rolling": Window(12) | First(3),
    "window": Window(1),
    "nothing": ~Full(),
    "all": Full(),
    "truncated": First(50),
    "the last ones": ~First(80),
    "chunks": Chunks(30, 7),
    "dilated": Dilated(5, 9),
    "heads": Heads([1]) | Window(9),
    "blocks": BlockSparse(torch.rand(2, 2, 12, 9, generator=rng) < 0.5, 40, first=(-3, 0)),
}
PLACES = {
    "square": {"q_len": 133},
    "at the end": {"q_len": 50},
    "one": {"q_len": 1},
    "placed": {"q_len": 60, "query_start": 170, "key_start": 64},
    "more queries": {"q_len": 150, "k_len": 40},
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("of", [Causal(), Full(), Causal() & Heads([0])], ids=str)
@pytest.mark.parametrize("mask", COUNTED.values(), ids=COUNTED)
def test_hidden_pairs_are_counted(mask, of, where):
    here = place(2, 2, **where)
    whole, shown = naively(of, here), naively(mask, here)
    request = {"batch": 2, "heads": 2, "k_len": here.k_len, **where}
    found = unseen(mask, of=of, **request)
    hidden = (whole & ~shown).sum(-1)
    assert torch.equal(found.pairs.expand_as(hidden), whole.sum(-1))
    assert torch.equal(found.hidden.expand_as(hidden), hidden)
    assert torch.equal(found.queries.expand(2, 2), (hidden > 0).sum(-1))
    share = float(hidden.sum()) / max(float(whole.sum()), 1)
    assert found.share == pytest.approx(share)
    assert found.low is found.high is found.mass is None


def test_a_rolling_window_at_length():
    """Counted without the square: what 128 k tokens lose to a window of 4 k with 4 sinks."""
    length, window, sinks = 2**17, 4096, 4
    found = unseen(Window(window) | First(sinks), length)
    query = torch.arange(length)
    hidden = (query + 1 - window - sinks).clamp(min=0)
    assert torch.equal(found.hidden[0, 0], hidden)
    assert torch.equal(found.pairs[0, 0], query + 1)
    assert str(found) == (
        "8,061,007,878 of 8,590,000,128 pairs hidden (93.8%); 126,972 of 131,072 rows miss keys; "
        "the last one 126,972 of 131,072"
    )


def weights_of(query: Tensor, key: Tensor, **request) -> Tensor:
    """The dense weights, and with sinks their rest."""
    call = Call.checked(query, key, None, **request)
    return reference.softmax(reference.scores(call), call.sinks)


MASSES = {
    "rolling": (Window(9) | First(2), {}),
    "truncated": (First(20), {"of": Full()}),
    "nothing": (~Full(), {}),
    "all": (Full(), {}),
    "by content": (TopBlocks(2, 8), {}),
    "padded": (
        Window(9),
        {"of": Causal() & Padding(torch.arange(60) >= torch.tensor([[0], [30]]))},
    ),
    "biased": (Strided(7), {"bias": ALiBi(), "softcap": 2.0, "query_start": 30, "key_start": 3}),
    "sinks": (Chunks(20, 5), {"sinks": floats(rng, 4).double(), "scale": 0.5}),
}


@pytest.mark.parametrize("mask, request_", MASSES.values(), ids=MASSES)
def test_the_mass_of_hidden_pairs_is_exact(mask, request_):
    query, key, _ = drawn(q_len=40, k_len=60)
    found = unseen_mass(mask, query, key, **request_)
    request = {"mask": request_.get("of", Causal()), **request_}
    request.pop("of", None)
    weights = weights_of(query, key, **request)
    call = Call.checked(query, key, None, **request | {"mask": request["mask"] & ~mask})
    hidden = call.program.visible(Span(0, 40, 0, 60)).expand_as(weights)
    mass = weights * hidden
    # In float64 both, and few numbers that each sum hundreds: what plain torch errs by is chance
    torch.testing.assert_close(found.mass, mass.sum(-1), rtol=1e-12, atol=1e-14)
    share = mass.sum((-2, -1)) / weights.sum((-2, -1))
    torch.testing.assert_close(found.low, share, rtol=1e-12, atol=1e-14)
    assert torch.equal(found.low, found.high)
    assert torch.equal(found.hidden, hidden.sum(-1))


@pytest.mark.parametrize("k", [1, 5, 60])
@pytest.mark.parametrize("mask", [Window(9) | First(2), First(20), Chunks(300), ~Full()], ids=str)
def test_observers_bound_the_mass(mask, k):
    """TopK and Received enclose the exact share; where they know it all, both ends are it."""
    query, key, _ = drawn(q_len=40, k_len=60)
    exact = unseen_mass(mask, query, key)
    top, received = observe(query, key, mask=Causal(), observe=[TopK(k), Received()])
    for seen, whole in ((top, k == 60), (received, not isinstance(mask, regard.call.masks.Or))):
        found = unseen(mask, 40, 60, seen=seen)
        assert torch.equal(found.hidden.expand_as(exact.hidden), exact.hidden)
        assert (found.low <= exact.low + 1e-12).all()
        assert (found.high >= exact.high - 1e-12).all()
        if whole:
            torch.testing.assert_close(found.low, exact.low)
            torch.testing.assert_close(found.high, exact.high)
    assert (unseen(Window(9), 40, 60, seen=top).low > 0).any()


def test_bounds_over_many_tiles():
    """Listed keys in full, empty and mixed tiles, at places far from 0."""
    query, key, _ = drawn(q_len=300, k_len=420, dim=4)
    where = {"query_start": 1130, "key_start": 1000}
    mask = Longformer(90, range(1100, 1300))
    (top,) = observe(query, key, mask=Causal(), observe=[TopK(420)], **where)
    exact = unseen_mass(mask, query, key, **where)
    found = unseen(mask, 300, 420, seen=top, **where)
    torch.testing.assert_close(found.low, exact.low)
    torch.testing.assert_close(found.high, exact.low)


def test_what_was_seen_must_fit():
    query, key, _ = drawn(q_len=40, k_len=60)
    top, part = observe(query, key, observe=[TopK(3), Received(queries=(25, 60))])
    with pytest.raises(RegardError, match="TopK saw 40 queries, not 60; give the length that it"):
        unseen(Window(3), 60, seen=top)
    with pytest.raises(RegardError, match="Received saw 35 queries and 60 keys from position 0, n"):
        unseen(Window(3), 40, 60, seen=part)


def test_a_recorded_layer_says_what_a_window_would_lose():
    model = zoo.plain()
    x = zoo.random(2, 30, 32)
    with torch.no_grad(), regard.watch(model, keep_qk=True) as seen:
        model(x)
    layer = seen.recording().layer(1)
    mask = Window(5) | First(1)
    for item in range(2):
        found = unseen_recorded(mask, layer, item)
        weights = layer.weights(slice(None), item).double()
        gap = torch.arange(30)[:, None] - torch.arange(30)
        hidden = (gap >= 5) & (torch.arange(30) >= 1)
        torch.testing.assert_close(found.mass[0], (weights * hidden).sum(-1).float())
        assert torch.equal(found.hidden[0, 0], hidden.sum(-1))
        assert torch.equal(found.pairs[0, 0], torch.arange(30) + 1)
    assert str(found).startswith("1,200 of 1,860 pairs hidden (64.5%); 96 of 120 rows")
    assert "of the attention mass lay there (" in str(found)


def test_decode_steps_with_sinks_and_padding_are_counted_together():
    """gpt-oss: learned sinks, a window, left padding, and one recorded call for each new token."""
    model = next(f for f in zoo.FAMILIES if f.name == "gpt-oss").build()
    prompt = zoo.decoder()
    with torch.no_grad(), regard.watch(model, keep_qk=True) as seen:
        model.generate(**prompt, max_new_tokens=5, do_sample=False)
    layer = seen.recording().layer(1)
    assert len(layer.chunks) == 5
    for item in range(layer.batch):
        found = unseen_recorded(Window(3), layer, item)
        weights = layer.weights(slice(None), item)
        gap = torch.arange(layer.q_len)[:, None] - torch.arange(layer.k_len)
        hidden = weights * (gap >= 3)
        # Both are ours, of the same numbers in float32
        torch.testing.assert_close(found.mass[0], hidden.sum(-1), rtol=1e-4, atol=1e-6)
        share = hidden.sum((-2, -1)) / weights.sum((-2, -1))
        torch.testing.assert_close(found.low[0], share, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.hidden[0], ((weights > 0) & (gap >= 3)).sum(-1))
        assert torch.equal(found.pairs[0], (weights > 0).sum(-1))
    assert (weights.sum(-1) < 0.999).any()  # the sinks took some


@pytest.mark.parametrize("size, overlap", [(20, 6), (20, 12), (9, 8), (300, 0)])
def test_chunks_lose_nothing_of_a_mask_within_their_overlap(size, overlap):
    """Each chunk computed by itself and stitched: the whole, to the bit of its rounding."""
    query, key, value = drawn(q_len=133)
    chunks = Chunks(size, overlap)
    reach = Window(overlap + 1) & Causal()
    whole = attention(query, key, value, mask=reach, engine="tiled")
    pieces = [[t[:, :, a:b] for t in (query, key, value)] for a, b in chunks.spans(133)]
    parts = [attention(*piece, mask=reach, engine="tiled") for piece in pieces]
    torch.testing.assert_close(stitch(parts, chunks, 133, causal=True, dim=2), whole)
    assert unseen(chunks, 133, of=reach).share == 0
    both = Window(overlap // 2 + 1, ahead=overlap // 2)
    parts = [attention(*piece, mask=both, engine="tiled") for piece in pieces]
    whole = attention(query, key, value, mask=both, engine="tiled")
    torch.testing.assert_close(stitch(parts, chunks, 133, causal=False, dim=2), whole)


def test_stitching_takes_each_position_once():
    chunks = Chunks(10, 4)  # 0 … 9, 6 … 15, 12 … 19
    parts = [torch.stack([torch.arange(a, b), torch.full((b - a,), n)])[None]
             for n, (a, b) in enumerate(chunks.spans(20))]  # fmt: skip
    early = stitch(parts, chunks, 20, causal=True, dim=2)
    middle = stitch(parts, chunks, 20, causal=False, dim=2)
    assert early[0, 0].tolist() == middle[0, 0].tolist() == list(range(20))
    assert early[0, 1].tolist() == [0] * 10 + [1] * 6 + [2] * 4
    assert middle[0, 1].tolist() == [0] * 8 + [1] * 6 + [2] * 6
    with pytest.raises(
        RegardError, match=r"parts have \[10, 10\] positions along dim 2; Chunks\(10"
    ):
        stitch(parts[:2], chunks, 20, causal=True, dim=2)
    with pytest.raises(RegardError, match="the document has length 0; there is nothing to stitch"):
        stitch([], chunks, 0, causal=True)


def test_causal_chunks_see_what_stitching_keeps():
    """The earliest chunk that holds a query holds every key that any of its chunks does."""
    chunks, length = Chunks(10, 4), 40
    spans = chunks.spans(length)
    shown = (Causal() & chunks).lower(place(1, 1, length, length)).visible(Span(0, 40, 0, 40))[0, 0]
    for q in range(length):
        first = next(a for a, b in spans if a <= q < b)
        assert shown[q].nonzero().flatten().tolist() == list(range(first, q + 1))
