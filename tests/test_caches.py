"""Caches: what is attended to, piece by piece, is what attention over the whole would have seen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import assert_within, bools, floats, ids
from regard import (
    ALiBi,
    Causal,
    Dense,
    Distances,
    Documents,
    Edges,
    Entropy,
    First,
    Full,
    Heads,
    LogSumExp,
    Map,
    Mask,
    MaxScore,
    NormTopK,
    Padding,
    Predicate,
    Received,
    RegardError,
    RelativeBias,
    Rows,
    TopK,
    Window,
    attention,
)
from regard.cache import KVCache, PagedCache, WindowCache
from regard.call.masks import And, Or

BATCH, HEADS, KV_HEADS, LENGTH, DIM, V_DIM = 2, 4, 2, 37, 8, 6
EXACT = dict(rtol=0, atol=1e-12)
CACHES = {
    "full": (KVCache, Full()),
    "full, room": (lambda: KVCache(capacity=50), Full()),
    "window": (lambda: WindowCache(9), Window(9)),
    "window and first": (lambda: WindowCache(9, first=2), Window(9) | First(2)),
    "wide window": (lambda: WindowCache(30, first=4), Window(30) | First(4)),
    "window of 1": (lambda: WindowCache(1), Window(1)),
    "window of 1 and first": (lambda: WindowCache(1, first=3), Window(1) | First(3)),
    "paged": (PagedCache, Full()),
    "blocks of 1": (lambda: PagedCache(1), Full()),
    "blocks of 5": (lambda: PagedCache(5, pages=16), Full()),
}
CHUNKS = {
    "at once": (37,),
    "one by one": (1,) * 37,
    "prompt and steps": (20, *(1,) * 17),
    "chunks": (5, 1, 1, 0, 20, 1, 2, 7),
}
caches = pytest.mark.parametrize("make, shown", CACHES.values(), ids=CACHES)
chunks = pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)


@dataclass(frozen=True)
class Drawn:
    query: Tensor
    key: Tensor
    value: Tensor


def drawn(length: int = LENGTH, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> Drawn:
    rng = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    made = (floats(rng, batch, h, length, d) for h, d in zip(heads, (DIM, DIM, V_DIM), strict=True))
    return Drawn(*(t.to(dtype) for t in made))


def pieces(sizes) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(e - n, e) for e, n in zip(ends, sizes, strict=True)]


# The whole request, and what of it a call of the queries `at` is given


Whole = dict[str, Any]
RNG = torch.Generator().manual_seed(1)
KEEP = bools(RNG, BATCH, LENGTH)
VISIBLE = bools(RNG, BATCH, HEADS, LENGTH, LENGTH)
IDS = ids(RNG, BATCH, LENGTH)
BIAS = floats(RNG, BATCH, HEADS, LENGTH, LENGTH).double()
TABLE = floats(RNG, 32, HEADS).double()
SINKS = floats(RNG, HEADS).double()
REQUESTS: dict[str, Callable[[slice], Whole]] = {
    "causal": lambda at: {},
    "wide": lambda at: {"mask": Window(100)},
    "window": lambda at: {"mask": Causal() & Window(5)},
    "no first": lambda at: {"mask": Causal() & ~First(3)},
    "prefix": lambda at: {"mask": Causal() & (Window(3) | First(6)) | Window(2)},
    "padding": lambda at: {"mask": Causal() & Padding(KEEP[:, : at.stop])},
    "padding shared": lambda at: {"mask": Causal() & Padding(KEEP[0, : at.stop])},
    "documents": lambda at: {"mask": Causal() & Documents(IDS[:, at], IDS[:, : at.stop])},
    "dense": lambda at: {"mask": Dense(VISIBLE[:, :, at, : at.stop]) & Causal()},
    "dense keys": lambda at: {"mask": Dense(VISIBLE[:, :1, :1, : at.stop]) & Causal()},
    "dense rows": lambda at: {"mask": Dense(VISIBLE[0, :, at, :1]) & Causal()},
    "edges": lambda at: {"mask": Causal() & ~Edges([(20, 20), (30, 1), (36, 35)])},
    "heads": lambda at: {"mask": Causal() & (Heads([0, 3]) | Window(3))},
    "predicate": lambda at: {"mask": Causal() & Predicate(lambda b, h, q, k: (q + k + h) % 3 > 0)},
    "alibi": lambda at: {"bias": ALiBi()},
    "relative": lambda at: {"bias": RelativeBias(TABLE, bidirectional=False)},
    "bias": lambda at: {"bias": BIAS[:, :, at, : at.stop]},
    "bias of keys": lambda at: {"bias": [BIAS[:, :, :1, : at.stop], ALiBi()]},
    "bias of rows": lambda at: {"bias": BIAS[0, :, at, :1]},
    "softcap and sinks": lambda at: {"softcap": 2.0, "sinks": SINKS, "scale": 0.3},
}
requests = pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)


def first_of_real(shown: Mask, mask: Mask) -> Mask:
    """Where a mask hides padding, the first tokens that a cache shows are the first real ones."""
    if isinstance(shown, Or) and isinstance(mask, And) and isinstance(mask.right, Padding):
        keep = torch.atleast_2d(mask.right.keep)
        return shown.left | Padding(keep & (keep.cumsum(1) <= shown.right.n))
    return shown


def whole(data: Drawn, shown: Mask, request: Whole, engine="reference", **more) -> Any:
    request = {"mask": Causal()} | request
    request["mask"] = request["mask"] & first_of_real(shown, request["mask"])
    return attention(data.query, data.key, data.value, **request, engine=engine, **more)


@pytest.mark.sample(1, most=2)
@requests
@chunks
@caches
def test_pieces_give_the_whole(make, shown, sizes, request_of):
    data, cache, out = drawn(), make(), []
    for at in pieces(sizes):
        out.append(
            cache.attend(
                data.query[:, :, at], data.key[:, :, at], data.value[:, :, at], **request_of(at)
            )
        )
    assert cache.length == LENGTH
    assert cache.lengths.tolist() == [LENGTH] * BATCH
    exact = whole(data, shown, request_of(slice(0, LENGTH)))
    torch.testing.assert_close(torch.cat(out, 2), exact, **EXACT)


@chunks
@caches
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes(make, shown, sizes, dtype):
    data, cache, out = drawn(dtype=dtype), make(), []
    for at in pieces(sizes):
        out.append(
            cache.attend(
                data.query[:, :, at], data.key[:, :, at], data.value[:, :, at], bias=ALiBi()
            )
        )
    plain = whole(data, shown, {"bias": ALiBi()})
    double = Drawn(*(t.double() for t in (data.query, data.key, data.value)))
    assert_within(torch.cat(out, 2), plain, whole(double, shown, {"bias": ALiBi()}))


OBSERVERS = [
    TopK(5),
    NormTopK(3),
    Received(),
    Received(heads="group_mean"),
    Received(heads="sum"),
    Received(queries=(10, 30)),
    Entropy(),
    MaxScore(),
    LogSumExp(),
    Rows([3, 25, 36]),
    Map(6, 7),
    Map(100, 100, reduce="max"),
    Distances(6),
]


def fields(result) -> dict[str, Tensor]:
    held = vars(result) | {"mean": getattr(result, "mean", None)}
    return {name: t for name, t in held.items() if isinstance(t, Tensor)}


def assert_same_results(ours, exact) -> None:
    assert type(ours) is type(exact)
    for name, tensor in fields(exact).items():
        mine = fields(ours)[name]
        assert mine.shape == tensor.shape, name
        torch.testing.assert_close(mine, tensor, **EXACT)
    assert getattr(ours, "indices", None) is None or torch.equal(
        torch.as_tensor(ours.indices), torch.as_tensor(exact.indices)
    )


@pytest.mark.sample(1)
@pytest.mark.parametrize("sizes", [CHUNKS["prompt and steps"], CHUNKS["chunks"]], ids=str)
@caches
def test_observers_see_positions(make, shown, sizes):
    data, cache, seen, lse = drawn(), make(), None, []
    sizes = [n for n in sizes if n]
    for at in pieces(sizes):
        given = (data.query[:, :, at], data.key[:, :, at], data.value[:, :, at])
        _, part_lse, now = cache.attend(*given, observe=OBSERVERS, return_lse=True)
        lse.append(part_lse)
        seen = now if seen is None else [a.then(b) for a, b in zip(seen, now, strict=True)]
    _, exact_lse, exact = whole(data, shown, {}, observe=OBSERVERS, return_lse=True)
    torch.testing.assert_close(torch.cat(lse, 2), exact_lse, **EXACT)
    assert len(seen) == len(exact)
    for ours, truth in zip(seen, exact, strict=True):
        assert_same_results(ours, truth)


def test_no_observers_is_an_empty_tuple():
    data, cache = drawn(), KVCache()
    out, seen = cache.attend(data.query, data.key, data.value, observe=[])
    assert seen == ()
    assert torch.equal(out, KVCache().attend(data.query, data.key, data.value))


# Items of different lengths

RAGGED = [  # how many new tokens each of three items brings, and the padded length of the call
    ((7, 3, 0), 7),
    ((1, 1, 1), 1),
    ((2, 5, 1), 6),
    ((1, 0, 1), 1),
    ((1, 1, 9), 9),
    ((1, 1, 1), 1),
]
TOTAL = [13, 11, 13]
PREDICATE = Predicate(lambda b, h, q, k: (q * 2 + k) % 5 > 0)
RAGGED_REQUESTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"mask": Causal() & Window(4)},
    "no first": {"mask": Causal() & ~First(2)},
    "predicate": {"mask": Causal() & PREDICATE},
    "edges": {"mask": Causal() & ~Edges([(3, 3), (7, 2), (10, 4)])},
    "heads": {"mask": Causal() & Heads([1, 2])},
    "alibi": {"bias": ALiBi()},
    "relative": {"bias": RelativeBias(TABLE, bidirectional=False)},
    "sinks": {"sinks": SINKS},
}


def ragged_feed(cache, data, **request):
    """Feeds `RAGGED`; yields (out, starts, new) of each call."""
    starts = [0, 0, 0]
    for new, padded in RAGGED:
        parts = []
        for tensor in (data.query, data.key, data.value):
            part = torch.full((3, tensor.shape[1], padded, tensor.shape[3]), 1e3).to(tensor)
            for item, (start, n) in enumerate(zip(starts, new, strict=True)):
                part[item, :, :n] = tensor[item, :, start : start + n]
            parts.append(part)
        yield cache.attend(*parts, lengths=new, **request), starts, new
        starts = [s + n for s, n in zip(starts, new, strict=True)]


@pytest.mark.sample(1)
@pytest.mark.parametrize("request_", RAGGED_REQUESTS.values(), ids=RAGGED_REQUESTS)
@caches
def test_ragged(make, shown, request_):
    data, cache = drawn(13, batch=3), make()
    exact = whole(data, shown, request_)
    for out, starts, new in ragged_feed(cache, data, **request_):
        for item, (start, n) in enumerate(zip(starts, new, strict=True)):
            torch.testing.assert_close(out[item, :, :n], exact[item, :, start : start + n], **EXACT)
            assert torch.all(out[item, :, n:] == 0)
    assert cache.lengths.tolist() == TOTAL
    assert cache.length == max(TOTAL)


@caches
def test_ragged_masks_of_tensors(make, shown):
    """Padding and dense masks, and biases, have a size for every position of the longest item."""
    data, cache = drawn(13, batch=3), make()
    rng = torch.Generator().manual_seed(2)
    keep, bias = bools(rng, 3, 13, share=0.8), floats(rng, 3, HEADS, 13, 13).double()
    exact = whole(data, shown, {"mask": Causal() & Padding(keep), "bias": bias[:, :, :1]})
    starts = [0, 0, 0]
    for new, _ in RAGGED:
        length = max(s + n for s, n in zip(starts, new, strict=True))
        parts = [
            torch.stack(
                [t[b, :, (torch.arange(max(new)) + s).clamp(max=12)] for b, s in enumerate(starts)]
            )
            for t in (data.query, data.key, data.value)
        ]
        out = cache.attend(
            *parts, lengths=new, mask=Causal() & Padding(keep[:, :length]),
            bias=bias[:, :, :1, :length],
        )  # fmt: skip
        for item, (start, n) in enumerate(zip(starts, new, strict=True)):
            torch.testing.assert_close(out[item, :, :n], exact[item, :, start : start + n], **EXACT)
        starts = [s + n for s, n in zip(starts, new, strict=True)]


@caches
def test_ragged_observed(make, shown):
    """What has no one position a row can be seen of a ragged batch; padding counts for nothing."""
    data, cache = drawn(13, batch=3), make()
    asked = [TopK(4), Received(), Received(heads="group_sum"), Entropy(), NormTopK(2)]
    _, exact = whole(data, shown, {}, observe=[Rows(range(13)), Entropy()])
    rows, received = exact[0].weights, torch.zeros(3, HEADS, 13).double()
    count = torch.zeros(3, HEADS, 13)
    for (_, seen), starts, new in ragged_feed(cache, data, observe=asked):
        top, columns, grouped, entropy, _ = seen
        for item, (start, n) in enumerate(zip(starts, new, strict=True)):
            truth = rows[item, :, start : start + n]
            received[item], count[item] = truth.sum(1), (truth > 0).sum(1)
            dense = torch.zeros(HEADS, n, 14).double()
            found = top.indices[item, :, :n].long()
            dense.scatter_(-1, found.where(found >= 0, 13), top.weights[item, :, :n])
            kept = truth.topk(4).values[..., -1:] <= truth
            torch.testing.assert_close(dense[..., :13], truth * kept, **EXACT)
            torch.testing.assert_close(
                entropy.values[item, :, :n], exact[1].values[item, :, start : start + n], **EXACT
            )
        width = columns.sum.shape[-1]
        torch.testing.assert_close(columns.sum, received[..., :width], **EXACT)
        assert torch.equal(columns.count.double(), count[..., :width].double())
        pooled = received.unflatten(1, (KV_HEADS, -1)).sum(2)
        torch.testing.assert_close(grouped.sum, pooled[..., :width], **EXACT)


@pytest.mark.parametrize(
    "observer", [Map(4, 4), Distances(3), Rows([1]), Received((0, 3))], ids=str
)
def test_ragged_rows_have_no_position(observer):
    data = drawn(5)
    cache = PagedCache(4)
    cache.attend(data.query, data.key, data.value, lengths=[3, 5])
    step = (data.query[:, :, :1], data.key[:, :, :1], data.value[:, :, :1])
    with pytest.raises(RegardError, match=r"stand at different positions \(\[3, 5\]\)"):
        cache.attend(*step, observe=[observer])
    assert cache.lengths.tolist() == [3, 5]
    cache.attend(*step, observe=[TopK(2)])
    assert cache.lengths.tolist() == [4, 6]
