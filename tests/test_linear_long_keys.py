"""Random features of keys of any length, which leave the dtype: against softmax over their logs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import assert_within
from long_keys import EVERYWHERE, FAVOR, FORMS, GROWTH, SIZES, Long, literal, weights_of
from regard import LogSumExp, Padding, RegardError, Rows, TopK, linear_attention
from regard.linear import Favor, LinearState
from test_hidden_linear import BAD, HIDING, drawn, run
from test_linear import in_pieces, typical

# In float64 the rule of plain torch's error has no room: exponents of −3,000 go by steps of 4.5e-13
# there, in the truth too, which is what 2 × float32's error comes to, scaled down. Instead it is
# held to 1e-9 of the largest number; float32 goes by steps of 2.4e-4.
every_form = pytest.mark.parametrize("form", FORMS)
every_growth = pytest.mark.parametrize("growth", GROWTH)
ENGINES = ["auto", "chunked", "recurrent", "reference"]


def engines_of(form: str) -> list[str]:
    return [e for e in ENGINES if e != "recurrent" or form not in EVERYWHERE]


def loss(out: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    return (out.double() * torch.randn(out.shape, generator=rng)).sum()


def answers(run, tensors: list[Tensor], request: dict) -> list[Tensor]:
    """Out, and the gradients of everything that goes in."""
    decay = request.get("decay")
    leaves = [t.clone().requires_grad_() for t in (*tensors, decay) if t is not None]
    if decay is not None:
        request = request | {"decay": leaves[3]}
    out = run(*leaves[:3], **request)
    return [out.detach(), *torch.autograd.grad(loss(out), leaves)]


def under(state: LinearState, shift: Tensor) -> list[Tensor]:
    """What a state holds, with the factor exp(shift) taken out of it."""
    own = torch.zeros_like(shift) if state.shift is None else state.shift.double()
    by = (own - shift).exp()
    return [by[..., None] * state.memory.double(), by * state.normaliser.double()]


@pytest.mark.sample(1)
@every_growth
@every_form
def test_float64_is_the_formula(form, growth):
    """Out and all gradients, of keys whose features leave float64, too."""
    case = Long(form, growth, torch.float64)
    truths = answers(literal, case.tensors, case.request)
    assert case.leaves_the_dtype()
    for engine in engines_of(form):
        for ours, truth in zip(
            answers(
                lambda *t, **r: linear_attention(*t, **r, engine=engine),  # noqa: B023
                case.tensors, case.request,
            ), truths, strict=True,
        ):  # fmt: skip
            scale = max(float(truth.abs().max()), 1.0)
            torch.testing.assert_close(ours, truth, rtol=0, atol=1e-9 * scale)


@pytest.mark.sample(1, most=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_growth
@every_form
def test_other_dtypes_meet_the_bar(form, growth, dtype):
    case = Long(form, growth, dtype)
    assert case.leaves_the_dtype()
    simple = answers(lambda *t, **r: literal(*t, **r).to(dtype), case.tensors, case.request)
    truths = answers(literal, *case.exactly())
    for engine in engines_of(form)[:-1]:  # the twin is for float64
        mine = answers(
            lambda *t, **r: linear_attention(*t, **r, engine=engine),  # noqa: B023
            case.tensors, case.request,
        )  # fmt: skip
        assert mine[0].dtype == dtype
        for a, b, truth in zip(mine, simple, truths, strict=True):
            assert a.isfinite().all()
            # A decay per head sums what nearly cancels over all tokens, as in test_linear
            more = 4 if truth.numel() < 16 else 1
            assert_within(a, b.to(a.dtype), truth, error=typical, roundings=more)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 8])
def test_vectors_of_any_length(size, engine):
    """Lengths of 8 to 64 at dim 64, where float64 needs no shift: never a row of zeros."""
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 32, 64, generator=rng) for _ in range(3))
    tensors = query * size, key * size, value
    exact = linear_attention(*(t.double() for t in tensors), feature_map=Favor(128, 0))
    out = linear_attention(*tensors, feature_map=Favor(128, 0), engine=engine)
    # At exponents of −2,048, of 64² / 2, float32 goes by steps of 2.4e-4
    torch.testing.assert_close(out, exact.float(), rtol=0, atol=1e-2)


@pytest.mark.sample(1, most=2)
@pytest.mark.parametrize("engine", ENGINES)
@every_growth
@pytest.mark.parametrize("form", [f for f in FORMS if f not in EVERYWHERE])
def test_pieces_are_the_whole(form, growth, engine):
    """Cut anywhere: out and its gradients; and what is left, whatever it is taken relative to."""
    case = Long(form, growth, torch.float64)
    ends = [0, 1, 2, 30, 30, 64, 82, SIZES.k_len]
    pieces = {"ends": ends, "engine": engine}
    found = []

    def whole(*tensors: Tensor, **request) -> Tensor:
        out, state = linear_attention(*tensors, **request, return_state=True, engine="reference")
        found.append(state)
        return out

    def cut(*tensors: Tensor, **request) -> Tensor:
        out, state = in_pieces(*tensors, **request, **pieces)
        found.append(state)
        return out

    truths = answers(whole, case.tensors, case.request)
    for ours, truth in zip(answers(cut, case.tensors, case.request), truths, strict=True):
        scale = max(float(truth.abs().max()), 1.0)
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-9 * scale)
    last, ours = found
    assert ours.length == last.length
    for mine, truth in zip(under(ours, last.shift), under(last, last.shift), strict=True):
        torch.testing.assert_close(
            mine, truth, rtol=0, atol=1e-9 * float(truth.detach().abs().max())
        )


@pytest.mark.parametrize("engine", engines_of("everywhere"))
def test_the_state_of_a_text_without_causality(engine):
    """Given to queries of another text, it is as if they saw its keys, too."""
    case = Long("everywhere", "growing", torch.float64)
    query, key, value = case.tensors
    truth = linear_attention(*case.tensors, **case.request, engine="reference")
    state = None
    for at in (slice(0, 40), slice(40, None)):
        out, state = linear_attention(
            query, key[:, :, at], value[:, :, at], **case.request, state=state, engine=engine,
            return_state=True,
        )  # fmt: skip
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-9)


def test_a_state_with_a_shift_fits_its_features_alone():
    case = Long("plain", "all long", torch.float32)
    _, state = linear_attention(*case.tensors, **case.request, return_state=True)
    assert state.shift is not None
    with pytest.raises(RegardError, match="state has a shift, as random features do"):
        linear_attention(*(t[..., :12] for t in case.tensors), state=state, feature_map=torch.exp,
                         normalise=True)  # fmt: skip
    state = LinearState(state.memory, state.normaliser, None, state.length, state.shift[:1])
    with pytest.raises(RegardError, match="state: shift is"):
        linear_attention(*case.tensors, **case.request, state=state)


def test_short_keys_are_computed_as_they_are():
    """No shift, no decay; and a state that was handed on without any needs none later."""
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, n, 90, 8, generator=rng) for n in (4, 2, 2)]
    _, state = linear_attention(*tensors, feature_map=FAVOR, return_state=True)
    assert state.shift is None
    features = [FAVOR.exponents(t).exp() for t in tensors[:2]]
    plain = linear_attention(*features, tensors[2], feature_map=None, return_state=True)[1]
    torch.testing.assert_close(state.memory, plain.memory)


@pytest.mark.parametrize(
    "form, engine",
    [(f, e) for f in ("plain", "gated", "everywhere") for e in engines_of(f) if e != "reference"],
)
def test_a_long_key_changes_no_neighbour(form, engine):
    """An item's bits do not depend on whether another one needs a shift; states neither."""
    case = Long(form, "all long", torch.float32)
    tensors = [t.clone() for t in case.tensors]
    tensors[1][0] /= 20
    request = case.request | {"engine": engine, "return_state": True}
    out, state = linear_attention(*tensors, **request)
    assert [bool(s.any()) for s in state.shift] == [False, True]
    for b in (0, 1):
        part = slice(b, b + 1)
        own = {n: v[part] if isinstance(v, Tensor) else v for n, v in request.items()}
        alone, last = linear_attention(*(t[part] for t in tensors), **own)
        assert torch.equal(alone, out[part])
        assert torch.equal(last.memory, state.memory[part])


