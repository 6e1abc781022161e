"""How far back the last loss is felt: its gradient at every earlier position."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .learning import IGNORED, Batch, fit, integers, small_lm
from .stats import power_law
from .study import Cell, Panel, Result, Setting, Study, Verdict

MIXERS = ("rnn", "lstm", "softmax")


def run(at: Setting) -> Result:
    size = at.size
    lines: dict[str, dict[str, tuple[list[int], list[float]]]] = {"at first": {}, "trained": {}}
    rows: list[tuple[Cell, ...]] = []
    falls: dict[tuple[str, str], float] = {}
    for place, mixer in enumerate(MIXERS):
        torch.manual_seed(at.seed)
        model = small_lm(
            size.vocabulary, size.dim, 1, 1, mixer=mixer, positions="learned", length=size.length
        )
        for when, norms in lines.items():
            if when == "trained":
                draw = partial(first_again, at, at.generator(1))
                told = at.training(mixer, place, len(MIXERS), size.steps)
                losses = fit(model, draw, size.steps, rate=size.rate, each=told, until=0.01)
            found = gradients(model, first_again(at, at.generator(2)))
            norms[mixer] = (list(range(len(found) - 1, -1, -1)), found)
            falls[mixer, when] = found[0] / max(found[-2], 1e-30)
            loss = None if when == "at first" else losses[-1]
            middle = found[len(found) // 2]
            rows.append((mixer, when, found[0], middle, found[-2], falls[mixer, when], loss))
    columns = ("mixer", "when", "oldest", "middle", "newest", "oldest/newest", "loss")
    vanish = {m: falls[m, "at first"] for m in MIXERS}
    verdicts = [
        Verdict("the gradient of an RNN vanishes with distance (to less than 1 % at first)",
                vanish["rnn"] < 0.01, f"oldest/newest {vanish['rnn']:.1e}"),
        Verdict("an LSTM's vanishes less than an RNN's", vanish["lstm"] > vanish["rnn"],
                f"{vanish['lstm']:.1e} against {vanish['rnn']:.1e}"),
        Verdict("attention's does not vanish (oldest at least a tenth of the newest)",
                vanish["softmax"] >= 0.1, f"{vanish['softmax']:.2g}"),
        Verdict("after training on what stood first, attention's largest gradient is there",
                falls["softmax", "trained"] > 1,
                f"oldest/newest {falls['softmax', 'trained']:.2g}; RNN "
                f"{falls['rnn', 'trained']:.1e}, LSTM {falls['lstm', 'trained']:.1e}"),
    ]  # fmt: skip
    rates = {m: power_law(range(1, size.length), lines["at first"][m][1][-2::-1]) for m in MIXERS}
    panels = [Panel(when, "tokens back", "gradient norm", found, "y") for when, found in
              lines.items()]  # fmt: skip
    return Result(columns, rows, verdicts, panels, notes=[
        f"One block of width {size.dim}, learned positions; {size.length} tokens, the last asks "
        f"for the first; at most {size.steps} steps of {size.batch}, the same for all (a run whose "
        "loss is below 0.01 ends early); guessing has a loss of "
        f"{math.log(size.vocabulary - 1):.2f}. Norm of the loss's gradient in each token's "
        f"embedding, mean over {size.batch} sequences; newest: the last token but one.",
        "The sizes were chosen after a run of 128 tokens, width 64 and 800 steps, in which "
        "attention, too, had hardly learned the task (loss 2.48).",
    ], more={"exponents": {m: b for m, (_, b) in rates.items()}})  # fmt: skip


def first_again(at: Setting, generator: torch.Generator) -> Batch:
    """Random tokens; the last asks for the first."""
    size = at.size
    ids = integers(1, size.vocabulary, (size.batch, size.length), generator)
    ids[:, -1] = 0
    targets = torch.full_like(ids, IGNORED)
    targets[:, -1] = ids[:, 0]
    return ids, targets


def gradients(model: Any, batch: Batch) -> list[float]:
    """Of the last target's loss, the norm of its gradient in each token's embedding."""
    ids, targets = batch
    embedded: list[Tensor] = []

    def as_leaf(module: object, args: object, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[0]

    hook = model.embedding.register_forward_hook(as_leaf)
    with torch.enable_grad():
        loss = F.cross_entropy(model(ids)[:, -1], targets[:, -1], reduction="sum")
        (found,) = torch.autograd.grad(loss, embedded)
    hook.remove()
    norms: list[float] = found.double().norm(dim=-1).mean(0).tolist()
    return norms


STUDY = Study(
    "gradient",
    "Through an RNN the gradient vanishes with distance; attention reaches every token directly.",
    "The last token's loss is differentiated by the embedding of every earlier token, at first and "
    "after training to say the first token again.",
    run,
    tiny=dict(length=8, vocabulary=8, dim=8, batch=4, steps=2, rate=1e-2),
    quick=dict(length=64, vocabulary=16, dim=32, batch=32, steps=300, rate=1e-2),
    full=dict(length=64, vocabulary=16, dim=32, batch=32, steps=600, rate=1e-2),
)  # fmt: skip
