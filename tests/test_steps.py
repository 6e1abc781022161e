"""The decode step of a cache that evicts: by the kernels what it is in plain torch, bit for bit."""

import copy

import pytest
import torch

from cases import floats
from regard import ALiBi, Causal, Full, Received, RegardError, Window
from regard.cache import H2O, TOVA, KVCache, SnapKV, WindowCache
from regard.engines.cpu import native
from regard.ops.cache.decode_step import DecodePlan, Steady

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="built without the compiled kernels")

MAKES = {
    "full": lambda cache, _: cache(),
    "H2O": lambda cache, _: cache(evict=H2O(12)),
    "H2O, no recent": lambda cache, _: cache(evict=H2O(7, recent=0)),
    "H2O, recent alone": lambda cache, _: cache(evict=H2O(8, recent=8)),
    "TOVA": lambda cache, _: cache(evict=TOVA(12)),
    "TOVA, one": lambda cache, _: cache(evict=TOVA(1)),
    "SnapKV": lambda cache, _: cache(evict=SnapKV(12, window=4)),
    "window": lambda _, window: window(8),
    "window, first": lambda _, window: window(8, first=3),
    "the newest alone": lambda _, window: window(1),
    "the newest and first": lambda _, window: window(1, first=2),
}
makes = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Plainly:
    """Every step by the way that serves every call."""

    def _evict_one(self, *_, **__) -> bool:
        return False

    def _by_plan(self, *_) -> None:
        return None


class PlainKVCache(Plainly, KVCache):
    pass


class PlainWindowCache(Plainly, WindowCache):
    pass


def drawn(batch, heads, kv_heads, n, dtype, rng):
    sizes = ((heads, 8), (kv_heads, 8), (kv_heads, 5))
    return [(floats(rng, batch, h, n, dim) * 1.5).to(dtype) for h, dim in sizes]


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """How many slots each step of the kernels was over."""
    made: list[int] = []

    def counted(steady, *rest):
        made.append(steady.positions.shape[2])
        evict(steady, *rest)

    evict = Steady.evict
    monkeypatch.setattr(Steady, "evict", counted)
    return made


def assert_same(ours: KVCache, plain: KVCache) -> None:
    assert torch.equal(ours.positions, plain.positions)
    assert torch.equal(ours.key, plain.key)
    assert torch.equal(ours.value, plain.value)
    for mine, theirs in zip(ours.read(), plain.read(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.sample(1)
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@makes
def test_the_same_is_kept(make, dtype, heads, kv_heads, steps):
    rng = torch.Generator().manual_seed(0)
    ours, plain = make(KVCache, WindowCache), make(PlainKVCache, PlainWindowCache)
    for n in (20, *(1,) * 30, 3, *(1,) * 12):
        data = drawn(2, heads, kv_heads, n, dtype, rng)
        assert torch.equal(ours.attend(*data), plain.attend(*data))
    assert len(steps) == (0 if ours._bound is None or isinstance(ours._evict, SnapKV) else 42)
    assert_same(ours, plain)


@makes
def test_with_other_calls_between(make, steps):
    """Items come and go, what is held is looked at, observed, and a call fails."""
    rng = torch.Generator().manual_seed(1)
    ours, plain = make(KVCache, WindowCache), make(PlainKVCache, PlainWindowCache)
    for turn in range(40):
        data = drawn(len(ours._lengths) or 2, 4, 2, 20 if not turn else 1, torch.float32, rng)
        if turn % 7 == 3:
            for cache in (ours, plain):
                cache.select([1, 0, 1])
            continue
        if turn % 9 == 5:
            assert_same(ours, plain)
        if turn % 11 == 4:
            for cache in (ours, plain):
                with pytest.raises(RegardError):
                    cache.attend(*data, scale=1.0, softcap=-1.0)
        if turn % 5 == 2:
            mine, theirs = (c.attend(*data, observe=[Received()]) for c in (ours, plain))
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1][0].sum, theirs[1][0].sum)
            continue
        with torch.inference_mode(turn % 2 == 1):
            assert torch.equal(ours.attend(*data), plain.attend(*data))
    assert_same(ours, plain)


@pytest.fixture
def planned(monkeypatch) -> list[bool]:
    """Of each decode step whether the plan of the last served it."""
    served: list[bool] = []
    serves = DecodePlan.serves
    monkeypatch.setattr(
        DecodePlan, "serves", lambda *given: served.append(serves(*given)) or served[-1]
    )
    return served


