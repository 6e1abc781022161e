"""Linear attention in all its forms against the float64 twin, and the twin against the formula."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import regard.ops.linear.chunked
from cases import Case, assert_within, at, floats, mapped
from linear_cases import CASES, CAUSAL, FEW, FORMS, gate, short
from regard import Documents, Padding, RegardError, Rows, linear_attention
from regard.linear import LinearState
from regard.ops.linear import front, reference
from regard.ops.linear.front import asked

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def leaves_of(tensors, request) -> tuple[list[Tensor], dict, list[Tensor]]:
    """Tensors and request whose floats ask for gradients, and the list of those."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    return [leaf(t) for t in tensors], mapped(request, leaf), leaves


def answers(run, tensors, request) -> tuple[list[Tensor], list[Tensor]]:
    """(out, memory, normaliser of the state), and the gradients of a fixed functional of them."""
    tensors, request, leaves = leaves_of(tensors, request)
    out, state = run(*tensors, **request)
    given = [t for t in (out, *parts(state)) if t is not None]
    rng = torch.Generator().manual_seed(2)
    loss = sum((t.double() * torch.randn(t.shape, generator=rng)).sum() for t in given)
    loss = loss + 0 * sum(leaf.sum() for leaf in leaves if not leaf.numel())  # part of a graph
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in given], list(grads)


def parts(state: LinearState | None) -> tuple[Tensor | None, ...]:
    return (None, None) if state is None else (state.memory, state.normaliser)


def by(engine: str):
    def run(*tensors, **request):
        packed = not request.get("causal", True) and "documents" in str(request).lower()
        if packed:
            return linear_attention(*tensors, **request, engine=engine), None
        return linear_attention(*tensors, **request, engine=engine, return_state=True)

    return run


def plainly(*tensors, **request):
    """The twin, wholly in the dtype of its tensors: what the bar measures."""
    out, state = reference.forward(asked(*tensors, **request), tensors[0].dtype)
    packed = not request.get("causal", True) and "documents" in str(request).lower()
    return out, None if packed else state


