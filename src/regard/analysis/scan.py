"""Every head's scores over many texts, which a run that is killed takes up where it stopped.

A score is first a mean over the tokens of a text, then over texts; its interval is that of 95 % by
a bootstrap over texts (`bootstrap.py`). What is known after each text goes to a file that is
replaced at once, so that a run resumed gives, to the bit, what one that was never stopped gives.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capture.recorded_layer import RecordedLayer
from ..capture.recording import Recording
from ..errors import RegardError
from .bootstrap import Interval, Replicates, draws
from .corpus import fingerprint, sentences_of
from .head_scores import SCORES, Strip, Tally, TokenKinds, as_numbers, strips, texts_of
from .heads import Head, Told, random_scores
from .look_model import read_as, reading
from .relations import HalvedTally, Sentence
from .text_model import TextModel
from .words import word_tokens

STATE = "state.json"
EXAMPLES = 3  # of each head, from different texts
READS = 8  # of the token of an example, listed
_SAVED = 5.0  # seconds between two states


class Example(NamedTuple):
    """A word that reads another strongly, special tokens and the first key apart.

    weight: from the word's token to the other's. text: the number of the text in the corpus. token:
    the number of the token that reads; reads: what it reads most, all tokens counted, largest
    first: (number, token, weight).
    """

    weight: float
    text: int
    word: str
    read: str
    where: str
    token: int
    reads: list[tuple[int, str, float]]


@dataclass
class HeadState:
    """One head over texts: of each score how many texts, and the sum."""

    sums: dict[str, list[float]] = field(default_factory=lambda: {n: [0, 0.0] for n in SCORES})
    examples: list[Example] = field(default_factory=list)

    def add(self, scores: dict[str, float | None]) -> None:
        """Add a text's scores."""
        for name, value in scores.items():
            if value is not None:
                had = self.sums[name]
                self.sums[name] = [had[0] + 1, had[1] + value]

    def keep(self, example: Example) -> None:
        """Keep an example if it is among the best."""
        kept = [*self.examples, example]
        self.examples = sorted(kept, key=lambda one: (-one.weight, one.text))[:EXAMPLES]

    def wants(self, weight: float) -> bool:
        """Whether an example of this weight would be kept."""
        return len(self.examples) < EXAMPLES or weight > self.examples[-1].weight

    def mean(self, name: str) -> float | None:
        """The mean over texts."""
        count, total = self.sums[name]
        return total / count if count else None


@dataclass
class ScannedHead:
    """A head, its mean scores, the interval of each, and its examples.

    intervals: None where fewer than two texts had the score.
    """

    head: Head
    intervals: dict[str, Interval | None]
    texts: dict[str, int]
    examples: list[Example]


@dataclass
class Scan:
    """What every head of a model does in the texts of a corpus. skipped: too long for the model."""

    model: str
    corpus: str
    texts: int
    skipped: int
    sentences: int
    heads: list[ScannedHead]

    def ranked(self, score: str) -> list[ScannedHead]:
        """The heads that have this score, the largest mean first."""
        found = [one for one in self.heads if one.head.scores[score] is not None]
        return sorted(
            found, key=lambda one: (-(one.head.scores[score] or 0.0), one.head.layer, one.head.head)
        )


