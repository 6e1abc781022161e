"""torch.func: vmap, gradients for each sample, ensembles, Jacobians."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

from regard import (
    ALiBi,
    Causal,
    Dense,
    Documents,
    Entropy,
    Padding,
    Received,
    RegardError,
    RelativeBias,
    TopK,
    Window,
    attention,
)
from test_nn import drawn, tokens
from test_torch_features import translator


def named(engine: str) -> Any:
    def run(query: Tensor, key: Tensor, value: Tensor, **request: Any) -> Tensor:
        return attention(query, key, value, engine=engine, **request)

    return run


engines = pytest.mark.parametrize("engine", ["auto", "tiled", "reference"])

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)

MAPPED = 3


def mapped_tensors(dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    return [drawn(MAPPED, batch, h, n, 8, dtype=dtype, seed=n) for h, n in ((4, 5), (2, 7), (2, 7))]


MASKS: dict[str, Any] = {
    "none": dict,
    "causal": lambda: {"mask": Causal() & Window(4)},
    "padding": lambda: {"mask": Padding(torch.arange(7) < torch.tensor([[7], [4]]))},
    "documents": lambda: {"mask": Documents(torch.arange(5) // 3, torch.arange(7) // 4)},
    "dense": lambda: {"mask": Dense(drawn(2, 1, 5, 7) > -0.5)},
    "bias": lambda: {"bias": drawn(4, 5, 7, dtype=torch.float64)},
    "alibi": lambda: {"bias": ALiBi(), "mask": Causal()},
    "table": lambda: {"bias": RelativeBias(drawn(8, 4, dtype=torch.float64))},
    "sinks": lambda: {"sinks": drawn(4, dtype=torch.float64), "softcap": 2.0},
}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Not the bar: two ways to the same sums by one engine, neither nearer to the truth."""
    return {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.sample(1)
@pytest.mark.filterwarnings("error")
@dtypes
@engines
@pytest.mark.parametrize("build", MASKS.values(), ids=MASKS)
def test_vmap_is_a_loop(build, engine, dtype):
    """Of query, key and value, each mapped or not, along any dimension; and its gradients."""
    request, run = build(), named(engine)
    tensors = mapped_tensors(dtype)
    for dims in ((0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, 2)):
        given = [t[0] if d is None else t.movedim(0, d) for t, d in zip(tensors, dims, strict=True)]
        slices = [
            [t if d is None else t.select(d, n) for t, d in zip(given, dims, strict=True)]
            for n in range(MAPPED)
        ]
        ours = vmap(lambda q, k, v: run(q, k, v, **request), in_dims=dims)(*given)
        wanted = torch.stack([run(*one, **request) for one in slices])
        torch.testing.assert_close(ours, wanted, **tolerance(dtype))

        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return run(q, k, v, **request).square().sum()

        of_each = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=dims)(*given)
        for n, one in enumerate(slices):
            leaves = [t.detach().clone().requires_grad_() for t in one]
            loss(*leaves).backward()
            for mine, leaf in zip(of_each, leaves, strict=True):
                torch.testing.assert_close(mine[n], leaf.grad, **tolerance(dtype))


