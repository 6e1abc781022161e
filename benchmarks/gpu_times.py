"""On a CUDA GPU: what the weights in sight cost, line by line of Markdown. Run by gpu.py.

Times by CUDA events: the median of 20 calls after 5 untimed ones, over inputs in rotation that
together outgrow the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import gpu_linear
import torch
from gpu_check import paged
from gpu_place import DEVICE
from torch import Tensor

from regard import Causal, Effect, Entropy, Full, Map, Received, TopK, attention
from regard.call.checked import Call
from regard.engines import sdpa_cuda

UNTIMED, TIMED = 5, 20
HEADS = 32
SIGHT = [TopK(8), Received(), Entropy(), Map(256, 256)]


def inputs(n: int, dim: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Several (query, key, value), so that none is in the cache when its turn comes."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, min(16, 2 * l2 // (3 * HEADS * n * dim * 2) + 1))
    shape = (3, 1, HEADS, n, dim)
    return [tuple(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)) for _ in range(count)]


def timed(call: Callable[..., Any], given: list[tuple[Tensor, ...]]) -> float:
    """Milliseconds of one call."""
    for i in range(UNTIMED):
        call(*given[i % len(given)])
    spans = []
    for i in range(TIMED):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(*given[i % len(given)])
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in spans)


def peers(mask: Any) -> dict[str, Callable[..., Any]]:
    """The unobserved kernels: PyTorch's flash and cuDNN ones, and compiled FlexAttention."""

    def by(kernel: sdpa_cuda.Kernel) -> Callable[..., Any]:
        def forward(q: Any, k: Any, v: Any) -> Any:
            call = Call.checked(q, k, v, mask=mask)
            return kernel.forward(call, kernel.mask(call))

        return forward

    return {
        "flash": by(sdpa_cuda.FLASH),
        "cudnn": by(sdpa_cuda.CUDNN),
        "flex": lambda q, k, v: attention(q, k, v, mask=mask, engine="flex"),
    }


def observed(lengths: Iterable[int]) -> Iterator[str]:
    """The forward, plain and observed, beside the best kernel that observes nothing."""
    yield "| N | D | mask | best peer | auto | observed | single, at most | eager |"
    yield "|---|---|---|---|---|---|---|---|"
    for n in lengths:
        for dim in (64, 128):
            for mask in (Full(), Causal()):
                yield row(n, dim, mask)
    yield ""
    yield "Columns after the best peer are × its time. observed: the output with TopK(8), Received,"
    yield "Entropy and Map(256, 256); single: with the dearest of the four alone; eager: with the"
    yield "weights, up to 8192."


def effects(lengths: Iterable[int]) -> Iterator[str]:
    """Forward and backward, with an Effect and without."""
    yield "| N | D | forward and backward | with Effect(8) |"
    yield "|---|---|---|---|"
    for n in lengths:
        for dim in (64, 128):
            yield effect_row(n, dim)
    yield ""
    yield "Causal, by auto; the last column is × the one before."


def decoding(lengths: Iterable[int], items: Iterable[int]) -> Iterator[str]:
    """One token's query, over keys in order and in pages."""
    heads = f"one query, {HEADS} heads of 8"
    yield f"| keys | items | {heads} | observed | in pages | observed | copied |"
    yield "|---|---|---|---|---|---|---|"
    for n in lengths:
        for batch in items:
            yield decode_row(n, batch)
    yield ""
    yield "Decoding, D128: columns after the third are × its time. observed: with TopK(8),"
    yield "Received, Entropy and Map(256, 256). Pages of 64 keys, read in place by `decode` and by"
    yield "the second pass; copied: by `sdpa`, which has them copied out first."


def linear(longest: int) -> Iterator[str]:
    """Linear attention beside its peer."""
    yield from gpu_linear.measured(longest, timed)


