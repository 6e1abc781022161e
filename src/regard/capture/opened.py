"""A recording, opened: its layers mapped from their files, the damaged ones named."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import RegardError
from .index_file import silent
from .recorded_layer import RecordedLayer
from .saved_files import Fields
from .shard_files import open_parts, parts_of
from .shard_layer import NAME as SHARD
from .stored import StoredTensors
from .stored_effect import add_effects, effect_file
from .stored_layer import NAME, named, open_layer


def open_layers(folder: Path, index: Fields) -> tuple[list[RecordedLayer], list[str]]:
    """The layers of a recording, and what is wrong with files that are not whole.

    index: its JSON; of a run that was stopped it names no layers, and those are taken that are
    there, in the order in which they were begun.
    """
    files, parts = layer_files(folder), parts_of(folder)
    entries: list[Any] = index.of(list, "layers")
    if not index.of(bool, "whole"):
        every = files | parts
        entries = [{"file": every[number][0].name} for number in sorted(every)]
    layers, damage = [], []
    for number, said in enumerate(entries):
        entry = Fields(said, f"layer {number}")
        file = entry.of((str, type(None)), "file")
        if file is None:
            layers.append(silent(entry))
            continue
        if (part := SHARD.fullmatch(file)) is not None:
            layer, wrong = _of_ranks(parts.get(int(part[1]), [folder / file]), entry)
        else:
            layer, wrong = _opened(folder, file, files.get(_number(folder, file), []), entry)
        layers.append(layer)
        damage += wrong
        effects = effect_file(folder / file)
        if layer.pattern and ("effects" in entry or effects.exists()):
            damage += [found] if (found := add_effects(layer, effects)) else []
    if damage and not any(layer.pattern for layer in layers):
        raise RegardError(damage[0])
    return layers, damage


def _of_ranks(paths: list[Path], entry: Fields) -> tuple[RecordedLayer, list[str]]:
    """A layer that several ranks wrote, and what is wrong with a part of it."""
    try:
        return open_parts(paths), []
    except RegardError as error:
        return _silent(paths[0].name, entry, str(error)), [str(error)]


def layer_files(folder: Path) -> dict[int, list[Path]]:
    """The files of each layer by its number in their names, first the one of its first calls."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir(), key=lambda p: (p.name.split(".")[0], len(p.name), p.name)):
        if match := NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    return dict(sorted(found.items()))


def _number(folder: Path, file: str) -> int:
    match = NAME.fullmatch(file)
    if match is None:
        raise RegardError(f"{folder}: file {file!r} lies outside the recording")
    return int(match[1])


def _opened(
    folder: Path, file: str, files: list[Path], entry: Fields
) -> tuple[RecordedLayer, list[str]]:
    """A layer from as many of its files as are whole, and what is wrong with the next."""
    wrong: list[str] = []
    try:
        with named(folder / file):
            for path in files or [folder / file]:
                if path.is_symlink():
                    raise ValueError(f"{path.name} is a link; it may lead outside the recording")
    except RegardError as error:
        files, wrong = [], [str(error)]
    for count in range(len(files), 0, -1):
        try:
            return open_layer(files[:count]), wrong
        except RegardError as error:
            wrong = [str(error)]
    if not wrong:
        wrong = [f"{folder / file} is not whole: it is not there"]
    return _silent(file, entry, wrong[0]), wrong


def _silent(file: str, entry: Fields, wrong: str) -> RecordedLayer:
    """A layer that cannot be read, and why."""
    name = entry.of(str, "name") if "name" in entry else file
    index = entry.of(int, "index") if "index" in entry else 0
    return RecordedLayer(name, index, "self", False, wrong, damage=wrong)


def verify(files: Iterable[Path]) -> None:
    """RegardError that names every file whose numbers are not as they were written."""
    wrong = []
    for path in files:
        try:
            with named(path):
                if damaged := StoredTensors(path).damaged():
                    raise ValueError(f"{', '.join(damaged)} not as written")
        except RegardError as error:
            wrong.append(str(error))
    if wrong:
        raise RegardError("; ".join(wrong))
