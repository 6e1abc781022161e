"""The page's first answers from a recording's files alone, while torch is still being imported.

Importing torch takes longer than all else that a first view needs. What the page asks first, what
there is to see, its words and the map as a whole, is in the JSON, in the files' headers and in the
maps that were pooled while recording: it is read with numpy. Whatever is not as `regard.record`
leaves it is no case for this module (`first_answers` is None): the recording itself then answers,
or says what is wrong.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .page_facts import SIDE, LayerFacts, recording_facts
from .pieces import Piece, displayed

INDEX, STREAMED = "recording.json", 2
_HEADER = 1 << 26  # bytes of a header that are read
_MAPS = {"sum": "sums.weights", "max": "maxima.weights"}
_VALUE_MAPS = {"sum": "value_sums.weights", "max": "value_maxima.weights"}


class _Unusual(Exception):
    """A recording that only `Recording.load` can judge."""


@dataclass(frozen=True, eq=False)
class _Map:
    """The pooled maps of one layer: float32 (batch, heads, cells, cells) in a file, from 0 on."""

    path: Path
    places: dict[tuple[str, str], int]  # the first byte of each, by what and how it was pooled
    shape: tuple[int, ...]
    cell: int

    def tile(self, zoom: int, where: Sequence[int], reduce: str, by: str) -> bytes | None:
        """A tile's float32; where: batch item, head, row, col. None for cells finer than these,
        and for what was not pooled."""
        batch, head, row, col = where
        factor, begin = (1 << zoom) // self.cell, self.places.get((by, reduce))
        if not factor or begin is None:
            return None
        rows, cols = self.shape[2:]
        size = 4 * rows * cols
        with self.path.open("rb") as file:  # read, not mapped: a file that shrinks ends no process
            data = os.pread(file.fileno(), size, begin + (batch * self.shape[1] + head) * size)
        if len(data) != size:
            return None
        part = np.frombuffer(data, "<f4").reshape(rows, cols)
        side = SIDE * factor
        part = part[row * side : (row + 1) * side, col * side : (col + 1) * side]
        room = np.zeros((side, side), "<f4")
        room[: part.shape[0], : part.shape[1]] = part
        cells = room.reshape(SIDE, factor, SIDE, factor)
        pooled = cells.sum((1, 3)) if reduce == "sum" else cells.max((1, 3))
        return pooled.astype("<f4").tobytes()


@dataclass(eq=False)
class FirstAnswers:
    """Of one recording: what the page asks first."""

    folder: Path
    about: dict[str, Any]
    sides: dict[str, list[Piece]]
    maps: dict[int, _Map]

    def there(self) -> bool:
        """Whether the recording is where it was."""
        return (self.folder / INDEX).is_file()

    def tile(
        self, layer: int, tile: Sequence[int], reduce: str, batch: int, by: str = "weight"
    ) -> bytes | None:
        """A tile (head, zoom, row, col) of a layer's map, where it was pooled while recording."""
        head, zoom, row, col = tile
        found = self.maps.get(layer)
        if found is None or head >= found.shape[1] or batch >= found.shape[0] or zoom > 40:
            return None
        return found.tile(zoom, (batch, head, row, col), reduce, by)


def first_answers(folders: Sequence[Path]) -> list[FirstAnswers] | None:
    """Of each recording; None where any is not as `regard.record` leaves it."""
    try:
        return [_read(folder) for folder in folders]
    except (_Unusual, OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def _read(folder: Path) -> FirstAnswers:
    index = json.loads((folder / INDEX).read_text("utf-8"))
    if index["format"] != STREAMED or index["whole"] is not True:
        raise _Unusual
    said, layers, maps = index["about"], [], {}
    names = {entry["file"] for entry in index["layers"]} - {None}
    if {path.name for path in folder.glob("layer-*")} != names:
        raise _Unusual  # left by a run that was stopped, or missing
    for number, entry in enumerate(index["layers"]):
        if entry["file"] is None:
            reason = entry["reason"]
            layers.append(
                LayerFacts(entry["index"], entry["name"], entry["kind"], 0, 0, 0, 0, False, reason,
                           False)
            )  # fmt: skip
            continue
        facts, found = _layer(folder / entry["file"])
        if effects := entry.get("effects"):
            _check_effects(folder / effects)
            facts = replace(facts, effects=True)
        layers.append(facts)
        if found is not None:
            maps[number] = found
    decoder = said.get("decoder")
    sides = {"text": displayed(said)}
    sides["decoder"] = displayed(decoder) if isinstance(decoder, dict) else []
    counts = {name: len(pieces) for name, pieces in sides.items()}
    about = recording_facts(folder.name, said, layers, counts, True, [])
    json.dumps(about, allow_nan=False)  # ValueError for what the page cannot be told
    return FirstAnswers(folder, about, sides, maps)


def _check_effects(path: Path) -> None:
    """Whether a file of effects may be whole: of the size that its header says."""
    header, begin = _header(path)
    if begin + _last(header) != path.stat().st_size:
        raise _Unusual


def _last(header: dict[str, Any]) -> int:
    """Where the last tensor ends."""
    return max(int(entry["data_offsets"][1]) for name, entry in header.items() if name[0] != "_")


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header, and where its tensors begin."""
    if path.is_symlink() or path.parent / path.name != path or os.sep in path.name:
        raise _Unusual
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER, path.stat().st_size - 8):
            raise _Unusual
        return json.loads(file.read(length)), 8 + length


def _layer(path: Path) -> tuple[LayerFacts, _Map | None]:
    """A layer's facts, and its pooled maps where they begin with the first query and key."""
    header, begin = _header(path)
    said = json.loads(header["__metadata__"]["regard"])
    if begin + _last(header) != path.stat().st_size or said["first_row"] != 0 or not said["chunks"]:
        raise _Unusual
    queries = [header[f"{n}.query"]["shape"] for n in range(len(said["chunks"]))]
    key, (batch, heads, *_) = header["key"]["shape"], queries[0]
    if any(len(shape) != 4 or min(shape) < 1 for shape in (key, *queries)):
        raise _Unusual
    q_len, k_len = sum(shape[2] for shape in queries), key[2]
    facts = LayerFacts(
        said["index"], said["name"], said["kind"], heads, q_len, k_len, batch, True, "",
        "norm" in header, value_maps=_VALUE_MAPS["sum"] in header,
    )  # fmt: skip
    return facts, _map(path, header, said, begin)


def _map(path: Path, header: dict[str, Any], said: dict[str, Any], begin: int) -> _Map | None:
    seen, first = said["results"], said["chunks"][0]
    if not seen or (first["query_start"], said["starts"]["key"]) != (0, 0):
        return None
    (row, rows, size), (col, cols, other) = seen["rows"], seen["cols"]
    if (row, col) != (0, 0) or size != other or size < 1 or size & (size - 1):
        return None
    shape = tuple(header[_MAPS["sum"]]["shape"])
    places = {}
    names = {("weight", reduce): name for reduce, name in _MAPS.items()}
    names |= {("value", r): name for r, name in _VALUE_MAPS.items() if name in header}
    for what, name in names.items():
        entry = header[name]
        start, stop = entry["data_offsets"]
        fits = entry["dtype"] == "F32" and tuple(entry["shape"]) == shape == (
            *shape[:2],
            rows,
            cols,
        )
        if not fits or stop - start != 4 * math.prod(shape):
            raise _Unusual
        places[what] = begin + start
    return _Map(path, places, shape, size)
