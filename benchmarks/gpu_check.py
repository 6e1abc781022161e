"""On a CUDA GPU: every kernel against float64. Run by gpu.py and gpu_ready.py.

Each engine and the Triton kernels of the second pass on small calls, few queries, pages and Effect
among them, against `reference` and the plain torch readers in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from gpu_place import DEVICE, DRY
from torch import Tensor

from regard import (
    ALiBi,
    Causal,
    Distances,
    Documents,
    Dropout,
    Edges,
    Effect,
    Entropy,
    First,
    LogSumExp,
    Map,
    MaxScore,
    Padding,
    Predicate,
    Received,
    RelativeBias,
    Rows,
    TopK,
    Window,
    attention,
    explain,
    observe,
)
from regard.cache import Pages
from regard.call.checked import Call
from regard.call.geometry import Span
from regard.sparse import BlockSparse

SECOND_PASS = "second pass by triton"
EVERY = [
    TopK(8), Received(), Entropy(), MaxScore(), LogSumExp(), Map(16, 16), Map(7, 9, "max"),
    Distances(), Rows([-1, -3]),
]  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = (32, 64, 80, 128, 256)
SIZES = ((333, 333, 4), (200, 333, 2), (1, 333, 2), (1, 4500, 1), (7, 1400, 2))
SAMPLE = ("full", "causal", "window", "padding", "softcap and sinks")  # each compiles anew


def requests(heads: int, q_len: int, k_len: int) -> dict[str, dict[str, Any]]:
    """Masks and biases of every kind, on the current device."""
    ids = torch.randint(0, 3, (2, k_len)).sort(-1).values
    side = -(-k_len // 64)  # queries stand at the end: in the last rows of blocks
    layout = torch.rand(heads, side, side)[:, (k_len - q_len) // 64 :]
    keep = torch.arange(k_len) >= torch.tensor([[0], [k_len // 3]])
    return {
        "full": {},
        "causal": {"mask": Causal()},
        "window": {"mask": Causal() & (Window(90) | First(4))},
        "documents": {"mask": Causal() & Documents(ids[:, -q_len:], ids)},
        "padding": {"mask": Causal() & Padding(keep)},
        "blocks": {"mask": BlockSparse(layout < 0.6, 64)},
        "predicate": {"mask": Predicate(lambda b, h, q, k: (q * 3 + k) % 7 < 4)},
        "edges": {"mask": Causal() & ~Edges([(k_len - 1, 3), (k_len - 2, 9)])},
        "alibi": {"mask": Causal(), "bias": ALiBi()},
        "relative": {"bias": RelativeBias(torch.randn(32, heads))},
        "bias": {"bias": torch.randn(heads, q_len, k_len)},
        "softcap and sinks": {"softcap": 5.0, "sinks": torch.randn(heads), "mask": Causal()},
    }


def double(value: Any) -> Any:
    """Floats of a request in float64."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return RelativeBias(value.table.double()) if isinstance(value, RelativeBias) else value


def _sizes(q_len: int, k_len: int, kv_heads: int) -> tuple[int, int, int]:
    """Of a call; in a dry run a few tokens."""
    return (min(q_len, 24), 24 if q_len == k_len else 40, kv_heads) if DRY else (
        q_len, k_len, kv_heads
    )  # fmt: skip


def _drawn(
    dtype: torch.dtype, dim: int, sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, dict[str, dict[str, Any]]]:  # fmt: skip
    """Query, key and value of two items, and requests of every kind."""
    q_len, k_len, kv_heads = sizes
    with torch.device(DEVICE):
        query = torch.randn(2, 4, q_len, dim, dtype=dtype)
        key, value = torch.randn(2, 2, kv_heads, k_len, dim, dtype=dtype)
        return query, key, value, requests(4, q_len, k_len)


def _each(
    check: Callable[..., Iterator[str]], dtype: torch.dtype, dims: Sequence[int],
    sizes: Sequence[tuple[int, int, int]], names: Sequence[str] | None,
) -> Iterator[str]:  # fmt: skip
    """What a check finds in requests of those names, None for all, at each dim and size."""
    for dim in dims[:1] if DRY else dims:
        for size in sizes:
            query, key, value, asked = _drawn(dtype, dim, _sizes(*size))
            chosen = list(asked if names is None else names)
            if DRY:
                chosen = [name for name in chosen if name in ("relative", "bias", "padding")]
            for name in chosen:
                for what in check(query, key, value, asked[name]):
                    place = f"{dtype}, dim {dim}, {size[0]} × {size[1]}, {size[2]} kv heads"
                    yield f"{what}: {name}, {place}"