@engines
def test_vmap_over_what_has_no_batch(engine):
    """Biases, tables, slopes and sinks, mapped, and their gradients."""
    q, k, v = (t[0] for t in mapped_tensors(torch.float64))
    bias, table = (
        drawn(MAPPED, *s, dtype=torch.float64, seed=i) for i, s in enumerate(((5, 7), (8, 4)))
    )
    slopes, sinks = (drawn(MAPPED, 4, dtype=torch.float64, seed=i).abs() for i in (2, 3))

    def loss(bias: Tensor, table: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
        biases = [bias, RelativeBias(table), ALiBi(slopes)]
        return attention(q, k, v, bias=biases, sinks=sinks, engine=engine).square().sum()

    given = (bias, table, slopes, sinks)
    of_each = vmap(grad(loss, argnums=(0, 1, 2, 3)))(*given)
    for n in range(MAPPED):
        leaves = [t[n].clone().requires_grad_() for t in given]
        loss(*leaves).backward()
        for mine, leaf in zip(of_each, leaves, strict=True):
            torch.testing.assert_close(mine[n], leaf.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ["auto", "tiled"])
def test_vmap_over_masks(engine):
    q, k, v = (t[0] for t in mapped_tensors(torch.float32))
    keep = drawn(MAPPED, 2, 7) > -0.5
    ids = torch.randint(3, (MAPPED, 7), generator=torch.Generator().manual_seed(0))

    def run(keep: Tensor, ids: Tensor) -> Tensor:
        return attention(q, k, v, mask=Padding(keep) & Documents(ids[2:], ids), engine=engine)

    wanted = torch.stack([run(*one) for one in zip(keep, ids, strict=True)])
    torch.testing.assert_close(vmap(run)(keep, ids), wanted)


def test_vmap_in_vmap_and_the_same_bits():
    """A mapped dimension is folded into the batch, which changes no bits."""
    tensors = [drawn(2, MAPPED, 1, 4, n, 8, seed=n) for n in (5, 7, 7)]
    run = named("tiled")
    ours = vmap(vmap(run))(*tensors)
    wanted = torch.stack([torch.stack([run(*t) for t in zip(*ts)]) for ts in zip(*tensors)])  # noqa: B905
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("engine", ["auto", "tiled"])
def test_vmap_observes(engine):
    tensors = mapped_tensors(torch.float32)
    slopes = drawn(MAPPED, 4).abs()

    def run(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        watchers = [TopK(2), Received(), Entropy()]
        _, (top, received, entropy) = attention(
            q, k, v, bias=ALiBi(slopes), observe=watchers, engine=engine
        )
        return top.weights, top.indices, received.sum, received.count, entropy.values

    for dims in ((0, 0, 0, 0), (0, 0, 0, None)):
        ours = vmap(run, in_dims=dims)(*tensors, slopes if dims[3] == 0 else slopes[0])
        for n in range(MAPPED):
            wanted = run(*(t[n] for t in tensors), slopes[n if dims[3] == 0 else 0])
            for mine, theirs in zip(ours, wanted, strict=True):
                torch.testing.assert_close(mine[n], theirs)


def test_vmap_drops_by_its_randomness():
    """torch's rule: refused, or the same for all slices, or another for each."""
    tensors = [t[:1].expand_as(t) for t in mapped_tensors(torch.float32)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, dropout=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(run)(*tensors)
    same = vmap(run, randomness="same")(*tensors)
    assert torch.equal(same[0], same[1])
    other = vmap(run, randomness="different")(*tensors)
    assert not torch.allclose(other[0], other[1])
    # A row of a few keys is dropped whole now and then; its slice is another one each time
    assert 0.9 < float((other != 0).float().mean()) <= 1


def test_per_sample_gradients_of_a_model():
    """vmap of grad over a whole Transformer, mask and all, equals one sample at a time."""
    model = translator()
    params = {n: p.detach() for n, p in model.named_parameters()}
    target, source = tokens(), tokens(9, seed=1)
    keep = torch.arange(9) < torch.tensor([[9], [4]])

    def loss(params: dict[str, Tensor], target: Tensor, source: Tensor, keep: Tensor) -> Tensor:
        given = (target[None], source[None])
        logits = functional_call(model, params, given, {"source_mask": Padding(keep[None])})
        return logits.square().mean()

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0))(params, target, source, keep)
    for n in range(2):
        model.zero_grad()
        loss(dict(model.named_parameters()), target[n], source[n], keep[n]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][n], parameter.grad, rtol=1e-4, atol=1e-5)


def test_an_ensemble_of_models():
    models = [translator().eval() for _ in range(3)]
    for number, model in enumerate(models):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.1 * number)
    params, buffers = stack_module_state(models)
    # Not on "meta", as torch's own example has it: moving there unties the head from the embedding
    base, given = models[0], (tokens(), tokens(9))

    def run(params: Any, buffers: Any) -> Tensor:
        return functional_call(base, (params, buffers), given)

    wanted = torch.stack([m(*given) for m in models])
    torch.testing.assert_close(vmap(run)(params, buffers), wanted)


@engines
def test_jacobians(engine):
    q, k, v = (t[0, :1, :2] for t in mapped_tensors(torch.float64))
    run = named(engine)
    ours = jacrev(lambda q: run(q, k, v, mask=Causal()))(q)
    wanted = torch.autograd.functional.jacobian(
        lambda q: attention(q, k, v, mask=Causal(), engine="reference"), q
    )
    torch.testing.assert_close(ours, wanted)


def test_second_derivatives_are_the_references():
    """The others say so."""
    q, k, v = (t[0, :1, :2] for t in mapped_tensors(torch.float64))

    def twice(engine: str) -> Tensor:
        return grad(lambda q: grad(lambda q: attention(q, k, v, engine=engine).sum())(q).sum())(q)

    leaf = q.clone().requires_grad_()
    first = torch.autograd.grad(
        attention(leaf, k, v, engine="reference").sum(), leaf, create_graph=True
    )[0]
    wanted = torch.autograd.grad(first.sum(), leaf)[0]
    torch.testing.assert_close(twice("reference"), wanted)
    with pytest.raises(RegardError, match="only engine='reference' can be differentiated twice"):
        twice("tiled")
