"""A recording that the page asks: its tokens, one word's weights, tiles of a head's map."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

from ...capture.recorded_layer import RecordedLayer
from ...capture.recording import INDEX, Recording
from ...errors import RegardError
from . import along, overview, segments
from .page_facts import (
    BINS,
    LISTED,
    SIDE,
    LayerFacts,
    names_words,
    recording_facts,
    side_of,
    special_of,
)
from .pieces import Piece, displayed
from .units import Units

By = Literal["weight", "value", "effect"]
"""What is shown: weights; weight · ‖W_O v‖, how long a vector each key adds; or |effect|."""
_APART = 64  # special tokens that can be taken out of a map


def readable(layer: RecordedLayer) -> bool:
    """Whether a layer has weights to show."""
    return layer.pattern and not layer.damage and layer.q_len > 0


def keys_before(layer: RecordedLayer) -> int:
    """How many keys stand before the first query: a query's token is so many further on."""
    return layer.k_len - layer.q_len if layer.kind == "self" else 0


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """The size and the file system's number of each file."""
    try:
        with os.scandir(folder) as found:
            stats = {entry.name: entry.stat() for entry in found if entry.is_file()}
    except OSError:
        return {}
    return {name: (stat.st_size, stat.st_ino) for name, stat in stats.items()}


