"""The JSON of a recording's folder: what it says of the input, and which file holds which layer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import RegardError
from .recorded_layer import RecordedLayer
from .saved_files import Fields

INDEX = "recording.json"
FORMAT = 2


def read_index(folder: Path) -> Fields:
    """The JSON of a folder. RegardError for another format; ValueError, OSError where it is none.

    Format 1 was written by versions before the first release.
    """
    index = Fields(json.loads((folder / INDEX).read_text("utf-8")), INDEX)
    if index["format"] != FORMAT:
        raise RegardError(
            f"{folder}: format {index['format']}; this version reads {FORMAT}: record it again"
        )
    return index


def write_index(
    folder: Path, about: dict[str, Any], entries: list[dict[str, Any]], whole: bool
) -> None:
    """Write the index, which is there once it is whole. entries: as `entry_of` makes them."""
    text = as_json({"format": FORMAT, "whole": whole, "about": about, "layers": entries})
    part = folder / f"{INDEX}.part"
    part.write_text(text, "utf-8")
    os.replace(part, folder / INDEX)


def entry_of(layer: Any, file: Path | None, effects: Path | None = None) -> dict[str, Any]:
    """What the index says of a layer, watched or recorded. file: None where nothing was kept.

    effects: the file of its effects, where they were measured.
    """
    said: dict[str, Any] = {"name": layer.name, "index": layer.index, "kind": layer.kind}
    said |= {"pattern": layer.pattern, "reason": layer.reason}
    said |= {"file": None if file is None else file.name}
    return said if effects is None else said | {"effects": effects.name}


def layer_file(folder: Path, number: int) -> Path:
    """The file of a layer's first calls."""
    return folder / f"layer-{number:03}.safetensors"


def silent(entry: Fields) -> RecordedLayer:
    """A layer without a pattern, as the index says it."""
    return RecordedLayer(
        entry.of(str, "name"), entry.of(int, "index"), entry.of(str, "kind"), False,
        entry.of(str, "reason"),
    )  # fmt: skip


def as_json(said: dict[str, Any]) -> str:
    """RegardError for what JSON cannot say."""
    try:
        return json.dumps(said, ensure_ascii=False, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RegardError(f"about: {error}; give what JSON can say") from None
