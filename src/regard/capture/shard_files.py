"""The parts of a layer that several ranks wrote, opened as one layer: rows and keys in order.

Files are mapped; opening reads their headers alone. What was read of rows is put together when it
is first asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..call.edge_results import TopKSeen
from ..call.results import Cells, DistancesSeen, EntropySeen, MapSeen, ReceivedSeen
from ..errors import RegardError
from .chunk_json import from_json
from .pyramid import MOST, Results
from .recorded_layer import Chunk, RecordedLayer
from .saved_files import Fields
from .shard_layer import NAME, shard_file
from .stored import StoredTensors
from .stored_layer import check_joined, named

_ROWS = ("top.indices", "top.weights", "top.rest", "top.sink", "entropy.values")
_SUMS = ("distances.past", "distances.future")
_MAPS = ("sums.weights", "maxima.weights")


def parts_of(folder: Path) -> dict[int, list[Path]]:
    """The files of each layer that ranks wrote, by its number: those that there should be."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := NAME.fullmatch(path.name):
            number, _, ranks = (int(n) for n in match.groups())
            found.setdefault(number, [shard_file(folder, number, r, ranks) for r in range(ranks)])
    return dict(sorted(found.items()))


def missing(path: Path) -> str:
    """What to say of a part that is not there."""
    match = NAME.fullmatch(path.name)
    assert match is not None
    return (
        f"{path} is not there: rank {match[2]} of {match[3]} wrote it; put its files beside those "
        "of the others"
    )


def open_parts(paths: Sequence[Path]) -> RecordedLayer:
    """A layer from the parts of all ranks. RegardError that names the one missing, or damaged."""
    for path in paths:
        if path.is_symlink():
            raise RegardError(f"{path} is a link; it may lead outside the recording")
        if not path.exists():
            raise RegardError(missing(path))
    parts: list[_Part] = []
    for path in paths:
        with named(path):
            parts.append(_Part.opened(path, len(paths), parts))
    with named(paths[0]):
        return _joined(parts)


@dataclass(frozen=True, eq=False)
class _Part:
    """One rank's file: its calls, the positions (start, stop) of its keys."""

    file: StoredTensors
    chunks: list[Chunk]
    keys: list[tuple[int, int]]
    results: list[Fields]

    @classmethod
    def opened(cls, path: Path, ranks: int, before: Sequence[_Part]) -> _Part:
        """From a file; ValueError where it does not fit, or belongs to others than those before."""
        file = StoredTensors(path)
        said = file.said
        match = NAME.fullmatch(path.name)
        if match is None or (said.count("rank"), said.count("ranks")) != (int(match[2]), ranks):
            raise ValueError("it is the part of another rank than its name says")
        for name in ("run", "name", "index", "kind"):
            if before and said[name] != before[0].file.said[name]:
                other = before[0].file.path.name
                raise ValueError(f"its {name} is {said[name]!r}; {other} has another: two runs")
        chunks = [
            from_json(Fields(each, f"chunk {n}"), n, _WithKey(file))
            for n, each in enumerate(said.of(list, "chunks"))
        ]
        keys = [(int(a), int(b)) for a, b in said.of(list, "keys")]
        results = [Fields(each, f"results {n}") for n, each in enumerate(said.of(list, "results"))]
        made = cls(file, chunks, keys, results)
        made._check(said)
        return made

    def _check(self, said: Fields) -> None:
        """ValueError unless the tensors have the sizes that the file says."""
        if any(not 0 <= a < b for a, b in self.keys):
            raise ValueError(f"it has keys at {self.keys}")
        own = sum(b - a for a, b in self.keys)
        for name in ("key", "value", "norm", "received.sum", "received.count"):
            if name in self.file and (self.file[name].dim() < 3 or self.file[name].shape[2] != own):
                raise ValueError(f"{name} is {tuple(self.file[name].shape)}; it has {own} keys")
        if len(self.results) != len(self.chunks) or (self.keys and "key" not in self.file):
            raise ValueError("it lacks keys, or what was read of rows")
        for n, (chunk, told) in enumerate(zip(self.chunks, self.results, strict=True)):
            if told:
                self._check_seen(n, chunk.query.shape[:3], told)

    def _check_seen(self, number: int, rows: Sequence[int], said: Fields) -> None:
        sizes = [Cells(*said.integers(name, 3)) for name in ("rows", "cols")]
        if any(c.size < 1 or c.count < 1 for c in sizes):
            raise ValueError("cells of no size")
        bins = len(said.integers("edges"))
        shapes = dict.fromkeys(_ROWS, tuple(rows)) | dict.fromkeys(_SUMS, (*rows[:2], bins))
        shapes |= dict.fromkeys(_MAPS, (*rows[:2], sizes[0].count, sizes[1].count))
        for name, shape in shapes.items():
            held = self.file[f"{number}.{name}"]
            listed = name in ("top.indices", "top.weights")
            if (held.shape[:-1] if listed else held.shape) != shape:
                raise ValueError(f"{number}.{name} is {tuple(held.shape)}; it must be {shape}")

    def pieces(self, name: str) -> list[tuple[int, Tensor]]:
        """Keys, values or norms, each range with the position of its first."""
        if name not in self.file:
            return []
        sizes = [stop - start for start, stop in self.keys]
        return [
            (start, piece)
            for (start, _), piece in zip(self.keys, self.file[name].split(sizes, 2), strict=True)
        ]


