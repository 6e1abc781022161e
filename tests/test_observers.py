"""Every observer against the dense float64 weights, and results that merge to the whole."""

from dataclasses import fields
from functools import cache, reduce
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import regard.engines.second_pass.strips
from cases import CASES, FEW, Case, at
from regard import (
    ALiBi,
    Causal,
    Distances,
    Entropy,
    First,
    Full,
    LogSumExp,
    Map,
    MaxScore,
    Padding,
    Received,
    Rows,
    TopK,
    Window,
    attention,
    observe,
)
from regard.call.checked import Call
from regard.engines import ENGINES, reference
from regard.engines.second_pass.top_k import largest

every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Truth:
    """scores and weights (batch, heads, q_len, k_len) of a case, who is visible, and positions."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        tensors, request = case.exactly(dtype)
        self.call = Call.checked(*tensors, **request)
        self.place = self.call.place
        self.scores = reference.scores(self.call)
        self.saturated = case.magnitude > 100 and self.call.softcap is not None
        self.lse = reference.log_sum_exp(self.scores, self.call.sinks)
        blind = (self.lse == -torch.inf)[..., None]
        sinks = torch.zeros(1) - torch.inf if self.call.sinks is None else self.call.sinks
        sinks = sinks.double()[:, None, None].expand(*self.scores.shape[:3], 1)
        both = torch.cat([self.scores, sinks], -1).masked_fill(blind, 0).softmax(-1)
        both = both.masked_fill(blind, 0)
        self.weights, self.sink = both[..., :-1], both[..., -1]
        self.query = torch.arange(self.place.q_len) + self.place.query_start
        self.key = torch.arange(self.place.k_len) + self.place.key_start
        self.visible = torch.zeros_like(self.scores, dtype=torch.bool)
        if self.visible.numel():
            self.visible |= self.call.program.visible(reference.whole(self.call))
        self.ranked = self.scores.sort(dim=-1, descending=True, stable=True).indices


truth_of = cache(Truth)


def close(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    assert ours.shape == truth.shape
    assert torch.allclose(ours.double(), truth.double(), rtol=tolerance, atol=tolerance)


def check_topk(o: TopK, r, t: Truth, tol: float) -> None:
    k = min(o.k, t.place.k_len)
    ranked = t.ranked[..., :k]
    listed, scores = t.weights.gather(-1, ranked), t.scores.gather(-1, ranked)
    pad = (0, o.k - k)
    keys = (ranked + t.place.key_start).where(scores > -torch.inf, -1)
    assert r.indices.dtype == torch.int32
    if tol < 1e-9 and not t.saturated:
        assert torch.equal(r.indices.long(), torch.nn.functional.pad(keys, pad, value=-1))
    else:  # rounding may exchange near ties: what is named is what is weighed
        cols = (r.indices.long() - t.place.key_start).clamp(min=0)[..., :k]
        close(r.weights[..., :k], t.weights.gather(-1, cols) * (r.indices >= 0)[..., :k], tol)
    close(r.weights, torch.nn.functional.pad(listed, pad), tol)
    close(r.rest, t.weights.sum(-1) - listed.sum(-1), tol)
    close(r.sink, t.sink, tol)


def check_received(o: Received, r, t: Truth, tol: float) -> None:
    start, stop = o.queries or (t.place.query_start, t.place.query_start + t.place.q_len)
    rows = (t.query >= start) & (t.query < stop)
    total, count = t.weights[:, :, rows].sum(2), t.visible[:, :, rows].sum(2)
    if o.heads != "each":
        groups = t.place.kv_heads if o.heads.startswith("group") else 1
        total, count = (x.unflatten(1, (groups, -1)) for x in (total, count))
        total = total.mean(2) if o.heads.endswith("mean") else total.sum(2)
        count = count.amax(2)
    close(r.sum, total, tol)
    assert torch.equal(r.count.long(), count)
    close(r.mean, total / count.clamp(min=1), tol)
    assert (r.q_len, r.key_start) == (int(rows.sum()), t.place.key_start)


def check_entropy(o: Entropy, r, t: Truth, tol: float) -> None:
    close(r.values, torch.special.entr(t.weights).sum(-1), tol)


def check_max_score(o: MaxScore, r, t: Truth, tol: float) -> None:
    none = torch.full((*t.scores.shape[:3], 1), -torch.inf, dtype=torch.float64)
    close(r.values, torch.cat([t.scores, none], -1).amax(-1), tol)


def check_lse(o: LogSumExp, r, t: Truth, tol: float) -> None:
    close(r.values, t.lse, tol)


def check_rows(o: Rows, r, t: Truth, tol: float) -> None:
    end = t.place.query_start + t.place.q_len
    wanted = [end + i if i < 0 else i for i in o.indices]
    rows = [p - t.place.query_start for p in wanted if t.place.query_start <= p < end]
    assert r.queries == tuple(t.place.query_start + row for row in rows)
    close(r.weights, t.weights[:, :, rows], tol)


def check_map(o: Map, r, t: Truth, tol: float) -> None:
    wanted = t.weights
    for dim, cells, positions, most in ((2, r.rows, t.query, o.rows), (3, r.cols, t.key, o.cols)):
        number = positions // cells.size - cells.first
        assert cells.size & (cells.size - 1) == 0
        assert number.unique().tolist() == list(range(cells.count))
        crosses = bool((positions < 0).any() and (positions >= 0).any())  # cells begin at 0
        assert cells.count <= max(most, 2 * crosses)
        if cells.size > 1:
            assert len((positions // (cells.size // 2)).unique()) > most, "a smaller cell fits"
        pooled = torch.zeros((*wanted.shape[:dim], cells.count, *wanted.shape[dim + 1 :])).double()
        if o.reduce == "max":
            number = number.view([-1, 1][: 4 - dim]).expand_as(wanted)
            wanted = pooled.scatter_reduce(dim, number, wanted, "amax")
        else:
            wanted = pooled.index_add(dim, number, wanted)
    close(r.weights, wanted, tol)


def check_distances(o: Distances, r, t: Truth, tol: float) -> None:
    distance = t.query[:, None] - t.key
    number = sum((distance.abs() >= edge).long() for edge in r.edges) - 1
    for ours, side in ((r.past, distance >= 0), (r.future, distance < 0)):
        wanted = torch.zeros(ours.shape, dtype=torch.float64)
        wanted.index_add_(2, number.flatten(), (t.weights * side).flatten(2))
        close(ours, wanted, tol)


CHECKS = {
    TopK: check_topk, Received: check_received, Entropy: check_entropy, Rows: check_rows,
    MaxScore: check_max_score, LogSumExp: check_lse, Map: check_map, Distances: check_distances,
}  # fmt: skip


def watchers(start: int) -> list:
    """One of each kind and option; start: the first query's position."""
    return [
        TopK(1), TopK(5), TopK(300), Entropy(), MaxScore(), LogSumExp(),
        Received(), Received((max(start, 0) + 3, max(start, 0) + 20)), Received((0, 2), "mean"),
        *(Received(heads=h) for h in ("sum", "mean", "group_sum", "group_mean")),
        Rows([]), Rows([-1, start, start + 2, 10**6]), Rows([start + 1, start + 1]),
        Map(16, 16), Map(5, 7), Map(4, 9, "max"), Map(1, 1), Map(512, 3, "max"),
        Distances(), Distances(1), Distances((0, 3, 50)),
    ]  # fmt: skip


