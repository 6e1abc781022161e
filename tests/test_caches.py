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
from regard.call.checked import Call
from regard.call.masks import And, Or
from regard.engines import ENGINES

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
    "blocks of 5": (lambda: PagedCache(5, blocks=16), Full()),
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


# Memory


def test_reads_are_views_and_growth_is_amortised():
    cache, one = KVCache(), torch.ones(1, 1, 1, 4)
    grown, at = 0, None
    for n in range(1000):
        cache.append(one * n, one * n)
        key, value = cache.read()
        grown, at = grown + (key.data_ptr() != at), key.data_ptr()
        assert key.shape == value.shape == (1, 1, n + 1, 4)
    assert grown <= 18  # by half: log 1000 / log 1.5, and the first few
    assert torch.equal(cache.key[0, 0, :, 0], torch.arange(1000.0))
    assert cache.positions.tolist() == [[list(range(1000))]]
    assert cache.nbytes <= 2 * 1.5 * 1000 * 4 * 4


def test_capacity_is_room_from_the_start():
    cache, one = KVCache(capacity=100), torch.ones(2, 3, 1, 4)
    cache.append(one, one)
    where = cache.key.data_ptr()
    for _ in range(99):
        cache.append(one, one)
    assert cache.key.data_ptr() == where
    assert cache.nbytes == 2 * 2 * 3 * 100 * 4 * 4


@pytest.mark.parametrize("sizes", [(200, *(1,) * 50), (1,) * 300, (64,) * 4], ids=str)
def test_a_window_holds_no_more_than_it_shows(sizes):
    window, first, slot = 20, 4, 2 * 2 * (8 + 6) * 8  # bytes of a key and value of each item
    cache, rng = WindowCache(window, first=first), torch.Generator().manual_seed(0)
    for n in sizes:
        given = (floats(rng, 2, h, n, d).double() for h, d in ((4, 8), (2, 8), (2, 6)))
        cache.attend(*given)
        assert cache.key.shape[2] <= first + window - 1
    held = first + window - 1
    room = held + held // 2 + 16
    assert cache.nbytes <= max(room, held + sizes[-1]) * slot + 2 * held * 4
    length = sum(sizes)
    expected = [0, 1, 2, 3, *range(length - window + 1, length)]
    assert torch.equal(cache.positions, torch.tensor(expected).expand(2, 2, -1))


# Items that come, go and go on


def go_on(cache, data: Drawn, rows, start: int, stop: int, shown: Mask) -> None:
    """Feed the rest of some items of `data`, and compare with the whole."""
    exact = whole(data, shown, {})[rows, :, start:stop]
    for at in pieces([1, 3, stop - start - 4]):
        at = slice(start + at.start, start + at.stop)
        parts = (t[rows][:, :, at] for t in (data.query, data.key, data.value))
        out = cache.attend(*parts)
        torch.testing.assert_close(out, exact[:, :, at.start - start : at.stop - start], **EXACT)


@caches
def test_select(make, shown):
    data, cache = drawn(), make()
    cache.attend(data.query[:, :, :13], data.key[:, :, :13], data.value[:, :, :13])
    cache.attend(*(t[:, :, 13:14] for t in (data.query, data.key, data.value)))
    cache.select([1, 0, 1])
    assert cache.lengths.tolist() == [14] * 3
    go_on(cache, data, [1, 0, 1], 14, 25, shown)
    cache.select(torch.tensor([2]))
    go_on(cache, data, [1], 25, 37, shown)


@caches
def test_select_nothing_empties(make, shown):
    data, cache = drawn(), make()
    cache.attend(data.query, data.key, data.value)
    cache.select([])
    assert cache.length == 0
    one = [t[:1, :, :9] for t in (data.query, data.key, data.value)]
    torch.testing.assert_close(cache.attend(*one), whole(data, shown, {})[:1, :, :9], **EXACT)


@caches
def test_crop(make, shown):
    data, cache = drawn(), make()
    wrong = torch.full((BATCH, KV_HEADS, 6, DIM), torch.nan).double()
    cache.attend(data.query[:, :, :8], data.key[:, :, :8], data.value[:, :, :8])
    cache.append(wrong, wrong[..., :V_DIM])
    cache.settle(())
    if cache.read()[0].shape[2] < 14:
        with pytest.raises(RegardError, match="what it evicted cannot come back"):
            cache.crop(6)
        assert cache.length == 14
    else:
        cache.crop(6)
        assert cache.length == 8
        go_on(cache, data, [0, 1], 8, 37, shown)


