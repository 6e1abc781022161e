"""Which dependency relation a head follows: sentences of CoNLL-U, and what is read in them.

As Clark et al. 2019, section 4: from word to word, the weight summed over the pieces of the word
read and averaged over those of the word that reads; a head follows a relation from one word to the
other where that other is the word it reads most, itself and special tokens apart. Beside it stands
the share that a fixed offset reaches ("always two words back"), the best one for that relation.
The best of many is partly luck: a head's relation, and the offset, are chosen on one half of the
sentences, and both shares are those of the other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capture.recorded_layer import RecordedLayer
from ..capture.recording import Recording
from ..errors import RegardError
from .head_scores import strips

FARTHEST = 10  # words, of a fixed offset
LEAST = 20  # pairs of a relation that make a share
_APART = ("root", "punct")


@dataclass(frozen=True)
class Sentence:
    """A text, the characters of each of its words, and its dependencies: (dependent, head,
    relation), by the words' numbers from 0. Relations without their subtypes."""

    text: str
    spans: list[tuple[int, int]]
    edges: list[tuple[int, int, str]]


class Relation(NamedTuple):
    """What a head follows best: how often (of `pairs`), against the best fixed offset.

    to: "head", from each dependent to its head, or "dependent", the other way. chosen: its share
    in the sentences by which relation and offset were chosen; share, baseline and pairs are of the
    others.
    """

    name: str
    to: str
    share: float
    baseline: float
    offset: int
    pairs: int
    chosen: float


