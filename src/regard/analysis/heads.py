"""Every head's scores: of a recording, or of a model that reads a text. `regard.heads`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..call.brief import shortened
from ..call.display.frame import needed
from ..call.display.html import Shown
from ..call.display.picture import Picture, Side
from ..capture.recording import INDEX, Recording
from ..capture.watching import watch
from ..errors import RegardError
from .head_scores import SCORES, Tally, as_numbers, behaviour, texts_of
from .head_sums import tally
from .look_model import read_as, reading
from .relations import HalvedTally, Relation, read_conllu
from .text_model import TextModel, quiet, without_cache

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

Told = Callable[[str, float | None], object]

TEXT = (
    "The lighthouse keeper counted the ships every evening. When the fog came in from the north, "
    "the lighthouse keeper lit the lamp, and the ships turned away from the rocks. Nobody in the "
    "village thanked him for it; they thanked the lamp. One winter the lamp went out, because the "
    "oil was gone, and the keeper rowed to the village to ask for more. The village gave him oil, "
    "bread and a dog. The dog counted the ships with him, and when the fog came in from the north, "
    "the dog barked until the lamp was lit."
)
"""What a model reads where no text is given."""
RANDOM, REPEATS, SEQUENCES = 25, 4, 4  # random tokens, how often they follow, and how many such


@dataclass(frozen=True)
class Head:
    """One head: its layer's place in the model and name, its number, and its scores by name.

    A score is None where no token reads what it asks about. relation: which dependency it follows
    best, where a CoNLL-U file was given and has enough pairs of one.
    """

    layer: int
    head: int
    name: str
    kind: str
    scores: dict[str, float | None]
    relation: Relation | None = None

    @property
    def behaviour(self) -> str | None:
        """The score that takes half of its mass or more; None where none does."""
        return behaviour(self.scores)


@dataclass(eq=False)
class HeadScores(Shown):
    """What every head of a model does; see `definitions`.

    tokens: of the text read. sentences: of the CoNLL-U file, that had dependencies.
    """

    model: str
    text: str | None
    tokens: int
    heads: list[Head]
    sentences: int = 0
    definitions: dict[str, str] = field(default_factory=lambda: dict(SCORES), repr=False)

    def __repr__(self) -> str:
        layers = len({head.layer for head in self.heads})
        said = f"{layers} layers, {len(self.heads)} heads, {self.tokens} tokens"
        return f"HeadScores({shortened(self.model, 40)}, {said})"

    def __getitem__(self, at: tuple[int, int]) -> Head:
        """The head of (layer, head)."""
        found = [one for one in self.heads if (one.layer, one.head) == tuple(at)]
        if not found:
            raise RegardError(f"no head {at}; there are {len(self.heads)}, by (layer, head)")
        return found[0]

    def ranked(self, score: str) -> list[Head]:
        """The heads that have this score, the largest first."""
        if score not in SCORES:
            raise RegardError(f"no score {score!r}; there are {', '.join(SCORES)}")
        found = [one for one in self.heads if one.scores[score] is not None]
        return sorted(found, key=lambda one: (-(one.scores[score] or 0.0), one.layer, one.head))

    def to_pandas(self) -> DataFrame:
        """One row a head, by layer and head; NaN where there is no score."""
        pandas = needed()
        rows = []
        for one in self.heads:
            row: dict[str, Any] = {"layer": one.layer, "head": one.head, "kind": one.kind}
            row |= {name: float("nan") if x is None else x for name, x in one.scores.items()}
            row["behaviour"] = one.behaviour
            if self.sentences:
                row |= _relation_columns(one.relation)
            rows.append(row)
        return pandas.DataFrame(rows).set_index(["layer", "head"])

    def plot(self, score: str = "previous", ax: Axes | None = None) -> Axes:
        """Layers × heads by one score, with matplotlib; the Axes."""
        from ..call.display.plots import draw

        return draw(self.picture(score), ax)

    def picture(self, score: str) -> Picture:
        """Layers × heads by one score; NaN where there is none."""
        if score not in SCORES:
            raise RegardError(f"no score {score!r}; there are {', '.join(SCORES)}")
        layers = sorted({one.layer for one in self.heads})
        most = max((one.head for one in self.heads), default=-1) + 1
        values = torch.full((len(layers), most), torch.nan, dtype=torch.float64, device="cpu")
        for one in self.heads:
            if (number := one.scores[score]) is not None:
                values[layers.index(one.layer), one.head] = number
        rows = Side("layer", labels=tuple(map(str, layers)))
        return Picture(values, rows, Side("head"), score.replace("_", " "))

    def _shown(self) -> Picture | None:
        return self.picture("previous") if self.heads else None


def _relation_columns(relation: Relation | None) -> dict[str, Any]:
    names = ("relation", "relation_to", "relation_share", "relation_baseline")
    values = (None, None, float("nan"), float("nan")) if relation is None else relation[:4]
    return dict(zip(names, values, strict=True))


def heads(
    source: Any = None,
    text: str | None = None,
    *,
    conllu: str | Path | None = None,
    sentences: int = 200,
    batch: int = 0,
    progress: Told | None = None,
) -> HeadScores:
    """What every head of a model does with positions, repeated tokens and, if asked, dependencies.

        scores = regard.heads("all-MiniLM-L6-v2")
        scores.ranked("previous")[0], scores.to_pandas()

    source: a recording or its folder; or a model: a folder, a name, (model, tokenizer), by default
        the one that `look` takes. text: what the model reads, by default one of the package's.
    conllu: a CoNLL-U file, of which so many sentences are read for the dependency relation that
        each head follows best (Clark et al. 2019). batch: the item of a recording.

    O(N) memory: weights are taken from q, k and lse a few rows at a time. `induction_random` runs
    the model on random tokens (Olsson et al. 2022), so a recording has none. RegardError for what
    cannot be read, and for a text or a file given with a recording.
    """
    told = progress or (lambda what, share: None)
    recording = _recording(source)
    if recording is not None:
        if text is not None or conllu is not None:
            raise RegardError(
                "a recording holds one text already; give the model to read another, or --conllu"
            )
        return scored(recording, batch=batch, progress=told)
    told("loading the model", None)
    reader = read_as(source)
    with reading(reader):
        told("reading the text", None)
        recording = reader.record(TEXT if text is None else text)
        found = relations(reader, conllu, sentences, told) if conllu is not None else None
        return scored(recording, random_scores(reader), found, progress=told)


def _recording(source: Any) -> Recording | None:
    """The recording that was given, opened where it is a folder; None for a model."""
    if isinstance(source, Recording):
        return source
    if isinstance(source, str | os.PathLike) and (Path(source).expanduser() / INDEX).exists():
        return Recording.load(Path(source).expanduser())
    return None


def scored(
    recording: Recording,
    random: Sequence[Tally | None] = (),
    found: HalvedTally | None = None,
    *,
    batch: int = 0,
    progress: Told | None = None,
) -> HeadScores:
    """The scores of a recording's heads, with what was found on random tokens and dependencies."""
    about = recording.about
    made: list[Head] = []
    for place, layer in enumerate(recording.layers):
        if progress:
            progress("reading the weights", place / len(recording.layers))
        if not layer.pattern:
            continue
        if not 0 <= batch < layer.batch:
            raise RegardError(f"batch {batch}: the recording has {layer.batch}")
        means = tally(layer, *texts_of(about, recording.layers, layer), batch).means()
        again = random[place] if place < len(random) else None
        means.pop("induction_random", None)
        if again is not None and layer.kind == "self":
            means["induction_random"] = again.means()["induction"]
        for head in range(layer.heads):
            best = None if found is None else found.best(place, head)
            made.append(Head(place, head, layer.name, layer.kind, as_numbers(means, head), best))
    if not made:
        raise RegardError("no layer of it has a pattern of attention, so there are no heads")
    tokens = about.get("tokens")
    longest = max(layer.q_len for layer in recording.layers if layer.pattern)
    return HeadScores(
        str(about.get("model", "no model named")), about.get("text"),
        longest if tokens is None else len(tokens), made, found.sentences if found else 0,
    )  # fmt: skip