@pytest.mark.sample(1)
@every_growth
@every_form
def test_what_is_observed(form, growth):
    """Rows, the largest weights and ln of the divisor, of weights that leave the dtype."""
    case = Long(form, growth, torch.float64)
    weights, lse = weights_of(*case.tensors, **case.request)
    observers = [Rows(range(SIZES.q_len)), TopK(3), LogSumExp()]
    _, (rows, top, total) = linear_attention(*case.tensors, **case.request, observe=observers)
    torch.testing.assert_close(rows.weights, weights, rtol=0, atol=1e-9)
    torch.testing.assert_close(top.weights, weights.topk(3).values, rtol=0, atol=1e-9)
    torch.testing.assert_close(total.values, lse, rtol=1e-9, atol=1e-9)


def test_what_is_observed_after_a_state():
    """The keys of this call, with the weights that they have in the whole sequence."""
    case = Long("gated", "some long", torch.float64)
    weights, lse = weights_of(*case.tensors, **case.request)
    decay = case.request["decay"]
    request = {"feature_map": FAVOR, "return_state": True}
    first, later = slice(0, 40), slice(40, None)
    *_, state = linear_attention(
        *(t[:, :, first] for t in case.tensors), **request, decay=decay[:, :, first]
    )
    _, _, (rows, total) = linear_attention(
        *(t[:, :, later] for t in case.tensors), **request, decay=decay[:, :, later], state=state,
        observe=[Rows(range(40, SIZES.k_len)), LogSumExp()],
    )  # fmt: skip
    torch.testing.assert_close(rows.weights, weights[:, :, 40:, 40:], rtol=0, atol=1e-9)
    torch.testing.assert_close(total.values, lse[:, :, 40:], rtol=1e-9, atol=1e-9)


