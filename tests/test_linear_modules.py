"""`LinearAttention` and `DeltaAttention` against the recurrence written out in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import DTYPES, assert_within
from regard import Documents, Padding, Received, RegardError, Rows, TopK
from regard.linear import Favor
from regard.nn import DeltaAttention, LinearAttention, Rotary
from test_nn import drawn, seeded, typical

DIM, HEADS, LENGTH = 12, 4, 11

MODULES: dict[str, Callable[[], Any]] = {
    "elu": lambda: LinearAttention(DIM, HEADS),
    "grouped": lambda: LinearAttention(DIM, HEADS, kv_heads=2, bias=True),
    "favor": lambda: LinearAttention(DIM, HEADS, feature_map=Favor(8, seed=1)),
    "own features": lambda: LinearAttention(DIM, HEADS, feature_map=torch.exp, normalise=True),
    "retention": lambda: LinearAttention(
        DIM, HEADS, feature_map=None, decay="fixed", rotary=Rotary(4), head_dim=4, gate=True
    ),
    "gated": lambda: LinearAttention(
        DIM, HEADS, feature_map=None, decay="gated", kv_heads=2, value_head_dim=5
    ),
    "channels": lambda: LinearAttention(
        DIM, HEADS, feature_map=None, decay="channel", kv_heads=2, gate=True, bias=True
    ),
    "elu gated": lambda: LinearAttention(DIM, HEADS, decay="gated"),
    "delta": lambda: DeltaAttention(DIM, HEADS),
    "delta grouped": lambda: DeltaAttention(DIM, HEADS, kv_heads=2, norm=False, bias=True),
    "delta gated": lambda: DeltaAttention(DIM, HEADS, decay="gated", gate=True, value_head_dim=2),
    "delta channels": lambda: DeltaAttention(DIM, HEADS, decay="channel"),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def twin(module: Any, x: Tensor) -> Tensor:
    """The module token by token, from its parameters, by plain torch in x's dtype."""

    def heads(layer: torch.nn.Linear, size: int) -> Tensor:
        y = x @ layer.weight.mT + (0 if layer.bias is None else layer.bias)
        split = y.unflatten(-1, (-1, size)).transpose(1, 2)
        return split.repeat_interleave(HEADS // split.shape[1], 1)

    q, k = heads(module.q_proj, module.head_dim), heads(module.k_proj, module.head_dim)
    v = heads(module.v_proj, module.value_head_dim)
    if module.rotary is not None:
        q, k = module.rotary(q), module.rotary(k)
    delta = isinstance(module, DeltaAttention)
    normalise = False if delta else module.normalise
    if delta:
        beta = torch.sigmoid(x @ module.beta.weight.mT).transpose(1, 2)
        q, k = (t * torch.sigmoid(t) for t in (q, k))
        q, k = (t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k))
    elif module.feature_map == "elu":
        q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    elif isinstance(module.feature_map, Favor):
        q, k = (module.feature_map.exponents(t).exp() for t in (q, k))
    elif module.feature_map is not None:
        q, k = module.feature_map(q), module.feature_map(k)
    factor = decayed(module, x)
    state = x.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    total = x.new_zeros(*k.shape[:2], k.shape[-1])
    rows = []
    for t in range(x.shape[1]):
        state, total = state * factor[:, :, t, :, None], total * factor[:, :, t]
        written = v[:, :, t]
        if delta:
            held = (state * k[:, :, t, :, None]).sum(2)
            written = beta[:, :, t, None] * (written - held)
        state = state + k[:, :, t, :, None] * written[:, :, None]
        total = total + k[:, :, t]
        row = (state * q[:, :, t, :, None]).sum(2)
        rows.append(row / (total * q[:, :, t]).sum(-1, keepdim=True) if normalise else row)
    out = torch.stack(rows, 1)
    if module.norm is not None:
        size = (out.square().mean(-1, keepdim=True) + module.norm.eps).sqrt()
        out = out / size * module.norm.weight
    out = out.flatten(2)
    if module.gate is not None:
        gate = x @ module.gate.weight.mT + (0 if module.gate.bias is None else module.gate.bias)
        out = out * gate * torch.sigmoid(gate)
    out = out @ module.out_proj.weight.mT
    return out if module.out_proj.bias is None else out + module.out_proj.bias


