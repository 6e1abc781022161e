"""What kinds of heads there are: positional, grammatical, semantic."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ...analysis.heads import scored
from ...analysis.relations import RelationTally, Sentence, read_conllu
from ...analysis.text_model import TextModel, load
from ...capture.recording import Recording
from .links import tokens
from .stats import Interval, bootstrap
from .study import Cell, Panel, Result, Setting, Study, Verdict

POSITIONAL = ("previous", "next", "self", "first", "separator")
ABOVE = 0.05  # of the best fixed offset, to follow a relation
NEAR, FAR = 0.45, 0.25  # cosines of input embeddings: related, unrelated
TWICE = 1.5  # how much more a semantic head gives related words
CONTENT = ("NOUN", "VERB", "ADJ", "PROPN", "ADV")


class Pair(NamedTuple):
    """What each head gives from one word to another: (layers, heads)."""

    related: bool
    weights: Tensor


def run(at: Setting) -> Result:
    reader = load()
    file = at.file("ud/en_ewt-ud-dev.conllu")
    halves = (RelationTally(), RelationTally())
    pairs: list[Pair] = []
    table = reader.model.get_input_embeddings().weight.detach()
    for number, (sentence, kinds) in enumerate(islice(_sentences(file), at.size.sentences)):
        at.told("sentences", number / at.size.sentences)
        recording = reader.record(sentence.text)
        halves[number % 2].add(sentence, recording)
        pairs += _pairs(reader, table, sentence, kinds, recording)
    told = scored(reader.record(" ".join(s.text for s, _ in islice(_sentences(file), 12))[:1500]))
    positional = {
        (one.layer, one.head): name for one in told.heads if (name := one.behaviour) in POSITIONAL
    }
    relations = _relations(halves, at.size.least)
    grammatical = {head for *_, head, share, base in relations if share > base + ABOVE}
    semantic = _semantic(pairs, at)
    rows: list[tuple[Cell, ...]] = [
        (name, to, count, f"{head[0]}.{head[1]}", share, base)
        for name, to, count, head, share, base in relations
    ]
    all_heads = len(told.heads)
    above = [one for one in relations if one[4] > one[5] + ABOVE]
    verdicts = [
        Verdict("some heads are positional (half of the mass or more on one place)",
                bool(positional), _share(len(positional), all_heads)),
        Verdict("some heads follow a dependency better than any fixed offset (by 5 points, on "
                "sentences that they were not chosen on)", bool(above),
                f"{len(above)} of {len(relations)} relations, by "
                f"{_share(len(grammatical), all_heads)}"),
        Verdict(f"some heads read related words more than unrelated ones ({TWICE} times, interval "
                "above 1.1)", bool(semantic), _share(len(semantic), all_heads)),
    ]  # fmt: skip
    best = max(semantic.values(), default=None, key=lambda one: one.value)
    rows.sort(key=lambda row: float(row[5] or 0) - float(row[4] or 0))
    shown = rows[: at.size.shown]
    told_as = [f"{r[0]} → {r[1]}" for r in shown]
    panels = [
        Panel("best head of a relation", "", "share",
              {"head": (told_as, [float(r[4] or 0) for r in shown]),
               "fixed offset": (told_as, [float(r[5] or 0) for r in shown])},
              bars=True),
        Panel("heads of a kind", "", f"of {all_heads}", {"heads": (
            ["positional", "grammatical", "semantic"],
            [len(positional), len(grammatical), len(semantic)])}, bars=True),
    ]  # fmt: skip
    columns = ("relation", "to", "n", "head", "share", "offset")
    related = sum(one.related for one in pairs)
    return Result(columns, shown, verdicts, panels, notes=[
        f"all-MiniLM-L6-v2 on {at.size.sentences} sentences of UD English EWT (dev); heads chosen "
        "on every other sentence, shares of the rest; offset: the best fixed distance there. "
        f"Related words: content words of a sentence, not neighbours, whose input embeddings have "
        f"a cosine above {NEAR} ({related} pairs; unrelated below {FAR}: {len(pairs) - related}), "
        "different in form; no list of synonyms is used"
        + (f"; the largest ratio is {best}." if best else ".")
    ], more={
        "positional": {f"{a}.{b}": name for (a, b), name in positional.items()},
        "grammatical": sorted(f"{a}.{b}" for a, b in grammatical),
        "semantic": {f"{a}.{b}": list(one) for (a, b), one in semantic.items()},
    })  # fmt: skip


def _share(count: int, of: int) -> str:
    return f"{count} of {of} heads ({count / of:.0%})"


def _sentences(file: object) -> Iterator[tuple[Sentence, list[str]]]:
    """Sentences short enough, each with the parts of speech of its words."""
    path = str(file)
    kinds: list[list[str]] = [[]]
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            columns = line.split("\t")
            if len(columns) == 10 and columns[0].isdecimal():
                kinds[-1].append(columns[3])
            elif not line.strip() and kinds[-1]:
                kinds.append([])
    for sentence, parts in zip(read_conllu(path), kinds, strict=False):
        if 5 <= len(sentence.spans) <= 40 and len(parts) == len(sentence.spans):
            yield sentence, parts


def _relations(
    halves: tuple[RelationTally, RelationTally], least: int
) -> list[tuple[str, str, int, tuple[int, int], float, float]]:
    """Relation, direction, pairs, the head that is best on one half; its share and the best fixed
    offset's on the other."""
    one, other = halves
    found = []
    for key in sorted(one.pairs):
        count = other.pairs.get(key, 0)
        if min(count, one.pairs[key]) < least:
            continue
        hits = torch.stack(one.hits[key])
        layer, head = divmod(int(hits.argmax()), hits.shape[1])
        share = int(other.hits[key][layer][head]) / count
        offset = int(one.offsets[key].argmax())
        found.append((*key, count, (layer, head), share, int(other.offsets[key][offset]) / count))
    return found


