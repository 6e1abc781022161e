"""`regard scan --out` and `--json`: every head over a corpus, as one object."""

from __future__ import annotations

import json
from typing import Any

from ..analysis.head_scores import PLACES, SCORES
from ..analysis.scan import Scan
from .heads_json import head_dict
from .screen import head_label


def scan_dict(found: Scan) -> dict[str, Any]:
    """The object; the command's help says what each field means."""
    return {
        "model": found.model,
        "corpus": found.corpus,
        "texts": found.texts,
        "skipped": found.skipped,
        "sentences": found.sentences,
        "definitions": SCORES,
        "ranked": {
            name: [head_label(one.head.layer, one.head.head) for one in found.ranked(name)]
            for name in PLACES
        },
        "heads": [
            head_dict(one.head)
            | {
                "intervals": one.intervals,
                "texts": one.texts,
                "examples": [example._asdict() for example in one.examples],
            }
            for one in found.heads
        ],
    }


def scan_json(found: Scan, ascii_only: bool = False) -> str:
    """The same as text."""
    return json.dumps(scan_dict(found), ensure_ascii=ascii_only, indent=1, allow_nan=False)
