"""What ranks do in tests: a case of `cases` computed together, or whole, and what came of it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
    context_parallel,
)
from regard.call.biases import ALiBi, RelativeBias
from regard.distributed import decode, linear_over_ranks, shard, unshard
from regard.linear import Favor
from regard.ops.distributed.formulas import Sizes
from regard.ops.distributed.layout import Layout, named

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


def by_engine(mesh, name, how, engine, dtype=torch.float64):
    """out and gradients, unsharded; and what `explain` says of these."""
    case, cut = BY_NAME[name], {"dim": 2}
    q, k, v = (shard(t, mesh, **cut).clone().requires_grad_() for t in case.tensors(dtype=dtype))
    with context_parallel(mesh, how):
        said = regard.explain(q, k, v, **case.request(dtype))
        out, lse = regard.attention(q, k, v, **case.request(dtype), return_lse=True, engine=engine)
    shapes = (*q.shape[:2], case.sizes.q_len, v.shape[3])
    full = torch.empty(shapes, dtype=dtype), torch.empty(shapes[:3], dtype=lse.dtype)
    g, h = (shard(weights_of(t, n), mesh, **cut) for n, t in enumerate(full, 1))
    loss_of(out, lse, g, h).backward()
    return [unshard(t, mesh, **cut) for t in (out, q.grad, k.grad, v.grad)], said["gradients"]


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


def llama(dtype=torch.float64):
    """A Llama-shaped model of two layers, and a batch of two texts of which one is padded."""
    import regard.huggingface  # noqa: F401 (makes the name valid)
    from zoo import FAMILIES

    ids = torch.arange(2 * 23).view(2, 23) * 7 % 90 + 3
    keep = torch.ones(2, 23, dtype=torch.int64)
    keep[1, :6] = 0
    model = next(f for f in FAMILIES if f.name == "Llama").build().to(dtype)
    model.set_attn_implementation("regard")
    return model, {
        "input_ids": ids,
        "attention_mask": keep,
        "labels": ids.masked_fill(keep == 0, -100),
    }


def watched(mesh, how):
    """Logits, loss, results and a weight's gradient: over the ranks (mesh), or of one process."""
    model, inputs = llama()
    observe = [TopK(3), Received(), Entropy(), Map(4, 4)]
    watching = regard.watch(model, observe=observe, count_padding=True)
    if mesh is None:
        with watching as seen:
            answer = model(**inputs, use_cache=False)
        loss, logits = answer.loss, answer.logits
    else:
        own = shard(inputs, mesh)
        with context_parallel(mesh, how), watching as seen:
            answer = model(**own, use_cache=False, num_items_in_batch=_labels(inputs))
            loss, logits = answer.loss, unshard(answer.logits, mesh)
            loss.backward()
        dist.all_reduce(loss, group=mesh.get_group())
    if mesh is None:
        loss.backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad
    if mesh is not None:
        dist.all_reduce(gradient, group=mesh.get_group())
    gathered = (lambda r: r) if mesh is None else (lambda r: r.gather())
    results = [[gathered(r) for r in layer.seen] for layer in seen.layers]
    return logits.detach(), loss.detach(), gradient, results


def _labels(inputs) -> int:
    """How many labels of next tokens count."""
    return int((inputs["labels"][:, 1:] != -100).sum())


def own_modules(mesh, how):
    """A block of regard.nn with rotary positions: over the ranks, or in one process."""
    from regard import nn

    torch.manual_seed(5)
    block = nn.MultiHeadAttention(32, 4, kv_heads=2, rotary=nn.Rotary(8)).double()
    x = torch.randn(2, 21, 32, dtype=torch.float64)
    if mesh is None:
        return block(x, mask=regard.Causal()).detach()
    with context_parallel(mesh, how):
        return unshard(block(shard(x, mesh), mask=regard.Causal()), mesh)


