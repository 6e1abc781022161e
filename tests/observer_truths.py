"""What observers must see: read off a case's dense weights; and the bar for what they saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cases import Case, assert_within, mapped
from regard import (
    Distances,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    Received,
    Rows,
    TopK,
)  # fmt: skip
from regard.call.checked import Call
from regard.engines import reference

# What was seen, and what there is to see; how many roundings that takes, where more than one
Pairs = Iterator[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, int]]


class Truth:
    """scores and weights (batch, heads, q_len, k_len) of a case, who is visible, and positions.

    Of the numbers as rounded to `dtype`, computed in float64; or in float32: what plain torch has,
    in one `order` of the dims that it sums.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype = torch.float64,
        working: torch.dtype = torch.float64,
        order: int = 0,
    ) -> None:
        tensors, request = case.exactly(dtype)
        request = mapped(request, lambda t: t.to(working))
        query, key, value = (t.to(working) for t in tensors)
        if order:
            dims = torch.randperm(query.shape[-1], generator=torch.Generator().manual_seed(order))
            query, key = query[..., dims], key[..., dims]
        self.call = Call.checked(query, key, value, **request)
        self.place = self.call.place
        self.scores = reference.scores(self.call)
        self.saturated = case.magnitude > 100 and self.call.softcap is not None
        self.lse = reference.log_sum_exp(self.scores, self.call.sinks)
        blind = (self.lse == -torch.inf)[..., None]
        sinks = torch.zeros(1) - torch.inf if self.call.sinks is None else self.call.sinks
        sinks = sinks.to(working)[:, None, None].expand(*self.scores.shape[:3], 1)
        both = torch.cat([self.scores, sinks], -1).masked_fill(blind, 0).softmax(-1)
        both = both.masked_fill(blind, 0)
        self.weights, self.sink = both[..., :-1], both[..., -1]
        self.query = torch.arange(self.place.q_len) + self.place.query_start
        self.key = torch.arange(self.place.k_len) + self.place.key_start
        self.visible = torch.zeros_like(self.scores, dtype=torch.bool)
        if self.visible.numel():
            self.visible |= self.call.program.visible(reference.whole(self.call))
        self.ranked = self.scores.sort(dim=-1, descending=True, stable=True).indices


class Bar:
    """A case's truth, and what plain torch has of it, in `orders` orders of its sums.

    One order may be lucky where few numbers are compared.
    """

    def __init__(
        self, case: Any, dtype: torch.dtype = torch.float64, truth: type = Truth, orders: int = 4
    ) -> None:
        self.exact, self.orders = truth(case, dtype), orders
        self.plain = cache(lambda order: truth(case, dtype, torch.float32, order))

    @property
    def of_lse(self) -> int:
        """Weights are exp(score − lse): half a rounding of a large lse is so many of theirs."""
        lse = self.exact.lse.nan_to_num(0, 0, 0)
        return max(1, int(lse.abs().max() / 2)) if lse.numel() else 1


bar_of = cache(Bar)


