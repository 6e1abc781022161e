"""What ranks do in tests: a case of `cases` computed together, or whole, and what came of it."""

import torch
from torch import Tensor

import regard
from cases import CASES
from regard import (
    Distances,
    Effect,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    NormTopK,
    Received,
    Rows,
    TopK,
)
from regard.call.biases import ALiBi, RelativeBias
from regard.distributed import context_parallel, shard, unshard

BY_NAME = {case.name: case for case in CASES}
OBSERVERS = (
    TopK(3),
    Received(),
    Received(heads="mean"),
    Received(queries=(60, 120), heads="group_sum"),
    Entropy(),
    MaxScore(),
    LogSumExp(),
    Rows([100, -1, 0, 100]),
    Map(6, 9),
    Map(5, 4, "max"),
    Distances(8),
    NormTopK(2),
)


def weights_of(tensor: Tensor, seed: int) -> Tensor:
    """What a scalar loss multiplies an output by."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=rng, dtype=torch.float64).to(tensor.dtype)


def floats_in(request: dict) -> list[Tensor]:
    """The tensors of a request that have gradients: biases, slopes, tables, sinks."""
    found = []
    bias = request.get("bias")
    for each in bias if isinstance(bias, list) else [bias]:
        inner = {ALiBi: "slopes", RelativeBias: "table"}.get(type(each))
        found.append(getattr(each, inner) if inner else each)
    found.append(request.get("sinks"))
    return [t.requires_grad_() for t in found if isinstance(t, Tensor)]


def loss_of(out: Tensor, lse: Tensor, g: Tensor, h: Tensor) -> Tensor:
    seen = lse.masked_fill(lse == -torch.inf, 0)
    return (out * g).sum() + (seen * h).sum()


def whole(name: str, dtype=torch.float64, observe=OBSERVERS, engine="auto"):
    """The case in one process: out, lse, gradients, results."""
    case = BY_NAME[name]
    q, k, v = (t.requires_grad_() for t in case.tensors(dtype=dtype))
    request = case.request(dtype)
    others = floats_in(request)
    out, lse, *seen = regard.attention(
        q, k, v, **request, observe=list(observe), return_lse=True, engine=engine
    )
    loss_of(out, lse, weights_of(out, 1), weights_of(lse, 2)).backward()
    grads = [t.grad for t in (q, k, v, *others)]
    return out.detach(), lse.detach(), grads, seen[0]


def together(mesh, name, how, dtype=torch.float64, order="zigzag", observe=OBSERVERS, most=2**30):
    """The same, each rank with its part; unsharded."""
    case = BY_NAME[name]
    cut = {"order": order, "dim": 2}
    q, k, v = (
        shard(t, mesh, **cut).clone().requires_grad_() for t in case.tensors(dtype=dtype)
    )
    request = case.request(dtype)
    others = floats_in(request)
    with context_parallel(mesh, how, order=order, most=most):
        out, lse, seen = regard.attention(
            q, k, v, **request, observe=list(observe), return_lse=True
        )
    shapes = (*q.shape[:2], case.sizes.q_len, v.shape[3])
    full = torch.empty(shapes, dtype=dtype), torch.empty(shapes[:3], dtype=lse.dtype)
    g, h = (shard(weights_of(t, n), mesh, **cut) for n, t in enumerate(full, 1))
    loss_of(out, lse, g, h).backward()
    grads = [unshard(t.grad, mesh, **cut) for t in (q, k, v)]
    for t in others:
        torch.distributed.all_reduce(t.grad, group=mesh.get_group())
        grads.append(t.grad)
    return unshard(out, mesh, **cut), unshard(lse, mesh, **cut), grads, [s.gather() for s in seen]


def tensors_of(result) -> dict[str, Tensor]:
    """The tensors of a result by name."""
    if isinstance(result, regard.call.edge_results.EffectSeen):
        return {n: getattr(result, n) for n in ("indices", "effects", "weights")}
    return {n: v for n, v in vars(result).items() if isinstance(v, Tensor)}


def numbers_of(result) -> dict:
    """What a result says besides its tensors."""
    return {n: v for n, v in vars(result).items() if not isinstance(v, Tensor) and n[0] != "_"}


EFFECTS = (*OBSERVERS, Effect(2))
