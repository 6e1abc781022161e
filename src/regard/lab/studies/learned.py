"""Attention before, during and after training: when the induction head appears."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...call.observers import Rows
from .learning import IGNORED, Batch, fit, integers, small_lm
from .study import Cell, Panel, Result, Setting, Study, Verdict

HEADS = 4


def repeated(at: Setting, generator: torch.Generator, varied: bool = True) -> Batch:
    """Random tokens said again and again: ids (batch, 2 · half) and the next token of each.

    They begin again after `half` tokens, or (varied) after half of that or more, another number in
    each row: else a head could learn the distance, and need not look for the earlier copy.
    """
    size = at.size
    said = integers(0, size.vocabulary, (size.batch, size.half), generator)
    after = torch.full((size.batch, 1), size.half, dtype=torch.int64, device="cpu")
    if varied:
        after = integers(size.half // 2, size.half + 1, (size.batch, 1), generator)
    places = torch.arange(2 * size.half, dtype=torch.int64, device="cpu")
    ids = said.gather(1, places % after)
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORED
    return ids, targets


def weights(model: Any, ids: Tensor) -> list[Tensor]:
    """Of each layer, float32 (batch, heads, length, length)."""
    with torch.no_grad():
        _, seen = model(ids, observe=[Rows(range(ids.shape[1]))])
    return [block.own[0].weights for block in seen]


def scores(model: Any, batch: Batch) -> dict[str, float]:
    """The best head's weight: induction (on what followed the token before), previous; and the
    loss in both halves."""
    ids, targets = batch
    half = ids.shape[1] // 2
    layers = torch.stack(weights(model, ids))  # (layers, batch, heads, length, length)
    induction = layers.diagonal(1 - half, dim1=-2, dim2=-1).mean((1, -1))
    previous = layers.diagonal(-1, dim1=-2, dim2=-1).mean((1, -1))
    with torch.no_grad():
        logs = model(ids).log_softmax(-1)
    losses = -logs[:, :-1].gather(-1, targets[:, :-1, None])[..., 0].mean(0)
    return {
        "induction": float(induction.max()),
        "previous": float(previous[0].max()),
        "first half": float(losses[: half - 1].mean()),
        "second half": float(losses[half:].mean()),
    }


def run(at: Setting) -> Result:
    size = at.size
    torch.manual_seed(at.seed)
    model = small_lm(size.vocabulary, size.dim, 2, HEADS, hidden=0)
    train, test = at.generator(1), repeated(at, at.generator(2), varied=False)
    found: dict[int, dict[str, float]] = {0: scores(model, test)}

    def each(step: int, loss: float) -> None:
        at.told(f"loss {loss:.2f}", step / size.steps)
        if (step + 1) % size.every == 0:
            model.eval()
            found[step + 1] = scores(model, test)
            model.train()

    fit(model, partial(repeated, at, train), size.steps, rate=size.rate, each=each)
    names = list(found[0])
    rows: list[tuple[Cell, ...]] = [(step, *one.values()) for step, one in found.items()]
    first, last = found[0], found[max(found)]
    appeared = next((step for step, one in found.items() if one["induction"] >= 0.5), None)
    # How much less what was said before costs: a loss alone falls first to that of guessing
    gain = {step: one["first half"] - one["second half"] for step, one in found.items()}
    rose = max((gain[b] - gain[a], b) for a, b in zip(list(gain), list(gain)[1:], strict=False))
    together = appeared is not None and abs(rose[1] - appeared) <= 2 * size.every
    verdicts = [
        Verdict("at first no head is an induction head (weight below 0.1)",
                first["induction"] < 0.1, f"{first['induction']:.3f}"),
        Verdict("after training one is (0.5 or more)", last["induction"] >= 0.5,
                f"{last['induction']:.2f}; what it copies is said with loss "
                f"{last['second half']:.2f}, guessing {last['first half']:.2f}"),
        Verdict("it appears when the loss of repeated tokens falls the most below that of new ones",
                together, f"weight 0.5 at step {appeared}; steepest fall up to step {rose[1]}"),
        Verdict("a head on the previous token comes with it (0.5 or more in layer 0)",
                last["previous"] >= 0.5, f"{first['previous']:.2f} → {last['previous']:.2f}"),
    ]  # fmt: skip
    steps = list(found)
    return Result(("step", *names), _thinned(rows), verdicts, [
        Panel("weight of the best head", "step", "weight", {
            n: (steps, [found[s][n] for s in steps]) for n in names[:2]}),
        Panel("loss", "step", "nats", {n: (steps, [found[s][n] for s in steps])
                                       for n in names[2:]}),
    ], notes=[
        f"Two layers of attention alone, {HEADS} heads, width {size.dim}, rotary; "
        f"{size.half} random tokens of {size.vocabulary} said twice (in training after "
        f"{size.half // 2} to {size.half}, so that no fixed distance helps); {size.steps} steps of "
        f"{size.batch}. induction: mean weight on the token after the earlier copy, the best head "
        "of both layers; previous: on the token before, the best of layer 0 (Olsson et al. 2022)."
    ])  # fmt: skip


def _thinned(rows: list[tuple[Cell, ...]], most: int = 12) -> list[tuple[Cell, ...]]:
    """At most so many, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


STUDY = Study(
    "learned",
    "Attention is learned: an induction head is not there at first, and appears in training.",
    "A two-layer model of attention alone learns random tokens that are said twice; on the way "
    "each head's weight on the token after the earlier copy is read, beside the loss.",
    run,
    tiny=dict(half=6, vocabulary=8, dim=16, batch=4, steps=4, every=2, rate=3e-3),
    quick=dict(half=24, vocabulary=48, dim=64, batch=32, steps=1000, every=50, rate=3e-3),
    full=dict(half=24, vocabulary=48, dim=64, batch=32, steps=1200, every=20, rate=3e-3),
)
