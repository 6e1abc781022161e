"""Linear attention: large and bad numbers, gradcheck, same bits, autocast, compiled."""

import pytest
import torch
from torch import Tensor

from cases import Case, assert_within, at, floats
from linear_cases import CASES, FEW, FORMS, gate, short
from regard import Causal, Documents, Padding, Rows, attention, linear_attention
from regard.linear import Favor, LinearState
from regard.ops.linear.front import asked
from regard.ops.linear.recurrence import prepared
from test_linear import typical


def test_strong_gates_neither_overflow_nor_forget_too_much():
    """One chunk with decays of e^−300 among none: later tokens still see each other exactly."""
    query, key, value = Case("", at(64, batch=1, heads=1, kv_heads=1)).tensors(dtype=torch.float32)
    decay = torch.zeros(1, 1, 64, 16)
    decay[:, :, ::7] = -300.0
    decay[..., 3] = -1e30
    out = linear_attention(query, key, value, feature_map=None, decay=decay)
    plain, exact = (
        linear_attention(
            *(t.to(dtype) for t in (query, key, value)), feature_map=None, decay=decay.to(dtype),
            engine="reference",
        )
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    assert_within(out, plain, exact)


def test_a_query_far_below_zero_still_reads():
    """elu + 1 of it underflows in float32; the factor that cancels is taken out."""
    query, key, value = Case("", at(9)).tensors(dtype=torch.float32)
    shifted = linear_attention(query - 500, key, value)
    truth = (query - query.amax(-1, keepdim=True)).double().exp()
    phi = torch.where(key > 0, key + 1, key.clamp(max=0).exp()).double()
    weights = (truth @ phi.repeat_interleave(2, 1).mT).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    truth = weights @ value.double().repeat_interleave(2, 1)
    torch.testing.assert_close(shifted.double(), truth, rtol=1e-4, atol=1e-4)


def test_favor_directions_are_orthogonal():
    drawn = torch.ops.regard.favor_directions(torch.zeros(1, 8, dtype=torch.float64), 20, 5)
    assert drawn.shape == (20, 8)
    for block in drawn.split(8):
        gram = block @ block.mT
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-12)
    assert drawn.norm(dim=-1).unique().numel() == 20
    again = torch.ops.regard.favor_directions(torch.zeros(1, 8), 20, 5)
    torch.testing.assert_close(again.double(), drawn, rtol=1e-6, atol=1e-6)
    other = torch.ops.regard.favor_directions(torch.zeros(1, 8), 20, 6)
    assert (again - other).abs().min() > 0


def test_favor_is_on_average_softmax():
    """φ(q) · φ(k) → exp(q · k / √dim) over seeds; out → softmax attention with more features."""
    query, key, value = Case("", at(20, heads=2, kv_heads=2, dim=8), magnitude=0.5).tensors()
    key = key * 0.5
    kernel = (query @ key.mT / 8**0.5).exp()
    drawn = torch.stack(
        [
            Favor(64, seed).exponents(query).exp() @ Favor(64, seed).exponents(key).exp().mT
            for seed in range(400)
        ]
    )
    spread = drawn.std(0) / 400**0.5
    assert ((drawn.mean(0) - kernel).abs() / spread).square().mean() < 2  # 1 if unbiased
    exact = attention(query, key, value, mask=Causal())
    errors = []
    for features in (16, 256, 4096):
        maps = (Favor(features, seed) for seed in range(8))
        off = [linear_attention(query, key, value, feature_map=m) - exact for m in maps]
        errors.append(float(typical(torch.stack(off))))
    assert errors[0] > 2.5 * errors[1] > 2.5**2 * errors[2]  # 16 times as many: a quarter
    assert errors[2] < 0.02


@pytest.mark.sample(1)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("form", ["elu", "retention", "gla", "channel delta", "favor"])
def test_nan_and_inf_surface(form, where, bad):
    """In every row that sees it, and in no other head or item."""
    case = Case("", at(130), FORMS[form], layout=short)
    tensors = [t.clone() for t in case.tensors(dtype=torch.float32)]
    tensors[where][1, 1, 70, 2] = bad
    for engine in ("chunked", "recurrent", "reference"):
        out = linear_attention(*tensors, **case.request(torch.float32), engine=engine)
        shown = ~out.isfinite().all(-1)
        assert not shown[0].any()
        assert not shown[1, :2].any() or where == 0
        if where == 0:
            assert shown[1, 1].nonzero().flatten().tolist() == [70] or engine == "chunked"
            assert shown[1, 1, 70]
        elif form in ("elu", "favor") or where == 2:
            assert shown[1, 2:, 70].all()


