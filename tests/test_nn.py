"""Modules against plain torch in float64, torch's own modules, and Hugging Face's models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from cases import CASES, DTYPES, Case, assert_within, mapped, plain
from regard import (
    Causal,
    Padding,
    Received,
    RegardError,
    Rows,
    TopK,
    Window,
)
from regard.nn import (
    Block,
    Decoder,
    Encoder,
    FeedForward,
    MultiHeadAttention,
    Rotary,
    Transformer,
)

MODEL = 20  # the size of a token's vector


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Any:
    """A module whose every parameter is drawn, and large enough for weights far from uniform."""
    module = make().to(dtype)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.copy_(offset + 0.4 * noise)
    return module


def tokens(length: int = 7, seed: int = 0, vocab: int = 11) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (2, length), generator=rng)


def typical(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()


# MultiHeadAttention against its twin


def twin(module: MultiHeadAttention, inputs: list[Tensor], at_q: Tensor, **request: Any) -> Tensor:
    """What the module computes, from its parameters, by plain torch in their dtype."""
    query, key, value = inputs

    def heads(x: Tensor, layer: nn.Linear) -> Tensor:
        y = x @ layer.weight.mT + (0 if layer.bias is None else layer.bias)
        return torch.stack(y.split(module.head_dim, -1), 1)

    def normed(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        if norm is None:
            return x
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    def turned(x: Tensor, at: Tensor) -> Tensor:
        if module.rotary is None:
            return x
        angles = at[:, None] * module.rotary.angles()[None]
        cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    q = turned(normed(heads(query, module.q_proj), module.q_norm), at_q)
    at_k = at_q if key is query else torch.arange(key.shape[1])
    k = turned(normed(heads(key, module.k_proj), module.k_norm), at_k)
    v = heads(value, module.v_proj)
    request = {"softcap": module.softcap, "scale": module.scale, "sinks": module.sinks} | request
    out, _ = plain(q, k, v, **request)
    out = out.transpose(1, 2).flatten(2) @ module.out_proj.weight.mT
    return out if module.out_proj.bias is None else out + module.out_proj.bias


def outcome(
    run: Callable[..., Tensor], module: MultiHeadAttention, inputs: list[Tensor], **request: Any
) -> list[Tensor]:
    """out, and the gradients of the inputs, the parameters and the biases of a fixed functional."""
    module.zero_grad()
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    made: dict[int, Tensor] = {}
    for tensor in inputs:  # one leaf where query is key
        if id(tensor) not in made:
            made[id(tensor)] = leaf(tensor)
    request = mapped(request, leaf)
    out = run(module, [made[id(t)] for t in inputs], **request)
    (out.double() * drawn(*out.shape, dtype=torch.float64, seed=9)).sum().backward()
    parameters = [p for p in module.parameters() if p.grad is not None]
    return [out.detach(), *(t.grad for t in [*leaves, *parameters])]


Triples = list[tuple[Tensor, Tensor, Tensor]]


def outcomes(
    module: MultiHeadAttention, inputs: list[Tensor], dtype: torch.dtype, **request: Any
) -> Triples:
    """What comes out of the module, of its twin at dtype, and of its twin in float64."""
    start = request.pop("positions", 0)
    at_q = torch.arange(inputs[0].shape[1]) + start

    def ours(m: MultiHeadAttention, given: list[Tensor], **r: Any) -> Tensor:
        query, key, value = given
        if key is query:
            return m(query, positions=start, **r)
        return m(query, key, value, positions=start, **r)

    def naive(m: MultiHeadAttention, given: list[Tensor], **r: Any) -> Tensor:
        r |= {"query_start": start, "key_start": start if given[1] is given[0] else 0}
        return twin(m, given, at_q, **r)

    unique = {id(t): t.to(dtype) for t in inputs}
    inputs = [unique[id(t)] for t in inputs]
    request = mapped(request, lambda t: t.to(dtype))
    at_dtype = torch.float32 if dtype == torch.float64 else dtype
    low = {id(t): t.to(at_dtype) for t in inputs}
    wide = {id(t): t.double() for t in inputs}
    exact = outcome(
        naive, copy.deepcopy(module).double(), [wide[id(t)] for t in inputs],
        **mapped(request, lambda t: t.double()),
    )  # fmt: skip
    simple = outcome(
        naive, copy.deepcopy(module).to(at_dtype), [low[id(t)] for t in inputs],
        **mapped(request, lambda t: t.to(at_dtype)),
    )  # fmt: skip
    mine = outcome(ours, module.to(dtype), inputs, **request)
    assert mine[0].dtype == dtype
    return list(zip(mine, simple, exact, strict=True))


def compare(module: MultiHeadAttention, inputs: list[Tensor], dtype: torch.dtype, **request: Any):
    """The module's error against float64 stays within the bar, which its twin's error sets."""
    assert_all_within(outcomes(module, inputs, dtype, **request), dtype)


def assert_all_within(found: Triples, dtype: torch.dtype) -> None:
    largest = max(float(c.abs().max()) for _, _, c in found if c.numel())
    for a, b, c in found:
        if c.numel() and float(c.abs().max()) < 1e-12 * largest:
            # What all keys share cancels in the softmax: its gradient is 0, and ours rounding
            assert float(a.abs().max()) < 20 * torch.finfo(dtype).eps * largest
        elif 0 < c.numel() < 8:  # sums over every pair: the error of a few is chance
            close = 30 * torch.finfo(dtype).eps * float(c.abs().max())
            torch.testing.assert_close(a.double(), c, rtol=0, atol=close)
        else:
            assert_within(a, b, c, dtype, error=typical)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "grouped": {"kv_heads": 2},
    "multi-query": {"kv_heads": 1},
    "wide heads": {"head_dim": 12},
    "normed": {"qk_norm": True},
    "rotary": {"rotary": Rotary(8)},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 1.5},
    "scaled": {"scale": 1.0},
    "all": {
        "kv_heads": 2, "qk_norm": True, "rotary": Rotary(8), "sinks": True, "softcap": 4.0,
        "bias": False,
    },
}  # fmt: skip


def build(heads: int = 4, dim: int = 8, **config: Any) -> MultiHeadAttention:
    return seeded(lambda: MultiHeadAttention(MODEL, heads, **{"head_dim": dim} | config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_self_attention_is_its_twin(config, dtype):
    x = drawn(2, 19, MODEL)
    mask = Causal() & Padding(torch.arange(19) >= torch.tensor([[0], [4]]))
    compare(build(**config), [x, x, x], dtype, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cross_attention_is_its_twin(config, dtype):
    """Queries, keys and values of three sizes."""
    inputs = [drawn(2, 9, MODEL), drawn(2, 23, 12, seed=1), drawn(2, 23, 7, seed=2)]
    module = build(**config, key_dim=12, value_dim=7)
    compare(module, inputs, dtype, mask=Window(15, ahead=3))


def fits(case: Case) -> bool:
    """Whether a module can make this call: no starts, nor dropout of a seed, nor dims apart."""
    s, request = case.sizes, case.request()
    placed = "query_start" in request or "dropout" in request
    return not placed and s.dim == s.v_dim and s.dim > 0 and s.dim % 2 == 0 and s.batch > 0


SHARED = [c for c in CASES if fits(c)]
FEW_PAIRS = 64  # of a query and a key


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_the_shared_cases(case):
    """Every mask and bias, with grouped heads, a norm and rotary, forward and gradients.

    Of a call of few tokens, some gradients are 8 numbers, nearly 0, whose error in one draw is
    chance: in one draw the twin's is several times smaller, in the next larger. The bar is held
    over several draws together, on which both errors are measured alike.
    """
    s, request = case.sizes, case.request(torch.float32)
    config = {name: request.pop(name) for name in ("softcap", "scale") if name in request}
    sinks = request.pop("sinks", None)
    module = build(
        s.heads, s.dim, kv_heads=s.kv_heads, qk_norm=True, rotary=Rotary(s.dim),
        sinks=sinks is not None, **config,
    )  # fmt: skip
    draws = []
    for first in range(0, 48 if s.q_len * s.k_len <= FEW_PAIRS else 3, 3):
        query, key, value = (
            drawn(s.batch, n, MODEL, seed=first + i)
            for i, n in enumerate((s.q_len, s.k_len, s.k_len))
        )
        draws.append(outcomes(module, [query, key, value], torch.float32, **request))
    joined = [
        tuple(torch.cat(of) for of in zip(*same, strict=True)) for same in zip(*draws, strict=True)
    ]
    assert_all_within(joined, torch.float32)


def test_the_shared_cases_are_many():
    assert len(SHARED) > 70


@pytest.mark.parametrize("start", [0, 7])
def test_positions_of_self_attention(start):
    """Masks and rotary both count from the start."""
    x = drawn(2, 19, MODEL)
    module = build(rotary=Rotary(8))
    compare(module, [x, x, x], torch.float32, mask=regard.First(12) & Causal(), positions=start)


def test_positions_as_a_tensor():
    """Left padding: each item's first token stands at 0."""
    module, x = build(rotary=Rotary(8, base=50.0)).double(), drawn(1, 9, MODEL).double()
    alone = module(x, mask=Causal())
    padded = torch.cat([drawn(1, 3, MODEL, seed=3).double(), x], 1)
    keep = torch.arange(12)[None] >= 3
    at = (torch.arange(12) - 3).clamp(min=0)
    for positions in (at, at[None]):
        out = module(padded, mask=Causal() & Padding(keep), positions=positions)
        torch.testing.assert_close(out[:, 3:], alone)