@pytest.mark.parametrize("make", [MAKES["full"], MAKES["H2O"], MAKES["window"]])
def test_what_is_asked_may_change(make, planned):
    """A step is not the last's but for its query: as it is asked, so it is answered."""
    rng = torch.Generator().manual_seed(2)
    ours, plain = make(KVCache, WindowCache), make(PlainKVCache, PlainWindowCache)
    changes = (
        {}, {"scale": 0.3}, {}, {"softcap": 2.0}, {"sinks": torch.ones(4)}, {"return_lse": True},
        {"mask": Causal() & Window(5)}, {"bias": ALiBi()}, {"engine": "tiled"}, {"mask": Full()},
        {"engine": "cpu"}, {},
    )  # fmt: skip
    before = torch.get_num_threads()
    try:
        for turn, asked in enumerate(({}, *changes, *changes)):
            torch.set_num_threads(1 + turn % 2)
            data = drawn(2, 4, 2, 20 if not turn else 1, torch.float32, rng)
            if turn % 3 == 1:  # the same numbers, laid out otherwise
                data[0] = data[0].transpose(0, 1).contiguous().transpose(0, 1)
            mine, theirs = (c.attend(*data, **asked) for c in (ours, plain))
            pairs = zip(mine, theirs, strict=True) if asked.get("return_lse") else [(mine, theirs)]
            for one, other in pairs:
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)
    assert any(planned)
    assert not all(planned)
    assert_same(ours, plain)


def test_a_full_cache_grows_shrinks_and_is_watched(planned):
    rng = torch.Generator().manual_seed(3)
    ours, plain = KVCache(capacity=4), PlainKVCache()
    for turn in range(30):
        data = drawn(2, 4, 2, 1 + (turn % 9 == 8), torch.bfloat16, rng)
        if turn % 10 == 9:
            for cache in (ours, plain):
                cache.crop(3)
        if turn % 7 == 6:
            for cache in (ours, plain):
                cache.select([1, 0])
        if turn % 6 == 5:
            with pytest.raises(RegardError, match="one dtype"):
                ours.attend(data[0].float(), *data[1:])
        if turn % 5 == 4:
            both = [c.attend(*data, observe=[Received()])[1][0].sum for c in (ours, plain)]
            assert torch.equal(*both)
        else:
            assert torch.equal(ours.attend(*data), plain.attend(*data))
    assert any(planned)
    assert_same(ours, plain)


def test_a_query_that_asks_for_gradients_gets_them(planned):
    rng = torch.Generator().manual_seed(4)
    cache = KVCache(capacity=16)
    for n in (5, 1, 1):
        data = drawn(1, 2, 2, n, torch.float32, rng)
        cache.attend(*data)
    data[0].requires_grad_()
    cache.attend(*data).sum().backward()
    assert data[0].grad is not None
    assert planned == [True, True, False]


@makes
def test_a_copy_goes_on_by_itself(make):
    rng = torch.Generator().manual_seed(5)
    ours, plain = make(KVCache, WindowCache), make(PlainKVCache, PlainWindowCache)
    for n in (20, 1, 1, 1):
        data = drawn(2, 4, 2, n, torch.float32, rng)
        for cache in (ours, plain):
            cache.attend(*data)
    copied, other = copy.deepcopy(ours), copy.deepcopy(plain)
    for _ in range(5):
        data = drawn(2, 4, 2, 1, torch.float32, rng)
        assert torch.equal(ours.attend(*data), plain.attend(*data))
        data = drawn(2, 4, 2, 1, torch.float32, rng)
        assert torch.equal(copied.attend(*data), other.attend(*data))
    assert_same(ours, plain)
    assert_same(copied, other)


def test_equal_worth_leaves_the_later(steps):
    """Keys of 0 receive the same: of these the earliest goes, in every head."""
    cache = KVCache(evict=TOVA(4))
    for n in (6, 1, 1, 1):
        nothing = torch.zeros(1, 2, n, 4)
        cache.attend(nothing, nothing[:, :1], nothing[:, :1])
    assert cache.positions.tolist() == [[[5, 6, 7, 8]]]
    assert steps == [5, 5, 5]
