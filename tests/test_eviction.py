"""Eviction, token for token: what is kept, and what is computed from it, as the papers say it."""

import copy

import pytest
import torch
from torch import Tensor

import regard
import zoo
from cases import assert_within, bools, floats
from eager_eviction import Eager
from regard import (
    ALiBi,
    Causal,
    Dense,
    Distances,
    Entropy,
    First,
    Map,
    NormTopK,
    Padding,
    Received,
    RegardError,
    RelativeBias,
    Rows,
    TopK,
    Window,
    attention,
)
from regard.cache import H2O, TOVA, KVCache, PagedCache, SnapKV, WindowCache
from regard.call.biases import relative_bucket

EXACT = dict(rtol=0, atol=1e-12)


POLICIES = [
    H2O(12),
    H2O(10, recent=0),
    H2O(6, recent=5),
    H2O(1, recent=0),
    H2O(7, recent=7),
    SnapKV(12, window=4),
    SnapKV(12, window=4, kernel=3, pool="max"),
    SnapKV(5, window=5, kernel=1),
    SnapKV(9, window=1, kernel=7),
    TOVA(12),
    TOVA(1),
]
policies = pytest.mark.parametrize("policy", POLICIES, ids=str)
CHUNKS = {
    "at once": (30,),
    "one by one": (1,) * 40,
    "prompt and steps": (20, *(1,) * 20),
    "short prompt": (5, *(1,) * 35),
    "chunks": (5, 1, 1, 13, 1, 2, 3, 3, 3, 8),
    "few at a time": (10, *(2,) * 15),
}
chunks = pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)


def drawn(batch: int, heads: int, kv_heads: int, length: int, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    query, key = (floats(rng, batch, h, length, 8).double() * 1.5 for h in (heads, kv_heads))
    return [query, key, floats(rng, batch, kv_heads, length, 6).double()]


def pieces(sizes) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(e - n, e) for e, n in zip(ends, sizes, strict=True)]


def assert_kept(cache: KVCache, twins: list[Eager]) -> None:
    for item, twin in enumerate(twins):
        for kv, held in enumerate(twin.kept):
            ours = [p for p in cache.positions[item, kv].tolist() if p >= 0]
            assert ours == held
            key = cache.key[item, kv, : len(held)]
            assert torch.equal(key, twin.keys[kv, held])
            assert torch.equal(cache.value[item, kv, : len(held)], twin.values[kv, held])


@pytest.mark.sample(1, most=2)
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (4, 1)])
@chunks
@policies
def test_token_for_token(policy, sizes, heads, kv_heads):
    data = drawn(2, heads, kv_heads, sum(sizes))
    cache = KVCache(evict=policy)
    twins = [Eager(policy, heads // kv_heads) for _ in range(2)]
    for at in pieces(sizes):
        out = cache.attend(*(t[:, :, at] for t in data))
        for item, twin in enumerate(twins):
            exact, _ = twin.step(*(t[item, :, at] for t in data))
            torch.testing.assert_close(out[item], exact, **EXACT)
        assert_kept(cache, twins)
    assert cache.length == sum(sizes)


def test_by_hand():
    """H2O of 2 keys, the last one exempt; keys 0 … 3 score ln 1, 2, 3, 1 by every query."""
    key = torch.tensor([1.0, 2.0, 3.0, 1.0]).log()[None, None, :, None]
    query, value = torch.ones_like(key), torch.eye(4)[None, None]
    cache = KVCache(evict=H2O(2, recent=1))
    cache.attend(query[:, :, :2], key[:, :, :2], value[:, :, :2], scale=1.0)
    # Received so far: 1 + 1/3, 2/3. The third query gives 1/6, 2/6, 3/6: 1.5, 1.0; key 1 goes
    out = cache.attend(query[:, :, 2:3], key[:, :, 2:3], value[:, :, 2:3], scale=1.0)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([1 / 6, 2 / 6, 3 / 6, 0]))
    assert cache.positions.tolist() == [[[0, 2]]]
    # The fourth sees keys 0, 2, 3 and gives 1/5, 3/5, 1/5: 1.7 and 1.1; key 2 goes, 3 is exempt
    out = cache.attend(query[:, :, 3:], key[:, :, 3:], value[:, :, 3:], scale=1.0)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([1 / 5, 0, 3 / 5, 1 / 5]))
    assert cache.positions.tolist() == [[[0, 3]]]


def test_equal_worth_leaves_the_later():
    data = [torch.zeros(1, 2, 9, 4) for _ in range(3)]
    cache = KVCache(evict=TOVA(4))
    cache.attend(*data)  # every key has weight 1/9
    assert cache.positions.tolist() == [[[5, 6, 7, 8]] * 2]
    for n in range(3):
        cache.attend(*(t[:, :, :1] for t in data))
        assert cache.positions.tolist() == [[list(range(6 + n, 10 + n))] * 2]