def ceilings() -> Iterator[str]:
    """What the card can do at most."""
    side = 8192
    a, b = torch.randn(2, side, side, device=DEVICE, dtype=torch.bfloat16)
    span = timed(torch.matmul, [(a, b), (b, a)])
    yield f"Ceilings: bfloat16 matmul {2 * side**3 / span / 1e9:.0f} TFLOP/s; "
    source, target = torch.empty(2, 2**30, device=DEVICE, dtype=torch.uint8)
    span = timed(lambda x, y: y.copy_(x), [(source, target), (target, source)])
    yield f"memory copy {2 * 2**30 / span / 1e6:.0f} GB/s read and written."


def row(n: int, dim: int, mask: Any) -> str:
    """One line of the table."""
    given = inputs(n, dim)
    each = {name: timed(call, given) for name, call in peers(mask).items()}
    best = min(each, key=lambda name: each[name])

    def ratio(call: Callable[..., Any]) -> str:
        return f"{timed(call, given) / each[best]:.2f}"

    def seen(observers: list) -> Callable[..., Any]:
        return lambda q, k, v: attention(q, k, v, mask=mask, observe=observers)

    alone = max((ratio(seen([o])) for o in SIGHT), key=float)
    eager = "–"
    if n <= 8192:
        eager = ratio(lambda q, k, v: plainly(q, k, v, mask))
    auto = ratio(lambda q, k, v: attention(q, k, v, mask=mask))
    return (
        f"| {n} | {dim} | {mask} | {best} {each[best]:.2f} ms | {auto} | {ratio(seen(SIGHT))} | "
        f"{alone} | {eager} |"
    )


def effect_row(n: int, dim: int) -> str:
    """What Effect adds to a forward and a backward pass."""
    given = inputs(n, dim)

    def passes(observers: list | None) -> Callable[..., Any]:
        def both(*tensors: Tensor) -> None:
            leaves = [t.detach().requires_grad_() for t in tensors]
            answer = attention(*leaves, mask=Causal(), observe=observers)
            out = answer if observers is None else answer[0]
            out.backward(tensors[2])

        return both

    plain = timed(passes(None), given)
    return f"| {n} | {dim} | {plain:.2f} ms | {timed(passes([Effect(8)]), given) / plain:.2f} |"


def over(in_pages: bool, observers: list | None, engine: str = "auto") -> Callable[..., Any]:
    """A call on (query, key, value, and the pools and pages that hold the same)."""

    def once(query: Tensor, key: Tensor, value: Tensor, *pools: Any) -> Any:
        if in_pages:
            keys, values, pages = pools
            return attention(query, keys, values, pages=pages, observe=observers, engine=engine)
        return attention(query, key, value, observe=observers, engine=engine)

    return once


def decode_row(n: int, batch: int) -> str:
    """One token's query over many keys, in order and in pages."""
    query = torch.randn(batch, HEADS, 1, 128, device=DEVICE, dtype=torch.bfloat16)
    sets, copies = [], 1 if batch * n > 2**19 else 3
    for _ in range(copies):
        key, value = torch.randn(2, batch, 8, n, 128, device=DEVICE, dtype=torch.bfloat16)
        lengths = torch.full((batch,), n, device=DEVICE)
        sets.append((query, key, value, *paged(key, value, 64, lengths)))

    plain = timed(over(False, None), sets)
    others = (
        over(False, SIGHT), over(True, None), over(True, SIGHT), over(True, None, "sdpa")
    )  # fmt: skip
    ratios = " | ".join(f"{timed(call, sets) / plain:.2f}" for call in others)
    return f"| {n} | {batch} | {plain:.3f} ms | {ratios} |"


def plainly(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """Eager attention, which has the weights."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if isinstance(mask, Causal):
        hidden = torch.ones(scores.shape[-2:], device=DEVICE, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights


def memory(n: int) -> Iterator[str]:
    """What an observed forward takes beside its tensors."""
    query, key, value = torch.randn(3, 1, HEADS, n, 128, device=DEVICE, dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, _ = attention(query, key, value, mask=Causal(), observe=SIGHT)
    used = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    what = f"An observed causal forward of {n} tokens, {HEADS} heads, D128, takes"
    yield f"{what} {used / 2**30:.2f} GiB beside q, k, v, out."