def random_scores(reader: TextModel) -> list[Tally | None]:
    """The scores of each layer on random tokens that repeat; [] where a model has too few."""
    batch = _random_tokens(reader)
    if batch is None:
        return []
    ids, special = batch
    encoder = reader.family == "encoder-decoder"
    model = reader.model.get_encoder() if encoder else reader.model.base_model
    with quiet(), torch.no_grad(), watch(model, observe=[], keep_qk=True) as seen:
        model(input_ids=ids, **without_cache(model))
    recording = seen.recording()
    found: list[Tally | None] = []
    for layer in recording.layers:
        parts = [
            tally(layer, about, about, item)
            for item, row in enumerate(ids.tolist() if layer.pattern else ())
            for about in [{"tokens": [str(one) for one in row], "special": special}]
        ]
        for part in parts[1:]:
            parts[0].merge(part)
        found.append(parts[0] if parts else None)
    return found


def _random_tokens(reader: TextModel) -> tuple[Tensor, list[bool]] | None:
    """Ids (SEQUENCES, tokens), special tokens around them as the tokenizer sets them."""
    marks = reader.encode("a")
    first = marks.special.index(False)
    last = len(marks.special) - marks.special[::-1].index(False)
    before, after = marks.ids[:first], marks.ids[last:]
    apart = set(reader.tokenizer.all_special_ids)
    size = min(len(reader.tokenizer), reader.model.get_input_embeddings().num_embeddings)
    ids = [id_ for id_ in range(size) if id_ not in apart]
    known = torch.tensor(ids, dtype=torch.int64, device="cpu")
    room = len(known) if reader.limit is None else (reader.limit - len(before + after)) // REPEATS
    count = min(RANDOM, len(known), room)
    if count < 2:
        return None
    drawn = torch.Generator(device="cpu").manual_seed(0)
    rows = []
    for _ in range(SEQUENCES):
        order = torch.randperm(len(known), generator=drawn, dtype=torch.int64, device="cpu")
        chosen = known[order[:count]].tolist()
        rows.append([*before, *chosen * REPEATS, *after])
    special = [True] * len(before) + [False] * (count * REPEATS) + [True] * len(after)
    return torch.tensor(rows, dtype=torch.int64, device="cpu"), special


def relations(reader: TextModel, conllu: str | Path, sentences: int, told: Told) -> HalvedTally:
    """What heads read along the dependencies of a file's first sentences."""
    found = HalvedTally()
    for number, sentence in enumerate(islice(read_conllu(conllu), sentences)):
        told("reading dependencies", number / sentences)
        encoded = reader.encode(sentence.text)
        if reader.limit is None or len(encoded.ids) <= reader.limit:
            found.add(sentence, reader.record(sentence.text))
    return found
