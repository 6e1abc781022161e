"""What observers see of linear attention against the dense implied matrix of the float64 twin."""

from functools import cache
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import observer_truths
import regard.ops.linear.implied_weights
from cases import Case, at, floats, mapped
from linear_cases import CASES, FORMS, short
from observer_truths import Bar, Pairs, assert_seen, shares
from regard import (
    Causal,
    Distances,
    Documents,
    Effect,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    NormTopK,
    Received,
    RegardError,
    Rows,
    TopK,
    linear_attention,
    observe,
)
from regard.linear import Favor
from regard.ops.linear.front import asked
from regard.ops.linear.reference import phi
from test_gradients import Largest

every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Truth:
    """signed: the matrix w with out = w · value; weights: its absolute values, as for `PAIRS`.

    By the float64 twin; or by the same in float32, which is plain torch.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype = torch.float64, working: torch.dtype = torch.float64,
        order: int = 0,
    ) -> None:  # fmt: skip
        tensors, request = case.exactly(dtype)
        query, key, value = (t.to(working) for t in tensors)
        request = mapped(request, lambda t: t.to(working))
        eye = torch.eye(key.shape[2], dtype=working).expand(*key.shape[:2], -1, -1)
        self.signed = linear_attention(query, key, eye, **request, engine="reference")
        self.value, self.given = value, asked(query, key, value, **request)
        self.place, self.normalise = self.given.call.place, self.given.normalise
        self.weights = self.signed.abs()
        self.query = torch.arange(self.place.q_len) + self.place.query_start
        self.key = torch.arange(self.place.k_len) + self.place.key_start
        self.visible = torch.zeros(self.signed.shape, dtype=torch.bool)
        if self.visible.numel():
            rows = self.query[:, None] + torch.zeros_like(self.key)
            shown = rows >= self.key if self.given.causal else rows > -(10**9)
            if self.given.query_ids is not None:
                mine, theirs = self.given.query_ids[:, :, None], self.given.key_ids[:, None, :]
                shown = shown & ((mine == theirs) & (mine >= 0))[:, None]
            if self.given.keep is not None:
                shown = shown & self.given.keep[:, None, None, :]
            self.visible |= shown
        if self.normalise:  # ln of the weights before their division
            scores = linear_attention(
                query, key, eye, **request | {"normalise": False}, engine="reference"
            ).log()
            self.scores = scores.masked_fill(~self.visible, -torch.inf)
            self.lse = self.scores.exp().sum(-1).log()


bar_of = cache(lambda case, dtype=torch.float64: Bar(case, dtype, Truth, 1))


def truth_of(case: Case) -> Truth:
    return bar_of(case).exact


def close(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    assert ours.shape == truth.shape
    scale = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
    torch.testing.assert_close(ours.double(), truth.double(), rtol=0, atol=tolerance * scale)


def ranked(sizes: Tensor, t: Truth, k: int) -> tuple[Tensor, Tensor]:
    """Columns of the k largest visible sizes, and which of them there are."""
    sizes = sizes.masked_fill(~t.visible, -1)
    found = sizes.sort(dim=-1, descending=True, stable=True)
    return found.indices[..., :k], found.values[..., :k] >= 0


def of_topk(o: TopK, r, t: Truth) -> Pairs:
    k = min(o.k, t.place.k_len)
    cols, there = ranked(t.weights, t, k)
    listed, mass = t.weights.gather(-1, cols) * there, t.weights.sum(-1)
    assert torch.equal(r.sink, torch.zeros_like(r.rest))
    assert torch.equal(r.indices[..., :k] >= 0, there)
    assert (r.indices[..., k:] == -1).all()
    yield r.weights.abs(), pad(listed, (0, o.k - k))
    # Beside the mass: what is left of it is a difference of two sums that have its rounding
    yield shares(mass.to(r.rest.dtype), r.rest), shares(mass, mass - listed.sum(-1)), 2
    # Rounding may exchange near ties: what is named is what is weighed, with its sign
    mine = (r.indices.long() - t.place.key_start).clamp(min=0)[..., :k]
    yield r.weights[..., :k], t.signed.gather(-1, mine) * there


def of_norms(o: NormTopK, r, t: Truth) -> Pairs:
    k = min(o.k, t.place.k_len)
    sizes = t.weights * o.norms(t.value, t.place.heads)[:, :, None]
    cols, there = ranked(sizes, t, k)
    yield r.norms, pad(sizes.gather(-1, cols) * there, (0, o.k - k))
    mine = (r.indices.long() - t.place.key_start).clamp(min=0)[..., :k]
    yield r.weights[..., :k], t.signed.gather(-1, mine) * there


def of_received(o: Received, r, t: Truth) -> Pairs:
    yield next(observer_truths.of_received(o, r, t))  # its mean is of weights that sum to 1


def of_rows(o: Rows, r, t: Truth) -> Pairs:
    yield r.weights, t.signed[:, :, [p - t.place.query_start for p in r.queries]]


def of_max_score(o: MaxScore, r, t: Truth) -> Pairs:
    for pair in observer_truths.of_max_score(o, r, t):  # ln of what may be 1, and rounded as that
        yield tuple(shares(torch.ones_like(values), values) for values in pair)


PAIRS = observer_truths.PAIRS | {
    TopK: of_topk, NormTopK: of_norms, Received: of_received, Rows: of_rows,
    MaxScore: of_max_score,
}  # fmt: skip


def watchers(t: Truth) -> list:
    """One of each kind and option that the weights allow."""
    start = max(t.place.query_start, 0)
    asked = [
        TopK(1), TopK(5), TopK(200), NormTopK(3),
        Received(), Received((start + 3, start + 70)), Received((0, 2), "mean"),
        *(Received(heads=h) for h in ("sum", "mean", "group_sum", "group_mean")),
        Rows([]), Rows([-1, start, start + 2, 10**6]),
        Map(16, 16), Map(5, 7), Map(4, 9, "max"), Map(512, 3, "max"),
        Distances(), Distances((0, 9)),
    ]  # fmt: skip
    return asked + ([Entropy(), MaxScore(), LogSumExp()] if t.normalise else [])


def look(case: Case, dtype: torch.dtype = torch.float64) -> None:
    bar, tensors, request = bar_of(case, dtype), case.tensors(dtype=dtype), case.request(dtype)
    observers = watchers(bar.exact)
    out, seen = linear_attention(*tensors, **request, observe=observers)
    assert torch.equal(out, linear_attention(*tensors, **request))
    assert len(seen) == len(observers)
    # A decay over n tokens is the exponential of a sum of n numbers, in the truth, too
    roundings = 8 if dtype == torch.float64 else 1
    for observer, result in zip(observers, seen, strict=True):
        assert_seen(observer, result, bar, PAIRS, roundings)


@pytest.mark.sample(every=9)
@every_case
def test_all_observers_are_exact(case):
    look(case)


@pytest.mark.sample(every=15)
@pytest.mark.parametrize("case", [c for c in CASES if c.sizes.k_len > 100], ids=str)
def test_all_observers_in_small_strips(case, monkeypatch):
    """With a small budget the small cases, too, take many strips and parts."""
    monkeypatch.setattr(regard.ops.linear.implied_weights, "BUDGET", 2**12)
    look(case)


FLOAT32 = ("elu", "gla", "gated delta", "channel delta", "retention", "everywhere, elu")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in FLOAT32], ids=str)
def test_all_observers_in_float32(case):
    look(case, torch.float32)


@pytest.mark.parametrize("form", ["elu", "elu, fixed", "gla", "channel delta", "favor"])
def test_after_a_state_the_keys_of_this_call_are_seen(form):
    """Their weights are those of the whole sequence; what the state holds is not listed."""
    case = next(c for c in CASES if c.name == form)
    truth, tensors, request = truth_of(case), case.tensors(), case.request()
    at_ = 70

    def part(start: int, stop: int, **more):
        cut = {n: v[:, :, start:stop] if isinstance(v, Tensor) and v.dim() > 1 else v
               for n, v in request.items()}  # fmt: skip
        return linear_attention(*(t[:, :, start:stop] for t in tensors), **cut, **more)

    _, state = part(0, at_, return_state=True)
    observers = [Rows(range(at_, 131)), TopK(3), Received(), Map(4, 4), Distances()]
    observers += [LogSumExp(), Entropy()] if truth.normalise else []
    _, seen = part(at_, 131, state=state, observe=observers)
    rows, top, received, pooled, distances, *more = seen
    signed = truth.signed[:, :, at_:, at_:]
    close(rows.weights, signed, 1e-11)
    assert (rows.key_start, rows.queries) == (at_, tuple(range(at_, 131)))
    assert int(top.indices.min()) in (-1, at_)
    close(top.weights.abs().sum(-1) + top.rest, signed.abs().sum(-1), 1e-11)
    close(received.sum, signed.abs().sum(2), 1e-11)
    assert received.key_start == at_
    assert pooled.cols.first * pooled.cols.size <= at_
    close(distances.past.sum(-1), signed.abs().sum((-1, -2)), 1e-11)
    if truth.normalise:
        close(more[0].values, truth.lse[:, :, at_:], 1e-11)
        close(more[1].values, torch.special.entr(signed).sum(-1), 1e-11)


def test_a_state_is_in_the_lse_without_keys():
    query, key, value = Case("", at(9, 30)).tensors()
    everything = {"causal": False, "observe": [LogSumExp(), MaxScore(), TopK(2)]}
    _, seen = linear_attention(query, key, value, **everything)
    _, state = linear_attention(query, key, value, causal=False, return_state=True)
    none = (key[:, :, :0], value[:, :, :0])
    _, (lse, score, top) = linear_attention(query, *none, state=state, **everything)
    close(lse.values, seen[0].values, 1e-12)
    assert (score.values == -torch.inf).all()
    assert (top.indices == -1).all()


def test_favor_looks_like_softmax():
    """With many features its lse and its weights come near those of attention."""
    query, key, value = Case("", at(40, dim=8), magnitude=0.5).tensors()
    key = key * 0.5
    observers = [LogSumExp(), Rows(range(40)), MaxScore()]
    truth = observe(query, key, observe=observers, mask=Causal())
    _, ours = linear_attention(query, key, value, feature_map=Favor(8192), observe=observers)
    assert (ours[0].values - truth[0].values).abs().mean() < 0.02
    assert (ours[1].weights - truth[1].weights).abs().mean() < 0.001
    assert (ours[2].values - truth[2].values).abs().mean() < 0.05


def test_the_delta_rule_subtracts():
    """Two equal keys, full strength: the second takes the place of the first, whole."""
    key = short(torch.ones(1, 1, 2, 4, dtype=torch.float64))
    value = torch.eye(2, dtype=torch.float64)[None, None]
    beta = torch.ones(1, 1, 2, dtype=torch.float64)
    out, (rows,) = linear_attention(
        key, key, value, feature_map=None, beta=beta, observe=[Rows([0, 1])]
    )
    wanted = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(rows.weights[0, 0], wanted)
    torch.testing.assert_close(out[0, 0], wanted)
    # Half alike: what the second key already knows of the first is taken from it
    half = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)[None, None]
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)[None, None]
    _, (top,) = linear_attention(query, half, value, feature_map=None, beta=beta, observe=[TopK(2)])
    assert top.indices[0, 0, 1].tolist() == [1, 0]
    torch.testing.assert_close(top.weights[0, 0, 1], torch.tensor([0.8, -0.48]).double())
    torch.testing.assert_close(top.rest, torch.zeros_like(top.rest))


def test_results_carry_no_gradients():
    case = next(c for c in CASES if c.name == "elu, gated")
    tensors = [t.requires_grad_() for t in case.tensors()]
    observers = watchers(truth_of(case))
    out, seen = linear_attention(*tensors, **case.request(), observe=observers)
    assert out.requires_grad
    held = [v for result in seen for v in vars(result).values() if isinstance(v, Tensor)]
    assert held
    assert not any(t.requires_grad for t in held)


@pytest.mark.parametrize("observer", [Entropy(), MaxScore(), LogSumExp()], ids=str)
@pytest.mark.parametrize("form", ["identity", "gla", "delta", "elu, not normalised"])
def test_what_needs_normalised_weights_says_so(form, observer):
    case = Case("", at(9), FORMS[form], layout=short)
    with pytest.raises(RegardError, match="needs weights that are normalised; these are not"):
        linear_attention(*case.tensors(), **case.request(), observe=[observer])


def test_effect_is_softmaxs():
    tensors = Case("", at(9)).tensors()
    with pytest.raises(RegardError, match=r"Effect.* is defined for softmax"):
        linear_attention(*tensors, observe=[Effect(3)])


def test_a_nan_surfaces():
    query, key, value = Case("", at(90)).tensors(dtype=torch.float32)
    query[1, 0, 4, 2] = torch.nan
    observers = [TopK(3), Received(), Entropy(), Map(4, 4)]
    _, (top, received, entropy, pooled) = linear_attention(query, key, value, observe=observers)
    for rows in (top.weights.isnan().all(-1), entropy.values.isnan()):
        assert rows.nonzero().tolist() == [[1, 0, 4]]
    assert received.sum.isnan().any(-1).nonzero().tolist() == [[1, 0]]
    assert pooled.weights.isnan().any(-1).any(-1).nonzero().tolist() == [[1, 0]]


class LargestOfLinear(Largest):
    INSIDE: ClassVar = {
        torch.ops.regard.linear.default: regard.ops.linear.chunked._linear,
        torch.ops.regard.linear_backward.default: regard.ops.linear.chunked._backward,
        torch.ops.regard.linear_weigh.default: regard.ops.linear.second_pass._weigh,
    }  # fmt: skip


@pytest.mark.sample(0)
@pytest.mark.parametrize("form", ["elu", "retention", "gla", "gated delta", "documents"])
def test_no_tensor_grows_with_the_square(form):
    """Forward, backward and every observer: nothing larger than a few strips; linear in N."""
    most = []
    for n in (2048, 4096):
        case = Case("", at(n, batch=1, heads=1, kv_heads=1, dim=8), FORMS.get(form, FORMS["elu"]))
        leaves = [short(t).requires_grad_() for t in case.tensors(dtype=torch.float32)]
        request = case.request(torch.float32)
        if form == "documents":
            request["mask"] = Documents(torch.arange(n) // 500)
        observers = [TopK(8), Received(), Rows([5]), Map(64, 64), Distances(), NormTopK(4)]
        with LargestOfLinear() as mode:
            out, _ = linear_attention(*leaves, **request, observe=observers)
            out.sum().backward()
        assert mode.entered == set(LargestOfLinear.INSIDE)
        most.append(mode.most)
    assert most[1] <= 2.2 * most[0]
    assert n * 8 <= most[1] <= 2 * 256 * n < n * n / 4


def test_the_map_of_favor_is_positive():
    """The twin's features are the paper's: exp(w · x − ‖x‖² / 2) / √m with x scaled by dim^−¼."""
    x = floats(torch.Generator().manual_seed(0), 5, 8).double()
    drawn = torch.ops.regard.favor_directions(x, 12, 3)
    scaled = x / 8**0.25
    wanted = [[(w @ y - y @ y / 2).exp() / 12**0.5 for w in drawn] for y in scaled]
    torch.testing.assert_close(phi(Favor(12, 3), x), torch.tensor(wanted, dtype=torch.float64))
