"""Linear attention on a CUDA GPU, for `gpu.py`: the Triton kernels against float64, then their time
beside the engine `chunked` and, where it is installed, flash-linear-attention.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_place import DEVICE, DRY
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from regard import Documents, linear_attention

HEADS = 32
FORMS = ("retention", "scalar gate", "gla", "delta", "gated delta", "channel delta")


def request(form: str, batch: int, heads: int, tokens: int, dim: int) -> dict[str, Any]:
    """The form's arguments, float32, on the current device; gates from near 0 to −20."""
    asked: dict[str, Any] = {"feature_map": None, "scale": dim**-0.5}
    if form == "elu":
        asked = {}
    if form == "retention":
        asked["decay"] = torch.log1p(-(2.0 ** (-5 - torch.arange(heads) % 24)))
    if form in ("scalar gate", "gated delta"):
        asked["decay"] = logsigmoid(4 * torch.randn(batch, heads, tokens) + 4)
    if form in ("gla", "channel delta"):
        asked["decay"] = logsigmoid(4 * torch.randn(batch, heads, tokens, dim) + 4)
    if "delta" in form:
        asked["beta"] = torch.rand(batch, heads, tokens)
    return asked


def answers(engine: str, tensors: list[Tensor], asked: dict[str, Any]) -> list[Tensor]:
    """Out, the last state, and the gradients of a fixed functional of both."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    floats = {n: t.detach().requires_grad_() for n, t in asked.items() if isinstance(t, Tensor)}
    out, state = linear_attention(*tensors, **asked | floats, return_state=True, engine=engine)
    rng = torch.Generator(DEVICE).manual_seed(2)
    loss: Any = 0
    for given in (out, state.memory):
        weights = torch.randn(given.shape, generator=rng, device=DEVICE)
        loss = loss + (given.double() * weights).sum()
    grads = torch.autograd.grad(loss, [*tensors, *floats.values()])
    return [t.detach() for t in (out, state.memory, *grads)]


def checked() -> Iterator[str]:
    """What is not within its bar, in words."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (32, 64, 80, 128, 256):
            for form in ("elu", *FORMS):
                for what in wrong(form, dtype, dim):
                    yield f"{what}: linear attention, {form}, {dtype}, dim {dim}"


def forms(dtype: torch.dtype) -> Iterator[str]:
    """The same of one type, at two dims."""
    for dim in (128, 64)[DRY:]:
        for form in ("elu", *FORMS)[slice(1, 2) if DRY else slice(None)]:
            for what in wrong(form, dtype, dim):
                yield f"{what}: linear attention, {form}, {dtype}, dim {dim}"


def wrong(form: str, dtype: torch.dtype, dim: int) -> Iterator[str]:
    """What is off: outputs, states, gradients, from run to run; packed sequences, too."""
    n = 20 if DRY else 333
    with torch.device(DEVICE):
        query = torch.randn(2, 4, n, dim, dtype=dtype)
        key, value = torch.randn(2, 2, 2, n, dim, dtype=dtype)
        asked = request(form, 2, 2, n, dim)
        mask = Documents(torch.arange(n) // 90)
    tensors = [query, normalize(key.float(), dim=-1).to(dtype), value]
    names = ["out", "state", "d_query", "d_key", "d_value"]
    names += [f"d_{n}" for n, t in asked.items() if isinstance(t, Tensor)]
    eps = torch.finfo(dtype).eps * (64 if dtype == torch.float32 else 8)
    for more in ({}, {"mask": mask}):
        whole = {n: t.double() if isinstance(t, Tensor) else t for n, t in asked.items()}
        exact = answers("reference", [t.double() for t in tensors], whole | more)
        ours, again = (answers("triton", tensors, asked | more) for _ in range(2))
        for name, mine, repeated, truth in zip(names, ours, again, exact, strict=True):
            if not torch.equal(mine, repeated):
                yield f"{name} differs from run to run"
            if not (mine.double() - truth).abs().max() <= eps * (1 + truth.abs().max()):
                yield f"{name}{', packed' if more else ''}"


def peer(form: str) -> Callable[..., Any] | None:
    """flash-linear-attention's kernel of (query, key, value, decay, beta), all (…, heads, dim)."""
    if importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.simple_gla import chunk_simple_gla

    kernels: dict[str, Callable[..., Any]] = {
        "retention": lambda q, k, v, g, b: chunk_simple_gla(q, k, v, g_gamma=g)[0],
        "scalar gate": lambda q, k, v, g, b: chunk_simple_gla(q, k, v, g=g)[0],
        "gla": lambda q, k, v, g, b: chunk_gla(q, k, v, g)[0],
        "delta": lambda q, k, v, g, b: chunk_delta_rule(q, k, v, b)[0],
        "gated delta": lambda q, k, v, g, b: chunk_gated_delta_rule(q, k, v, g, b)[0],
        "channel delta": lambda q, k, v, g, b: chunk_kda(q, k, v, g, b)[0],
    }
    return kernels.get(form)


def measured(longest: int, timed: Callable[..., float]) -> Iterator[str]:
    """The table, line by line. timed: milliseconds of a call over inputs in rotation."""
    yield "| N | D | linear attention | triton | chunked | fla | with gradients | chunked | fla |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for n in (n for n in (2048, 8192, 32768) if n <= longest):
        for dim in (64, 128):
            for form in FORMS:
                yield row(form, n, dim, timed)
    yield ""
    yield "triton and its time with gradients: ms; others × its time. fla: flash-linear-attention."


def row(form: str, n: int, dim: int, timed: Callable[..., float]) -> str:
    """One line of the table."""
    with torch.device(DEVICE):
        given = [tuple(torch.randn(3, 1, HEADS, n, dim, dtype=torch.bfloat16)) for _ in range(2)]
        given = [(q, normalize(k, dim=-1), v) for q, k, v in given]
        asked = request(form, 1, HEADS, n, dim)
    decay, beta = asked.get("decay"), asked.get("beta")
    theirs = [tuple(t.transpose(1, 2).contiguous() for t in each) for each in given]
    gate = decay if decay is None or decay.dim() == 1 else decay.transpose(1, 2).contiguous()
    strength = None if beta is None else beta.mT.contiguous().bfloat16()
    kernel = peer(form)

    def by(engine: str) -> Callable[..., Tensor]:
        return lambda q, k, v: linear_attention(q, k, v, **asked, engine=engine)

    calls: list[tuple[Callable[..., Tensor] | None, Any]] = [
        (by("triton"), given), (by("chunked"), given),
        (None if kernel is None else lambda q, k, v: kernel(q, k, v, gate, strength), theirs),
    ]  # fmt: skip
    cells = []
    for gradients in (False, True):
        spans = [spent(call, each, gradients, timed) for call, each in calls if call is not None]
        cells.append(f"{spans[0]:.2f} ms")
        cells += [f"{span / spans[0]:.2f}" for span in spans[1:]]
        if kernel is None:
            cells.append("–")
    return f"| {n} | {dim} | {form} | {' | '.join(cells)} |"


def spent(
    call: Callable[..., Tensor], given: list[tuple[Tensor, ...]], gradients: bool,
    timed: Callable[..., float],
) -> float:  # fmt: skip
    """Milliseconds of the call, or of it and its gradients."""
    if not gradients:
        with torch.no_grad():
            return timed(call, given)
    leaves = [tuple(t.detach().requires_grad_() for t in each) for each in given]

    def both(*tensors: Tensor) -> None:
        out = call(*tensors)
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    return timed(both, leaves)