def gradients(dtype: torch.dtype) -> Iterator[str]:
    """PyTorch's kernels with gradients and hidden numbers, which our kernels mend."""
    names = ("full", "causal", "window", "padding", "documents", "bias", "alibi")
    yield from _each(wrong_gradients, dtype, (64, 128), SIZES[:2], names)


def in_pages() -> Iterator[str]:
    """Few queries over keys that stay in their pages."""
    for dtype, dim in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)):
        for size in SIZES[2:]:
            yield from _paged(dtype, dim, size)


def prompts_in_pages() -> Iterator[str]:
    """Prompts over such keys, fewer queries than keys and as many."""
    for dtype, dim in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)):
        for size in SIZES[:2]:
            yield from _paged(dtype, dim, size)


def _paged(dtype: torch.dtype, dim: int, size: tuple[int, int, int]) -> Iterator[str]:
    query, key, value, _ = _drawn(dtype, dim, _sizes(*size))
    for what in wrong_pages(query, key, value):
        yield f"{what}: {dtype}, dim {dim}, {size[0]} × {size[1]}"


def effects(dtype: torch.dtype) -> Iterator[str]:
    """Effect, with dropout and without."""
    names = ("causal", "window", "padding", "softcap and sinks", "alibi", "full")
    yield from _each(wrong_effects, dtype, (64, 128), SIZES[:1], names)

    def dropped(query: Tensor, key: Tensor, value: Tensor, asked: dict) -> Iterator[str]:
        for what in wrong_effects(query, key, value, asked | {"dropout": Dropout(0.2, 7)}):
            yield f"{what}, dropout"

    yield from _each(dropped, dtype, (64,), SIZES[1:2], ("causal", "padding"))


def passes(dtype: torch.dtype, dim: int) -> Iterator[str]:
    """The forward and every observer, masks and biases of every kind."""
    yield from _each(wrong, dtype, (dim,), SIZES[:1], None)
    yield from _each(wrong, dtype, (dim,), SIZES[1:2], SAMPLE)


def few() -> Iterator[str]:
    """The same of few queries."""
    yield from _each(wrong, torch.bfloat16, (64, 128), SIZES[2:], SAMPLE)


def flexes() -> Iterator[str]:
    """FlexAttention, compiled; by name alone."""

    def compiled(query: Tensor, key: Tensor, value: Tensor, asked: dict) -> Iterator[str]:
        return wrong_output(query, key, value, asked, ("flex",))

    names = ("alibi", "relative", "bias", "predicate", "padding", "blocks")
    yield from _each(compiled, torch.bfloat16, (128, 64), SIZES[:1], names)


def sampled() -> Iterator[str]:
    """What is not within its bar, in words, of a few calls that say most."""
    for dim in (64, 128):
        for sizes in (SIZES[0], SIZES[3]):
            yield from _checked(torch.bfloat16, dim, sizes, SAMPLE, effects=False)


def checked() -> Iterator[str]:
    """What is not within its bar, in words, of all calls."""
    for dtype in DTYPES:
        for dim in DIMS:
            for sizes in SIZES:
                effects = dim in (64, 256) and sizes[0] > 1  # each is compiled anew
                yield from _checked(dtype, dim, sizes, None, effects)


def _checked(
    dtype: torch.dtype, dim: int, sizes: tuple[int, int, int], names: Any, effects: bool
) -> Iterator[str]:
    """names: of requests, None for all."""
    q_len, k_len, kv_heads = sizes
    with torch.device(DEVICE):
        query = torch.randn(2, 4, q_len, dim, dtype=dtype)
        key, value = torch.randn(2, 2, kv_heads, k_len, dim, dtype=dtype)
        asked = requests(4, q_len, k_len)
    place = f"{dtype}, dim {dim}, {q_len} × {k_len}, {kv_heads} kv heads"
    for name in asked if names is None else names:
        request = asked[name]
        for what in wrong(query, key, value, request):
            yield f"{what}: {name}, {place}"
        for what in wrong_gradients(query, key, value, request):
            yield f"{what}: {name}, {place}"
        if effects:
            for what in wrong_effects(query, key, value, request):
                yield f"{what}: {name}, {place}"
            dropped = request | {"dropout": Dropout(0.2, 7)}
            for what in wrong_effects(query, key, value, dropped):
                yield f"{what}: dropout, {name}, {place}"
    for what in wrong_pages(query, key, value):
        yield f"{what}: {place}"


