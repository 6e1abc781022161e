"""Every observer against the dense float64 weights, and results that merge to the whole."""

from dataclasses import fields
from functools import reduce
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import regard.engines.second_pass.strips
from cases import CASES, FEW, ON_THE_CPU, Case, at
from observer_truths import assert_seen, bar_of, parts, watchers
from regard import (
    ALiBi,
    Causal,
    Distances,
    Entropy,
    First,
    Full,
    LogSumExp,
    Map,
    Padding,
    Received,
    Rows,
    TopK,
    Window,
    attention,
    observe,
)
from regard.call.checked import Call
from regard.engines import reference
from regard.engines.second_pass.top_k import largest

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def look(case: Case, engine: str, dtype: torch.dtype) -> None:
    bar, tensors, request = bar_of(case, dtype), case.tensors(dtype=dtype), case.request(dtype)
    asked = watchers(bar.exact.place.query_start)
    _, seen = attention(*tensors, **request, engine=engine, observe=asked)
    assert len(seen) == len(asked)
    for observer, result in zip(asked, seen, strict=True):
        assert_seen(observer, result, bar, roundings=bar.of_lse)


@pytest.mark.sample(every=5)
@every_case
def test_all_observers_are_exact(case):
    look(case, "tiled", torch.float64)


@pytest.mark.sample(every=5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_all_observers_inside_the_kernels(case, dtype):
    """Engine cpu gathers them in its forward, in float32."""
    look(case, "cpu", dtype)


@pytest.mark.sample(1)
@pytest.mark.parametrize("sizes", [at(1, 3000), at(5, 2100, heads=8), at(64, 1100, heads=2)])
@pytest.mark.parametrize("mask", [Full(), Causal() & Window(1500)], ids=str)
def test_all_observers_where_keys_are_cut_into_chunks(sizes, mask):
    """Few queries and many keys: chunks of a row are joined."""
    look(Case("", sizes, lambda s, g: {"mask": mask}), "cpu", torch.float32)


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("case", [c for c in FEW if c.sizes.q_len > 64], ids=str)
def test_all_observers_in_small_strips(case, monkeypatch):
    """With a small budget the small cases, too, take many strips and parts."""
    monkeypatch.setattr(regard.engines.second_pass.strips, "BUDGET", 2**14)
    look(case, "tiled", torch.float64)


@pytest.mark.parametrize("name", ["nested", "left padding", "bias that hides", "129 × 64"])
def test_all_observers_beside_sdpa(name):
    look(next(c for c in CASES if c.name == name), "sdpa", torch.float64)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("case", FEW[::3], ids=str)
def test_all_observers_in_rounding(case):
    look(case, "tiled", torch.float32)


@pytest.mark.parametrize("engine", ON_THE_CPU)
def test_results_carry_no_gradients(engine):
    leaves = [t.requires_grad_() for t in Case("", at(9, 12)).tensors(dtype=torch.float32)]
    out, seen = attention(*leaves, engine=engine, observe=watchers(3))
    assert out.requires_grad
    assert not any(t.requires_grad for result in seen for t in parts(result).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 31, 128, 129, 300, 1000])
def test_largest_takes_the_lower_of_ties(n, dtype):
    rng = torch.Generator().manual_seed(n)
    rows = torch.randint(-3, 4, (5, n), generator=rng).to(dtype) * 0.5
    rows[0], rows[1, ::2], rows[2] = 0.0, -0.0, -torch.inf
    rows[3, n // 2 :] = -torch.inf
    for k in {min(k, n) for k in (1, 2, 5, 40, n)}:
        values, indices = largest(rows, k)
        wanted = rows.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(indices, wanted.indices[:, :k])
        assert torch.equal(values, wanted.values[:, :k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 7, 60, 400])
@pytest.mark.parametrize("mask", [Full(), Causal(), ~Window(9), Padding(torch.arange(300) % 3 > 0)])
def test_equal_scores_go_to_the_lower_key(mask, k, dtype):
    """All scores 0, or in three steps: the first visible keys of the highest step."""
    query = torch.zeros(1, 2, 6, 4, dtype=dtype)
    query[:, 1] = 1
    key = torch.zeros(1, 2, 300, 4, dtype=dtype)
    key[:, 1, :, 0] = torch.arange(300) % 3
    (top,) = observe(query, key, observe=[TopK(k)], mask=mask, query_start=200)
    truth = Call.checked(query, key, None, mask=mask, query_start=200)
    scores = reference.scores(truth)
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    keys = ranked.where(scores.gather(-1, ranked) > -torch.inf, -1)
    keys = torch.nn.functional.pad(keys, (0, max(0, k - 300)), value=-1)
    assert torch.equal(top.indices.long(), keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 3, 4, 8])