def refused(mesh, what):
    """The error that a call is refused with, in this rank."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 4, 12, 8) for _ in range(3))
    mine = [shard(t, mesh, dim=2) for t in (q, k, v)]
    rank = mesh.get_local_rank()
    calls = {
        "heads": lambda: regard.attention(*mine, mask=regard.Causal()),
        "dropout by heads": lambda: regard.attention(*mine, dropout=0.1),
        "effect of a norm": lambda: regard.attention(
            mine[0].requires_grad_(), *mine[1:], observe=[regard.Effect(2, norm=True)]),
        "effect of nothing": lambda: regard.attention(*mine, observe=[regard.Effect(2)]),
        "other masks": lambda: regard.attention(
            *mine, mask=regard.Causal() if rank else regard.Full()),
        "other lengths": lambda: regard.attention(*(t[:, :, rank:] for t in mine)),
        "torch's attention": lambda: F.scaled_dot_product_attention(*mine),
        "positions that jump": lambda: llama(torch.float32)[0](
            shard(torch.arange(20)[None], mesh), use_cache=False,
            position_ids=shard(torch.arange(20)[None], mesh)),
        "decode steps": lambda: llama(torch.float32)[0].generate(
            shard(torch.arange(3, 23)[None], mesh), max_new_tokens=2),
    }  # fmt: skip
    how = {
        "heads": "heads",
        "dropout by heads": "heads",
        "effect of a norm": "ring",
        "effect of nothing": "ring",
    }
    try:
        with context_parallel(mesh, how.get(what, "gather")):
            calls[what]()
    except regard.RegardError as error:
        return str(error)
    return ""


def without_padding(mesh):
    """Sums over the queries that are not padding: gathered over the ranks, and of one process."""
    observe = [Received(), TopK(2), Map(4, 4), Distances(4)]
    model, inputs = llama()
    with torch.no_grad(), regard.watch(model, observe=observe) as one:
        model(**inputs, use_cache=False)
    found = []
    for how in ("heads", "gather", "ring"):
        with torch.no_grad(), context_parallel(mesh, how), regard.watch(model, observe) as seen:
            model(**shard(inputs, mesh), use_cache=False)
        pairs = zip(seen.layers, one.layers, strict=True)
        found += [(a.gather(), b) for x, y in pairs for a, b in zip(x.seen, y.seen, strict=True)]
    return found


def explained(mesh, how):
    q, k, v = (shard(torch.randn(1, h, 64, 8), mesh, dim=2) for h in (8, 4, 4))
    with context_parallel(mesh, how):
        return regard.explain(q.requires_grad_(), k, v, mask=regard.Causal())


def dropped(mesh):
    """The same seed in every rank, whatever each draws: out of the ranks, and of one process."""
    torch.manual_seed(mesh.get_local_rank())
    q, k, v = (t.float() for t in BY_NAME["causal"].tensors())
    with context_parallel(mesh):
        parts = (shard(t, mesh, dim=2) for t in (q, k, v))
        out = unshard(regard.attention(*parts, dropout=0.4), mesh, dim=2)
    torch.manual_seed(0)
    return out, regard.attention(q, k, v, dropout=0.4)


def in_balance(mesh):
    """Pairs that each rank sees of a mask in three orders, most over mean."""
    from regard.call.geometry import Place, Span
    from regard.distributed import balanced

    length, size = 4096, mesh.size()
    mask = regard.First(2000) & ~regard.Causal() | regard.Window(64)
    program = mask.lower(Place(1, 1, 1, length, length, 0, 0, torch.device("cpu")))
    rows = program.visible(Span(0, length, 0, length))[0, 0].sum(-1).double()
    worst = []
    for order in ("plain", "zigzag", balanced(mask, length, size)):
        layout = Layout(length, named(order, size))
        load = torch.stack([layout.take(rows, r, 0).sum() for r in range(size)])
        worst.append(float(load.max() / load.mean()))
    return worst


def decoded(mesh):
    """A step over keys in several ranks, out and results; and those of one process."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=rng, dtype=torch.float64)
               for h, n in ((4, 2), (2, 37), (2, 37)))  # fmt: skip
    request = {"mask": regard.Causal() & (regard.Window(30) | regard.First(2)),
               "sinks": torch.randn(4, generator=rng, dtype=torch.float64)}  # fmt: skip
    observe = [TopK(3), Entropy(), MaxScore(), LogSumExp(), Rows([-1]), NormTopK(2)]
    layout = Layout(37, named("plain", mesh.size()))
    ((start, stop),) = layout.spans(mesh.get_local_rank())
    out, seen = decode(q, k[:, :, start:stop], v[:, :, start:stop], mesh, query_start=35,
                       key_start=start, observe=observe, **request)  # fmt: skip
    exact, one = regard.attention(q, k, v, query_start=35, observe=observe, **request)
    return (out, *seen), (exact, *one)


def linear(mesh, kind):
    """out and gradients of linear attention over ranks, unsharded; and those of one process."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 29, 8, generator=rng, dtype=torch.float64) for h in (4, 2, 2))
    given = {"decay": -torch.rand(2, 2, 29, generator=rng, dtype=torch.float64)}
    more: dict = {}
    if kind == "beta":
        given["beta"] = torch.rand(2, 2, 29, generator=rng).double()
        more["feature_map"] = "identity"
    if kind == "long keys":  # so long that their features need a shift, from the middle on
        more["feature_map"] = Favor(16, seed=3)
        k[0, :, 12:] *= 30
    ids = torch.tensor([[0] * 7 + [1] * 15 + [-1] * 2 + [2] * 5, [3] * 29])
    keep = torch.rand(2, 29, generator=rng) < 0.7
    masked = kind == "documents"
    cut = {"order": "plain", "dim": 2}
    whole = [t.clone().requires_grad_() for t in (q, k, v, *given.values())]
    own = [shard(t, mesh, **cut).clone().requires_grad_() for t in (q, k, v, *given.values())]
    names = list(given)
    rows = (shard(t, mesh, order="plain", dim=1) for t in (ids, keep))
    pairs = ((ids, keep), tuple(rows))
    masks = [{"mask": regard.Documents(i) & regard.Padding(p)} if masked else {} for i, p in pairs]
    asked = [dict(zip(names, each[3:], strict=True)) | more for each in (whole, own)]
    one = regard.linear_attention(*whole[:3], **asked[0], **masks[0])
    two = linear_over_ranks(*own[:3], mesh, **asked[1], **masks[1])
    g = weights_of(one, 1)
    (one * g).sum().backward()
    (two * shard(g, mesh, **cut)).sum().backward()
    mine = [two, *(t.grad for t in own)]
    return [unshard(t, mesh, **cut) for t in mine], [one.detach(), *(t.grad for t in whole)]


def linear_refused(mesh, name):
    """What a rank is told of an argument that is not taken."""
    q = torch.zeros(1, 1, 4, 2)
    given = {"observe": [TopK(1)], "return_state": True, "causal": False}
    try:
        linear_over_ranks(q, q, q, mesh, **{name: given[name]})
    except regard.RegardError as error:
        return str(error)
    return ""