def test_crop_leaves_nothing_behind():
    """A ragged batch multiplies what lies beyond an item's end by weight 0."""
    for cache in (KVCache(), PagedCache(4)):
        data = drawn(13, batch=3)
        bad = torch.full((3, KV_HEADS, 9, DIM), torch.inf).double()
        cache.append(bad, bad[..., :V_DIM])
        cache.crop(9)
        for out, starts, new in ragged_feed(cache, data):
            exact = whole(data, Full(), {})
            for item, (start, n) in enumerate(zip(starts, new, strict=True)):
                torch.testing.assert_close(
                    out[item, :, :n], exact[item, :, start : start + n], **EXACT
                )


# Pages


def of_tables(cache: PagedCache) -> list[Tensor]:
    """Each sequence's keys, read the way an engine would."""
    tables = cache.tables()
    assert tables.blocks.dtype == tables.lengths.dtype == torch.int32
    keys = []
    for row, length in zip(tables.blocks.tolist(), tables.lengths.tolist(), strict=True):
        count = -(-length // cache.block)
        assert all(b >= 0 for b in row[:count])
        assert all(b == -1 for b in row[count:])
        found = [tables.key[row[i // cache.block], :, i % cache.block] for i in range(length)]
        keys.append(torch.stack(found, 1) if found else tables.key.new_zeros(KV_HEADS, 0, DIM))
    return keys


def test_tables_say_where_the_keys_are():
    data, cache = drawn(13, batch=3), PagedCache(4)
    for _, starts, new in ragged_feed(cache, data):
        for item, (start, n) in enumerate(zip(starts, new, strict=True)):
            assert torch.equal(of_tables(cache)[item], data.key[item, :, : start + n])
    tables = cache.tables()
    assert tables.key.shape[1:] == (KV_HEADS, 4, DIM)
    assert tables.value.shape[1:] == (KV_HEADS, 4, V_DIM)
    assert tables.blocks.shape == (3, 4)
    assert cache.blocks == 4 + 3 + 4


def test_a_shared_prefix_is_held_once_and_copied_on_write():
    data, cache = drawn(batch=1), PagedCache(4)
    prompt = [t[:, :, :10] for t in (data.query, data.key, data.value)]
    cache.attend(*prompt)
    assert cache.blocks == 3
    cache.select([0] * 5)
    assert cache.blocks == 3
    tables = cache.tables().blocks
    assert torch.equal(tables, tables[:1].expand(5, -1))
    rng = torch.Generator().manual_seed(3)
    more = Drawn(*(floats(rng, 5, h, 9, d).double() for h, d in ((4, 8), (2, 8), (2, 6))))
    joined = Drawn(
        *(
            torch.cat([p.expand(5, -1, -1, -1), t], 2)
            for p, t in zip(prompt, (more.query, more.key, more.value), strict=True)
        )
    )
    go_on(cache, joined, [0, 1, 2, 3, 4], 10, 19, Full())
    # Two whole blocks shared; the third, half full, copied by all but the last to write into it
    assert cache.blocks == 2 + 5 * 3
    cache.select([2])
    assert cache.blocks == 5
    assert torch.equal(of_tables(cache)[0], joined.key[2])


def test_fork_shares_a_part():
    data, cache = drawn(batch=1), PagedCache(4)
    cache.attend(data.query[:, :, :11], data.key[:, :, :11], data.value[:, :, :11])
    assert cache.fork(0, 6) == 1
    assert cache.fork(0) == 2
    assert cache.fork(1, 0) == 3
    assert cache.lengths.tolist() == [11, 6, 11, 0]
    assert cache.blocks == 3
    other = drawn(20, batch=4)
    parts = [t[:, :, :5] for t in (other.query, other.key, other.value)]
    out = cache.attend(*parts, lengths=[1, 5, 0, 4])
    for item, (prefix, n) in enumerate([(11, 1), (6, 5), (11, 0), (0, 4)]):
        own = [
            torch.cat([old[:, :, :prefix], new[item : item + 1, :, :n]], 2)
            for old, new in zip((data.query, data.key, data.value), parts, strict=True)
        ]
        exact = attention(*own, mask=Causal(), engine="reference")[0, :, prefix:]
        torch.testing.assert_close(out[item, :, :n], exact, **EXACT)
        assert torch.equal(of_tables(cache)[item], own[1][0])


def test_sequences_come_and_go():
    """As in serving: a sequence is dropped, another takes its blocks, one pool of a fixed size."""
    data, cache = drawn(12, batch=3), PagedCache(4, blocks=6)
    step = [t[:2] for t in (data.query, data.key, data.value)]
    cache.attend(*step)
    assert cache.blocks == 6
    pool = cache.tables().key.data_ptr()
    one = [t[:, :, :1] for t in step]
    with pytest.raises(RegardError) as error:
        cache.attend(*one)
    assert str(error.value) == (
        "PagedCache(4, blocks=6): the new tokens need 2 more blocks of 4, 0 are free; drop "
        "sequences with select, or give a larger pool"
    )
    assert cache.lengths.tolist() == [12, 12]
    assert torch.equal(of_tables(cache)[1], data.key[1])
    cache.select([1])
    cache.add()
    assert cache.lengths.tolist() == [12, 0]
    assert cache.blocks == 3
    late = [torch.stack([t[1], t[2]]) for t in (data.query, data.key, data.value)]
    out = cache.attend(*late, lengths=[0, 12])
    torch.testing.assert_close(out[1], whole(data, Full(), {})[2], **EXACT)
    assert cache.tables().key.data_ptr() == pool
    assert cache.nbytes == 6 * KV_HEADS * 4 * (DIM + V_DIM) * 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_freed_block_brings_nothing_along(dtype):
    data, cache = drawn(13, dtype, batch=3), PagedCache(4, blocks=12)
    bad = torch.full((1, KV_HEADS, 48, DIM), torch.nan, dtype=dtype)
    cache.append(bad, bad[..., :V_DIM])
    cache.select([])
    exact = whole(data, Full(), {})
    for out, starts, new in ragged_feed(cache, data):
        for item, (start, n) in enumerate(zip(starts, new, strict=True)):
            truth = exact[item, :, start : start + n]
            torch.testing.assert_close(out[item, :, :n], truth, rtol=0, atol=1e-5)


def test_engine_cpu_reads_the_blocks_in_place(monkeypatch):
    data, cache, out = drawn(dtype=torch.float32), PagedCache(4), []
    plain = whole(data, Full(), {})
    if ENGINES["cpu"].why_not(Call.checked(data.query, data.key, data.value)):
        pytest.skip("engine cpu is not built here")
    monkeypatch.setattr(PagedCache, "read", lambda self: pytest.fail("it gathers"))
    for at in pieces(CHUNKS["chunks"]):
        given = (data.query[:, :, at], data.key[:, :, at], data.value[:, :, at])
        out.append(cache.attend(*given))
    torch.testing.assert_close(torch.cat(out, 2), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["reference", "tiled", "sdpa"])
def test_a_named_engine_is_taken(engine):
    """Where it cannot read blocks in place, they are gathered for it."""
    data = drawn(dtype=torch.float32)
    same = Drawn(data.query, data.key, data.key.clone())
    for cache in (KVCache(), PagedCache(4), WindowCache(100)):
        out = []
        for at in pieces(CHUNKS["prompt and steps"]):
            given = (same.query[:, :, at], same.key[:, :, at], same.value[:, :, at])
            out.append(cache.attend(*given, engine=engine))
        exact = whole(same, Full(), {})
        torch.testing.assert_close(torch.cat(out, 2), exact, rtol=0, atol=1e-5)


# Wrong input

ODD = drawn(3)
QKV = (ODD.query, ODD.key, ODD.value)
WRONG = {
    "query of 3 dims": ((ODD.query[0], ODD.key, ODD.value), {}, "each needs 4 dimensions"),
    "lengths apart": (
        (ODD.query[:, :, :2], ODD.key, ODD.value), {},
        "query (2, 4, 2, 8), key (2, 2, 3, 8): each new token has a query and a key",
    ),
    "value": ((ODD.query, ODD.key, ODD.value[:, :1]), {}, "the first three the same"),
    "dtypes": ((ODD.query, ODD.key, ODD.value.float()), {}, "give both in one dtype"),
    "heads": ((ODD.query[:, :3], ODD.key, ODD.value), {}, "kv_heads 2 must divide heads 3"),
    "other kv_heads": (
        (ODD.query, ODD.key[:, :1], ODD.value[:, :1]), {},
        "the cache holds 2 kv_heads, dim 8 and v_dim 6, torch.float64 on cpu",
    ),
    "other dtype": (tuple(t.float() for t in QKV), {}, "torch.float64 on cpu"),
    "other batch": (tuple(t[:1] for t in QKV), {}, "the cache holds a batch of 2"),
    "lengths too long": (QKV, {"lengths": [4, 1]}, "lengths [4, 1]: give one number for each of 2"),
    "lengths too few": (QKV, {"lengths": [1]}, "lengths [1]: give one number for each of 2 items"),
    "mask": (QKV, {"mask": Padding(torch.ones(2, 4).bool())}, "this call needs (2, 6)"),
    "no mask": (QKV, {"mask": torch.ones(3, 3)}, "give a regard mask"),
    "bias": (QKV, {"bias": torch.ones(3, 5)}, "does not broadcast to (2, 4, 3, 6)"),
    "no bias": (QKV, {"bias": ["x"]}, "bias holds 'x'"),
    "observer": (QKV, {"observe": TopK(2)}, "observe is TopK(k=2) alone; give a list"),
    "engine": (QKV, {"engine": "x"}, "no engine is named 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("given, more, said", WRONG.values(), ids=WRONG)
@caches
def test_wrong_input_leaves_the_cache_as_it_was(make, shown, given, more, said):
    data, cache = drawn(), make()
    go = [t[:, :, :3] for t in (data.query, data.key, data.value)]
    cache.attend(*go)
    with pytest.raises(RegardError) as error:
        cache.attend(*given, **more)
    assert said in str(error.value)
    assert cache.lengths.tolist() == [3, 3]
    go_on(cache, data, [0, 1], 3, 37, shown)


@pytest.mark.parametrize("make", [KVCache, PagedCache])
def test_a_first_call_that_fails_leaves_no_shapes(make):
    data, cache = drawn(), make()
    with pytest.raises(RegardError, match="kv_heads 3 must divide heads 4"):
        cache.attend(data.query, data.query[:, :3], data.query[:, :3])
    cache.attend(data.query[:1], data.key[:1], data.value[:1])
    assert cache.lengths.tolist() == [LENGTH]


def test_added_sequences_stay_when_a_call_fails():
    cache = PagedCache(4)
    cache.add(2)
    with pytest.raises(RegardError, match="kv_heads 3 must divide heads 4"):
        cache.attend(ODD.query, ODD.query[:, :3], ODD.query[:, :3])
    assert cache.lengths.tolist() == [0, 0]
    cache.attend(*QKV, lengths=[2, 3])
    assert cache.lengths.tolist() == [2, 3]


ARGUMENTS = {
    "capacity": (lambda: KVCache(capacity=-1), "capacity is -1; give a number of slots"),
    "evict": (lambda: KVCache(evict=5), "evict is 5; give a policy, such as H2O(512)"),
    "window": (lambda: WindowCache(0), "WindowCache(0, first=0): give window ≥ 1, first ≥ 0"),
    "first": (lambda: WindowCache(4, first=-1), "give window ≥ 1, first ≥ 0"),
    "block": (lambda: PagedCache(0), "PagedCache(0, blocks=None): give block ≥ 1 and blocks ≥ 1"),
    "blocks": (lambda: PagedCache(4, blocks=0), "blocks=0): give block ≥ 1 and blocks ≥ 1"),
    "empty": (lambda: KVCache().key, "KVCache() is empty: append keys and values first"),
    "empty pages": (lambda: PagedCache().tables(), "is empty: append keys and values first"),
    "layout": (lambda: KVCache().layout, "nothing was appended yet"),
    "rows": (lambda: filled().select([2]), "select: rows [2]; the batch has items 0 … 1"),
    "crop": (lambda: filled().crop(4), "crop: 4 of 3 tokens"),
    "fork": (lambda: filled(PagedCache()).fork(2), "fork: row 2; the batch has items 0 … 1"),
    "fork length": (lambda: filled(PagedCache()).fork(1, 4), "length 4; item 1 has 3 tokens"),
}


def filled(cache=None):
    cache = KVCache() if cache is None else cache
    cache.append(ODD.key, ODD.value)
    return cache


@pytest.mark.parametrize("make, said", ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments(make, said):
    with pytest.raises(RegardError) as error:
        make()
    assert said in str(error.value)


@pytest.mark.parametrize("make", [KVCache, PagedCache])
def test_a_cache_keeps_no_graph(make):
    cache, (query, key, value) = make(), QKV
    with pytest.raises(RegardError, match=r"keeps no graph; run under torch.no_grad"):
        cache.attend(query, key.clone().requires_grad_(), value)
    with torch.no_grad():
        out = cache.attend(query, key.clone().requires_grad_(), value)
    assert not out.requires_grad
    # A gradient by the query alone is whole
    asked = query.clone().requires_grad_()
    make().attend(asked, key, value).sum().backward()
    assert asked.grad is not None