def test_gradcheck():
    """Against finite differences, through out and state."""
    rng = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return floats(rng, *shape).double().requires_grad_()

    query, key, value = drawn(1, 2, 5, 3), drawn(1, 1, 5, 3), drawn(1, 1, 5, 2)
    decay = gate(rng, 1, 1, 5, 3).double().requires_grad_()
    beta = torch.rand(1, 1, 5, generator=rng).double().requires_grad_()
    memory = drawn(1, 1, 3, 2)

    def delta(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        *qkv, decay, beta, memory = leaves
        out, state = linear_attention(
            *qkv, feature_map=None, decay=decay, beta=beta, state=LinearState(memory),
            return_state=True, engine="chunked",
        )  # fmt: skip
        return out, state.memory

    assert torch.autograd.gradcheck(delta, (query, key, value, decay, beta, memory))

    def elu(*leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *qkv, decay, memory = leaves
        state = LinearState(memory, memory.abs().sum(-1))
        mask = Documents(torch.tensor([0, 0, -1, 1, 1])) & Padding(torch.arange(5) != 1)
        out, state = linear_attention(
            *qkv, decay=decay, state=state, return_state=True, engine="chunked"
        )
        packed = linear_attention(*qkv, decay=decay, mask=mask, engine="chunked")
        return out, packed, state.memory

    fixed = gate(rng, 2).double().requires_grad_()
    wide = drawn(1, 2, 3, 2)
    assert torch.autograd.gradcheck(elu, (query, key, value, fixed, wide))


@pytest.mark.parametrize("case", [c for c in FEW if c.sizes.batch > 1][::3], ids=str)
def test_same_bits_again_and_alone(case):
    """Same input, same bits: over runs, whatever the threads or the neighbours in the batch."""
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    first = linear_attention(*tensors, **request, engine="chunked")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    again = linear_attention(*tensors, **request, engine="chunked")
    torch.set_num_threads(before)
    assert torch.equal(first, again)
    if "mask" in request:  # its ids are those of the batch
        return
    request = {n: v[1:] if isinstance(v, Tensor) and v.dim() > 1 else v for n, v in request.items()}
    alone = linear_attention(*(t[1:] for t in tensors), **request, engine="chunked")
    assert torch.equal(first[1:], alone)


@pytest.mark.parametrize("form", ["elu", "gla", "gated delta", "favor", "everywhere, elu"])
def test_autocast_changes_nothing(form):
    """What is computed in float32 stays so: out, gradients and weights, to the bit."""
    case = next(c for c in CASES if c.name == form)
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    results = []
    for on in (False, True):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out, (rows,) = linear_attention(*leaves, **request, observe=[Rows([3])])
        grads = torch.autograd.grad((out * out).sum(), leaves)
        results.append([out, rows.weights, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.sample(0)
@pytest.mark.parametrize("form", ["identity", "gla", "channel delta"])
def test_the_ops_are_what_they_say(form):
    """torch's own checks: schema, fake tensors, autograd."""
    case = Case("", at(70), FORMS[form], layout=short)
    flow = prepared(asked(*case.tensors(), **case.request())).flow
    given = (flow.query, flow.key, flow.value, flow.decay, flow.beta, flow.memory)
    leaves = tuple(None if t is None else t.clone().requires_grad_() for t in given)
    torch.library.opcheck(torch.ops.regard.linear.default, (*leaves, True))
    torch.library.opcheck(torch.ops.regard.linear.default, (*given, False))
    like = torch.zeros(3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.regard.favor_directions.default, (like, 5, 1))


@pytest.mark.sample(0)
@pytest.mark.parametrize("form", ["elu", "gla", "channel delta", "favor", "packed"])
def test_compiles_whole(form):
    """torch.compile keeps the call in one graph: forward, backward, state and observers."""
    name = "elu" if form == "packed" else form
    case = Case("", at(70), FORMS[name], layout=short)
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    if form == "packed":
        request["mask"] = Documents(torch.arange(70) // 30) & Padding(torch.arange(70) % 9 > 0)

    def loss(*qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, state, (rows,) = linear_attention(
            *(t * 2 for t in qkv), **request, return_state=True, observe=[Rows([5])]
        )
        return (out * out).sum() + state.memory.sum(), out, rows.weights

    torch._dynamo.reset()
    answers = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        value, *seen = function(*leaves)
        value.backward()
        answers.append([value, *seen, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(answers[1], answers[0])