def parts(result: Any) -> dict[str, Tensor]:
    named = {f.name: getattr(result, f.name) for f in fields(result)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def shares(*of_a_row: Tensor) -> Tensor:
    return torch.stack(of_a_row, -1)


def of_topk(o: TopK, r, t: Truth) -> Pairs:
    k = min(o.k, t.place.k_len)
    ranked = t.ranked[..., :k]
    listed, scores = t.weights.gather(-1, ranked), t.scores.gather(-1, ranked)
    rest = (0, o.k - k)
    keys = (ranked + t.place.key_start).where(scores > -torch.inf, -1)
    assert r.indices.dtype == torch.int32
    if r.weights.dtype == t.weights.dtype == torch.float64 and not t.saturated:
        assert torch.equal(r.indices.long(), pad(keys, rest, value=-1))
    # Rounding may exchange near ties: what is named is what is weighed
    cols = (r.indices.long() - t.place.key_start).clamp(min=0)[..., :k]
    yield r.weights[..., :k], t.weights.gather(-1, cols) * (r.indices >= 0)[..., :k]
    yield r.weights, pad(listed, rest)
    yield r.sink, t.sink
    # Beside 1, the whole of a row: a difference of two sums that have its rounding
    left, whole = t.weights.sum(-1) - listed.sum(-1), torch.ones_like(r.rest)
    yield shares(whole, r.rest), shares(whole, left), 2


def of_received(o: Received, r, t: Truth) -> Pairs:
    start, stop = o.queries or (t.place.query_start, t.place.query_start + t.place.q_len)
    rows = (t.query >= start) & (t.query < stop)
    total, count = t.weights[:, :, rows].sum(2), t.visible[:, :, rows].sum(2)
    if o.heads != "each":
        groups = t.place.kv_heads if o.heads.startswith("group") else 1
        total, count = (x.unflatten(1, (groups, -1)) for x in (total, count))
        total = total.mean(2) if o.heads.endswith("mean") else total.sum(2)
        count = count.amax(2)
    assert torch.equal(r.count.long(), count)
    assert (r.q_len, r.key_start) == (int(rows.sum()), t.place.key_start)
    yield r.sum, total
    yield r.mean, total / count.clamp(min=1)


def of_entropy(o: Entropy, r, t: Truth) -> Pairs:
    yield r.values, torch.special.entr(t.weights).sum(-1)


def of_max_score(o: MaxScore, r, t: Truth) -> Pairs:
    none = torch.full((*t.scores.shape[:3], 1), -torch.inf, dtype=t.scores.dtype)
    yield r.values, torch.cat([t.scores, none], -1).amax(-1)


def of_lse(o: LogSumExp, r, t: Truth) -> Pairs:
    yield r.values, t.lse


def of_rows(o: Rows, r, t: Truth) -> Pairs:
    end = t.place.query_start + t.place.q_len
    wanted = [end + i if i < 0 else i for i in o.indices]
    rows = [p - t.place.query_start for p in wanted if t.place.query_start <= p < end]
    assert r.queries == tuple(t.place.query_start + row for row in rows)
    yield r.weights, t.weights[:, :, rows]


def of_map(o: Map, r, t: Truth) -> Pairs:
    wanted = t.weights
    for dim, cells, positions, most in ((2, r.rows, t.query, o.rows), (3, r.cols, t.key, o.cols)):
        number = positions // cells.size - cells.first
        assert cells.size & (cells.size - 1) == 0
        assert number.unique().tolist() == list(range(cells.count))
        crosses = bool((positions < 0).any() and (positions >= 0).any())  # cells begin at 0
        assert cells.count <= max(most, 2 * crosses)
        if cells.size > 1:
            assert len((positions // (cells.size // 2)).unique()) > most, "a smaller cell fits"
        pooled = wanted.new_zeros((*wanted.shape[:dim], cells.count, *wanted.shape[dim + 1 :]))
        if o.reduce == "max":
            number = number.view([-1, 1][: 4 - dim]).expand_as(wanted)
            wanted = pooled.scatter_reduce(dim, number, wanted, "amax")
        else:
            wanted = pooled.index_add(dim, number, wanted)
    yield r.weights, wanted


def of_distances(o: Distances, r, t: Truth) -> Pairs:
    distance = t.query[:, None] - t.key
    number = sum((distance.abs() >= edge).long() for edge in r.edges) - 1
    for ours, side in ((r.past, distance >= 0), (r.future, distance < 0)):
        wanted = torch.zeros(ours.shape, dtype=t.weights.dtype)
        wanted.index_add_(2, number.flatten(), (t.weights * side).flatten(2))
        # Thousands of weights one after another, in float64 in the truth, too
        yield ours, wanted, 16 if ours.dtype == torch.float64 else 1


PAIRS = {
    TopK: of_topk, Received: of_received, Entropy: of_entropy, Rows: of_rows,
    MaxScore: of_max_score, LogSumExp: of_lse, Map: of_map, Distances: of_distances,
}  # fmt: skip


def watchers(start: int) -> list:
    """One of each kind and option, as a new observer is one here, and a function in `PAIRS`.

    start: the first query's position.
    """
    return [
        TopK(1), TopK(5), TopK(300), Entropy(), MaxScore(), LogSumExp(),
        Received(), Received((max(start, 0) + 3, max(start, 0) + 20)), Received((0, 2), "mean"),
        *(Received(heads=h) for h in ("sum", "mean", "group_sum", "group_mean")),
        Rows([]), Rows([-1, start, start + 2, 10**6]), Rows([start + 1, start + 1]),
        Map(16, 16), Map(5, 7), Map(4, 9, "max"), Map(1, 1), Map(512, 3, "max"),
        Distances(), Distances(1), Distances((0, 3, 50)),
    ]  # fmt: skip


def assert_seen(observer, result, bar: Bar, pairs: dict = PAIRS, roundings: int = 1) -> None:
    """Every number of a result: error ≤ 2 × (that of plain torch's dense weights + rounding)."""
    read = pairs[type(observer)]
    for n, (ours, truth, *own) in enumerate(read(observer, result, bar.exact)):
        # One order after the other, until the bar is met
        orders = map(bar.plain, range(bar.orders))
        near = (next(islice(read(observer, result, t), n, None))[1] for t in orders)
        # Few numbers that each sum hundreds of rows: a chance of its own, as in test_linear; and in
        # float64 the truth has roundings of its own
        more = 4 if truth.numel() < 16 or ours.dtype == torch.float64 else 1
        assert_within(ours, near, truth, ours.dtype, roundings=max(roundings, more, *own))


def assert_seen_nearly(observer, result, exact: Truth, tolerance: float) -> None:
    """Within a fixed tolerance, relative to 1 + each number."""
    for ours, truth, *_ in PAIRS[type(observer)](observer, result, exact):
        assert ours.shape == truth.shape
        assert torch.allclose(ours.double(), truth.double(), rtol=tolerance, atol=tolerance)
