"""What positions do: word order with and without them, and lengths beyond the trained one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...analysis.text_model import TextModel, load
from .learning import IGNORED, Batch, fit, integers, loss_of, small_lm
from .stats import mean_interval
from .study import Cell, Panel, Result, Setting, Study, Verdict

KINDS = ("none", "sinusoidal", "learned", "rotary", "alibi")


def characters(at: Setting) -> tuple[Tensor, int]:
    """A text as numbers of its characters, and how many there are."""
    text = at.file("tinyshakespeare/input.txt").read_text("utf-8")[: at.size.text]
    known = {char: number for number, char in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[char] for char in text], dtype=torch.int64, device="cpu")
    return ids, len(known)


def drawn(ids: Tensor, length: int, batch: int, generator: torch.Generator) -> Batch:
    """Pieces of a text, and the next character of each."""
    starts = integers(0, len(ids) - length - 1, (batch, 1), generator)
    at = starts + torch.arange(length, dtype=torch.int64, device="cpu")
    return ids[at], ids[at + 1]


def run(at: Setting) -> Result:
    size = at.size
    ids, vocabulary = characters(at)
    cut = len(ids) * 9 // 10
    lengths = [size.length, 2 * size.length, 4 * size.length]
    held = ids[cut:]
    ends = integers(lengths[-1], len(held) - 1, (8 * size.batch,), at.generator(2))
    losses: dict[str, list[float]] = {}
    for place, kind in enumerate(KINDS):
        torch.manual_seed(at.seed)
        model = small_lm(vocabulary, size.dim, 2, 2, positions=kind, length=lengths[-1])
        draw = partial(drawn, ids[:cut], size.length, size.batch, at.generator(1))
        told = at.training(kind, place, len(KINDS), size.steps)
        fit(model, draw, size.steps, each=told)
        losses[kind] = [_at_end(model, held, n, size, ends) for n in lengths]
    rows: list[tuple[Cell, ...]] = [(kind, *found) for kind, found in losses.items()]
    same, apart = _shuffled(at)
    grown = {kind: found[-1] - found[0] for kind, found in losses.items()}
    best = min(grown, key=lambda kind: grown[kind])
    verdicts = [
        Verdict("without positions an encoder does not see word order: a shuffled sentence has the "
                "same vector (cosine above 0.9999)", same > 0.9999,
                f"cosine {same:.6f} without, {apart:.3f} with positions"),
        Verdict("with them it does (below 0.999)", apart < 0.999, f"{apart:.3f}"),
        Verdict("a causal model learns better with positions than without",
                min(losses[k][0] for k in KINDS[1:]) < losses["none"][0],
                ", ".join(f"{k} {losses[k][0]:.2f}" for k in KINDS)),
        Verdict("ALiBi holds beyond the trained length (loss grows by less than 0.05 nats)",
                grown["alibi"] < 0.05, f"{grown['alibi']:+.2f} at four times the length"),
        Verdict("sinusoidal, learned and rotary do not (it grows by more than ALiBi's)",
                all(grown[k] > max(grown["alibi"], 0.05) for k in
                    ("sinusoidal", "learned", "rotary")),
                ", ".join(f"{k} {g:+.2f}" for k, g in grown.items()) + f"; least: {best}"),
    ]  # fmt: skip
    panel = Panel("loss beyond the trained length", "tokens", "nats",
                  {kind: (lengths, found) for kind, found in losses.items()}, "x")  # fmt: skip
    columns = ("positions", *(f"loss at {n}" for n in lengths))
    return Result(columns, rows, verdicts, [panel], notes=[
        f"Two blocks of width {size.dim}, 2 heads, trained for {size.steps} steps of {size.batch} "
        f"pieces of {size.length} characters of Tiny Shakespeare; loss in nats of the last "
        f"{size.length // 2} characters before the same places of held-out text, at each length. "
        "Learned positions beyond the trained length are as they began. The encoder is "
        f"all-MiniLM-L6-v2, its positions set to zero, over {size.sentences} sentences."
    ])  # fmt: skip


def _at_end(model: Any, ids: Tensor, length: int, size: Any, ends: Tensor) -> float:
    """Loss of the characters before the same ends, with so many to read in all."""
    last = size.length // 2  # of a trained length
    found = []
    for some in ends.split(size.batch):
        at = some[:, None] + torch.arange(-length, 0, dtype=torch.int64, device="cpu")
        targets = ids[at + 1].clone()
        targets[:, :-last] = IGNORED
        with torch.no_grad():
            found.append(float(loss_of(model, (ids[at], targets))) * len(some))
    return sum(found) / len(ends)


def _shuffled(at: Setting) -> tuple[float, float]:
    """Mean cosine of a sentence's vector and that of its shuffled words, without and with
    positions."""
    reader = load()
    rng = at.random("shuffled")
    text = at.file("tinystories/tiny_stories_sample.txt").read_text("utf-8")
    sentences = [
        line for line in text.split(". ")
        if 8 <= len(line.split()) <= 30
    ][: at.size.sentences]  # fmt: skip
    pairs = []
    for line in sentences:
        words = line.split()
        pairs.append((line, " ".join(rng.sample(words, len(words)))))
    embeddings = reader.model.embeddings
    found = []
    for keep in (0.0, 1.0):
        hook = embeddings.position_embeddings.register_forward_hook(
            lambda _, __, out, keep=keep: out * keep
        )
        values = [
            float(torch.cosine_similarity(_vector(reader, one), _vector(reader, other), 0))
            for one, other in pairs
        ]
        hook.remove()
        found.append(mean_interval(values, rng).value)
    return found[0], found[1]


def _vector(reader: TextModel, text: str) -> Tensor:
    """A sentence's: the mean over its tokens."""
    run: Callable[..., Tensor] = reader.model
    ids = torch.tensor([reader.encode(text).ids], dtype=torch.int64, device="cpu")
    with torch.no_grad():
        return run(input_ids=ids)[0][0].double().mean(0)


STUDY = Study(
    "positions",
    "Without positions attention sees a bag of words; some positions reach beyond training.",
    "An encoder reads sentences and their shuffled words; small causal models with each kind of "
    "positions are tried at the trained length, twice and four times that.",
    run,
    tiny=dict(text=4000, length=16, dim=16, batch=4, steps=3, sentences=3),
    quick=dict(text=300_000, length=48, dim=64, batch=16, steps=200, sentences=20),
    full=dict(text=1_000_000, length=64, dim=64, batch=32, steps=600, sentences=100),
)