@dataclass(eq=False)
class Opened:
    """One recording. Methods may be called from several threads."""

    recording: Recording
    folder: Path | None  # None: it is in memory alone
    files: dict[str, tuple[int, int]]  # as they were when it was opened
    _kept: dict[Any, Any] = field(default_factory=dict)
    _locks: dict[Any, Lock] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def load(cls, folder: Path) -> Opened:
        """RegardError where it is no recording, or has nothing to show."""
        recording = Recording.load(folder)
        if not any(map(readable, recording.layers)):
            damaged = recording.damaged[:1] or ["it has no layer with softmax attention"]
            raise RegardError(f"nothing to view in {folder}: {damaged[0]}")
        return cls(recording, folder, _files(folder))

    @classmethod
    def of(cls, recording: Recording) -> Opened:
        """A recording that is at hand. RegardError where it has nothing to show."""
        if not any(map(readable, recording.layers)):
            raise RegardError("the recording has no layer with weights to show")
        folder = recording.folder
        return cls(recording, folder, {} if folder is None else _files(folder))

    def check(self) -> None:
        """RegardError where the recording is no longer there, or no longer what was opened.

        A file that is cut off later than this is an error of whatever reads it.
        """
        if self.folder is None:
            return
        found = _files(self.folder)
        if INDEX not in found:
            raise RegardError(
                f"the recording {self.folder.name} is no longer where it was opened; "
                "put it back and reload, or start regard view with another"
            )
        for name, (size, number) in self.files.items():
            now = found.get(name)
            if now is None or now[0] < size:
                raise RegardError(
                    f"{self.folder.name}/{name} is {'gone' if now is None else 'cut off'} since it "
                    "was opened; put it back and reload, or start regard view again"
                )
            if now[1] != number:
                raise RegardError(
                    f"{self.folder.name} was recorded anew since it was opened: "
                    "start regard view again"
                )

    def shows(self, number: int) -> bool:
        """Whether a layer has weights to show."""
        return readable(self.recording.layers[number])

    def about(self) -> dict[str, Any]:
        """What the page needs to begin."""
        whole, damaged = self.recording.whole, self.recording.damaged
        said = self.recording.about
        name = "recording" if self.folder is None else self.folder.name
        return recording_facts(name, said, self._facts, self.sides, whole, damaged)

    @cached_property
    def sides(self) -> dict[str, int]:
        """How many tokens each side has."""
        return {name: len(self.pieces(name)) for name in ("text", "decoder")}

    @cached_property
    def _facts(self) -> list[LayerFacts]:
        return [
            LayerFacts(
                layer.index, layer.name, layer.kind, layer.heads, layer.q_len, layer.k_len,
                layer.batch, readable(layer), layer.damage or layer.reason, bool(layer.norms),
                layer.effects is not None, layer.results.value_sums is not None,
            )
            for layer in self.recording.layers
        ]  # fmt: skip

    @property
    def worded(self) -> bool:
        """Whether the recording names words that fit its layers."""
        return names_words(self.recording.about, self._facts, self.sides)

    @property
    def units(self) -> Units | None:
        """The words of the text, and the tokens of none; None where no words are named."""
        if not self.worded:
            return None
        words, count = self.recording.about["words"], len(self.pieces("text"))
        return self._once("units", lambda: Units(words, count))

    def words(self) -> list[Piece | int]:
        """Each word at its first token, 0 at its others."""
        if self.units is None:
            raise RegardError("the recording names no words")
        units = self.units
        return self._once("words", lambda: units.pieces(self.pieces("text")))

    def side(self, layer: RecordedLayer, of: str) -> str:
        """Whose tokens a layer's queries ("q") or keys ("k") are: the text's, or the decoder's."""
        return side_of(layer.kind, layer.q_len if of == "q" else layer.k_len, self.sides, of)

    def pieces(self, side: str) -> list[Piece]:
        """Each token as the text shows it, with what stands before it."""

        def found() -> list[Piece]:
            about = self.recording.about
            mine = about if side == "text" else about.get("decoder")
            return displayed(mine if isinstance(mine, dict) else {})

        return self._once(("pieces", side), found)

    def layer(self, number: int, head: int, batch: int) -> RecordedLayer:
        """A layer, where that head and batch item are in it."""
        layer = self.recording.layer(number)
        if not 0 <= head < layer.heads:
            raise RegardError(f"no head {head}: layer {number} has heads 0 to {layer.heads - 1}")
        if not 0 <= batch < layer.batch:
            raise RegardError(f"no batch item {batch}: the recording has {layer.batch}")
        return layer

    def overview(self, number: int, batch: int) -> dict[str, Any] | None:
        """What each head of a layer does, by metric."""
        if not 0 <= number < len(self.recording.layers):
            raise RegardError(f"no layer {number}: there are {len(self.recording.layers)}")
        if not readable(self.recording.layers[number]):
            return None
        return self._once(
            ("overview", number, batch),
            lambda: overview.layer_metrics(self.recording, number, batch),
        )

    def along(self, number: int, head: int, batch: int, what: str) -> dict[str, Any]:
        """A head's line along the text: see `along.line`."""
        self.layer(number, head, batch)
        return self._once(
            ("along", number, head, batch, what),
            lambda: along.line(self.recording, number, head, batch, what),
        )

    def row(
        self, number: int, head: int, queries: list[int], batch: int, by: By = "weight"
    ) -> Tensor:
        """What some queries read, on average: (k_len,)."""
        layer = self.layer(number, head, batch)
        for query in queries:
            if not 0 <= query < layer.q_len:
                raise RegardError(f"no query {query}: the layer has {layer.q_len:,}")
        if by == "effect":
            edges = self.recording.effect(number, head, queries, batch)
            return edges.dense(layer.k_len).mean(0)
        read = self.recording.weights if by == "weight" else self.recording.norm_weights
        return read(number, head, queries, batch=batch).mean(0)

    def column(self, number: int, head: int, key: int, batch: int, by: By = "weight") -> Tensor:
        """By how much each query reads one key: (q_len,)."""
        layer = self.layer(number, head, batch)
        if not 0 <= key < layer.k_len:
            raise RegardError(f"no key {key}: the layer has {layer.k_len:,}")
        col, place = divmod(key, SIDE)
        tiles = [(head, 0, row, col) for row in range(-(-layer.q_len // SIDE))]
        parts = [
            self.recording.tiles(number, tiles[at : at + SIDE], "sum", batch, by)[
                :, :, place
            ].flatten()
            for at in range(0, len(tiles), SIDE)
        ]
        return torch.cat(parts)[: layer.q_len]

    def fan(
        self, number: int, head: int, index: int, *, batch: int, inward: bool, by: By = "weight"
    ) -> dict[str, Any]:
        """One word's strongest weights, out or in, and where they lie along the whole text."""
        if inward:
            values = self.column(number, head, index, batch, by)
        else:
            values = self.row(number, head, [index], batch, by)
        return self._fan(values, values, None, index, number, head, inward)

    def word_fan(
        self, number: int, head: int, index: int, *, batch: int, inward: bool, by: By = "weight"
    ) -> dict[str, Any]:
        """The same by words, `index` any token of one: each stands at its first token.

        Sums over the tokens read, means over the tokens that read: `recording.to_words()`.
        """
        units, layer = self.units, self.layer(number, head, batch)
        if units is None:
            raise RegardError("the recording names no words")
        before = keys_before(layer)
        limit, moved = (layer.k_len, 0) if inward else (layer.q_len, before)
        if not 0 <= index < limit:
            raise RegardError(f"no token {index}: the layer has {limit:,}")
        mine = [t - moved for t in units.tokens(index + moved) if 0 <= t - moved < limit]
        if inward:
            values = sum(self.column(number, head, key, batch, by) for key in mine)
            assert isinstance(values, Tensor)
            summed = units.mean(values, before)
        else:
            values = self.row(number, head, mine, batch, by)
            summed = units.summed(values)
        starts = [max(0, start - before) if inward else start for start in units.starts]
        return self._fan(values, summed, starts, mine[0], number, head, inward)

    def _fan(
        self, values: Tensor, summed: Tensor, starts: list[int] | None, index: int, number: int,
        head: int, inward: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """values: of each token, for the strip; summed: of each word, listed at `starts`."""
        if not bool(values.isfinite().all()):
            raise RegardError(
                f"a weight of token {index:,} is not a number in head {number}.{head}: the model's "
                "queries or keys held NaN or infinity there"
            )
        best = summed.topk(min(LISTED, len(summed)))
        shown = best.values > 0
        places = best.indices[shown].tolist()
        size = -(-max(1, len(values)) // BINS)
        padded = torch.nn.functional.pad(values, (0, -len(values) % size))
        return {
            "index": index,
            "inward": inward,
            "items": list(
                zip(
                    places if starts is None else [starts[unit] for unit in places],
                    best.values[shown].tolist(),
                    strict=True,
                )
            ),
            "total": float(summed.double().sum()),
            "visible": int((summed > 0).sum()),
            "count": len(summed),
            "bins": padded.view(-1, size).sum(1).tolist(),
            "bin": size,
        }

    def segments(
        self, given: str, number: int, token: int | None, batch: int, by_words: bool
    ) -> dict[str, Any] | None:
        """How much of its mass each head of a layer gives to each segment of the text."""
        layer = self.layer(number, 0, batch)
        if self.side(layer, "k") != "text":
            return None
        rows = None if token is None else [token]
        if token is not None and by_words and self.units is not None:
            before = keys_before(layer)
            if 0 <= token + before < layer.k_len:
                rows = [t - before for t in self.units.tokens(token + before)]
        return segments.shares(self.recording, given, number, rows, batch)

    def weight(self, number: int, head: int, query: int, key: int, batch: int) -> float:
        """One weight."""
        layer = self.layer(number, head, batch)
        if not (0 <= query < layer.q_len and 0 <= key < layer.k_len):
            raise RegardError(f"no weight at query {query}, key {key}")
        found = float(self.recording.weights(number, head, [query], [key], batch)[0, 0])
        if not math.isfinite(found):
            raise RegardError(f"the weight at query {query}, key {key} is not a number")
        return found

    def tile(
        self, number: int, tile: tuple[int, int, int, int], reduce: str, batch: int, sinks: bool,
        by: By = "weight",
    ) -> bytes:  # fmt: skip
        """One tile (head, zoom, row, col) of a map: 128 × 128 float32, little-endian.

        Without `sinks`, the first and the special tokens' columns are taken out of it: from sums
        exactly; a cell of several tokens whose largest weight may be theirs is +inf.
        """
        found = self.recording.tile(number, *tile, reduce, batch, by).float()  # type: ignore[arg-type]
        if not sinks:
            found = self._without_sinks(found, number, tile, reduce, batch, by)
        return found.contiguous().numpy().astype("<f4", copy=False).tobytes()

    def _without_sinks(
        self, found: Tensor, number: int, tile: tuple[int, int, int, int], reduce: str, batch: int,
        by: By,
    ) -> Tensor:  # fmt: skip
        head, zoom, row, col = tile
        size, found = 1 << zoom, found.clone()
        first, last = col * SIDE * size, (col + 1) * SIDE * size
        for key in {0, *special_of(self.recording.about)[:_APART]}:
            if not first <= key < min(last, self.recording.layers[number].k_len):
                continue
            at = (key - first) // size
            if zoom == 0:
                found[:, at] = 0
            elif reduce == "max":
                found[:, at] = torch.inf
            else:
                column = self._once(
                    ("column", number, head, key, batch, by),
                    lambda key=key: self.column(number, head, key, batch, by),  # type: ignore[misc]
                )
                part = column[row * SIDE * size : (row + 1) * SIDE * size]
                part = torch.nn.functional.pad(part, (0, SIDE * size - len(part)))
                found[:, at] = (found[:, at] - part.view(SIDE, size).sum(1)).clamp(min=0)
        return found

    def matching(self, text: str, side: str = "text", most: int = 10_000) -> list[int]:
        """The tokens that hold `text`, or, of a text of several tokens, those where it begins."""
        wanted = text.strip().casefold()
        if not wanted:
            return []
        pieces = self.pieces(side)
        names = [(p if isinstance(p, str) else p[1]).strip().casefold() for p in pieces]
        exact = [i for i, name in enumerate(names) if name == wanted]
        found = exact or [i for i, name in enumerate(names) if wanted in name]
        return (found or list(self._across(names, wanted)))[:most]

    @staticmethod
    def _across(names: list[str], wanted: str) -> Iterator[int]:
        """Where a word begins that was cut into several tokens."""
        whole = "".join(names)
        starts, at = [], 0
        for name in names:
            starts.append(at)
            at += len(name)
        joined, found = "".join(wanted.split()), -1
        begins = {start: i for i, start in enumerate(starts)}
        while (found := whole.find(joined, found + 1)) >= 0:
            if found in begins:
                yield begins[found]

    def reads(self, source: str, target: str, batch: int) -> dict[str, Any]:
        """How much `source` reads `target` in each head.

        The mean over the last 8 places of the source, summed over all places of the target.
        """
        values: list[list[float] | None] = []
        used: tuple[list[int], list[int]] = ([], [])
        places = cache(self.matching)  # not once a layer: a long text has many tokens
        for number, layer in enumerate(self.recording.layers):
            if not readable(layer):
                values.append(None)
                continue
            before = keys_before(layer)
            rows = [i - before for i in places(source, self.side(layer, "q"))]
            rows = [i for i in rows if 0 <= i < layer.q_len]
            cols = [i for i in places(target, self.side(layer, "k")) if i < layer.k_len]
            if not rows or not cols:
                values.append(None)
                continue
            used = (rows[-8:], cols)
            found = self.recording.weights(number, None, rows[-8:], cols, batch)
            values.append(found.sum(-1).mean(-1).tolist())
        if not any(values):
            missing = target if places(source, "text") else source
            raise RegardError(f"no token of the text holds {missing.strip()!r}; try another word")
        return {"values": values, "sources": used[0], "targets": used[1][:200]}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once; others who want the same wait for it."""
        with self._lock:
            lock = self._locks.setdefault(key, Lock())
        with lock:
            if key not in self._kept:
                self._kept[key] = make()
            return self._kept[key]