def test_observers_see_the_weights():
    """(out, seen) as from `regard.attention` on what the projections give."""
    module, x = build(kv_heads=2, rotary=Rotary(8), qk_norm=True), drawn(2, 13, MODEL)
    q = module.rotary(module.q_norm(module.q_proj(x).unflatten(-1, (4, 8)).transpose(1, 2)))
    k, v = module.remember(x)
    watchers = [TopK(3), Received(), Rows([5])]
    wanted_out, wanted = regard.attention(q, k, v, mask=Causal(), observe=watchers)
    out, (top, received, rows) = module(x, mask=Causal(), observe=watchers)
    torch.testing.assert_close(out, module.out_proj(wanted_out.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(out, module(x, mask=Causal()), rtol=0, atol=0)
    torch.testing.assert_close(top.weights, wanted[0].weights)
    torch.testing.assert_close(received.sum, wanted[1].sum)
    torch.testing.assert_close(rows.weights, wanted[2].weights)
    assert module(x, observe=[])[1] == ()


def test_dropout_is_of_training_and_of_the_weights():
    module, x = build().requires_grad_(False), drawn(2, 13, MODEL)
    exact = module(x)
    module.dropout = 0.5
    torch.manual_seed(0)
    first, second = module(x), module(x)
    assert not torch.allclose(first, second)
    torch.manual_seed(0)
    assert torch.equal(module(x), first)
    mean = torch.stack([module(x) for _ in range(400)]).mean(0)
    assert float((mean - exact).abs().mean()) < 0.1 * float(exact.abs().mean())
    assert torch.equal(module.eval()(x), exact)


def test_a_memory_is_projected_once():
    module = build(key_dim=12, value_dim=7, rotary=Rotary(8)).eval()
    query = drawn(2, 9, MODEL)
    key, value = drawn(2, 23, 12, seed=1), drawn(2, 23, 7, seed=2)
    out = module(query, key, value)
    memory = module.remember(key, value)
    assert torch.equal(module(query, memory), out)
    steps = [module(query[:, n : n + 1], memory, positions=n) for n in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), out)


WRONG = {
    "heads": (lambda: MultiHeadAttention(20, 3), "heads 3 do not divide dim 20; give head_dim"),
    "kv_heads": (lambda: MultiHeadAttention(20, 4, kv_heads=3), "heads 4, kv_heads 3: give"),
    "no heads": (lambda: MultiHeadAttention(20, 0), "dim 20, heads 0"),
    "dropout": (lambda: MultiHeadAttention(20, 4, dropout=1.0), "give 0 ≤ dropout < 1"),
    "rotary": (
        lambda: MultiHeadAttention(16, 4, rotary=Rotary(8)),
        "rotary turns 8 numbers of heads of 4",
    ),
    "query": (
        lambda: build()(drawn(2, 3, 19)),
        "query is (2, 3, 19); this module needs (batch, length, 20)",
    ),
    "unbatched": (lambda: build()(drawn(3, 20)), "query is (3, 20)"),
    "key": (
        lambda: build(key_dim=12)(drawn(2, 3, 20), drawn(2, 5, 20)),
        "key is (2, 5, 20); this module needs (batch, length, 12)",
    ),
    "value": (
        lambda: build(value_dim=12)(drawn(2, 3, 20), drawn(2, 5, 20)),
        "value is (2, 5, 20); this module needs (batch, length, 12)",
    ),
    "value alone": (
        lambda: build()(drawn(2, 3, 20), value=drawn(2, 3, 20)),
        "a value is given without a key",
    ),
    "memory and value": (
        lambda: build()(drawn(2, 3, 20), build().remember(drawn(2, 3, 20)), drawn(2, 3, 20)),
        "a value is given beside a Memory",
    ),
    "key and value": (
        lambda: build()(drawn(2, 3, 20), drawn(2, 5, 20), drawn(2, 4, 20)),
        "key and value must agree in batch, kv_heads and length",
    ),
    "cache of cross": (
        lambda: build()(drawn(2, 3, 20), drawn(2, 5, 20), cache=regard.cache.KVCache()),
        "a cache grows by the queries' own keys",
    ),
    "cache in training": (
        lambda: build(dropout=0.1)(drawn(2, 3, 20), cache=regard.cache.KVCache()),
        "a cache is for inference, without dropout; call eval() first",
    ),
    "activation": (lambda: FeedForward(8, activation="tanh"), "activation is 'tanh'; give relu"),
    "norm": (lambda: Block(8, 2, norm="batch"), "norm is 'batch'; give layer or rms"),
    "memory to a block without": (
        lambda: Block(8, 2)(drawn(1, 3, 8), drawn(1, 3, 8)),
        "memory is given to a block without cross-attention; make it with cross=True",
    ),
    "no memory": (
        lambda: Block(8, 2, cross=True)(drawn(1, 3, 8)),
        "this block has cross-attention; give it a memory (batch, k_len, memory_dim)",
    ),
    "remember": (lambda: Block(8, 2).remember(drawn(1, 3, 8)), "no cross-attention to remember"),
    "depth": (lambda: Encoder(0, 8, 2), "depth is 0"),
    "caches": (
        lambda: Decoder(2, 8, 2)(drawn(1, 3, 8), caches=[regard.cache.KVCache()]),
        "caches are 1 for 2 blocks; give one a block",
    ),
    "memories": (
        lambda: Decoder(2, 8, 2, cross=True)(drawn(1, 3, 8), []),
        "memory are 0 for 2 blocks",
    ),
    "neither": (lambda: Transformer(vocab=9, dim=8, heads=2), "encoder 0, decoder 0: give"),
    "source_vocab": (
        lambda: Transformer(vocab=9, dim=8, heads=2, decoder=1, source_vocab=4),
        "source_vocab is of an encoder beside a decoder",
    ),
    "positions": (
        lambda: Transformer(vocab=9, dim=8, heads=2, decoder=1, positions="absolute"),
        "positions is 'absolute'; give sinusoidal, learned, rotary, relative, alibi, or a module",
    ),
    "learned without length": (
        lambda: Transformer(vocab=9, dim=8, heads=2, decoder=1, positions="learned"),
        "learned positions end somewhere; give length",
    ),
    "floats": (
        lambda: Transformer(vocab=9, dim=8, heads=2, decoder=1)(drawn(2, 3)),
        "tokens are (2, 3) torch.float32; give integers (batch, length)",
    ),
    "source": (
        lambda: Transformer(vocab=9, dim=8, heads=2, decoder=1)(tokens(), tokens()),
        "source is for a model with an encoder and a decoder; give tokens alone",
    ),
    "no source": (
        lambda: Transformer(vocab=9, dim=8, heads=2, encoder=1, decoder=1)(tokens()),
        "this model has an encoder and a decoder; give tokens and source",
    ),
    "no encoder": (
        lambda: Transformer(vocab=9, dim=8, heads=2, decoder=1).encode(tokens()),
        "this model has no encoder",
    ),
    "no decoder": (
        lambda: Transformer(vocab=9, dim=8, heads=2, encoder=1).decode(tokens()),
        "this model has no decoder",
    ),
    "nothing to remember": (
        lambda: Transformer(vocab=9, dim=8, heads=2, encoder=1).remember(drawn(1, 2, 8)),
        "this model has no decoder",
    ),
}


@pytest.mark.parametrize("call, said", WRONG.values(), ids=WRONG)
def test_errors_show_shapes(call, said):
    with pytest.raises(RegardError) as error:
        call()
    assert said in str(error.value)
