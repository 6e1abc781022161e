"""Which ways give attention itself, and which give something else, and by how much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...analysis.text_model import load
from ...call.masks import Causal, First, Window
from ...call.sparse_masks import BigBird
from ...engines.cpu import native
from ...ops.attend import attention
from ...ops.linear import Favor, linear_attention
from .study import Cell, Panel, Result, Setting, Study, Verdict

EXACT = ("eager", "sdpa", "tiled") + (("cpu",) if native.library() is not None else ())
TEXT = (
    "The lighthouse keeper counted the ships every evening, and the village counted on him. "
    "When the fog came in from the north he lit the lamp, and the ships turned away from it. "
)


def run(at: Setting) -> Result:
    rows: list[tuple[Cell, ...]] = []
    rounding: dict[str, dict[str, float]] = {}
    losses: dict[str, dict[str, float]] = {}
    for source, (q, k, v) in _inputs(at).items():
        at.told(source, None)
        exact = attention(*(x.double() for x in (q, k, v)), mask=Causal(), engine="reference")
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            given = [x.to(dtype) for x in (q, k, v)]
            # What the dtype's own numbers give, computed exactly: the input's rounding is no error
            truth = attention(*(x.double() for x in given), mask=Causal(), engine="reference")
            for name in EXACT:
                error = _off(_exact(name, given), truth)
                rounding.setdefault(f"{name} {kind}", {})[source] = error
        for name, call in _approximate(at).items():
            losses.setdefault(name, {})[source] = _off(call(q, k, v), exact)
    sources = list(next(iter(losses.values())))
    for name, found in (rounding | losses).items():
        rows.append((name, *(found[source] for source in sources)))
    eager = {kind: rounding[f"eager {kind}"] for kind in ("float32", "bfloat16")}
    eps = {"float32": torch.finfo(torch.float32).eps, "bfloat16": torch.finfo(torch.bfloat16).eps}
    beyond = {
        name: max(e / (2 * (eager[name.split()[1]][s] + eps[name.split()[1]]))
                  for s, e in found.items())
        for name, found in rounding.items()
    }  # fmt: skip
    worst = max(beyond, key=lambda name: beyond[name])
    least = {name: min(found.values()) for name, found in losses.items()}
    nearest = min(least, key=lambda name: least[name])
    most32 = max(max(f.values()) for n, f in rounding.items() if n.endswith("float32"))
    verdicts = [
        Verdict("flash (sdpa), tiled and cpu give eager's numbers, up to rounding: at most "
                "2 × (eager's own error + ε)", beyond[worst] <= 1,
                f"the largest is {beyond[worst]:.2f} of that bound ({worst})"),
        Verdict("windows, sparse and linear attention give other numbers (each off by 1 % or more)",
                least[nearest] >= 0.01,
                f"the nearest, {nearest}, is off by {least[nearest]:.1%}; exact ways in float32 by "
                f"{most32:.0e} at most"),
    ]  # fmt: skip
    panel = Panel("error of the output, relative", "", "", {
        s: (list(rounding | losses), [f[s] for f in (rounding | losses).values()]) for s in sources
    }, "y", bars=True)  # fmt: skip
    return Result(("way", *sources), rows, verdicts, [panel], notes=[
        "Error: ‖out − exact‖ / ‖exact‖ over the whole output; exact is computed in float64. "
        f"MiniLM: q, k, v of its layer {at.size.layer} over {len(q[0, 0])} tokens, read causally; "
        "its dimensions are those of the model (12 heads of 32)."
    ])  # fmt: skip


def _inputs(at: Setting) -> dict[str, tuple[Tensor, ...]]:
    """Random numbers, and what a real layer makes of a text: (1, heads, N, dim) each."""
    rng = at.generator()
    drawn = torch.randn(
        3, 1, 4, at.size.length, 64, generator=rng, device="cpu", dtype=torch.float32
    )
    return {"random": tuple(drawn), "MiniLM": _of_minilm(at)}


def _of_minilm(at: Setting) -> tuple[Tensor, ...]:
    reader = load()
    model = reader.model
    ids = reader.encode(TEXT * 12).ids[: min(at.size.length, 512)]
    own = model.encoder.layer[at.size.layer].attention.self
    kept: dict[str, Tensor] = {}
    hooks = [
        getattr(own, name).register_forward_hook(
            lambda _, __, out, name=name: kept.__setitem__(name, out.detach())
        )
        for name in ("query", "key", "value")
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids], dtype=torch.int64, device="cpu"))
    for hook in hooks:
        hook.remove()
    heads = model.config.num_attention_heads
    return tuple(
        kept[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
    )


def _exact(name: str, given: list[Tensor]) -> Tensor:
    q, k, v = given
    if name == "eager":
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device="cpu").triu(1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
        return scores.softmax(-1) @ v
    return attention(q, k, v, mask=Causal(), engine=name)


def _approximate(at: Setting) -> dict[str, Callable[..., Any]]:
    """Other things than attention, by name: functions of q, k and v."""
    near = at.size.length // 4
    sparse = BigBird(at.size.block, seed=at.seed)

    def favor(features: int) -> Callable[..., Any]:
        return lambda q, k, v: linear_attention(q, k, v, feature_map=Favor(features, at.seed))

    return {
        "window of N/4": lambda q, k, v: attention(q, k, v, mask=Causal() & Window(near)),
        "window and sinks": lambda q, k, v: attention(
            q, k, v, mask=Causal() & (Window(near) | First(4))
        ),
        "BigBird": lambda q, k, v: attention(q, k, v, mask=Causal() & sparse),
        "linear, elu + 1": lambda q, k, v: linear_attention(q, k, v),
        "Favor, 64 features": favor(64),
        "Favor, 1024 features": favor(1024),
    }


def _off(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


STUDY = Study(
    "equal",
    "Flash and tiled attention are attention, to the last rounding; linear and sparse are not.",
    "Every way computes causal attention of the same q, k and v, random ones and a real layer's, "
    "and is compared with float64.",
    run,
    tiny=dict(length=64, layer=3, block=8),
    quick=dict(length=512, layer=3, block=32),
    full=dict(length=512, layer=3, block=32),
)
