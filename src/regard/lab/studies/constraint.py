"""Whether heads link an instruction to the one it depends on, and a name in code to its
definition."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from ...analysis.text_model import load
from .links import Item, Span, by_effect, by_weight, chosen, hits, nearest, share
from .study import Cell, Panel, Result, Setting, Study, Verdict

START, TURN = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
TASKS = ("title", "summary", "list", "letter", "poem", "story", "report", "question")
FORMS = ("French", "German", "capitals", "rhyme", "verse", "bullets", "numbers", "quotes")
FUNCTIONS = ("area", "price", "total", "speed", "weight", "score", "height", "count")
BODIES = ("return x + 1", "return x * 2", "return x - 3", "return x * x", "return x / 2")
RULES = 3  # candidates of each text, so chance is a third


def instruction(rng: random.Random) -> Item:
    """Rules, each for one thing to write; then one of the things is asked for, and the last word
    should read the form that its rule demands."""
    tasks, forms = rng.sample(TASKS, RULES), rng.sample(FORMS, RULES)
    text, spans = START, []
    for task, form in zip(tasks, forms, strict=True):
        text, span = _with(f"{text}Write the {task} in ", form)
        spans.append(span)
        text += ". "
    right = rng.randrange(RULES)
    text, reader = _with(f"{text}Now write only the ", tasks[right])
    return Item(text + TURN, reader, tuple(spans), right)


def definition(rng: random.Random) -> Item:
    """Functions, then a call of one: its name should read the name in its definition."""
    names, bodies = rng.sample(FUNCTIONS, RULES), rng.sample(BODIES, RULES)
    text, spans = "<|im_start|>", []
    for name, body in zip(names, bodies, strict=True):
        text, span = _with(f"{text}def ", name)
        spans.append(span)
        text += f"(x):\n    {body}\n\n"
    right = rng.randrange(RULES)
    text, reader = _with(f"{text}print(", names[right])
    return Item(text + "(", reader, tuple(spans), right)


def _with(text: str, word: str) -> tuple[str, Span]:
    """The text with the word behind it, and where that stands."""
    return text + word, (len(text), len(text) + len(word))


KINDS: dict[str, Callable[[random.Random], Item]] = {
    "instruction": instruction, "definition": definition,
}  # fmt: skip


def run(at: Setting) -> Result:
    reader = load(str(at.model("minimind2-small")))
    rows: list[tuple[Cell, ...]] = []
    verdicts = []
    bars: dict[str, list[float]] = {"weight": [], "Effect": [], "nearest": []}
    effect = partial(by_effect, directions=at.size.directions)
    for kind, make in KINDS.items():
        for by, measure, most in (
            ("weight", by_weight, at.size.items), ("Effect", effect, at.size.effects)
        ):  # fmt: skip
            rng = at.random(kind)
            one, other = ([make(rng) for _ in range(most)] for _ in range(2))
            told = partial(at.told, f"{kind} by {by}")
            dev, test = (hits(reader, items, measure, told) for items in (one, other))
            found = chosen(dev, test, other, at.random(f"{kind} {by}"))
            rows.append((kind, by, f"{found.layer}.{found.head}", found.items, *found.share,
                         share(other, nearest)))  # fmt: skip
            bars[by].append(found.share.value)
            links = "a later request to the form that its rule demands"
            what = links if kind == "instruction" else "a name in code to its definition"
            verdicts.append(Verdict(
                f"by {by}, some head links {what} (above the chance of a third)",
                found.share.low > 1 / RULES, found.share.percent(),
            ))  # fmt: skip
            if by == "weight":
                bars["nearest"].append(share(other, nearest))
    columns = ("link", "by", "head", "n", "share", "low", "high", "nearest")
    panel = Panel("strongest candidate is the right one", "", "share",
                  {by: (list(KINDS), values) for by, values in bars.items()},
                  bars=True, level=1 / RULES)  # fmt: skip
    item = KINDS["instruction"](at.random("shown"))
    return Result(columns, rows, verdicts, [panel], notes=[
        f"minimind2-small; {RULES} candidates a text, so chance is {1 / RULES:.0%}. Texts are made "
        f"by rule and seed, such as “{item.text[len(START) : -len(TURN)]}”; the head is chosen on "
        "one half and reported on the other. A name and its definition are the same word: a head "
        "that reads equal words (an induction head) is enough for that link."
    ])  # fmt: skip


STUDY = Study(
    "constraint",
    "A later instruction is linked to the earlier one that binds it, and a name to its definition.",
    "Texts with three rules, or three functions, of which one is then used: how often the head "
    "chosen on other texts reads the right one the most, by weight and by Effect.",
    run,
    tiny=dict(items=2, effects=1, directions=2),
    quick=dict(items=24, effects=6, directions=4),
    full=dict(items=150, effects=30, directions=16),
)
