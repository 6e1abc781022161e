"""On a CUDA GPU: each bar beside its peer, in turns; rows for `gpu_ready`.

A row: name, ms, ratio (to the peer's ms), bar (what the ratio may be at most), met; or `failed`.
bfloat16, batch 1, 32 heads, random numbers, inputs in rotation that together outgrow the L2 cache.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median
from typing import Any
from unittest.mock import patch

import gpu_linear
import torch
from gpu_check import paged
from gpu_place import DEVICE, DRY, TIMED, UNTIMED, in_turns
from gpu_times import over
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

import regard
from regard import Causal, Effect, Entropy, Full, Map, Received, TopK, attention
from regard.call.checked import Call
from regard.engines import sdpa_cuda
from regard.engines.second_pass.triton import effect as measuring

Row = dict[str, Any]
HEADS, KV_HEADS = (4, 2) if DRY else (32, 8)
SIGHT = [TopK(8), Received(), Entropy(), Map(256, 256)]
SINGLE = {"TopK": 2.4, "Received": 1.8, "Entropy": 1.8, "Map": 1.8}
DIMS = (16,) if DRY else (128, 64)


def size(tokens: int) -> int:
    """The length; in a dry run a few tokens."""
    return 48 if DRY else tokens


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def inputs(n: int, dim: int, kv_heads: int | None = None) -> list[tuple[Tensor, ...]]:
    """Several (query, key, value), so that none is in the cache when its turn comes."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, min(16, 2 * l2 // (3 * HEADS * n * dim * 2) + 1))
    kept = kv_heads or HEADS
    return [
        (drawn(1, HEADS, n, dim), drawn(1, kept, n, dim), drawn(1, kept, n, dim))
        for _ in range(count)
    ]


def rows(
    place: str, calls: dict[str, Callable[..., Any]], given: list[tuple[Any, ...]],
    peers: tuple[str, ...], bars: dict[str, float],
) -> Iterator[Row]:  # fmt: skip
    """A row each call; ratios are to the fastest of `peers`."""
    spans, failed = in_turns(calls, given)
    best = min((spans[p] for p in peers if p in spans), default=None)
    for name, ms in spans.items():
        row: Row = {"name": f"{place}, {name}", "ms": ms}
        if best is not None:
            row["ratio"] = ms / best
            if name in bars:
                row |= {"bar": bars[name], "met": row["ratio"] <= bars[name]}
        yield row
    for what in failed:
        yield {"failed": f"{place}, {what}"}


def by(kernel: sdpa_cuda.Kernel, mask: Any) -> Callable[..., Any]:
    """A kernel of PyTorch's, unobserved."""

    def forward(q: Any, k: Any, v: Any) -> Any:
        call = Call.checked(q, k, v, mask=mask)
        return kernel.forward(call, kernel.mask(call))

    return forward


def observed(tokens: int) -> Iterator[Row]:
    """The forward with each observer and with all four, beside cuDNN's and flash's."""
    for dim, mask in product(DIMS, (Full(), Causal())):

        def seen(observers: list, mask: Any = mask) -> Callable[..., Any]:
            return lambda q, k, v: attention(q, k, v, mask=mask, observe=observers)

        calls = {"cudnn": by(sdpa_cuda.CUDNN, mask), "flash": by(sdpa_cuda.FLASH, mask)}
        calls["auto"] = lambda q, k, v, mask=mask: attention(q, k, v, mask=mask)
        calls |= {type(one).__name__: seen([one]) for one in SIGHT}
        calls["all four"] = seen(SIGHT)
        bars = {"auto": 1.05}
        if tokens >= 16384:
            bars |= SINGLE | {"all four": 2.8 if dim > 64 else 3.2}
        place = f"{tokens} tokens, dim {dim}, {mask}"
        yield from rows(place, calls, inputs(size(tokens), dim), ("cudnn", "flash"), bars)


def hosts(call: Callable[[], Any]) -> float:
    """Milliseconds of Python for one call, the GPU left to itself."""
    for _ in range(UNTIMED):
        call()
    spans = []
    for _ in range(TIMED):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        spans.append(1e3 * (time.perf_counter() - begin))
    return median(spans)