# Masks, biases and observers after eviction

LENGTH = 40
RNG = torch.Generator().manual_seed(5)
KEEP = bools(RNG, LENGTH, share=0.8)
TABLE = floats(RNG, 16, 4).double()
SLOPES = [0.25, 0.0625, 0.015625, 0.00390625]
DENSE = floats(RNG, LENGTH, LENGTH).double()
FAR = RelativeBias(TABLE, bidirectional=False, max_distance=30)


def of_table(h: int, q: int, k: int) -> float:
    bucket = relative_bucket(torch.tensor(k - q), False, 16, 30)
    return float(TABLE[bucket, h])


REQUESTS = {
    "window": (
        lambda at: {"mask": Causal() & Window(9)},
        {"visible": lambda q, k: 0 <= q - k < 9},
    ),
    "window and first": (
        lambda at: {"mask": Causal() & (Window(6) | First(3))},
        {"visible": lambda q, k: k <= q and (q - k < 6 or k < 3)},
    ),
    "padding": (
        lambda at: {"mask": Causal() & Padding(KEEP[: at.stop])},
        {"visible": lambda q, k: k <= q and bool(KEEP[k]), "real": lambda k: bool(KEEP[k])},
    ),
    "dense": (
        lambda at: {"mask": Causal() & Dense(DENSE[at, : at.stop] < 1)},
        {"visible": lambda q, k: k <= q and float(DENSE[q, k]) < 1},
    ),
    "alibi": (lambda at: {"bias": ALiBi()}, {"added": lambda h, q, k: -SLOPES[h] * (q - k)}),
    "relative": (lambda at: {"bias": FAR}, {"added": of_table}),
    "bias": (
        lambda at: {"bias": DENSE[at, : at.stop]},
        {"added": lambda h, q, k: float(DENSE[q, k])},
    ),
}


