"""Caches that forget, in a padded batch: each item keeps what it would keep alone."""

import copy

import pytest
import torch
from torch import Tensor

from regard import ALiBi, Causal, Padding, TopK, attention
from regard.cache import H2O, TOVA, KVCache, SnapKV, WindowCache
from regard.call.masks import Dense, First, Window

N, STEPS, HEADS, DIM = 21, 12, 2, 8
WINDOWS = [WindowCache(6, first=3), WindowCache(1, first=4), WindowCache(9, first=2)]
POLICIES = [H2O(9), H2O(8, recent=2), TOVA(7), SnapKV(9, 3, kernel=5), SnapKV(8, 2, pool="max")]
CACHES = [*WINDOWS, *(KVCache(evict=policy) for policy in POLICIES)]


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    shape = (1, HEADS, N + STEPS, DIM)
    return [torch.randn(shape, dtype=torch.float64) for _ in range(3)]


def fed(cache, given: list[Tensor], keep: Tensor | None, sizes: list[int], told: int = 99, **more):
    """The outputs of a cache fed in pieces. told: how many calls are told of padding."""
    at, outs = 0, []
    for call, n in enumerate(sizes):
        mask = Causal()
        if keep is not None and call < told:
            mask = mask & Padding(keep[:, : at + n])
        part = [t[:, :, at : at + n] for t in given]
        outs.append(cache.attend(*part, mask=mask, **more))
        at += n
    return torch.cat(outs, 2)


SIZES = {
    "prompt": [N, *(1,) * STEPS],
    "short prompt": [2, *(1,) * (N + STEPS - 2)],
    "chunks": [3, 8, 1, 9, *(1,) * STEPS],
}


def left_padded(given: list[Tensor], pads: int, sizes: list[int]) -> tuple:
    """The item after padding, beside one that is as long without: tensors, keep, sizes."""
    torch.manual_seed(1)
    long = [torch.randn(1, HEADS, pads + N + STEPS, DIM).double() for _ in range(3)]
    short = [torch.cat([torch.randn(1, HEADS, pads, DIM).double(), t], 2) for t in given]
    keep = torch.ones(2, pads + N + STEPS, dtype=torch.bool)
    keep[1, :pads] = False
    both = [torch.cat(pair) for pair in zip(long, short, strict=True)]
    return both, keep, [pads + sizes[0], *sizes[1:]]


@pytest.mark.sample(1)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("pads", [1, 3, 7])
@pytest.mark.parametrize("cache", CACHES, ids=repr)
def test_left_padding_changes_nothing(cache, pads, sizes):
    given = tensors()
    alone = fed(copy.deepcopy(cache), given, None, SIZES[sizes])
    both, keep, longer = left_padded(given, pads, SIZES[sizes])
    out = fed(copy.deepcopy(cache), both, keep, longer)
    torch.testing.assert_close(out[1:, :, pads:], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pads", [3, 7])
def test_the_item_beside_it_is_as_alone(pads):
    both, keep, sizes = left_padded(tensors(), pads, SIZES["prompt"])
    alone = fed(WindowCache(6, first=3), [t[:1] for t in both], None, sizes)
    out = fed(WindowCache(6, first=3), both, keep, sizes)
    torch.testing.assert_close(out[:1], alone, rtol=0, atol=1e-12)


def whole(given: list[Tensor], keep: Tensor, window: int, first: int, **more) -> Tensor:
    """Uncached attention of what a WindowCache shows: the first that are not padding."""
    firsts = keep & (keep.cumsum(1) <= first)
    mask = Causal() & Padding(keep) & (Window(window) | Padding(firsts))
    return attention(*given, mask=mask, engine="reference", **more)


@pytest.mark.parametrize("kept", ["left", "right", "middle", "later"])
@pytest.mark.parametrize("cache", WINDOWS, ids=repr)
def test_outputs_are_those_of_the_first_real_tokens(cache, kept):
    """Wherever padding stands; with a bias that goes by position."""
    torch.manual_seed(0)
    given = [torch.randn(2, HEADS, N + STEPS, DIM).double() for _ in range(3)]
    at = {
        "left": slice(0, 5),
        "right": slice(2, N),
        "middle": slice(1, 9),
        "later": slice(N, N + 3),
    }
    keep = torch.ones(2, N + STEPS, dtype=torch.bool)
    keep[1, at[kept]] = False
    more = {"bias": ALiBi()}
    for sizes in SIZES.values():
        out = fed(copy.deepcopy(cache), given, keep, sizes, **more)
        right = whole(given, keep, cache.window, cache.first, **more)
        torch.testing.assert_close(out, right, rtol=0, atol=1e-12)


def test_what_was_said_of_padding_is_remembered():
    """A decode step's mask need not say again which were the first."""
    given = tensors()
    both, keep, sizes = left_padded(given, 5, SIZES["prompt"])
    again = fed(WindowCache(6, first=3), both, keep, sizes)
    out = fed(WindowCache(6, first=3), both, keep, sizes, told=1)
    # While padding is in the window it is seen again
    torch.testing.assert_close(out, again, rtol=0, atol=1e-12)


def test_select_crop_copy_and_errors_keep_the_first():
    both, keep, sizes = left_padded(tensors(), 5, [3, *(1,) * 20])
    cache = WindowCache(6, first=3)
    total = sum(sizes)
    both, keep = [t[:, :, :total] for t in both], keep[:, :total]
    fed(cache, both, keep, sizes[:1])
    cache.crop(2)  # two of the first real tokens are forgotten, and come again
    with pytest.raises(Exception, match="does not broadcast"):
        cache.attend(*(t[:, :, 6:9] for t in both), mask=Causal() & Dense(torch.ones(3, 5) > 0))
    cache.select([1, 0, 1])
    cache = copy.deepcopy(cache)
    again = [t[[1, 0, 1]] for t in both]
    outs, at = [], 6
    for n in (2, *sizes[1:]):
        part = [t[:, :, at : at + n] for t in again]
        outs.append(cache.attend(*part, mask=Causal() & Padding(keep[[1, 0, 1], : at + n])))
        at += n
    right = whole(again, keep[[1, 0, 1]], 6, 3)
    torch.testing.assert_close(torch.cat(outs, 2), right[:, :, 6:], rtol=0, atol=1e-12)


def test_observers_see_the_first_real_tokens():
    both, keep, sizes = left_padded(tensors(), 5, SIZES["prompt"])
    cache = WindowCache(6, first=3)
    fed(cache, both, keep, sizes[:-1])
    _, (top,) = cache.attend(
        *(t[:, :, -1:] for t in both), mask=Causal() & Padding(keep), observe=[TopK(9)]
    )
    last = keep.shape[1] - 1
    window = set(range(last - 5, last + 1))
    seen = [set(top.indices[b, 0, 0].tolist()) - {-1} for b in range(2)]
    assert seen == [window | {0, 1, 2}, window | {5, 6, 7}]


def test_without_padding_it_is_first():
    """`First(n)`, as ever: no state is kept."""
    given, keep = tensors(), torch.ones(1, N + STEPS, dtype=torch.bool)
    cache = WindowCache(6, first=3)
    out = fed(cache, given, keep, SIZES["prompt"])
    mask = Causal() & (Window(6) | First(3))
    right = attention(*given, mask=mask, engine="reference")
    torch.testing.assert_close(out, right, rtol=0, atol=1e-12)
    assert cache._first_at is None
