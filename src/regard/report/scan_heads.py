"""`regard scan --json-heads`: a file for each head, one that lists them; the form is our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..analysis.head_scores import SCORES
from ..analysis.scan import Scan, ScannedHead
from ..errors import RegardError
from .heads_json import head_dict
from .inline_page import write_page

FORMAT = "regard-heads-1"
INDEX = "heads.json"


def write_heads(found: Scan, folder: Path) -> None:
    """Write them into a folder. RegardError where it cannot be, or is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegardError(f"cannot use the folder {folder}: {error.strerror}") from error
    said = {"format": FORMAT, "model": found.model, "corpus": found.corpus, "texts": found.texts}
    for one in found.heads:
        _write(folder / file_of(one), said | head_file(one))
    heads = [
        {"layer": one.head.layer, "head": one.head.head, "file": file_of(one),
         "behaviour": one.head.behaviour, "scores": one.head.scores}
        for one in found.heads
    ]  # fmt: skip
    _write(folder / INDEX, said | {"definitions": SCORES, "heads": heads})  # last: all are there


def file_of(one: ScannedHead) -> str:
    """The name of a head's file."""
    return f"L{one.head.layer}H{one.head.head}.json"


def head_file(one: ScannedHead) -> dict[str, Any]:
    """What a head's file says of it; docs/heads.md names the fields."""
    return head_dict(one.head) | {
        "intervals": one.intervals,
        "texts_with": one.texts,
        "examples": [example._asdict() for example in one.examples],
    }


def _write(path: Path, said: dict[str, Any]) -> None:
    write_page(path, json.dumps(said, ensure_ascii=False, indent=1, allow_nan=False))