@pytest.mark.sample(1)
@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize(
    "where, engine",
    [
        (where, engine)
        for where, (asked, *_) in HIDING.items()
        for engine in ("chunked", "recurrent", "reference")
        if engine != "recurrent" or asked.get("causal") is not False  # it goes token by token
    ],
)
def test_a_row_is_what_it_is_without_what_it_does_not_see(engine, length, where):
    """As in test_hidden_linear: to the bit, of short keys and of long ones."""
    asked, token, rows = HIDING[where]
    found = []
    for bad in (0.5, *BAD):
        tensors = drawn()
        tensors[1] = tensors[1] * length
        tensors[1][:, :, token, 3] = bad
        found.append(run(tensors, engine, {"feature_map": Favor(12), **asked}, rows))
    for bad, (out, *grads) in zip(BAD, found[1:], strict=True):
        assert torch.equal(out[:, :, rows], found[0][0][:, :, rows]), bad
        for a, b in list(zip(grads, found[0][1:], strict=True))[: 1 if not asked else 3]:
            assert torch.equal(a[:, :, rows], b[:, :, rows]), bad


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize("bad", [*BAD, 1e30])
def test_an_infinite_key_is_seen(engine, length, bad):
    """Rows that see it, or one whose square is infinite, are NaN: it does not lose its weight."""
    tensors = drawn()
    tensors[1] = tensors[1] * length
    tensors[1][0, :, 60] = bad
    out = linear_attention(*tensors, feature_map=Favor(12), engine=engine)
    assert out[0, :, 60:].isnan().all()
    assert out[0, :, :60].isfinite().all()
    assert out[1].isfinite().all()


def test_a_hidden_key_may_be_as_long_as_it_likes():
    query, key, value = (torch.ones(1, 1, 4, 8) for _ in range(3))
    key[:, :, 0] = 1e4
    keep = torch.tensor([False, True, True, True])
    request = {"feature_map": Favor(16), "mask": Padding(keep)}
    right = linear_attention(query, torch.ones_like(key), value, **request)
    assert torch.equal(linear_attention(query, key, value, **request), right)


@pytest.mark.slow  # the default run compiles the ops in test_linear_numbers.py
@pytest.mark.parametrize(
    "form, growth",
    [
        ("plain", "short"),
        ("plain", "growing"),
        ("gated documents", "growing"),
        ("everywhere", "all long"),
        ("everywhere, documents", "growing"),
    ],
)
def test_compiles_whole(form, growth):
    """In one graph, which sees no numbers: forward, backward, states and observers."""
    case = Long(form, "growing" if growth == "short" else growth, torch.float32)
    if growth == "short":
        case.tensors[1] /= 20
    several = form == "everywhere, documents"  # which leave no single state

    def call(*qkv: Tensor) -> tuple[Tensor, ...]:
        out, *state, (rows,) = linear_attention(
            *(t * 1 for t in qkv), **case.request, return_state=not several, observe=[Rows([5])]
        )
        return out, rows.weights, *((state[0].memory, state[0].normaliser) if state else ())

    torch._dynamo.reset()
    found = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in case.tensors]
        seen = function(*leaves)
        loss(seen[0]).backward()
        found.append([*seen, *(leaf.grad for leaf in leaves)])
    # Both are ours; compiled, the sums go in other orders, at exponents of some hundreds
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["plain", "documents", "everywhere"])
def test_under_vmap(form):
    """A transform sees no numbers, either."""
    case = Long(form, "growing", torch.float32)
    request = {**case.request}
    if "mask" in request:
        request["mask"] = type(request["mask"])(request["mask"].query_ids[0])
    one = lambda *t: linear_attention(*(x[None] for x in t), **request)[0]  # noqa: E731
    together = torch.func.vmap(one)(*case.tensors)
    apart = torch.stack([one(*t) for t in zip(*case.tensors, strict=True)])
    # Both are ours, in sums of other orders
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
