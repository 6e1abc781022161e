"""Large buffers of caches ask for huge pages, and hold the same numbers where they get none."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from regard.cache import H2O, KVCache, PagedCache, WindowCache
from regard.ops.cache import buffers

# One head of dim 64 in float32: 256 bytes a token
LARGE, SMALL = buffers.LEAST // 256, buffers.LEAST // 256 - 16


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int]]:
    """(first, bytes) of each range that huge pages are asked for; all are refused."""
    ranges: list[tuple[int, int]] = []

    def madvise(first: int, size: int, advice: int) -> int:
        ranges.append((first, size))
        return -1

    monkeypatch.setattr(buffers, "_ADVICE", 14)
    monkeypatch.setattr(buffers, "_madvise", lambda: madvise)
    return ranges


def tokens(count: int) -> tuple[Tensor, Tensor]:
    key = torch.arange(count * 64.0).reshape(1, 1, count, 64)
    return key, key + 0.5


def asks_for(buffer: Tensor, asked: list[tuple[int, int]]) -> bool:
    """Whether somebody asked for all whole pages inside, and for nothing outside."""
    start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    return any(
        start <= first < start + 4096 and end - 4096 < first + size <= end
        and first % 4096 == size % 4096 == 0
        for first, size in asked
    )  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [KVCache, lambda: KVCache(evict=H2O(2 * LARGE)), lambda: WindowCache(2 * LARGE), PagedCache],
    ids=["all", "evicting", "window", "paged"],
)
def test_large_buffers_ask_and_hold_the_same(make, asked):
    cache, (key, value) = make(), tokens(LARGE)
    with torch.inference_mode():
        cache.append(key, value)
    cache.settle(())
    assert all(asks_for(t, asked) for t in cache._buffers())
    if not isinstance(cache, PagedCache):  # there items share their pages
        cache.select([0, 0])
        assert all(asks_for(t, asked) for t in cache._buffers())
    held = cache.read()
    assert all(torch.equal(t[-1:], given) for t, given in zip(held, (key, value), strict=True))


def test_small_buffers_and_those_of_a_fake_tensor_do_not_ask(asked):
    KVCache().append(*tokens(SMALL))
    assert not asked
    with torch._subclasses.FakeTensorMode():  # there is no memory
        KVCache().append(*tokens(LARGE))
    assert not asked


def test_the_system_is_told():
    # A kernel built without them, or another system: there is nobody to ask
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("no Linux with transparent huge pages")
    buffer = buffers.zeros(torch.empty(0), 2 * LARGE, 64)
    middle, inside = buffer.data_ptr() + buffer.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        start, dash, rest = line.split()[0].partition("-")
        if dash:
            inside = int(start, 16) <= middle < int(rest, 16)
        elif inside and line.startswith("VmFlags"):
            assert "hg" in line.split()
            return
    pytest.fail("the buffer is in no mapping")
