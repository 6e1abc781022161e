"""What a cache holds: its room, items that come and go, pages."""

import pytest
import torch
from torch import Tensor

from cases import assert_within, floats
from regard import Causal, Full, Mask, RegardError, attention
from regard.cache import KVCache, PagedCache, WindowCache
from regard.call.checked import Call
from regard.engines import ENGINES
from test_caches import (
    BATCH,
    CHUNKS,
    DIM,
    EXACT,
    KV_HEADS,
    V_DIM,
    Drawn,
    caches,
    drawn,
    pieces,
    ragged_feed,
    whole,
)


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


def plain_and_exact(data: Drawn) -> list[Tensor]:
    """The reference in float32, and the truth in float64."""
    made = (data.query, data.key, data.value)
    return [
        whole(Drawn(*(t.to(dtype) for t in made)), Full(), {})
        for dtype in (torch.float32, torch.float64)
    ]


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


def of_tables(cache: PagedCache) -> list[Tensor]:
    """Each sequence's keys, read the way an engine would."""
    tables = cache.tables()
    assert tables.pages.dtype == tables.lengths.dtype == torch.int32
    keys = []
    for row, length in zip(tables.pages.tolist(), tables.lengths.tolist(), strict=True):
        count = -(-length // cache.page_size)
        assert all(b >= 0 for b in row[:count])
        assert all(b == -1 for b in row[count:])
        found = [
            tables.key[row[i // cache.page_size], :, i % cache.page_size] for i in range(length)
        ]
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
    assert tables.pages.shape == (3, 4)
    assert cache.pages == 4 + 3 + 4


def test_a_shared_prefix_is_held_once_and_copied_on_write():
    data, cache = drawn(batch=1), PagedCache(4)
    prompt = [t[:, :, :10] for t in (data.query, data.key, data.value)]
    cache.attend(*prompt)
    assert cache.pages == 3
    cache.select([0] * 5)
    assert cache.pages == 3
    tables = cache.tables().pages
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
    assert cache.pages == 2 + 5 * 3
    cache.select([2])
    assert cache.pages == 5
    assert torch.equal(of_tables(cache)[0], joined.key[2])


def test_fork_shares_a_part():
    data, cache = drawn(batch=1), PagedCache(4)
    cache.attend(data.query[:, :, :11], data.key[:, :, :11], data.value[:, :, :11])
    assert cache.fork(0, 6) == 1
    assert cache.fork(0) == 2
    assert cache.fork(1, 0) == 3
    assert cache.lengths.tolist() == [11, 6, 11, 0]
    assert cache.pages == 3
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
    data, cache = drawn(12, batch=3), PagedCache(4, pages=6)
    step = [t[:2] for t in (data.query, data.key, data.value)]
    cache.attend(*step)
    assert cache.pages == 6
    pool = cache.tables().key.data_ptr()
    one = [t[:, :, :1] for t in step]
    with pytest.raises(RegardError) as error:
        cache.attend(*one)
    assert str(error.value) == (
        "PagedCache(4, pages=6): the new tokens need 2 more pages of 4, 0 are free; drop "
        "sequences with select, or give a larger pool"
    )
    assert cache.lengths.tolist() == [12, 12]
    assert torch.equal(of_tables(cache)[1], data.key[1])
    cache.select([1])
    cache.add()
    assert cache.lengths.tolist() == [12, 0]
    assert cache.pages == 3
    late = [torch.stack([t[1], t[2]]) for t in (data.query, data.key, data.value)]
    out = cache.attend(*late, lengths=[0, 12])
    torch.testing.assert_close(out[1], whole(data, Full(), {})[2], **EXACT)
    assert cache.tables().key.data_ptr() == pool
    assert cache.nbytes == 6 * KV_HEADS * 4 * (DIM + V_DIM) * 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_freed_block_brings_nothing_along(dtype):
    data, cache = drawn(13, dtype, batch=3), PagedCache(4, pages=12)
    bad = torch.full((1, KV_HEADS, 48, DIM), torch.nan, dtype=dtype)
    cache.append(bad, bad[..., :V_DIM])
    cache.select([])
    plain, exact = plain_and_exact(data)
    for out, starts, new in ragged_feed(cache, data):
        for item, (start, n) in enumerate(zip(starts, new, strict=True)):
            at = (item, slice(None), slice(start, start + n))
            assert_within(out[item, :, :n], plain[at], exact[at], dtype)


def test_engine_cpu_reads_the_blocks_in_place(monkeypatch):
    data, cache, out = drawn(dtype=torch.float32), PagedCache(4), []
    if ENGINES["cpu"].why_not(Call.checked(data.query, data.key, data.value)):
        pytest.skip("engine cpu is not built here")
    monkeypatch.setattr(PagedCache, "read", lambda self: pytest.fail("it gathers"))
    for at in pieces(CHUNKS["chunks"]):
        given = (data.query[:, :, at], data.key[:, :, at], data.value[:, :, at])
        out.append(cache.attend(*given))
    assert_within(torch.cat(out, 2), *plain_and_exact(data))


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
        assert_within(torch.cat(out, 2), *plain_and_exact(same))