class ScanState:
    """What is known after some texts, as JSON says it exactly."""

    def __init__(self, said: dict[str, Any]) -> None:
        self.said = said  # model, corpus, digest
        self.done, self.skipped = 0, 0
        self.names: list[tuple[int, str, str]] = []  # place, name and kind of each layer
        self.heads: list[list[HeadState]] = []
        self.replicates: list[Replicates] = []
        self.relations = HalvedTally()

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        heads = [
            [{"sums": one.sums, "examples": one.examples} for one in layer] for layer in self.heads
        ]
        return self.said | {
            "done": self.done, "skipped": self.skipped, "layers": self.names, "heads": heads,
            "replicates": [layer.to_json() for layer in self.replicates],
            "relations": self.relations.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, held: dict[str, Any], said: dict[str, Any], path: Path) -> ScanState:
        """The state of a file; RegardError where it is another scan's, or damaged."""
        for name, value in said.items():
            if held.get(name) != value:
                raise RegardError(
                    f"{path} is of another scan: its {name} differs; give another --out"
                )
        state = cls(said)
        try:
            state.done, state.skipped = int(held["done"]), int(held["skipped"])
            state.names = [
                (int(place), str(name), str(kind)) for place, name, kind in held["layers"]
            ]
            state.heads = [
                [HeadState({n: list(one["sums"][n]) for n in SCORES},
                           [Example(*each) for each in one["examples"]]) for one in layer]
                for layer in held["heads"]
            ]  # fmt: skip
            state.replicates = [
                Replicates.from_json(one, list(SCORES), len(layer))
                for one, layer in zip(held["replicates"], state.heads, strict=True)
            ]
            state.relations = HalvedTally.from_json(held["relations"])
        except (KeyError, TypeError, ValueError) as error:
            raise RegardError(f"{path} is damaged; delete it to begin again") from error
        return state

    def add(self, number: int, sentence: Sentence, recording: Recording) -> None:
        """Add a text."""
        places = [(n, layer) for n, layer in enumerate(recording.layers) if layer.pattern]
        if not self.names:
            self.names = [(n, layer.name, layer.kind) for n, layer in places]
            self.heads = [[HeadState() for _ in range(layer.heads)] for _, layer in places]
            self.replicates = [Replicates(list(SCORES), layer.heads) for _, layer in places]
        words: list[list[int]] | None = None
        drawn = draws(number)
        for mine, replicates, (_, layer) in zip(self.heads, self.replicates, places, strict=True):
            means, best = _read(layer, recording)
            replicates.add(means, drawn)
            for head, state in enumerate(mine):
                state.add(as_numbers(means, head))
                weight = float(best.values[head])
                if weight > 0 and state.wants(weight):
                    words = word_tokens(recording.about) if words is None else words
                    pair = (int(best.rows[head]), int(best.keys[head]))
                    row = layer.weights(slice(pair[0], pair[0] + 1))[head, 0]
                    state.keep(_example(weight, number, recording.about, words, pair, row))
        if sentence.edges:
            self.relations.add(sentence, recording)