def host() -> Iterator[Row]:
    """At 2,048 tokens: Python's time beside torch's own, and what a call takes beyond its kernels.

    The kernels' time is that of a CUDA graph of the call.
    """
    for dim, mask in product(DIMS, (Full(), Causal())):
        given = inputs(size(2048), dim)
        q, k, v = given[0]
        place = f"2048 tokens, dim {dim}, {mask}"
        causal = isinstance(mask, Causal)

        def torchs(q: Tensor, k: Tensor, v: Tensor, causal: bool = causal) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

        def plain(q: Tensor, k: Tensor, v: Tensor, mask: Any = mask) -> Any:
            return attention(q, k, v, mask=mask)

        def sees(q: Tensor, k: Tensor, v: Tensor, mask: Any = mask) -> Any:
            return attention(q, k, v, mask=mask, observe=SIGHT)

        calls = {"torch": torchs, "auto": plain}
        yield from rows(place, calls, given, ("torch",), {"auto": 1.05})
        for name, call in (*calls.items(), ("all four", sees)):
            yield {"name": f"{place}, host of {name}", "ms": hosts(lambda: call(q, k, v))}  # noqa: B023
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                sees(q, k, v)
        except Exception as error:  # of one capture: the rest is still to be measured
            yield {"failed": f"{place}, a graph of all four: {type(error).__name__}: {error}"}
            continue
        both = {"eager": sees, "graph": lambda *_: graph.replay()}  # noqa: B023
        spans, failed = in_turns(both, given[:1])
        yield from ({"failed": f"{place}, {what}"} for what in failed)
        if not failed:
            beyond = spans["eager"] - spans["graph"]
            what = f"{place}, all four beyond a graph of it"
            yield {"name": what, "ms": beyond, "met": beyond < 0.15}


def decoding(items: int) -> Iterator[Row]:
    """One token's query over 32,768 keys, in order and in pages."""
    n, dim = size(32768), DIMS[0]
    sets = []
    for _ in range(1 if items > 1 else 3):
        key, value = drawn(items, KV_HEADS, n, dim), drawn(items, KV_HEADS, n, dim)
        pools = paged(key, value, 16 if DRY else 64, torch.full((items,), n, device=DEVICE))
        sets.append((drawn(items, HEADS, 1, dim), key, value, *pools))

    calls = {
        "plain": over(False, None), "by decode": over(False, None, "decode"),
        "observed": over(False, SIGHT), "in pages": over(True, None),
        "in pages, observed": over(True, SIGHT), "copied out of pages": over(True, None, "sdpa"),
    }  # fmt: skip
    bars = {"observed": 2.0, "in pages": 1.3}
    yield from rows(f"decoding, {items} items of 32768", calls, sets, ("plain",), bars)