def wrong_output(
    query: Tensor, key: Tensor, value: Tensor, request: dict[str, Any], engines: Sequence[str]
) -> Iterator[str]:
    """Which engines are off: by more than twice plain torch in this type, and a rounding."""
    whole = {name: double(v) for name, v in request.items()}
    tensors, exactly = (query, key, value), (query.double(), key.double(), value.double())
    exact = attention(*exactly, **whole, engine="reference", return_lse=True)
    near_by = plain(*tensors, request)
    said = explain(*tensors, **request)
    for engine in engines:
        if said[engine]:
            continue
        found = attention(*tensors, **request, engine=engine, return_lse=True)
        for what, mine, near, truth in zip(("output", "lse"), found, near_by, exact, strict=True):
            eps = torch.finfo(mine.dtype).eps
            if what == "lse" and "bias" in request:
                eps = torch.finfo(query.dtype).eps  # PyTorch's kernels round biases
            if off := beyond(mine, near, truth, eps):
                yield f"{engine}'s {what}, {off}"


def plain(
    query: Tensor, key: Tensor, value: Tensor, request: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(out, lse) by straightforward torch, wholly in this type."""
    call = Call.checked(query, key, value, **request)
    place, whole = call.place, Span(0, call.place.q_len, 0, call.place.k_len)
    key, value = (t.repeat_interleave(place.heads // place.kv_heads, 1) for t in (key, value))
    scores = call.scale * (query @ key.mT)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    for bias in call.biases:
        scores = scores + bias.tile(whole, query.dtype)
    scores = scores.masked_fill(~call.program.visible(whole), -torch.inf)
    every = scores
    if call.sinks is not None:
        sinks = call.sinks.to(query.dtype)[:, None, None]
        every = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], -1)
    lse = every.logsumexp(-1)
    safe = lse.masked_fill(lse == -torch.inf, 0)
    return (scores - safe[..., None]).exp() @ value, lse


def beyond(mine: Tensor, near: Tensor, truth: Tensor, eps: float) -> str:
    """By what the largest error is above 2 × (that of `near` + a rounding); "" where it is not."""
    sure = truth.isfinite()
    if not torch.equal(mine.isfinite(), sure):
        return "other numbers are finite"
    if not sure.any():
        return ""
    errors = [float((t.double() - truth)[sure].abs().max()) for t in (mine, near)]
    bar = 2 * (errors[1] + eps * (float(truth[sure].abs().max()) or 1.0))
    return "" if errors[0] <= bar else f"{errors[0]:.2g}, bar {bar:.2g}"


def wrong(query: Tensor, key: Tensor, value: Tensor, request: dict[str, Any]) -> Iterator[str]:
    """Which engines and observers are off."""
    yield from wrong_output(query, key, value, request, ("sdpa", "decode", "tiled"))
    whole = {name: double(v) for name, v in request.items()}
    exactly = (query.double(), key.double())
    said = explain(query, key, value, **request, observe=EVERY)
    if said[SECOND_PASS]:
        yield f"the second pass refuses ({'; '.join(said[SECOND_PASS])})"
        return
    ours = observe(query, key, observe=EVERY, lse=None, **request)
    again = observe(query, key, observe=EVERY, lse=None, **request)
    truth = observe(*exactly, observe=EVERY, lse=None, **whole)
    for observer, *seen in zip(EVERY, ours, again, truth, strict=True):
        mine, repeated, wanted = ({f.name: getattr(r, f.name) for f in fields(r)} for r in seen)
        for name, tensor in mine.items():
            if not isinstance(tensor, Tensor):
                continue
            if not torch.equal(tensor, repeated[name]):
                yield f"{observer}.{name} differs from run to run"
            near = name == "indices" or torch.allclose(
                tensor.double(), wanted[name].double(), rtol=1e-3, atol=1e-4
            )
            if not near:
                yield f"{observer}.{name}"


def wrong_gradients(
    query: Tensor, key: Tensor, value: Tensor, request: dict[str, Any]
) -> Iterator[str]:
    """Whether engine sdpa is off where gradients are wanted, of keys that are finite and not.

    A NaN and an ∞ stand in the last key, and of one item amid them: what is finite for all that in
    float64 must be so here.
    """
    if explain(query.requires_grad_(), key, value, **request)["sdpa"]:
        query.requires_grad_(False)
        return
    query.requires_grad_(False)
    whole = {name: double(v) for name, v in request.items()}
    grad = torch.randn(query.shape, device=query.device)
    for spoiled in (False, True):
        given = [query, key.clone(), value.clone()]
        if spoiled:
            given[1][:, :, -1, 0], given[2][:, :, -1, -1] = torch.nan, torch.inf
            given[1][-1, :, key.shape[2] // 4, 0] = torch.nan
        ours = _gradients(given, request, grad, "sdpa")
        truth = _gradients([t.double() for t in given], whole, grad, "reference")
        for name, mine, exact in zip(("output", "dq", "dk", "dv"), ours, truth, strict=True):
            sure = exact.isfinite()
            if not sure.any():
                continue
            near = 8 * torch.finfo(query.dtype).eps * (1 + float(exact[sure].abs().max()))
            if not (mine.double() - exact)[sure].abs().max() <= near:
                yield f"sdpa's {name} with gradients{', hidden NaN' * spoiled}"


def _gradients(
    given: list[Tensor], request: dict[str, Any], grad: Tensor, engine: str
) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    tensors = [t.detach().clone().requires_grad_() for t in given]
    out = attention(*tensors, **request, engine=engine)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in tensors if t.grad is not None)]


def wrong_effects(
    query: Tensor, key: Tensor, value: Tensor, request: dict[str, Any]
) -> Iterator[str]:
    """Whether the effects of edges are off, of rows that none of their keys has nearly alone."""
    asked, grad = [Effect(8)], torch.randn_like(query)

    def measured(tensors: tuple[Tensor, ...], given: dict[str, Any]) -> Any:
        tensors = tuple(t.detach().clone().requires_grad_() for t in tensors)
        out, (seen,) = attention(*tensors, **given, observe=asked)
        out.backward(grad.to(out.dtype))
        return seen

    said = explain(query, key, value, **request, observe=asked)[SECOND_PASS]
    if said:
        yield f"the kernel refuses Effect ({'; '.join(said)})"
        return
    whole = {name: double(v) for name, v in request.items()}
    ours, again = (measured((query, key, value), request) for _ in range(2))
    truth = measured((query.double(), key.double(), value.double()), whole)
    for name in ("indices", "effects", "weights"):
        if not torch.equal(getattr(ours, name), getattr(again, name)):
            yield f"Effect.{name} differs from run to run"
    sure = truth.weights.amax(-1, keepdim=True) < 0.8
    size = truth.effects.abs() * sure
    near = 32 * torch.finfo(query.dtype).eps * (1 + float(size.max()))
    if not ((ours.effects.double().abs() * sure - size).abs().max() <= near):
        yield "Effect.effects"


def wrong_pages(query: Tensor, key: Tensor, value: Tensor) -> Iterator[str]:
    """Whether keys that lie in pages are read otherwise than the same in order."""
    lengths = torch.tensor([key.shape[2], key.shape[2] // 2], device=DEVICE)
    pool_k, pool_v, pages = paged(key, value, 16, lengths)
    keep = torch.arange(key.shape[2], device=DEVICE) < lengths[:, None]
    out, seen = attention(query, pool_k, pool_v, mask=Causal(), pages=pages, observe=EVERY)
    mask = Causal() & Padding(keep)
    wanted, truth = attention(query, key, value, mask=mask, observe=EVERY)
    if not torch.allclose(out, wanted, rtol=1e-2, atol=1e-2):
        yield "the output over pages"
    for observer, *results in zip(EVERY, seen, truth, strict=True):
        mine, theirs = ({f.name: getattr(r, f.name) for f in fields(r)} for r in results)
        for name, tensor in mine.items():
            if not isinstance(tensor, Tensor) or name == "indices":
                continue
            if not torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-4):
                yield f"{observer}.{name} over pages"


def paged(
    key: Tensor, value: Tensor, size: int, lengths: Tensor
) -> tuple[Tensor, Tensor, Pages]:  # fmt: skip
    """The keys and values in pages that lie in no order, and beyond an item's end NaN."""
    batch, kv_heads, k_len, _ = key.shape
    most = -(-k_len // size)
    order = torch.randperm(batch * most, device=DEVICE).view(batch, most)
    ends = torch.arange(most * size, device=DEVICE) < lengths[:, None]
    pools = []
    for tensor in (key, value):
        whole = torch.nn.functional.pad(tensor, (0, 0, 0, most * size - k_len))
        whole = whole.where(ends[:, None, :, None], torch.nan)
        pool = torch.empty(batch * most, kv_heads, size, tensor.shape[-1], device=DEVICE)
        pool = pool.to(tensor.dtype)
        pool[order] = whole.unflatten(2, (most, size)).transpose(1, 2)
        pools.append(pool)
    return pools[0], pools[1], Pages(order.to(torch.int32), lengths)
