"""Whether heads link a pronoun to what it stands for, against nearest and first noun."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ...analysis.text_model import TextModel, load
from . import coreference
from .links import Choice, Item, by_effect, by_weight, chosen, first, hits, nearest, share
from .stats import Interval, bootstrap
from .study import Cell, Panel, Result, Setting, Study, Verdict

SENTENCES = (
    ("The trophy didn't fit in the suitcase because it was too big.", "trophy", "suitcase"),
    ("The trophy didn't fit in the suitcase because it was too small.", "suitcase", "trophy"),
    ("The cat sat on the mat because it was tired.", "cat", "mat"),
    ("The animal didn't cross the road because it was tired.", "animal", "road"),
)


def run(at: Setting) -> Result:
    reader = load()
    data = {
        "WinoBias": [coreference.winobias(at.file("winobias"), p) for p in ("dev", "test")],
        "DPR": [coreference.dpr(at.file(f"dpr/{p}.c.txt")) for p in ("train", "test")],
        "GAP": [
            coreference.gap(at.file(f"gap/gap-{p}.tsv")) for p in ("development", "validation")
        ],
    }
    rows: list[tuple[Cell, ...]] = []
    verdicts = []
    bars: dict[str, list[float]] = {"best head": [], "nearest": [], "first": []}
    every: dict[str, dict[str, float]] = {}  # each head's share of the part reported on
    effect = partial(by_effect, directions=at.size.directions)
    for name, parts in data.items():
        for kind, measure, most in (
            ("weight", by_weight, at.size.items), ("Effect", effect, at.size.effects)
        ):  # fmt: skip
            one, other = (_some(at, part, most) for part in parts)
            told = partial(at.told, f"{name} by {kind}")
            dev, test = (hits(reader, items, measure, told) for items in (one, other))
            found = chosen(dev, test, other, at.random(name))
            every[f"{name} by {kind}"] = _every_head(test)
            base = share(other, nearest), share(other, first)
            rows.append((
                name, kind, f"{found.layer}.{found.head}", found.items, found.share.value,
                found.share.low, found.share.high, *base, found.pairs,
            ))  # fmt: skip
            if kind == "weight":
                verdicts.append(_verdict(at, name, found, other))
                for key, value in zip(bars, (found.share.value, *base), strict=True):
                    bars[key].append(value)
                if name == "DPR":
                    sentences = _sentences(reader, found)
                    apart = found.pairs
    verdicts.append(Verdict(
        "the head tells swapped pairs (big/small) apart: both right in more than half",
        apart is not None and apart > 0.5,
        f"{apart or 0:.0%} of DPR's pairs; by chance 25 %, by any fixed order 0 %",
    ))  # fmt: skip
    right = sum(bool(one["right"]) for one in sentences)
    verdicts.append(Verdict(
        "the sentences that the claim is told with come out right", right == len(sentences),
        f"{right} of {len(sentences)} with the head chosen on DPR",
    ))  # fmt: skip
    columns = ("data", "by", "head", "n", "share", "low", "high", "nearest", "first", "pairs")
    panel = Panel("strongest candidate is the antecedent", "", "share",
                  {key: (list(data), values) for key, values in bars.items()},
                  bars=True, level=0.5)  # fmt: skip
    heads = Panel("every head, from its best down", "rank", "share",
                  {name: ([*range(1, len(each) + 1)], sorted(each.values(), reverse=True))
                   for name, each in every.items()}, level=0.5)  # fmt: skip
    return Result(columns, rows, verdicts, [panel, heads], notes=[
        "all-MiniLM-L6-v2. Head (layer.head, from 0) chosen on WinoBias dev, DPR train, GAP "
        "development; share of items whose antecedent gets more than the other candidate on "
        "WinoBias test, DPR test, GAP validation, with 95 % bootstrap intervals. nearest, first: "
        "rules that look at order alone. pairs: both sentences of a pair right. By Effect fewer "
        "items are read: it takes backward passes. The picture has every head, of the part "
        "reported on, and the JSON its share by name."
    ], more={"sentences": sentences, "heads": every})  # fmt: skip


def _every_head(hits: Tensor) -> dict[str, float]:
    """How often each head is right, by its name: layer.head."""
    shares = hits.double().mean(0)
    return {
        f"{layer}.{head}": float(right)
        for layer, row in enumerate(shares) for head, right in enumerate(row)
    }  # fmt: skip


def _some(at: Setting, items: Sequence[Item], most: int) -> list[Item]:
    """So many, drawn by the seed, whole pairs together."""
    keys = sorted(
        {(item.pair, number if item.pair < 0 else 0) for number, item in enumerate(items)}
    )
    at.random("items").shuffle(keys)
    place = {key: rank for rank, key in enumerate(keys)}
    ranked = sorted(enumerate(items), key=lambda p: place[p[1].pair, p[0] if p[1].pair < 0 else 0])
    return [item for _, item in ranked[:most]]


def _verdict(at: Setting, name: str, found: Choice, items: Sequence[Item]) -> Verdict:
    rules = {"nearest": nearest, "first": first}
    best = max(rules, key=lambda rule: share(items, rules[rule]))
    pairs = [(hit, float(rules[best](item))) for hit, item in zip(found.hits, items, strict=True)]
    gain: Interval = bootstrap(
        pairs, lambda some: sum(a - b for a, b in some) / len(some), at.random(f"{name} gain")
    )
    return Verdict(
        f"a head links pronouns of {name} to their antecedents better than order alone",
        gain.low > 0, f"{found.share.percent()}, {best} {share(items, rules[best]):.0%}: "
        f"{gain.value:+.0%} [{gain.low:+.0%}, {gain.high:+.0%}]",
    )  # fmt: skip


def _sentences(reader: TextModel, found: Choice) -> list[dict[str, object]]:
    made = []
    for text, right, wrong in SENTENCES:
        spans = [(text.index(word), text.index(word) + len(word)) for word in (right, wrong)]
        start = text.index(" it ") + 1
        item = Item(text, (start, start + 2), tuple(spans), 0)
        weights = by_weight(reader, item)[found.layer, found.head].tolist()
        made.append({"text": text, right: weights[0], wrong: weights[1],
                     "right": weights[0] > weights[1]})  # fmt: skip
    return made


STUDY = Study(
    "pronouns",
    "Some head links a pronoun to the noun it stands for, not merely to the nearest or the first.",
    "In each sentence with two candidates, a head's answer is the one that gets the larger weight "
    "from the pronoun; the best head is chosen on one part of the data and reported on another.",
    run,
    tiny=dict(items=4, effects=1, directions=2),
    quick=dict(items=40, effects=6, directions=8),
    full=dict(items=500, effects=40, directions=16),
)