def grouped() -> Iterator[Row]:
    """Heads that share keys: flash as it is, and cuDNN with kv heads as items, keys expanded."""
    n, dim = size(8192), DIMS[0]

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Any:
        apart = q.view(KV_HEADS, HEADS // KV_HEADS, n, dim)
        k, v = (t.view(KV_HEADS, 1, n, dim).expand(apart.shape) for t in (k, v))
        return by(sdpa_cuda.CUDNN, Causal())(apart, k, v)

    flash = by(sdpa_cuda.FLASH, Causal())
    given = inputs(n, dim, KV_HEADS)
    yield from rows("grouped heads", {"flash": flash, "cudnn": folded}, given, ("flash",), {})
    off = float((flash(*given[0])[0] - folded(*given[0])[0].view(1, HEADS, n, dim)).abs().max())
    yield {"name": "grouped heads, largest difference", "value": off, "met": off < 0.05}


def effects(tokens: int) -> Iterator[Row]:
    """Forward and backward, with an Effect and without; its kernels alone by several tiles."""

    def passes(observers: list | None) -> Callable[..., Any]:
        def both(*tensors: Tensor) -> None:
            leaves = [t.detach().requires_grad_() for t in tensors]
            answer = attention(*leaves, mask=Causal(), observe=observers)
            out = answer if observers is None else answer[0]
            out.backward(tensors[2])

        return both

    for dim in DIMS:
        given, place = inputs(size(tokens), dim), f"{tokens} tokens, dim {dim}, Causal()"
        calls = {"both passes": passes(None), "with Effect(8)": passes([Effect(8)])}
        yield from rows(place, calls, given, ("both passes",), {"with Effect(8)": 2.0})
        if tokens == 8192:
            yield from _tiles_of_effect(given[0], place)


def _tiles_of_effect(given: tuple[Tensor, ...], place: str) -> Iterator[Row]:
    call = Call.checked(*given, mask=Causal())
    kernel = sdpa_cuda.CUDNN
    out, lse = kernel.forward(call, kernel.mask(call))
    for queries, warps, stages, most, least in (
        (64, 4, 2, None, 4), (64, 4, 2, None, 8), (64, 4, 3, None, 4), (64, 4, 2, 168, 4),
        (128, 8, 2, None, 4), (128, 8, 2, 128, 4), (128, 8, 3, None, 4),
    ):  # fmt: skip
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        if most is not None:
            options["maxnreg"] = most

        def once(*_: Tensor, queries: int = queries) -> Any:
            return measuring.effect(call, lse, out, 8, given[2], (queries, 64))

        with (
            patch.object(measuring, "_options", lambda blocks: options),  # noqa: B023
            patch.object(measuring, "LEAST", least),
        ):
            what = f"{queries} × 64, {warps} warps, {stages} stages, {most or 'all'} registers, "
            what += f"leaves of {least}"
            yield from rows(f"Effect's kernels, {place}", {what: once}, [given], (), {})


def linear(tokens: int) -> Iterator[Row]:
    """Beside flash-linear-attention, forward; its speed is to be reached to 0.8."""
    n = size(tokens)
    found = importlib.util.find_spec("fla") is not None
    if not found:
        yield {"failed": "fla is not installed: linear attention has no peer here"}
    for dim, form in product(DIMS, gpu_linear.FORMS):
        with torch.device(DEVICE):
            asked = gpu_linear.request(form, 1, HEADS, n, dim)
        decay, beta = asked.get("decay"), asked.get("beta")
        gate = decay if decay is None or decay.dim() == 1 else decay.transpose(1, 2).contiguous()
        strength = None if beta is None else beta.mT.contiguous().bfloat16()
        given = []
        for q, k, v in inputs(n, dim):
            k = normalize(k, dim=-1)
            given.append((q, k, v, *(t.transpose(1, 2).contiguous() for t in (q, k, v))))
        calls = {"ours": lambda q, k, v, *_: regard.linear_attention(q, k, v, **asked)}  # noqa: B023
        if (kernel := gpu_linear.peer(form)) is not None:
            calls["fla"] = lambda *t: kernel(*t[3:], gate, strength)  # noqa: B023
        with torch.no_grad():
            place = f"{form}, {tokens} tokens, dim {dim}"
            yield from rows(place, calls, given, ("fla",), {"ours": 1.25})


def memory() -> Iterator[Row]:
    """What an observed forward of 131,072 tokens takes beside its tensors."""
    q, k, v = (drawn(1, 8, size(131072), 64) for _ in range(3))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, _ = attention(q, k, v, mask=Causal(), observe=SIGHT)
    used = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    yield {
        "name": "131072 tokens, 8 heads, dim 64: GiB",
        "value": used / 2**30,
        "met": used < 2**30,
    }


def watch() -> Iterator[Row]:
    """A Llama-shaped model of 16 layers, watched by all four; logits are to be equal to the bit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "num_hidden_layers": 2} if DRY else {
        "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 5504,
    }  # fmt: skip
    config = LlamaConfig(
        **shape, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=1000,
        max_position_embeddings=2**17,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        ids = torch.randint(0, 1000, (1, size(32768)))

    def run(observers: list | None) -> Callable[..., Tensor]:
        @torch.no_grad()
        def once(ids: Tensor) -> Tensor:
            if observers is None:
                return model(ids, logits_to_keep=64).logits
            with regard.watch(model, observe=observers):
                return model(ids, logits_to_keep=64).logits

        return once

    same = torch.equal(run(None)(ids), run(SIGHT)(ids))
    yield {"name": "watched logits are equal to the bit", "value": same, "met": same}
    calls = {"unwatched": run(None), "watched by nothing": run([]), "all four": run(SIGHT)}
    yield from rows("watch, 32768 tokens", calls, [(ids,)], ("unwatched",), {"all four": 1.6})