def decayed(module: Any, x: Tensor) -> Tensor:
    """The factor of each token (batch, heads, length, 1 or head_dim)."""
    decay = module.decay
    if decay is None:
        return x.new_ones(x.shape[0], HEADS, x.shape[1], 1)
    if decay.kind == "fixed":
        rates = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(HEADS)], dtype=x.dtype)
        return rates[None, :, None, None].expand(x.shape[0], -1, x.shape[1], -1)
    if decay.kind == "gated":
        step = (1 + (x @ decay.project.weight.mT + decay.project.bias).exp()).log()
        return (-decay.log_rate.exp() * step).exp().transpose(1, 2)[..., None]
    logits = x @ decay.narrow.weight.mT @ decay.project.weight.mT + decay.project.bias
    factor = torch.sigmoid(logits) ** (1 / 16)
    factor = factor.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    return factor.repeat_interleave(HEADS // factor.shape[1], 1)


def outcome(run: Callable[..., Tensor], module: Any, x: Tensor) -> list[Tensor]:
    """out, and the gradients of the input and the parameters."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = run(module, x)
    (out.double() * drawn(*out.shape, dtype=torch.float64, seed=9)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_module
def test_is_its_twin(make, dtype):
    module = seeded(make, dtype)
    x = drawn(2, LENGTH, DIM, dtype=dtype)
    low = torch.float32 if dtype == torch.float64 else dtype
    mine = outcome(lambda m, x: m(x), module, x)
    exact = outcome(twin, copy.deepcopy(module).double(), x.double())
    plain = outcome(twin, copy.deepcopy(module).to(low), x.to(low))
    assert mine[0].dtype == dtype
    for ours, theirs, truth in zip(mine, plain, exact, strict=True):
        assert_within(ours, theirs, truth, dtype, error=typical)


@every_module
def test_tokens_one_by_one_are_one_call(make):
    """A prompt, a chunk and single tokens, the state handed on."""
    module, x = seeded(make, torch.float64), drawn(2, LENGTH, DIM, dtype=torch.float64)
    whole, state, parts = module(x), None, []
    for a, b in ((0, 4), (4, 8), *((n, n + 1) for n in range(8, LENGTH))):
        out, state = module(x[:, a:b], state=state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert state.length == LENGTH


@every_module
def test_documents_and_padding(make):
    """Packed documents are documents alone; a padded one is itself."""
    module, x = seeded(make, torch.float64), drawn(1, LENGTH, DIM, dtype=torch.float64)
    if module.rotary is not None:  # scores depend on distances: the start does not matter
        assert module.feature_map is None
    packed = module(x, mask=Documents(torch.arange(LENGTH) // 6))
    alone = torch.cat([module(x[:, :6]), module(x[:, 6:])], 1)
    torch.testing.assert_close(packed, alone)
    padded = module(x, mask=Padding(torch.arange(LENGTH) >= 3))
    torch.testing.assert_close(padded[:, 3:], module(x[:, 3:]))


@every_module
def test_observers_see_what_it_attends_to(make):
    """The implied weights: out = Σ w v, before norm and gate."""
    module, x = seeded(make, torch.float64), drawn(2, LENGTH, DIM, dtype=torch.float64)
    watchers = [Rows(range(LENGTH)), TopK(2), Received()]
    out, (rows, top, _) = module(x, observe=watchers)
    assert torch.equal(out, module(x))
    assert top.weights.shape == (2, HEADS, LENGTH, 2)
    v = module.v_proj(x).unflatten(-1, (-1, module.value_head_dim)).transpose(1, 2)
    mixed = rows.weights @ v.repeat_interleave(HEADS // v.shape[1], 1)
    mixed = mixed.transpose(1, 2)
    mixed = (mixed if module.norm is None else module.norm(mixed)).flatten(2)
    mixed = mixed if module.gate is None else mixed * F.silu(module.gate(x))
    torch.testing.assert_close(module.out_proj(mixed), out)
    out, state, seen = module(x, observe=watchers, return_state=True)
    assert (state.length, len(seen)) == (LENGTH, 3)


def test_without_causality():
    module = seeded(lambda: LinearAttention(DIM, HEADS, causal=False), torch.float64)
    x = drawn(2, LENGTH, DIM, dtype=torch.float64)
    q, k, v = (
        p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    mixed = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(module(x), module.out_proj(mixed.transpose(1, 2).flatten(2)))


def test_gates_begin_as_published():
    """Factors a token: for each head between exp(−16 · 0.1) and exp(−0.001)."""
    torch.manual_seed(0)
    module = LinearAttention(DIM, 64, head_dim=2, feature_map=None, decay="gated")
    torch.nn.init.zeros_(module.decay.project.weight)
    factor = module.decay(drawn(1, 3, DIM)).detach().exp()
    assert factor.shape == (1, 64, 3)
    assert 0.2 < float(factor.min()) < 0.8
    assert 0.98 < float(factor.max()) < 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_module
def test_autocast(make, dtype):
    module, x = seeded(make), drawn(2, LENGTH, DIM)
    with torch.autocast("cpu", dtype=dtype):
        out = module(x)
    assert out.dtype == dtype
    exact = module(x)
    error = (out - exact).detach().abs().mean()
    assert float(error) < 0.05 * float(exact.detach().abs().mean())


@every_module
def test_compiles_whole(make):
    """One graph, forward and backward."""
    module, x = seeded(make), drawn(2, LENGTH, DIM)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    answers = []
    for run in (module, compiled):
        module.zero_grad()
        out = run(x)
        out.square().sum().backward()
        answers.append([out, *(p.grad.clone() for p in module.parameters())])
    torch.testing.assert_close(answers[1], answers[0])


WRONG = {
    "heads": (lambda: LinearAttention(12, 5), "heads 5 do not divide dim 12; give head_dim"),
    "kv_heads": (lambda: DeltaAttention(12, 4, kv_heads=3), "of which kv_heads divides heads"),
    "decay": (lambda: LinearAttention(12, 4, decay="slow"), "decay is 'slow'; give fixed, gated"),
    "input": (
        lambda: DeltaAttention(12, 4)(drawn(3, 12)),
        "x is (3, 12); this module needs (batch, length, 12)",
    ),
    "not causal": (
        lambda: LinearAttention(12, 4, causal=False, decay="fixed")(drawn(1, 3, 12)),
        "decay is an order in time; it needs causal=True",
    ),
}


@pytest.mark.parametrize("call, said", WRONG.values(), ids=WRONG)
def test_errors_say_what_to_do(call, said):
    with pytest.raises(RegardError) as error:
        call()
    assert said in str(error.value)