def _pairs(
    reader: TextModel, table: Tensor, sentence: Sentence, kinds: list[str], recording: Recording
) -> list[Pair]:
    """Pairs of content words that are no neighbours, related or unrelated by their embeddings."""
    offsets = recording.about["offsets"]
    words = [
        (place, at)
        for place, (kind, span) in enumerate(zip(kinds, sentence.spans, strict=True))
        if kind in CONTENT and (at := tokens(offsets, span))
    ]
    if len(words) < 3:
        return []
    ids = reader.encode(sentence.text).ids
    vectors = torch.stack([table[[ids[i] for i in at]].mean(0) for _, at in words])
    near = torch.nn.functional.normalize(vectors, dim=-1)
    cosines = near @ near.mT
    layers = torch.stack([layer_weights(recording, n) for n in range(len(recording.layers))])
    found = []
    for i, (one, rows) in enumerate(words):
        for j, (other, cols) in enumerate(words):
            same = sentence.text[slice(*sentence.spans[one])].lower() == sentence.text[
                slice(*sentence.spans[other])].lower()  # fmt: skip
            cosine = float(cosines[i, j])
            if abs(one - other) < 3 or same or FAR <= cosine <= NEAR:
                continue
            given = layers[:, :, rows][..., cols].sum(-1).mean(-1)
            found.append(Pair(cosine > NEAR, given))
    return found


def layer_weights(recording: Recording, layer: int) -> Tensor:
    """All of a short text: (heads, tokens, tokens)."""
    return recording.weights(layer)


def _semantic(pairs: list[Pair], at: Setting) -> dict[tuple[int, int], Interval]:
    """Heads whose mean weight to related words is so many times that to unrelated ones."""
    related = [one.weights for one in pairs if one.related]
    others = [one.weights for one in pairs if not one.related]
    if len(related) < 5 or not others:
        return {}
    base = torch.stack(others).double().mean(0)
    ratio = torch.stack(related).double().mean(0) / base
    found = {}
    for layer, head in (ratio >= TWICE).nonzero().tolist():
        values = [float(one[layer, head] / base[layer, head]) for one in related]
        interval = bootstrap(values, lambda some: sum(some) / len(some), at.random(), 300)
        if interval.low > 1.1:
            found[layer, head] = interval
    return found


STUDY = Study(
    "heads",
    "Heads specialise: some follow positions, some grammar, some meaning.",
    "Each head's mass by place, the dependency it follows against the best fixed offset, and its "
    "weights between words that mean related things against those between other words.",
    run,
    tiny=dict(sentences=8, least=2, shown=6),
    quick=dict(sentences=150, least=20, shown=14),
    full=dict(sentences=800, least=40, shown=24),
)