class _Best:
    """The strongest weight of each head between tokens, special ones and the first key apart."""

    def __init__(self, heads: int, kinds: TokenKinds) -> None:
        self._kinds = kinds
        self.values = torch.zeros(heads, dtype=torch.float32, device="cpu")
        self.rows, self.keys = (
            torch.zeros(heads, dtype=torch.int64, device="cpu") for _ in range(2)
        )

    def add(self, strip: Strip) -> None:
        apart = self._kinds.special[strip.keys] | (strip.keys == strip.keys[0])
        weights = strip.weights.masked_fill(apart, 0)
        weights = weights.masked_fill(self._kinds.special[strip.rows][:, None], 0).flatten(1)
        values, at = weights.max(1)
        better = values > self.values
        width = len(strip.keys)
        self.values = torch.where(better, values, self.values)
        self.rows = torch.where(better, strip.rows[at // width], self.rows)
        self.keys = torch.where(better, strip.keys[at % width], self.keys)


def _read(layer: RecordedLayer, recording: Recording) -> tuple[dict[str, Tensor], _Best]:
    """The scores of a layer in one text, and its strongest weights, in one pass."""
    about, _ = texts_of(recording.about, recording.layers, layer)
    kinds = TokenKinds.of(about)
    assert kinds is not None  # a TextModel names its tokens
    made, best = Tally(layer.heads, layer.kind == "cross", kinds), _Best(layer.heads, kinds)
    for strip in strips(layer):
        made.add(strip)
        best.add(strip)
    return made.means(), best


def _example(
    weight: float, number: int, about: dict[str, Any], words: list[list[int]],
    pair: tuple[int, int], row: Tensor,
) -> Example:  # fmt: skip
    """An example of what a token reads: row holds all its weights."""
    offsets, text = about["offsets"], about["text"]

    def word_of(token: int) -> str:
        first, last = next(word for word in words if word[0] <= token < word[1])
        return str(text[offsets[first][0] : offsets[last - 1][1]]).strip()

    reader, read = map(word_of, pair)
    middle = offsets[pair[0]][0]
    around = text[max(middle - 60, 0) : middle + 60]
    best = row.topk(min(READS, len(row)))
    reads = [
        (key, str(about["tokens"][key]), value)
        for key, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        if value > 0
    ]
    return Example(weight, number, reader, read, " ".join(around.split()), pair[0], reads)


def scan(
    model: Any,
    corpus: str | Path,
    out: str | Path | None = None,
    *,
    texts: int | None = None,
    progress: Told | None = None,
    saved_every: float = _SAVED,
) -> Scan:
    """The scores of every head over the texts of a corpus: see `Scan`.

    out: a folder for the state, from which a run that was stopped goes on. texts: at most so many.
    RegardError for a corpus that cannot be read, or has no text that the model can.
    """
    told = progress or (lambda what, share: None)
    path = Path(corpus).expanduser()
    said = {"digest": fingerprint(path)}
    told("loading the model", None)
    reader = read_as(model)
    said |= {"model": reader.name}
    file = None if out is None else Path(out).expanduser() / STATE
    state = _begun(file, said)
    last = time.monotonic()
    with reading(reader):
        for number, sentence in enumerate(islice(sentences_of(path), texts)):
            if number < state.done:
                continue
            told(f"text {number + 1:,}", None if texts is None else number / texts)
            if _fits(reader, sentence.text):
                state.add(number, sentence, reader.record(sentence.text))
            else:
                state.skipped += 1
            state.done = number + 1
            if file is not None and time.monotonic() - last >= saved_every:
                _save(file, state)
                last = time.monotonic()
        if file is not None:
            _save(file, state)
        if not state.heads:
            raise RegardError(f"{path} has no text that {reader.name} can read")
        return _found(state, path, random_scores(reader))


def _begun(file: Path | None, said: dict[str, Any]) -> ScanState:
    if file is None:
        return ScanState(said)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            return ScanState(said)
        held = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise RegardError(f"cannot use the folder {file.parent}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RegardError(f"{file} is damaged; delete it to begin again") from error
    if not isinstance(held, dict):
        raise RegardError(f"{file} is damaged; delete it to begin again")
    return ScanState.from_json(held, said, file)


def _save(file: Path, state: ScanState) -> None:
    """Replace the state at once."""
    part = file.with_name(f".{file.name}.part")
    with part.open("w", encoding="utf-8") as whole:
        json.dump(state.to_json(), whole, ensure_ascii=True)
        whole.flush()
        os.fsync(whole.fileno())
    os.replace(part, file)


def _fits(reader: TextModel, text: str) -> bool:
    """Whether the model has positions for all of it."""
    return reader.limit is None or len(reader.encode(text).ids) <= reader.limit


def _found(state: ScanState, path: Path, random: list[Tally | None]) -> Scan:
    heads = []
    for (place, name, kind), layer, replicates in zip(
        state.names, state.heads, state.replicates, strict=True
    ):
        again = random[place] if place < len(random) else None
        for number, one in enumerate(layer):
            scores = {score: one.mean(score) for score in SCORES}
            if again is not None and kind == "self":
                scores["induction_random"] = float(again.means()["induction"][number])
            best = state.relations.best(place, number)
            made = Head(place, number, name, kind, scores, best)
            texts = {score: int(one.sums[score][0]) for score in SCORES}
            intervals = {
                score: replicates.interval(score, number) if texts[score] > 1 else None
                for score in SCORES
            }
            heads.append(ScannedHead(made, intervals, texts, one.examples))
    return Scan(
        str(state.said["model"]), path.name, state.done - state.skipped, state.skipped,
        state.relations.sentences, heads,
    )  # fmt: skip
