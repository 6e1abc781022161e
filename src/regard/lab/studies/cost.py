"""What attention costs over the length N: time and memory, exact and approximate, against LSTM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...call.masks import Causal, Window
from ...call.sparse_masks import BigBird
from ...ops.attend import attention
from ...ops.linear import linear_attention
from .measuring import peak_bytes, seconds
from .stats import exponent
from .study import Cell, Panel, Result, Setting, Study, Verdict

HEADS, DIM = 4, 64
WINDOW, BLOCK = 256, 64


def ways(length: int, at: Setting) -> dict[str, Callable[[], Any]]:
    """The calls, one a way, on random float32 numbers."""
    rng = at.generator(length)
    q, k, v = torch.randn(
        3, 1, HEADS, length, DIM, generator=rng, device="cpu", dtype=torch.float32
    )
    lstm = torch.nn.LSTM(HEADS * DIM, HEADS * DIM, batch_first=True, device="cpu")
    x = v.transpose(1, 2).flatten(2)
    future = torch.ones(length, length, dtype=torch.bool, device="cpu").triu(1)
    sparse = Causal() & BigBird(BLOCK, seed=at.seed)

    def eager() -> Tensor:
        scores = q @ k.mT * DIM**-0.5
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ v

    return {
        "exact": lambda: attention(q, k, v, mask=Causal()),
        "eager": eager,
        "window": lambda: attention(q, k, v, mask=Causal() & Window(WINDOW)),
        "block-sparse": lambda: attention(q, k, v, mask=sparse),
        "linear": lambda: linear_attention(q, k, v),
        "LSTM": lambda: lstm(x),
    }


def run(at: Setting) -> Result:
    lengths: list[int] = at.size.lengths
    times: dict[str, list[float]] = {}
    sizes: dict[str, list[float]] = {}
    with torch.no_grad():
        for place, length in enumerate(lengths):
            for name, call in ways(length, at).items():
                at.told(f"{name} at {length}", place / len(lengths))
                times.setdefault(name, []).append(seconds(call, at.size.enough))
                # One call more, so that what is made once (plans, threads) is not counted
                sizes.setdefault(name, []).append(max(1, peak_bytes(call)))
    late = slice(-at.size.fitted, None)
    of_time = {name: exponent(lengths[late], found[late]) for name, found in times.items()}
    of_size = {name: exponent(lengths[late], found[late]) for name, found in sizes.items()}
    rows: list[tuple[Cell, ...]] = [
        (name, times[name][-1] * 1e3, of_time[name], sizes[name][-1] / 2**20, of_size[name])
        for name in times
    ]
    last = f"at {lengths[-1]:,} tokens"
    columns = ("way", f"ms {last}", "exponent of time", "MiB", "exponent of memory")
    return Result(columns, rows, _verdicts(of_time, of_size, sizes), [
        Panel("time", "tokens", "seconds", {n: (lengths, t) for n, t in times.items()}, "xy",
              clock=True),
        Panel("memory", "tokens", "MiB", {
            n: (lengths, [b / 2**20 for b in s]) for n, s in sizes.items()}, "xy", clock=True),
    ], columns[1:], [
        f"{HEADS} heads of {DIM}, float32, causal, batch 1, forward alone; window {WINDOW}; "
        f"block-sparse: BigBird, blocks of {BLOCK}; LSTM of width {HEADS * DIM}. Exponents are "
        f"fitted to the last {at.size.fitted} of the lengths {', '.join(map(str, lengths))}. "
        "Memory: the most that the call holds beyond its input."
    ])  # fmt: skip


def _verdicts(
    of_time: dict[str, float], of_size: dict[str, float], sizes: dict[str, list[float]]
) -> list[Verdict]:
    flat = {n: of_time[n] for n in ("window", "block-sparse", "linear", "LSTM")}
    more = sizes["eager"][-1] / sizes["exact"][-1]
    return [
        Verdict("attention's time grows as N² (exponent above 1.7)", of_time["exact"] > 1.7,
                f"{of_time['exact']:.2f}; eager {of_time['eager']:.2f}", True),
        Verdict("eager memory grows as N² (above 1.7)", of_size["eager"] > 1.7,
                f"{of_size['eager']:.2f}", True),
        Verdict("exact attention needs only N memory (below 1.3)", of_size["exact"] < 1.3,
                f"{of_size['exact']:.2f}; eager holds {more:.0f} times as much", True),
        Verdict("window, block-sparse, linear and LSTM take N time (below 1.3)",
                max(flat.values()) < 1.3, ", ".join(f"{n} {e:.2f}" for n, e in flat.items()), True),
    ]  # fmt: skip


STUDY = Study(
    "cost",
    "Attention costs N² time; only eager attention costs N² memory too.",
    "Each way is called on longer and longer random input; its exponent is the slope of its time "
    "and peak memory over N on logarithmic axes.",
    run,
    tiny=dict(lengths=[64, 128], fitted=2, enough=0.0),
    quick=dict(lengths=[256, 512, 1024, 2048], fitted=3, enough=0.1),
    full=dict(lengths=[512, 1024, 2048, 4096, 8192], fitted=4, enough=0.5),
)
