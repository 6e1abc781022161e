"""On a CUDA GPU: every kernel against float64, then what the weights in sight cost.

    python benchmarks/gpu.py [--check] [--longest 32768] [--write docs/benchmarks-gpu.md]

First each engine and the Triton kernels of the second pass on small calls, few queries, pages and
Effect among them, against `reference` and the plain torch readers in float64: a failure ends the
run with exit code 1. Then times by CUDA events: the median of 20 calls after 5 untimed ones, over
inputs in rotation that together outgrow the L2 cache. Without a GPU: one sentence, exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import gpu_linear
import torch
from torch import Tensor

import regard
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
    Full,
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
from regard.engines import sdpa_cuda
from regard.sparse import BlockSparse

UNTIMED, TIMED = 5, 20
HEADS = 32
SIGHT = [TopK(8), Received(), Entropy(), Map(256, 256)]
SECOND_PASS = "second pass by triton"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only the checks against float64")
    parser.add_argument("--longest", type=int, default=32768, help="the longest sequence timed")
    parser.add_argument("--write", type=Path, help="write the tables to this Markdown file, too")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA GPU is available here, and nothing else is measured.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    failures = [*checked(), *gpu_linear.checked()]
    for failure in failures:
        print(f"WRONG {failure}", file=sys.stderr)
    if failures:
        return 1
    print("Every kernel is within its bar of float64.")
    if asked.check:
        return 0
    text = "\n".join(measured(asked.longest))
    print(text)
    if asked.write:
        asked.write.write_text(text + "\n", "utf-8")
    return 0


# --- right ---------------------------------------------------------------------------------------


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


def checked() -> Iterator[str]:
    """What is not within its bar, in words."""
    every = [
        TopK(8), Received(), Entropy(), MaxScore(), LogSumExp(), Map(16, 16), Map(7, 9, "max"),
        Distances(), Rows([-1, -3]),
    ]  # fmt: skip
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (32, 64, 80, 128, 256):
            for q_len, k_len, kv_heads in (
                (333, 333, 4), (200, 333, 2), (1, 333, 2), (1, 4500, 1), (7, 1400, 2)
            ):  # fmt: skip
                with torch.device("cuda"):
                    query = torch.randn(2, 4, q_len, dim, dtype=dtype)
                    key, value = torch.randn(2, 2, kv_heads, k_len, dim, dtype=dtype)
                    asked = requests(4, q_len, k_len)
                for name, request in asked.items():
                    where = f"{name}, {dtype}, dim {dim}, {q_len} × {k_len}, {kv_heads} kv heads"
                    for what in wrong(query, key, value, request, every):
                        yield f"{what}: {where}"
                    if dim not in (64, 256) or q_len == 1:  # each is compiled anew
                        continue
                    for what in wrong_effects(query, key, value, request):
                        yield f"{what}: {where}"
                    dropped = request | {"dropout": Dropout(0.2, 7)}
                    for what in wrong_effects(query, key, value, dropped):
                        yield f"{what}: dropout, {where}"
                for what in wrong_pages(query, key, value, every):
                    yield f"{what}: {dtype}, dim {dim}, {q_len} × {k_len}, {kv_heads} kv heads"


def wrong(
    query: Tensor, key: Tensor, value: Tensor, request: dict[str, Any], every: list
) -> Iterator[str]:
    """Which engines and observers are off."""
    whole = {name: double(v) for name, v in request.items()}
    tensors, exactly = (query, key, value), (query.double(), key.double(), value.double())
    exact, lse = attention(*exactly, **whole, engine="reference", return_lse=True)
    bar = 4 * torch.finfo(query.dtype).eps * (1 + float(exact.abs().max()))
    said = explain(*tensors, **request, observe=every)
    for engine in ("sdpa", "flex", "tiled"):
        if said[engine]:
            continue
        out, its_lse = attention(*tensors, **request, engine=engine, return_lse=True)
        if not (out.double() - exact).abs().max() <= bar:
            yield f"{engine}'s output"
        off = 8 * torch.finfo(query.dtype).eps if "bias" in request else 1e-3  # biases are rounded
        if not torch.allclose(its_lse.double(), lse, rtol=1e-4, atol=max(off, 1e-3)):
            yield f"{engine}'s lse"
    if said[SECOND_PASS]:
        yield f"the second pass refuses ({'; '.join(said[SECOND_PASS])})"
        return
    ours = observe(query, key, observe=every, lse=None, **request)
    again = observe(query, key, observe=every, lse=None, **request)
    truth = observe(*exactly[:2], observe=every, lse=None, **whole)
    for observer, *seen in zip(every, ours, again, truth, strict=True):
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
    for name in ("indices", "effect", "weights"):
        if not torch.equal(getattr(ours, name), getattr(again, name)):
            yield f"Effect.{name} differs from run to run"
    sure = truth.weights.amax(-1, keepdim=True) < 0.8
    size = truth.effect.abs() * sure
    near = 32 * torch.finfo(query.dtype).eps * (1 + float(size.max()))
    if not ((ours.effect.double().abs() * sure - size).abs().max() <= near):
        yield "Effect.effect"


def wrong_pages(query: Tensor, key: Tensor, value: Tensor, every: list) -> Iterator[str]:
    """Whether keys that lie in pages are read otherwise than the same in order."""
    lengths = torch.tensor([key.shape[2], key.shape[2] // 2], device="cuda")
    pool_k, pool_v, pages = paged(key, value, 16, lengths)
    keep = torch.arange(key.shape[2], device="cuda") < lengths[:, None]
    out, seen = attention(query, pool_k, pool_v, mask=Causal(), pages=pages, observe=every)
    mask = Causal() & Padding(keep)
    wanted, truth = attention(query, key, value, mask=mask, observe=every)
    if not torch.allclose(out, wanted, rtol=1e-2, atol=1e-2):
        yield "the output over pages"
    for observer, *results in zip(every, seen, truth, strict=True):
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
    order = torch.randperm(batch * most, device="cuda").view(batch, most)
    ends = torch.arange(most * size, device="cuda") < lengths[:, None]
    pools = []
    for tensor in (key, value):
        whole = torch.nn.functional.pad(tensor, (0, 0, 0, most * size - k_len))
        whole = whole.where(ends[:, None, :, None], torch.nan)
        pool = torch.empty(batch * most, kv_heads, size, tensor.shape[-1], device="cuda")
        pool = pool.to(tensor.dtype)
        pool[order] = whole.unflatten(2, (most, size)).transpose(1, 2)
        pools.append(pool)
    return pools[0], pools[1], Pages(order.to(torch.int32), lengths)


# --- fast ----------------------------------------------------------------------------------------


def inputs(n: int, dim: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Several (query, key, value), so that none is in the cache when its turn comes."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, min(16, 2 * l2 // (3 * HEADS * n * dim * 2) + 1))
    shape = (3, 1, HEADS, n, dim)
    return [tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16)) for _ in range(count)]


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
        return lambda q, k, v: kernel.forward(Call.checked(q, k, v, mask=mask))

    return {
        "flash": by(sdpa_cuda.FLASH),
        "cudnn": by(sdpa_cuda.CUDNN),
        "flex": lambda q, k, v: attention(q, k, v, mask=mask, engine="flex"),
    }


def measured(longest: int) -> Iterator[str]:
    """The Markdown of docs/benchmarks-gpu.md, line by line."""
    import triton

    card = torch.cuda.get_device_properties(0)
    yield "# Benchmarks on a GPU"
    yield ""
    yield f"{card.name}, {card.total_memory / 2**30:.0f} GiB; PyTorch {torch.__version__}, "
    yield f"Triton {triton.__version__}, regard {regard.__version__}; {date.today()}."
    yield f"By `benchmarks/gpu.py`: bfloat16, batch 1, {HEADS} heads, the median of {TIMED} calls"
    yield "by CUDA events, inputs in rotation."
    yield ""
    yield from ceilings()
    yield ""
    yield "| N | D | mask | best peer | auto | observed | single, at most | eager |"
    yield "|---|---|---|---|---|---|---|---|"
    for n in (n for n in (2048, 8192, 32768) if n <= longest):
        for dim in (64, 128):
            for mask in (Full(), Causal()):
                yield row(n, dim, mask)
    yield ""
    yield "Columns after the best peer are × its time. observed: the output with TopK(8), Received,"
    yield "Entropy and Map(256, 256); single: with the dearest of the four alone; eager: with the"
    yield "weights, up to 8192."
    yield ""
    yield memory(131072 if longest >= 32768 else longest)
    yield ""
    yield "| N | D | forward and backward | with Effect(8) |"
    yield "|---|---|---|---|"
    for n in (n for n in (2048, 8192, 32768) if n <= longest):
        for dim in (64, 128):
            yield effect_row(n, dim)
    yield ""
    yield "Causal, by auto; the last column is × the one before."
    yield ""
    yield f"| keys | items | one query, {HEADS} heads of 8 | observed | keys in pages | observed |"
    yield "|---|---|---|---|---|---|"
    for n in (n for n in (2048, 32768, 131072) if n <= max(longest, 2048) * 4):
        for batch in (1, 16):
            yield decode_row(n, batch)
    yield ""
    yield "Decoding, D128, by auto: columns after the third are × its time. observed: with TopK(8),"
    yield "Received, Entropy and Map(256, 256). Pages of 64 keys; auto copies them out for the"
    yield "output, and the second pass reads them in place."
    yield ""
    yield from gpu_linear.measured(longest, timed)


def ceilings() -> Iterator[str]:
    side = 8192
    a, b = torch.randn(2, side, side, device="cuda", dtype=torch.bfloat16)
    span = timed(torch.matmul, [(a, b), (b, a)])
    yield f"Ceilings: bfloat16 matmul {2 * side**3 / span / 1e9:.0f} TFLOP/s; "
    source, target = torch.empty(2, 2**30, device="cuda", dtype=torch.uint8)
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


def decode_row(n: int, batch: int) -> str:
    """One token's query over many keys, in order and in pages."""
    query = torch.randn(batch, HEADS, 1, 128, device="cuda", dtype=torch.bfloat16)
    sets, copies = [], 1 if batch * n > 2**19 else 3
    for _ in range(copies):
        key, value = torch.randn(2, batch, 8, n, 128, device="cuda", dtype=torch.bfloat16)
        lengths = torch.full((batch,), n, device="cuda")
        sets.append((query, key, value, *paged(key, value, 64, lengths)))

    def over(in_pages: bool, observers: list | None) -> Callable[..., Any]:
        def once(query: Tensor, key: Tensor, value: Tensor, *pools: Any) -> Any:
            if in_pages:
                return attention(query, *pools[:2], pages=pools[2], observe=observers)
            return attention(query, key, value, observe=observers)

        return once

    plain = timed(over(False, None), sets)
    others = (over(False, SIGHT), over(True, None), over(True, SIGHT))
    ratios = " | ".join(f"{timed(call, sets) / plain:.2f}" for call in others)
    return f"| {n} | {batch} | {plain:.3f} ms | {ratios} |"


def plainly(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """Eager attention, which has the weights."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if isinstance(mask, Causal):
        hidden = torch.ones(scores.shape[-2:], device="cuda", dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights


def memory(n: int) -> str:
    """What an observed forward takes beside its tensors."""
    query, key, value = torch.randn(3, 1, HEADS, n, 128, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, _ = attention(query, key, value, mask=Causal(), observe=SIGHT)
    used = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    what = f"An observed causal forward of {n} tokens, {HEADS} heads, D128, takes"
    return f"{what} {used / 2**30:.2f} GiB beside q, k, v, out."


if __name__ == "__main__":
    sys.exit(main())