@pytest.mark.parametrize("q_len", [3, 70])
def test_the_largest_of_small_whole_scores(q_len, k, dtype):
    """Each row meets keys in an order of its own: rising, falling, in steps, many equal."""
    keys, dim = 300, 16
    j = torch.arange(keys)
    columns = [j // 2, -j // 2, j % 5, j // 64 % 2, 0 * j, (7 * j) % 127, (j == 31) + (j == 63) * 1]
    key = torch.stack([columns[d % len(columns)] for d in range(dim)], -1).to(dtype)[None, None]
    query = torch.eye(dim, dtype=dtype)[torch.arange(q_len) * 5 % dim][None, None]
    _, (top,) = attention(query, key, key, scale=1.0, engine="cpu", observe=[TopK(k)])
    scores = query.double() @ key.double().mT
    wanted = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    assert torch.equal(top.indices.long(), wanted)


def test_a_nan_surfaces():
    query, key, value = Case("", at(9, 12)).tensors(dtype=torch.float32)
    query[1, 0, 4, 2] = torch.nan
    _, seen = attention(query, key, value, observe=[TopK(3), Received(), Entropy(), Map(4, 4)])
    top, received, entropy, pooled = seen
    for rows in (top.weights.isnan().all(-1), entropy.values.isnan()):
        assert rows.nonzero().tolist() == [[1, 0, 4]]
    assert received.sum.isnan().all(-1).nonzero().tolist() == [[1, 0]]
    assert pooled.weights.isnan().any(-1).any(-1).nonzero().tolist() == [[1, 0]]


def mergeable(start: int) -> list:
    return [o for o in watchers(start) if not isinstance(o, Rows)] + [
        Rows([max(start, 0) + 3, max(start, 0) + 40])
    ]


def assert_same(ours, truth, tolerance: float = 1e-12) -> None:
    assert type(ours) is type(truth)
    for f in fields(truth):
        mine, wanted = getattr(ours, f.name), getattr(truth, f.name)
        if isinstance(wanted, Tensor):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=tolerance)
        else:
            assert mine == wanted, f.name


LONG = Case("", at(61))
MASKS = [Full(), Causal(), Causal() & Window(9), Causal() & (Window(5) | First(3)), ~Causal()]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "mask, growing", [*((m, False) for m in MASKS), *((m, True) for m in MASKS[1:4])], ids=str
)
@pytest.mark.parametrize("start", [0, 7, 64, -20])
def test_query_chunks_then_are_the_whole(mask, start, growing):
    """Prefill, decode steps, another prefill; the keys of a cache may grow with them."""
    query, key, _ = LONG.tensors()
    request = {"mask": mask, "bias": ALiBi(), "sinks": torch.arange(4.0)}
    request["key_start"] = max(start, 0)  # queries may stand before the first key
    asked = mergeable(start)
    whole = observe(query, key, observe=asked, query_start=start, **request)
    ends = [0, 17, 18, 19, 20, 50, 61]
    steps = [
        observe(
            query[:, :, a:b], key[:, :, :b] if growing and start >= 0 else key, observe=asked,
            query_start=start + a, **request,
        )
        for a, b in pairwise(ends)
    ]  # fmt: skip
    for *results, truth in zip(*steps, whole, strict=True):
        assert_same(reduce(lambda a, b: a.then(b), results), truth)


@pytest.mark.sample(1)
@pytest.mark.parametrize("start", [0, 7, 64, -20])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_key_shards_beside_are_the_whole(mask, start):
    query, key, _ = LONG.tensors()
    request = {"mask": mask, "bias": ALiBi(), "sinks": torch.arange(4.0), "query_start": start}
    asked = mergeable(start)
    first = max(start, 0)
    *whole, lse = observe(query, key, observe=[*asked, LogSumExp()], key_start=first, **request)
    ends = [0, 20, 21, 33, 61]
    shards = [
        observe(
            query, key[:, :, a:b], observe=asked, lse=lse.values, key_start=first + a, **request
        )
        for a, b in pairwise(ends)
    ]
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        for *results, truth in zip(*(shards[i] for i in order), whole, strict=True):
            if not isinstance(truth, type(lse)):  # given as the whole's
                assert_same(reduce(lambda a, b: a.beside(b), results), truth)


def test_lse_of_shards_beside_is_the_wholes():
    query, key, _ = LONG.tensors()
    (whole,) = observe(query, key, observe=[LogSumExp()], mask=Causal())
    shards = [
        observe(query, part, observe=[LogSumExp()], mask=Causal(), query_start=0, key_start=20 * n)
        for n, part in enumerate(key.split(20, 2))
    ]
    assert_same(reduce(lambda a, b: a.beside(b), (s for (s,) in shards)), whole)


def test_ties_across_shards_go_to_the_lower_key():
    query, key = torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 9, 4)
    lse = torch.full((1, 1, 3), 9.0).log()
    shards = [
        observe(query, key[:, :, :n], observe=[TopK(5)], lse=lse, key_start=s, query_start=8)[0]
        for s, n in ((6, 3), (0, 2), (2, 4))
    ]
    top = reduce(lambda a, b: a.beside(b), shards)
    assert top.indices.tolist() == [[[[0, 1, 2, 3, 4]] * 3]]
    torch.testing.assert_close(top.weights, torch.full((1, 1, 3, 5), 1 / 9))
    torch.testing.assert_close(top.rest, torch.full((1, 1, 3), 4 / 9))


# What chooses among all keys is refused where lse may be that of more keys (tests/test_blocks.py)
ALONE = [c for c in FEW[::2] if "dropout" not in c.request() and "top blocks" not in c.name]


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_the_second_pass_alone(case):
    """regard.observe, with the lse of the call and without, is what `attention` saw."""
    (query, key, value), request = case.tensors(), case.request()
    asked = [TopK(5), Received(), Entropy(), LogSumExp(), Map(16, 16), Distances()]
    _, lse, seen = attention(
        query, key, value, **request, engine="tiled", return_lse=True, observe=asked
    )
    for given in (None, lse):
        alone = observe(query, key, **request, lse=given, observe=asked)
        for mine, theirs in zip(alone, seen, strict=True):
            assert_same(mine, theirs, 1e-9 if case.magnitude > 100 else 1e-12)