def read_conllu(path: str | Path) -> Iterator[Sentence]:
    """The sentences of a file, one after another. RegardError where it is none."""
    path = Path(path).expanduser()
    lines: list[list[str]] = []
    said: str | None = None
    found = False
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip("\r\n")
                if line.startswith("#"):
                    said = line.partition("= ")[2] if line.startswith("# text =") else said
                elif line.strip():
                    lines.append(_columns(line, path, number))
                elif lines:
                    found = True
                    yield _sentence(said, lines, path)
                    lines, said = [], None
            if lines:
                found = True
                yield _sentence(said, lines, path)
    except OSError as error:
        raise RegardError(f"cannot read the file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RegardError(f"{path} is not text: byte {error.start} is not UTF-8") from error
    if not found:
        raise RegardError(f"{path} has no sentence; give a CoNLL-U file")


def _columns(line: str, path: Path, number: int) -> list[str]:
    columns = line.split("\t")
    if len(columns) != 10:
        raise RegardError(f"{path}, line {number}: {len(columns)} columns; CoNLL-U has 10")
    return columns


def _sentence(said: str | None, lines: list[list[str]], path: Path) -> Sentence:
    """A sentence of its lines; a token of several words ("don't") covers them all."""
    text = said or " ".join(line[1] for line in lines if line[0].isdecimal())
    spans: list[tuple[int, int]] = []
    at, joined_until = 0, 0
    edges = []
    for ident, form, *_, head, relation, _, _ in (line for line in lines if "." not in line[0]):
        if "-" in ident:
            start, at = _found(text, form, at)
            joined_until, span = int(ident.partition("-")[2]), (start, at)
            continue
        if int(ident) > joined_until:
            start, at = _found(text, form, at)
            span = (start, at)
        spans.append(span)
        name = relation.partition(":")[0]
        if name not in _APART and head.isdecimal() and int(head) > 0:
            edges.append((int(ident) - 1, int(head) - 1, name))
    if any(max(pair[:2]) >= len(spans) for pair in edges):
        raise RegardError(f"{path}: a head is no word of its sentence: {text[:60]!r}")
    return Sentence(text, spans, edges)


def _found(text: str, form: str, at: int) -> tuple[int, int]:
    """Where a form stands in the text, from a place on; an empty stretch where it does not."""
    start = text.find(form, at)
    return (at, at) if start < 0 else (start, start + len(form))


@dataclass(eq=False)
class RelationTally:
    """Hits of every head by relation and direction, over sentences. Counts, so exact in any order.

    hits: (relation, to) → for each layer int64 (heads,); pairs; offsets: int64 (2·FARTHEST + 1,).
    """

    hits: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    pairs: dict[tuple[str, str], int] = field(default_factory=dict)
    offsets: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    sentences: int = 0

    def add(self, sentence: Sentence, recording: Recording) -> None:
        """Add a sentence and what heads read in it."""
        words = _word_of_token(recording.about, sentence)
        edges = _edges(sentence, words)
        if not edges:
            return
        self.sentences += 1
        readers = torch.tensor([edge[0] for edge in edges], dtype=torch.int64, device="cpu")
        targets = torch.tensor([edge[1] for edge in edges], dtype=torch.int64, device="cpu")
        tops = [
            _most_read(layer, words, len(sentence.spans)) if _readable(layer, words) else None
            for layer in recording.layers
        ]
        for place, (reader, target, name, to) in enumerate(edges):
            key = name, to
            self.pairs[key] = self.pairs.get(key, 0) + 1
            steps = self.offsets.setdefault(
                key, torch.zeros(2 * FARTHEST + 1, dtype=torch.int64, device="cpu")
            )
            if abs(target - reader) <= FARTHEST:
                steps[target - reader + FARTHEST] += 1
            sums = self.hits.setdefault(key, [
                torch.zeros(0 if top is None else len(top), dtype=torch.int64, device="cpu")
                for top in tops
            ])  # fmt: skip
            for mine, top in zip(sums, tops, strict=True):
                if top is not None:
                    mine += top[:, readers[place]] == targets[place]

    def to_json(self) -> dict[str, Any]:
        """As JSON says it, exactly."""
        found = [
            [*key, pairs, self.offsets[key].tolist(), [mine.tolist() for mine in self.hits[key]]]
            for key, pairs in self.pairs.items()
        ]
        return {"sentences": self.sentences, "found": found}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> RelationTally:
        """The same again."""
        made = cls(sentences=int(said["sentences"]))
        for name, to, pairs, steps, hits in said["found"]:
            made.pairs[name, to] = int(pairs)
            made.offsets[name, to] = torch.tensor(steps, dtype=torch.int64, device="cpu")
            made.hits[name, to] = [torch.tensor(h, dtype=torch.int64, device="cpu") for h in hits]
        return made

    def share(self, key: tuple[str, str], layer: int, head: int) -> float:
        """How often a head follows a relation."""
        return int(self.hits[key][layer][head]) / self.pairs[key]

    def offset(self, key: tuple[str, str]) -> int:
        """The fixed offset that is right most often."""
        return int(self.offsets[key].argmax()) - FARTHEST

    def baseline(self, key: tuple[str, str], offset: int) -> float:
        """How often a fixed offset is right."""
        return int(self.offsets[key][offset + FARTHEST]) / self.pairs[key]


class HalvedTally:
    """Sentences in turns: relation and offset are chosen on one half, measured on the other."""

    def __init__(self, halves: Sequence[RelationTally] = ()) -> None:
        self.halves = list(halves) or [RelationTally(), RelationTally()]

    @property
    def sentences(self) -> int:
        """How many had dependencies."""
        return sum(half.sentences for half in self.halves)

    def add(self, sentence: Sentence, recording: Recording) -> None:
        """Add a sentence and what heads read in it."""
        self.halves[self.sentences % 2].add(sentence, recording)

    def best(self, layer: int, head: int, least: int = LEAST) -> Relation | None:
        """The relation in which a head is the most above the best fixed offset.

        least: pairs that either half must have.
        """
        chosen, measured = self.halves
        keys = [
            key for key, pairs in sorted(chosen.pairs.items())
            if min(pairs, measured.pairs.get(key, 0)) >= least
            and head < min(len(half.hits[key][layer]) for half in self.halves)
        ]  # fmt: skip
        if not keys:
            return None

        def above(key: tuple[str, str]) -> float:
            return chosen.share(key, layer, head) - chosen.baseline(key, chosen.offset(key))

        key = max(keys, key=above)
        offset = chosen.offset(key)
        return Relation(
            *key, measured.share(key, layer, head), measured.baseline(key, offset), offset,
            measured.pairs[key], chosen.share(key, layer, head),
        )  # fmt: skip

    def to_json(self) -> list[dict[str, Any]]:
        """As JSON says it, exactly."""
        return [half.to_json() for half in self.halves]

    @classmethod
    def from_json(cls, said: list[dict[str, Any]]) -> HalvedTally:
        """The same again."""
        one, other = said
        return cls([RelationTally.from_json(one), RelationTally.from_json(other)])


def _word_of_token(about: dict[str, Any], sentence: Sentence) -> list[int]:
    """The word of each token, the one it shares most characters with; −1: none, or special."""
    found = []
    for (start, end), special in zip(about["offsets"], about["special"], strict=True):
        shared = [min(end, b) - max(start, a) for a, b in sentence.spans]
        most = max(shared, default=0)
        found.append(-1 if special or most <= 0 else shared.index(most))
    return found


def _edges(sentence: Sentence, words: list[int]) -> list[tuple[int, int, str, str]]:
    """Both directions of each dependency whose words both have a token: (from, to, name, to …)."""
    there = set(words)
    both = []
    for dependent, head, name in sentence.edges:
        if dependent in there and head in there:
            both += [(dependent, head, name, "head"), (head, dependent, name, "dependent")]
    return both


def _readable(layer: RecordedLayer, words: list[int]) -> bool:
    return layer.pattern and layer.kind == "self" and layer.k_len == layer.q_len == len(words)


def _most_read(layer: RecordedLayer, words: list[int], count: int) -> Tensor:
    """The word that each word reads most, itself apart: int64 (heads, words); −1: it reads none.

    A word's tokens follow each other, so only the last word of a strip waits for the next strip.
    (Its number of tokens, by which the mean over them divides, decides nothing here.)
    """
    of = torch.tensor(words, dtype=torch.int64, device="cpu")
    there = of >= 0
    top = torch.full((layer.heads, count), -1, dtype=torch.int64, device="cpu")
    waiting, carried = -1, torch.zeros(layer.heads, count, dtype=torch.float32, device="cpu")
    for strip in strips(layer):
        mine, reads = of[strip.rows], there[strip.rows]
        if not reads.any():
            continue
        low, high = int(mine[reads].min()), int(mine[reads].max())
        read = carried.new_zeros(layer.heads, int(reads.sum()), count)
        read.index_add_(2, of[there], strip.weights[:, reads][:, :, there])
        table = carried.new_zeros(layer.heads, high - low + 1, count)
        table.index_add_(1, mine[reads] - low, read)
        if low == waiting:
            table[:, 0] += carried
        waiting, carried = high, table[:, -1].clone()
        table.diagonal(low, dim1=1, dim2=2).fill_(-1)
        most = table.max(2)
        top[:, low : high + 1] = torch.where(most.values > 0, most.indices, -1)
    return top
