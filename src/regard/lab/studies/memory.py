"""Attention keeps nothing between calls: what is lost with the context, what a cache adds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...analysis.text_model import TextModel, load, quiet
from ...ops.attend import attention
from .stats import Interval, mean_interval
from .study import Cell, Panel, Result, Setting, Study, Verdict

NAMES = ("Tom", "Lily", "Anna", "Peter", "Mary", "Jack", "Sara", "David")
THINGS = ("dog", "hat", "ball", "car", "book", "cat", "cup", "bird")
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
BETWEEN = (
    "The weather was fine that day.",
    "There were many people in the street.",
    "The shop on the corner was open.",
    "It was a quiet morning in the town.",
)
START = "<|im_start|>user\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
"""As minimind2-small was trained to be asked."""


class Fact(NamedTuple):
    """What is said, what is said after it, what is asked, and the answer, as texts."""

    said: str
    between: str
    asked: str
    answer: str


def facts(at: Setting) -> list[Fact]:
    """Facts that no model can know: someone's thing has a colour."""
    rng = at.random("facts")
    made = []
    for _ in range(at.size.facts):
        name, thing, colour = rng.choice(NAMES), rng.choice(THINGS), rng.choice(COLOURS)
        between = " ".join(rng.sample(BETWEEN, 2))
        what = f"colour of {name}'s {thing} is"
        asked = f" What colour is {name}'s {thing}?{TURN}The {what}"
        made.append(Fact(f"The {what} {colour}. ", between, asked, f" {colour}"))
    return made


def run(at: Setting) -> Result:
    reader = load(str(at.model("minimind2-small")), head=True)
    rng = at.random("intervals")
    found: dict[str, list[float]] = {"whole": [], "cached": [], "dropped": [], "kept cache": []}
    moved = 0.0
    with torch.no_grad(), quiet():
        for number, fact in enumerate(facts(at)):
            at.told("facts", number / at.size.facts)
            whole = _answered(reader, [START + fact.said + fact.between + fact.asked], fact.answer)
            parts = _answered(reader, [START + fact.said + fact.between, fact.asked], fact.answer)
            # The same two calls, but nothing is handed from one to the other
            dropped = _answered(reader, [START + fact.between + fact.asked], fact.answer)
            found["whole"].append(whole[0])
            found["cached"].append(parts[0])
            found["dropped"].append(dropped[0])
            cache = _cached(reader, START + fact.said)
            found["kept cache"].append(
                _answered(reader, [fact.between + fact.asked], fact.answer, cache)[0]
            )
            moved = max(moved, float((whole[1] - parts[1]).abs().max()))
    told = {name: mean_interval(values, rng) for name, values in found.items()}
    fell = mean_interval(
        [a - b for a, b in zip(found["whole"], found["dropped"], strict=True)], rng
    )
    ways = (
        ("one call reads fact and question", "whole"),
        ("fact, then question with its cache", "cached"),
        ("the fact's cache kept, text not read again", "kept cache"),
        ("question alone: the fact was an earlier call", "dropped"),
    )
    rows: list[tuple[Cell, ...]] = [
        (said, told[name].value, told[name].low, told[name].high) for said, name in ways
    ]
    panel = Panel("log-probability of the answer", "", "nats", {
        "mean": ([name for _, name in ways], [told[name].value for _, name in ways]),
    }, bars=True)  # fmt: skip
    return Result(
        ("what the model is given", "log p", "low", "high"), rows,
        _verdicts(at, fell, moved), [panel], notes=[
            f"{at.size.facts} facts such as “{facts(at)[0].said.strip()}”, two sentences between, "
            "then the question; log-probability of the answer's first token in nats, with 95 % "
            "bootstrap intervals. minimind2-small, float32."
        ],
    )  # fmt: skip


def _verdicts(at: Setting, fell: Interval, moved: float) -> list[Verdict]:
    return [
        Verdict("a call leaves nothing behind: attention gives the same bits whatever was called "
                "before, an LSTM called again with its state does not", *_stateless(at)),
        Verdict("what was said in an earlier call is lost when its context is dropped",
                fell.low > 0, f"the answer's log-probability falls by {fell} nats"),
        Verdict("a cache adds nothing to reading all again: the same logits, up to rounding "
                "(2e-3)", moved < 2e-3, f"they differ by {moved:.0e} at most"),
    ]  # fmt: skip


def _stateless(at: Setting) -> tuple[bool, str]:
    rng = at.generator()
    one, other = torch.randn(2, 3, 1, 2, 64, 16, generator=rng, device="cpu", dtype=torch.float32)
    before = attention(*one)
    attention(*other)
    same = torch.equal(before, attention(*one))
    lstm = torch.nn.LSTM(16, 16, batch_first=True, device="cpu")
    x = one[0][0, :1]
    out, state = lstm(x)
    differs = not torch.equal(out, lstm(x, state)[0])
    said = "attention repeats bit by bit" if same else "attention does not repeat"
    return same and differs, f"{said}; the LSTM {'does not' if differs else 'does too'}"


def _ids(reader: TextModel, text: str) -> Tensor:
    ids = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def _cached(reader: TextModel, text: str) -> Any:
    return reader.model(input_ids=_ids(reader, text), use_cache=True).past_key_values


def _answered(
    reader: TextModel, parts: list[str], answer: str, cache: Any = None
) -> tuple[float, Tensor]:
    """Log-probability of the answer's first token after parts read in turn, and all the logits."""
    for part in parts:
        out = reader.model(input_ids=_ids(reader, part), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    logits = out.logits[0, -1]
    return float(logits.double().log_softmax(-1)[_ids(reader, answer)[0, 0]]), logits


STUDY = Study(
    "memory",
    "Attention keeps nothing between calls: memory is the context, and a cache only saves time.",
    "A model is told a fact and asked for it: in one call, in two with the cache handed on, and in "
    "two with nothing handed on.",
    run,
    tiny=dict(facts=2),
    quick=dict(facts=40),
    full=dict(facts=120),
)
