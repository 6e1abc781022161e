"""What ranks do in tests: a case of `cases` computed together, or whole, and what came of it."""

import torch
import torch.distributed as dist
from torch import Tensor

import regard
from cases import CASES, plain
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
from regard.ops.distributed.formulas import Sizes

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
    q, k, v = (shard(t, mesh, **cut).clone().requires_grad_() for t in case.tensors(dtype=dtype))
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
        dist.all_reduce(t.grad, group=mesh.get_group())
        grads.append(t.grad)
    return unshard(out, mesh, **cut), unshard(lse, mesh, **cut), grads, [s.gather() for s in seen]


def plainly(case, dtype, working=None):
    """out and gradients of q, k, v by plain torch, in `working`, of numbers rounded to dtype."""
    tensors = [t.to(working or dtype).requires_grad_() for t in case.tensors(dtype=dtype)]
    out, lse = plain(*tensors, **case.request(working or dtype))
    g, h = weights_of(out.to(dtype), 1), weights_of(lse.to(torch.float32), 2)
    loss_of(out, lse, g.to(out.dtype), h.to(out.dtype)).backward()
    return [out.detach(), *(t.grad for t in tensors)]


def tensors_of(result) -> dict[str, Tensor]:
    """The tensors of a result by name."""
    if isinstance(result, regard.call.edge_results.EffectSeen):
        return {n: getattr(result, n) for n in ("indices", "effects", "weights")}
    return {n: v for n, v in vars(result).items() if isinstance(v, Tensor)}


def numbers_of(result) -> dict:
    """What a result says besides its tensors."""
    return {n: v for n, v in vars(result).items() if not isinstance(v, Tensor) and n[0] != "_"}


EFFECTS = (*OBSERVERS, Effect(2))


def two_layers(mesh, how):
    """Two calls before one backward of both: pairs of gradients, ours and one process'."""
    case, cut = BY_NAME["causal"], {"dim": 2}
    wholes = [[t.requires_grad_() for t in case.tensors(seed)] for seed in (0, 1)]
    parts = [[shard(t.detach(), mesh, **cut).requires_grad_() for t in w] for w in wholes]
    mask = regard.Causal()
    one = [regard.attention(*w, mask=mask) for w in wholes]
    (one[0] * one[1]).sum().backward()
    with context_parallel(mesh, how):
        two = [regard.attention(*p, mask=mask) for p in parts]
    (two[0] * two[1]).sum().backward()
    return [
        (unshard(p.grad, mesh, **cut), w.grad)
        for ps, ws in zip(parts, wholes, strict=True)
        for p, w in zip(ps, ws, strict=True)
    ]


def counted(mesh, how, dtype, observe, wants):
    """(bytes that this rank sent in the forward, in the backward, the formulas' sizes)."""
    sent = [0]
    group = mesh.get_group()
    kept = {n: getattr(dist, n) for n in ("all_gather", "all_to_all_single", "batch_isend_irecv")}
    rank, size = mesh.get_local_rank(), mesh.size()

    def all_gather(found, tensor, **more):
        sent[0] += (size - 1) * tensor.nbytes
        return kept["all_gather"](found, tensor, **more)

    def all_to_all_single(found, tensor, ins, outs, **more):
        sent[0] += (sum(outs) - outs[rank]) * tensor.element_size()
        return kept["all_to_all_single"](found, tensor, ins, outs, **more)

    def batch_isend_irecv(ops):
        sent[0] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return kept["batch_isend_irecv"](ops)

    sizes = Sizes(size, 2, 8, 4, 96, 96, 16, 16, dtype.itemsize)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (
        shard(torch.randn(2, h, 96, 16, generator=rng).to(dtype), mesh, dim=2).requires_grad_(wants)
        for h in (8, 4, 4)
    )
    for name, function in list(locals().items()):
        if name in kept:
            setattr(dist, name, function)
    try:
        with context_parallel(mesh, how):
            answer = regard.attention(q, k, v, mask=regard.Causal(), observe=observe)
        out = answer[0] if observe is not None else answer
        forward = sent[0]
        if wants:
            out.float().sum().backward()
        assert group is mesh.get_group()
        return forward, sent[0] - forward, sizes
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