@pytest.mark.parametrize("request_of, eager", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("policy", [H2O(12), SnapKV(12, window=4), TOVA(12)], ids=str)
def test_masks_and_biases_go_by_position(policy, request_of, eager):
    data = drawn(1, 4, 2, LENGTH)
    cache, twin = KVCache(evict=policy), Eager(policy, 2)
    for at in pieces((20, 1, 1, 5, *(1,) * 10, 3)):
        out = cache.attend(*(t[:, :, at] for t in data), **request_of(at))
        exact, _ = twin.step(*(t[0, :, at] for t in data), **eager)
        torch.testing.assert_close(out[0], exact, **EXACT)
        assert_kept(cache, [twin])


@pytest.mark.parametrize("policy", [H2O(12), SnapKV(12, window=4), TOVA(12)], ids=str)
def test_observers_see_positions(policy):
    """What is observed after an eviction is told by position, the evicted ones having weight 0."""
    data = drawn(1, 4, 2, LENGTH)
    cache, twin = KVCache(evict=policy), Eager(policy, 2)
    asked = [
        TopK(5), Received(), Received(heads="sum"), Received(heads="group_mean"), Entropy(),
        Rows([-1]), Map(8, 8), Map(64, 64, reduce="max"), Distances(6), NormTopK(3),
        Received(queries=(18, 27)),
    ]  # fmt: skip
    for at in pieces((20, 1, 1, 5, *(1,) * 10, 3)):
        out, seen = cache.attend(*(t[:, :, at] for t in data), observe=asked)
        exact, weights = twin.step(*(t[0, :, at] for t in data))
        torch.testing.assert_close(out[0], exact, **EXACT)
        truth = torch.cat(weights)
        top, received, pooled, grouped, entropy, rows, blocks, cells, distances, norm, part = seen
        for ranked, of in ((top, truth), (norm, truth * norms(twin))):
            most = of.topk(ranked.indices.shape[-1])
            listed = ranked.indices[0].long()
            found = of.gather(-1, listed.clamp(min=0)).where(listed >= 0, 0)
            torch.testing.assert_close(found, most.values, **EXACT)
            assert torch.equal(listed >= 0, most.values > 0)
        torch.testing.assert_close(received.sum[0], truth.sum(1), **EXACT)
        assert torch.equal(received.count[0], (truth > 0).sum(1).int())
        torch.testing.assert_close(pooled.sum[0, 0], truth.sum((0, 1)), **EXACT)
        torch.testing.assert_close(grouped.sum[0], truth.unflatten(0, (2, 2)).mean(1).sum(1))
        torch.testing.assert_close(entropy.values[0], -truth.xlogy(truth).sum(-1), **EXACT)
        assert rows.queries == (at.stop - 1,)
        torch.testing.assert_close(rows.weights[0, :, 0], truth[:, -1], **EXACT)
        torch.testing.assert_close(blocks.weights.sum((2, 3))[0], truth.sum((1, 2)), **EXACT)
        assert cells.cols.size == 1
        assert cells.rows.first == at.start
        torch.testing.assert_close(cells.weights[0], truth, **EXACT)
        near = [float(truth[0, i, at.start + i]) for i in range(at.stop - at.start)]
        assert float(distances.past[0, 0, 0]) == pytest.approx(sum(near))
        rows_of = [q - at.start for q in range(18, 27) if at.start <= q < at.stop]
        torch.testing.assert_close(part.sum[0], truth[:, rows_of].sum(1), **EXACT)
        assert_kept(cache, [twin])


def norms(twin: Eager) -> Tensor:
    return twin.values.norm(dim=-1).repeat_interleave(twin.group, 0)[:, None]


@policies
def test_ragged(policy):
    """Every item of a ragged batch is evicted as if it were alone."""
    data = drawn(3, 4, 2, 60)
    cache, twins, starts = KVCache(evict=policy), [Eager(policy, 2) for _ in range(3)], [0, 0, 0]
    calls = [(16, 3, 0), (1, 1, 1), (1, 1, 1), (2, 9, 14), (1, 1, 1), (0, 1, 1), (7, 8, 2)]
    for new in [*calls, *[(1, 1, 1)] * 6]:
        width = max(new) + 1
        parts = [torch.full((3, t.shape[1], width, t.shape[3]), 50.0).double() for t in data]
        for part, tensor in zip(parts, data, strict=True):
            for item, (start, n) in enumerate(zip(starts, new, strict=True)):
                part[item, :, :n] = tensor[item, :, start : start + n]
        out = cache.attend(*parts, lengths=new)
        for item, (start, n) in enumerate(zip(starts, new, strict=True)):
            if not n:
                continue
            own = (t[item, :, start : start + n] for t in data)
            exact, _ = twins[item].step(*own)
            torch.testing.assert_close(out[item, :, :n], exact, **EXACT)
        starts = [s + n for s, n in zip(starts, new, strict=True)]
        assert_kept(cache, twins)
        assert cache.lengths.tolist() == starts


@pytest.mark.parametrize("engine", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("policy", [H2O(12), SnapKV(12, window=4), TOVA(12)], ids=str)
def test_in_float32_the_same_are_kept(policy, engine):
    data = [t.float() for t in drawn(2, 4, 2, 60)]
    ours, plain, exact = (KVCache(evict=policy) for _ in range(3))
    outs = []
    for at in pieces((30, *(1,) * 20, 10)):
        now = [t[:, :, at] for t in data]
        outs.append(
            (
                ours.attend(*now, engine=engine),
                plain.attend(*now, engine="reference"),
                exact.attend(*(t.double() for t in now), engine="reference"),
            )
        )
        assert torch.equal(ours.positions, exact.positions)
    assert_within(*(torch.cat(out, 2) for out in zip(*outs, strict=True)))


@policies
def test_select(policy):
    """Items that are repeated go on each by itself, with what was summed up till then."""
    data = drawn(2, 4, 2, 40)
    cache, twins = KVCache(evict=policy), [Eager(policy, 2) for _ in range(2)]
    for at in pieces((20, 1, 1)):
        cache.attend(*(t[:, :, at] for t in data))
        for item, twin in enumerate(twins):
            twin.step(*(t[item, :, at] for t in data))
    rows = [1, 0, 1]
    cache.select(rows)
    twins = [copy.deepcopy(twins[r]) for r in rows]
    assert_kept(cache, twins)
    others = drawn(3, 4, 2, 40, seed=1)
    for at in pieces((1, 1, 5, 1)):
        cache.attend(*(t[:, :, at] for t in others))
        for item, twin in enumerate(twins):
            twin.step(*(t[item, :, at] for t in others))
        assert_kept(cache, twins)


@pytest.mark.parametrize("sizes", [(300, *(1,) * 40), (1,) * 200, (40,) * 6], ids=str)
@pytest.mark.parametrize("policy", [H2O(48), TOVA(48)], ids=str)
def test_memory_is_bounded_by_the_budget(policy, sizes):
    rng = torch.Generator().manual_seed(0)
    cache, key = KVCache(evict=policy), 2 * 4 * (16 + 8) * 4  # bytes of a key and a value
    for n in sizes:
        cache.attend(*(floats(rng, 2, h, n, d) for h, d in ((8, 16), (4, 16), (4, 8))))
        assert cache.key.shape[2] == min(cache.length, 48)
    # Positions and what H2O has summed up, one slot more, and what a step's query gives each slot
    about = 2 * 4 * (48 + 1) * (4 + 4) + 2 * 8 * (48 + 1) * 4
    assert cache.nbytes <= max(48 + sizes[-1], 48 * 3 // 2 + 16) * key + about
    assert cache.nbytes < 0.5 * cache.length * key


def test_who_appends_has_to_settle():
    """append, attend over it, settle: by hand as `attend` does it."""
    query, key, value = (t[:, :, :9] for t in drawn(1, 4, 2, 9))
    cache, same = KVCache(evict=TOVA(4)), KVCache(evict=TOVA(4))
    cache.append(key, value)
    assert not cache.settled
    for call in (lambda: cache.append(key, value), lambda: cache.attend(query, key, value)):
        with pytest.raises(RegardError, match="evicts by what its last call attended to"):
            call()
    for call in (lambda: cache.select([0]), lambda: cache.crop(1)):
        with pytest.raises(RegardError, match="was not told what its last call attended to"):
            call()
    assert cache.length == 9
    request = cache.layout.request(query, Causal(), None)
    _, seen = attention(query, *cache.read(), **request, observe=cache.wanted)
    cache.settle(seen)
    same.attend(query, key, value)
    assert torch.equal(cache.positions, same.positions)
    assert cache.positions.shape == (1, 2, 4)


@pytest.mark.parametrize("policy", [H2O(12), TOVA(4)], ids=str)
def test_what_was_summed_or_evicted_cannot_be_cropped(policy):
    cache = KVCache(evict=policy)
    cache.attend(*drawn(1, 4, 2, 9))
    with pytest.raises(RegardError, match="what it evicted cannot come back"):
        cache.crop(1)
    assert cache.length == 9


def test_a_failed_call_evicts_nothing():
    data = drawn(1, 4, 2, 30)
    cache, same = KVCache(evict=H2O(6)), KVCache(evict=H2O(6))
    for at in pieces((10, 1, 4, 1)):
        given = [t[:, :, at] for t in data]
        with pytest.raises(RegardError, match="does not broadcast"):
            cache.attend(*given, bias=torch.zeros(3, 99))
        assert torch.equal(cache.attend(*given), same.attend(*given))
        assert torch.equal(cache.positions, same.positions)


# Who watches a module that attends over a cache


class Block(torch.nn.Module):
    """A module of somebody's own, with a cache."""

    kind = "self"

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.cache.attend(query, key, value)


CACHES = {
    "KVCache": KVCache,
    "PagedCache": lambda: PagedCache(4),
    "WindowCache": lambda: WindowCache(9, first=2),
    "H2O": lambda: KVCache(evict=H2O(12)),
    "TOVA": lambda: KVCache(evict=TOVA(12)),
}


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_watching_a_module(make):
    """`watch` sees positions, also of a cache that has evicted, and the same is computed."""
    data, plain = drawn(2, 4, 2, 40), make()
    block, rows = Block(make()), []
    with regard.watch(block, observe=[TopK(40), Received()]) as seen:
        for at in pieces((20, *(1,) * 15, 5)):
            given = [t[:, :, at] for t in data]
            exact, (row,) = plain.attend(*given, observe=[Rows(range(at.start, at.stop))])
            rows.append(torch.nn.functional.pad(row.weights, (0, 40 - at.stop)))
            torch.testing.assert_close(block(*given), exact, **EXACT)
    truth, (layer,) = torch.cat(rows, 2), seen
    assert (layer.kind, layer.q_len, layer.k_len) == ("self", 40, 40)
    torch.testing.assert_close(zoo.dense(layer.seen[0], 40), truth, **EXACT)
    torch.testing.assert_close(layer.seen[1].sum, truth.sum(2), **EXACT)


def test_cutting_what_was_evicted_from():
    data, block = drawn(1, 4, 2, 20), Block(KVCache(evict=H2O(6)))
    cut = regard.Cut("", regard.Edges([(19, 18)]))
    first, second = ([t[:, :, at] for t in data] for at in pieces((19, 1)))
    with regard.watch(block, cut=[cut]):
        block(*first)
        with pytest.raises(RegardError, match="attends to a cache that has evicted; cut it before"):
            block(*second)


def test_dropout_needs_every_position():
    data, cache = drawn(1, 4, 2, 20), KVCache(evict=H2O(6))
    first, second = ([t[:, :, at] for t in data] for at in pieces((10, 10)))
    out = cache.attend(*first, dropout=regard.Dropout(0.5, 3))
    same = attention(*first, mask=Causal(), dropout=regard.Dropout(0.5, 3))
    torch.testing.assert_close(out, same, **EXACT)
    with pytest.raises(RegardError, match="no longer holds what dropout goes by, all positions"):
        cache.attend(*second, dropout=0.5)
    assert cache.length == 10
    cache.attend(*second)