class _WithKey(dict[str, Tensor]):
    """A file's tensors; where this rank has no keys, a key of no numbers."""

    def __init__(self, file: StoredTensors) -> None:
        super().__init__((name, file[name]) for name in file)
        self.setdefault("key", torch.zeros(0, 0, 0, 0, dtype=torch.float32, device="cpu"))


def _joined(parts: Sequence[_Part]) -> RecordedLayer:
    """One layer: rows and keys in the order of their positions."""
    said = parts[0].file.said
    layer = RecordedLayer(said.of(str, "name"), said.of(int, "index"), said.of(str, "kind"))
    rows = [(chunk, part, n) for part in parts for n, chunk in enumerate(part.chunks)]
    rows.sort(key=lambda row: row[0].packed[-2])
    layer.chunks = [chunk for chunk, _, _ in rows]
    if not rows:
        raise ValueError("it has no rows")
    end = layer.query_start
    for chunk, part, _ in rows:
        if chunk.packed[-2] != end:
            raise ValueError(
                f"the rows from {end} on are missing: {part.file.path.name} has others"
            )
        end += chunk.query.shape[2]
    for name, held in (("key", layer.pieces), ("value", layer.values), ("norm", layer.norms)):
        found = [piece for part in parts for piece in part.pieces(name)]
        held.extend(sorted(found, key=lambda piece: piece[0]))
    check_joined(layer)
    if all(told for part in parts for told in part.results):
        layer.results = _Joined(parts, [(part, n) for _, part, n in rows])
    return layer


class _Joined(Results):
    """What was read, of all ranks: each result is put together when it is first asked for."""

    def __init__(self, parts: Sequence[_Part], rows: Sequence[tuple[_Part, int]]) -> None:
        self.__dict__.update(parts=parts, rows=rows)

    parts: Sequence[_Part]
    rows: Sequence[tuple[_Part, int]]

    def __bool__(self) -> bool:
        return True

    def _tensors(self, name: str) -> list[Tensor]:
        """Of each range of queries, in order."""
        return [part.file[f"{n}.{name}"] for part, n in self.rows]

    def _said(self, name: str) -> list[list[int]]:
        return [part.results[n].integers(name) for part, n in self.rows]

    @cached_property
    def top(self) -> TopKSeen:
        fields = ("indices", "weights", "rest", "sink")
        return TopKSeen(*(torch.cat(self._tensors(f"top.{name}"), 2) for name in fields))

    @cached_property
    def entropy(self) -> EntropySeen:
        return EntropySeen(torch.cat(self._tensors("entropy.values"), 2))

    @cached_property
    def distances(self) -> DistancesSeen:
        past, future = (torch.stack(self._tensors(name)).sum(0) for name in _SUMS)
        return DistancesSeen(past, future, tuple(self._said("edges")[0]))

    @cached_property
    def received(self) -> ReceivedSeen:
        total, count = (self._of_keys(f"received.{name}") for name in ("sum", "count"))
        start = min(a for part in self.parts for a, _ in part.keys)
        return ReceivedSeen(total, count, self.parts[0].file.said.count("q_len"), start)

    def _of_keys(self, name: str) -> Tensor:
        found = [piece for part in self.parts for piece in part.pieces(name)]
        return torch.cat([t for _, t in sorted(found, key=lambda piece: piece[0])], 2)

    @cached_property
    def sums(self) -> MapSeen:
        return self._map("sums", "sum")

    @cached_property
    def maxima(self) -> MapSeen:
        return self._map("maxima", "max")

    def _map(self, name: str, reduce: str) -> MapSeen:
        """The map of all rows: a cell at a border is of two ranges."""
        tensors = self._tensors(f"{name}.weights")
        cells = [[Cells(*each) for each in self._said(side)] for side in ("rows", "cols")]
        rows, cols = (
            Cells(first := min(c.first for c in side),
                  max(c.first + c.count for c in side) - first, side[0].size)
            for side in cells
        )  # fmt: skip
        whole = tensors[0].new_zeros(*tensors[0].shape[:2], rows.count, cols.count)
        for part, r, c in zip(tensors, *cells, strict=True):
            view = whole[:, :, r.first - rows.first :, c.first - cols.first :]
            view = view[:, :, : r.count, : c.count]
            view.copy_(torch.maximum(view, part) if reduce == "max" else view + part)
        return MapSeen(whole, rows, cols, reduce, (MOST, MOST))