@cache
def exact(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return answers(by("reference"), *case.exactly(dtype))


def engines_of(case: Case) -> list[str]:
    return ["chunked", "recurrent"] if case.request().get("causal", True) else ["chunked"]


def typical(error: Tensor) -> Tensor:
    """Root mean square: the one largest among sums over hundreds of rows is chance."""
    return error.square().mean().sqrt()


@cache
def near(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """What float32 has: the bar of float64 is that of float32, scaled."""
    return answers(plainly, case.tensors(dtype=torch.float32), case.request(torch.float32))


def assert_double(ours: list[Tensor], plain: list[Tensor], truths: list[Tensor]) -> None:
    """In float64, where the truth has roundings of its own, each of a few steps."""
    for mine, other, truth in zip(ours, plain, truths, strict=True):
        assert_within(mine, other.float(), truth, mine.dtype, error=typical, roundings=4)


@pytest.mark.sample(every=9)
@every_case
def test_float64_is_the_twins(case):
    """Out, state and the gradients of everything that goes in; both forms."""
    for engine in engines_of(case):
        ours = answers(by(engine), case.tensors(), case.request())
        for found in zip(ours, near(case), exact(case, torch.float64), strict=True):
            assert_double(*found)


@pytest.mark.sample(every=7)
@pytest.mark.parametrize("case", [c for c in CAUSAL if c.sizes.k_len > 100], ids=str)
def test_float64_in_small_segments(case, monkeypatch):
    """Segments of one chunk: the small cases, too, take many."""
    monkeypatch.setattr(regard.ops.linear.chunked, "MOST_CHUNKS", 1)
    ours = answers(by("chunked"), case.tensors(), case.request())
    for found in zip(ours, near(case), exact(case, torch.float64), strict=True):
        assert_double(*found)


@pytest.mark.sample(every=9)
@pytest.mark.parametrize("case", [c for c in CAUSAL if c.sizes.k_len > 7], ids=str)
def test_float64_in_parts(case, monkeypatch):
    """Without a graph, a long sequence goes part by part; here every one of more than 7 tokens."""
    monkeypatch.setattr(front, "PART", 0)
    monkeypatch.setattr(front, "CHUNK", 7)
    tensors, request = case.tensors(), case.request()
    with torch.no_grad():
        assert front._part(asked(*tensors, **request)) == 7
    for engine in engines_of(case):
        with torch.no_grad():
            out, state = by(engine)(*tensors, **request)
        ours = [t for t in (out, *parts(state)) if t is not None]
        assert_double(ours, near(case)[0], exact(case, torch.float64)[0])


@pytest.mark.parametrize("engine", ["auto", "chunked", "recurrent"])
def test_what_is_observed_is_what_was_computed(engine):
    """A feature map may draw: it is asked once for the queries and once for the keys."""
    asked_for = []

    def drawn(x: Tensor) -> Tensor:
        asked_for.append(x.shape)
        return torch.rand(x.shape, dtype=x.dtype)

    rng = torch.Generator().manual_seed(0)
    tensors = [floats(rng, 1, 2, 9, 4).double() for _ in range(3)]
    out, (rows,) = linear_attention(
        *tensors, feature_map=drawn, observe=[Rows(tuple(range(9)))], engine=engine
    )
    assert len(asked_for) == 2
    torch.testing.assert_close(rows.weights @ tensors[2], out)


@pytest.mark.parametrize("engine", ["auto", "chunked", "recurrent", "reference"])
def test_a_state_that_does_not_fit(engine):
    tensors = [torch.ones(1, 2, 3, 4) for _ in range(3)]
    _, state = linear_attention(*tensors, return_state=True)
    narrow = [t[..., :3] for t in tensors]
    with pytest.raises(RegardError, match="this call needs"):
        linear_attention(*narrow, state=state, engine=engine)


@pytest.mark.sample(every=13)
@pytest.mark.parametrize(
    "case, dtype",
    [
        *((case, dtype) for case in FEW for dtype in (torch.float32, torch.bfloat16)),
        *((case, torch.float16) for case in FEW[::3]),
    ],
    ids=str,
)
def test_other_dtypes_meet_the_bar(case, dtype):
    tensors, request = case.tensors(dtype=dtype), case.request(dtype)
    simple = answers(plainly, tensors, request)
    for engine in engines_of(case):
        mine = answers(by(engine), tensors, request)
        assert mine[0][0].dtype == dtype
        assert all(t.dtype == torch.float32 for t in mine[0][1:])
        for ours, theirs, truths in zip(mine, simple, exact(case, dtype), strict=True):
            for a, b, truth in zip(ours, theirs, truths, strict=True):
                if b.isfinite().all():
                    # A decay per head sums what nearly cancels over all tokens: a chance of its own
                    more = 4 if truth.numel() < 16 else 1
                    assert_within(a, b.to(a.dtype), truth, error=typical, roundings=more)
                else:  # what overflows in plain float16 is computed in float32
                    eps = torch.finfo(a.dtype).eps * float(truth.abs().max())
                    torch.testing.assert_close(a.double(), truth, rtol=0, atol=eps)


def literal(case: Case) -> Tensor:
    """The implied weights from their definition, key by key back from each query:

    w_ij = φ(q_i)ᵀ (I − β_i k_i k_iᵀ) A_i … (I − β_{j+1} k_{j+1} k_{j+1}ᵀ) A_{j+1} β_j k_j
    """
    s, request = case.sizes, case.request()
    query, key, _ = case.tensors()
    phi = {
        "elu": lambda x: torch.nn.functional.elu(x) + 1,
        "identity": lambda x: x,
        None: lambda x: x,
    }
    phi = phi.get(request.get("feature_map", "elu"), request.get("feature_map"))
    query, key = phi(query) * request.get("scale", 1), phi(key)
    weights = torch.zeros(s.batch, s.heads, s.q_len, s.k_len, dtype=torch.float64)
    for b in range(s.batch):
        for h in range(s.heads):
            mine = h * s.kv_heads // s.heads
            for i in range(s.q_len):
                row = query[b, h, i]
                for j in range(i, -1, -1):
                    k = key[b, mine, j]
                    strength = of_head(request.get("beta"), s, b, h, j)
                    weights[b, h, i, j] = (row @ k) * (1 if strength is None else strength)
                    if strength is not None:
                        row = row - strength * (row @ k) * k
                    decay = of_head(request.get("decay"), s, b, h, j)
                    if decay is not None:
                        row = row * decay.exp()
    elu = request.get("feature_map", "elu") == "elu" and "beta" not in request
    if request.get("normalise", elu):
        weights = weights / weights.sum(-1, keepdim=True)
    return weights


def of_head(given: Tensor | None, s, b: int, h: int, j: int) -> Tensor | None:
    if given is None:
        return None
    heads = given.shape[0] if given.dim() == 1 else given.shape[1]
    h = h * heads // s.heads
    return given[h] if given.dim() == 1 else given[b, h, j]


@pytest.mark.parametrize("form", [f for f in FORMS if "favor" not in f and f != "wider"])
def test_the_twin_is_the_formula(form):
    case = Case(form, at(23, batch=2, dim=3, v_dim=5), FORMS[form], layout=short)
    value = case.tensors()[2].repeat_interleave(2, 1)
    ours = linear_attention(*case.tensors(), **case.request(), engine="reference")
    torch.testing.assert_close(ours, literal(case) @ value, rtol=1e-11, atol=1e-11)


def test_without_causality_is_the_formula():
    """Katharopoulos et al. 2020, eq. 4."""
    query, key, value = Case("", at(9, 12, kv_heads=4)).tensors()
    phi = torch.nn.functional.elu
    weights = (phi(query) + 1) @ (phi(key) + 1).mT
    truth = weights / weights.sum(-1, keepdim=True) @ value
    for engine in ("reference", "chunked"):
        ours = linear_attention(query, key, value, causal=False, engine=engine)
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def assert_as_theirs(case: Case, theirs: tuple[Tensor, Tensor]) -> None:
    """(out, memory) in float32 by the bar: theirs is plain, the twin in float64 the truth."""
    request = case.request(torch.float32) | {"scale": 8**-0.5, "return_state": True}
    out, state = linear_attention(*case.tensors(dtype=torch.float32), **request)
    tensors, doubly = case.exactly(torch.float32)
    exact_out, exact_state = linear_attention(*tensors, **request | doubly, engine="reference")
    for mine, other, truth in zip(
        (out, state.memory), theirs, (exact_out, exact_state.memory), strict=True
    ):
        assert_within(mine, other, truth)
        # That theirs is the same function, however the two are off: no bar of ours
        torch.testing.assert_close(other.double(), truth, rtol=1e-5, atol=1e-5)


def test_gated_delta_rule_is_qwens():
    """The recurrence of Qwen3-Next in transformers (float32, scaled by 1 / √dim)."""
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    case = Case("", at(90, heads=3, kv_heads=3, dim=8), FORMS["gated delta"], layout=short)
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    decay, beta = request["decay"], request["beta"]
    truth, last = theirs.torch_recurrent_gated_delta_rule(
        *(t.transpose(1, 2) for t in tensors), g=decay.mT, beta=beta.mT, output_final_state=True
    )
    assert_as_theirs(case, (truth.transpose(1, 2), last))


def test_channel_delta_rule_is_kimis():
    """The recurrence of Kimi Linear in transformers (float32, scaled by 1 / √dim)."""
    theirs = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    case = Case("", at(90, heads=3, kv_heads=3, dim=8), FORMS["channel delta"], layout=short)
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    truth, last = theirs.recurrent_kimi_delta_attention(
        *(t.transpose(1, 2) for t in tensors), request["decay"].transpose(1, 2),
        request["beta"].mT, None, True,
    )  # fmt: skip
    assert_as_theirs(case, (truth.transpose(1, 2), last))


def cut(value, start: int, stop: int):
    """A request's tensor or mask, from token start to stop."""
    if isinstance(value, Tensor) and value.dim() >= 3:
        return value[:, :, start:stop]
    if isinstance(value, Documents):
        return Documents(value.query_ids[..., start:stop])
    if isinstance(value, Padding):
        return Padding(value.keep[..., start:stop])
    if hasattr(value, "left"):
        return cut(value.left, start, stop) & cut(value.right, start, stop)
    return value


def in_pieces(*tensors, ends: list[int], engine: str, **request):
    state, outs = None, []
    for a, b in pairwise(ends):
        out, state = linear_attention(
            *(t[:, :, a:b] for t in tensors),
            **{name: cut(v, a, b) for name, v in request.items()},
            state=state,
            return_state=True,
            engine=engine,
        )
        outs.append(out)
    return torch.cat(outs, 2), state


@pytest.mark.sample(every=7)
@pytest.mark.parametrize("case", [c for c in CAUSAL if c.sizes.k_len == 131], ids=str)
def test_pieces_are_the_whole(case):
    """A sequence cut anywhere, the state handed on: the same out, state and gradients."""
    ends = [0, 1, 2, 40, 40, 104, 128, 131]
    for engine in ("chunked", "recurrent") if case in CAUSAL[::3] else ("chunked",):
        ours = answers(
            lambda *t, **r: in_pieces(*t, ends=ends, engine=engine, **r),  # noqa: B023
            case.tensors(),
            case.request(),
        )
        for found in zip(ours, near(case), exact(case, torch.float64), strict=True):
            assert_double(*found)


@pytest.mark.parametrize("form", ["elu", "elu, fixed", "gla", "channel delta", "favor"])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_prefill_and_decode_are_the_whole(form, engine):
    case = next(c for c in CAUSAL if c.name == form)
    tensors, request = case.tensors(), case.request()
    out, state = in_pieces(*tensors, ends=[0, 120, *range(121, 132)], engine=engine, **request)
    ours = [t for t in (out, *parts(state)) if t is not None]
    assert_double(ours, near(case)[0], exact(case, torch.float64)[0])


def test_auto_decodes_by_steps(monkeypatch):
    """A few tokens without gradients take the recurrent step; any other call is chunked."""
    ran = []
    for form in (regard.ops.linear.chunked, regard.ops.linear.token_by_token):
        monkeypatch.setattr(
            form,
            "forward",
            lambda flow, form=form, run=form.forward: (ran.append(form), run(flow))[1],
        )
    query, key, value = Case("", at(4)).tensors()
    linear_attention(query, key, value)
    linear_attention(query.clone().requires_grad_(), key, value)
    linear_attention(*Case("", at(5)).tensors())
    chunked, recurrent = regard.ops.linear.chunked, regard.ops.linear.token_by_token
    assert ran == [recurrent, chunked, chunked]


def test_a_state_counts_and_detaches():
    query, key, value = (t.requires_grad_() for t in Case("", at(9)).tensors())
    _, state = linear_attention(query, key, value, return_state=True)
    _, state = linear_attention(query, key, value, state=state, return_state=True)
    assert state.length == 18
    assert state.memory.requires_grad
    cut_off = state.detach()
    assert not cut_off.memory.requires_grad
    assert not cut_off.normaliser.requires_grad
    assert cut_off.length == 18


def test_a_memory_without_keys_of_its_own():
    """Without causality a state is a memory to read: cross-attention to what was summed up."""
    query, key, value = Case("", at(9, 30)).tensors()
    whole = linear_attention(query, key, value, causal=False)
    _, state = linear_attention(key.repeat_interleave(2, 1), key, value, return_state=True)
    ours = linear_attention(query, key[:, :, :0], value[:, :, :0], causal=False, state=state)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)
    half = linear_attention(
        query, key[:, :, :11], value[:, :, :11], causal=False, return_state=True
    )[1]
    ours = linear_attention(query, key[:, :, 11:], value[:, :, 11:], causal=False, state=half)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


def test_documents_are_apart():
    """Packed documents give what each gives alone, and the state is that of the last."""
    query, key, value = Case("", at(100), layout=short).tensors()
    rng = torch.Generator().manual_seed(5)
    decay, beta = gate(rng, 2, 2, 100, 16).double(), torch.rand(2, 2, 100, generator=rng).double()
    cu = [0, 30, 31, 100]
    mask = Documents.from_cu_seqlens(torch.tensor(cu))
    request = {"feature_map": None, "decay": decay, "beta": beta}
    packed, state = linear_attention(query, key, value, **request, mask=mask, return_state=True)
    for a, b in pairwise(cu):
        here = {name: cut(v, a, b) for name, v in request.items()}
        alone, last = linear_attention(
            *(t[:, :, a:b] for t in (query, key, value)), **here, return_state=True
        )
        torch.testing.assert_close(packed[:, :, a:b], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.memory, last.memory, rtol=1e-12, atol=1e-12)
    assert state.document.tolist() == [2, 2]


def test_mixed_dtypes():
    """Gates in float32 beside bfloat16: kept as precise as they are; gradients in each dtype."""
    case = Case("", at(70), FORMS["gated delta"], layout=short)
    tensors = [t.requires_grad_() for t in case.tensors(dtype=torch.bfloat16)]
    request = mapped(case.request(torch.float32), lambda t: t.requires_grad_())
    out, state = linear_attention(*tensors, **request, return_state=True)
    assert (out.dtype, state.memory.dtype) == (torch.bfloat16, torch.float32)
    wide = linear_attention(*(t.float() for t in tensors), **request)
    torch.testing.assert_close(out, wide.bfloat16(), rtol=0, atol=0)
    out.float().sum().backward()
    assert [t.grad.dtype for t in tensors] == [torch.bfloat16] * 3
    assert request["decay"].grad.dtype == request["beta"].grad.dtype == torch.float32