def look(case: Case, engine: str, dtype: torch.dtype, tolerance: float) -> None:
    truth, tensors, request = truth_of(case, dtype), case.tensors(dtype=dtype), case.request(dtype)
    asked = watchers(truth.place.query_start)
    _, seen = attention(*tensors, **request, engine=engine, observe=asked)
    assert len(seen) == len(asked)
    for observer, result in zip(asked, seen, strict=True):
        CHECKS[type(observer)](observer, result, truth, tolerance)


@every_case
def test_all_observers_are_exact(case):
    look(case, "tiled", torch.float64, 1e-11)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_all_observers_inside_the_kernels(case, dtype):
    """Engine cpu gathers them in its forward, in float32; huge scores are off by their rounding."""
    look(case, "cpu", dtype, 0.02 if case.magnitude > 100 else 1e-4)


@pytest.mark.parametrize("sizes", [at(1, 3000), at(5, 2100, heads=8), at(64, 1100, heads=2)])
@pytest.mark.parametrize("mask", [Full(), Causal() & Window(1500)], ids=str)
def test_all_observers_where_keys_are_cut_into_chunks(sizes, mask):
    """Few queries and many keys: chunks of a row are joined."""
    look(Case("", sizes, lambda s, g: {"mask": mask}), "cpu", torch.float32, 1e-4)


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("case", [c for c in FEW if c.sizes.q_len > 64], ids=str)
def test_all_observers_in_small_strips(case, monkeypatch):
    """With a small budget the small cases, too, take many strips and parts."""
    monkeypatch.setattr(regard.engines.second_pass.strips, "BUDGET", 2**14)
    look(case, "tiled", torch.float64, 1e-11)


@pytest.mark.parametrize("name", ["nested", "left padding", "bias that hides", "129 × 64"])
def test_all_observers_beside_sdpa(name):
    look(next(c for c in CASES if c.name == name), "sdpa", torch.float64, 1e-10)


@pytest.mark.parametrize("case", FEW[::3], ids=str)
def test_all_observers_in_rounding(case):
    """In float32; huge scores are off by their own rounding."""
    look(case, "tiled", torch.float32, 0.02 if case.magnitude > 100 else 1e-4)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "flex"])  # cuda only
def test_results_carry_no_gradients(engine):
    leaves = [t.requires_grad_() for t in Case("", at(9, 12)).tensors(dtype=torch.float32)]
    out, seen = attention(*leaves, engine=engine, observe=watchers(3))
    assert out.requires_grad
    assert not any(t.requires_grad for result in seen for t in parts(result).values())


def parts(result) -> dict[str, Tensor]:
    named = {f.name: getattr(result, f.name) for f in fields(result)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


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
