"""`regard look --json`: what was found, as one object."""

from __future__ import annotations

import json
import re
from typing import Any

from .looking import Look


def as_dict(found: Look) -> dict[str, Any]:
    """The object that ``regard look --json`` prints; its help says what each field means."""
    names = [word.text for word in found.words]
    return {
        "model": found.model,
        "words": names,
        "links": [
            {
                "layer": link.layer,
                "head": link.head,
                "from": names[link.source],
                "to": names[link.target],
                "from_index": link.source,
                "to_index": link.target,
                "weight": link.weight,
            }
            for link in found.links
        ],
        "heads": [
            {
                "layer": layer,
                "head": head,
                "kind": part.kind,
                "name": part.names[layer],
                "sinks": [
                    {
                        "word": part.keys.words[place].text,
                        "index": place + part.keys.first,
                        "weight": float(part.means[i, place]),
                    }
                    for place in part.sinks[i].nonzero().flatten().tolist()
                ],
                "apart": float(part.received[i, part.special | part.sinks[i]].sum()),
            }
            for part in found.parts
            for i, (layer, head) in enumerate(part.heads)
        ],
        "shown_mass": found.shown_mass,
    }


def as_json(found: Look) -> str:
    """``as_dict`` as one line; control characters are escaped, other letters are themselves."""
    line = json.dumps(as_dict(found), ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\u200e\u200f\u202a-\u202e\u2066-\u2069]", _escaped, line
    )


def _escaped(char: re.Match[str]) -> str:
    return f"\\u{ord(char[0]):04x}"
