"""`regard heads --json`: every head's scores, as one object."""

from __future__ import annotations

import json
from typing import Any

from ..analysis.heads import Head, HeadScores


def heads_dict(found: HeadScores) -> dict[str, Any]:
    """The object that ``regard heads --json`` prints; its help says what each field means."""
    return {
        "model": found.model,
        "text": found.text,
        "tokens": found.tokens,
        "sentences": found.sentences,
        "definitions": found.definitions,
        "heads": [head_dict(one) for one in found.heads],
    }


def head_dict(one: Head) -> dict[str, Any]:
    """One head."""
    return {
        "layer": one.layer,
        "head": one.head,
        "name": one.name,
        "kind": one.kind,
        "behaviour": one.behaviour,
        "scores": one.scores,
        "relation": None if one.relation is None else one.relation._asdict(),
    }


def heads_json(found: HeadScores, ascii_only: bool = False) -> str:
    """The same as text."""
    return json.dumps(heads_dict(found), ensure_ascii=ascii_only, indent=1, allow_nan=False)
