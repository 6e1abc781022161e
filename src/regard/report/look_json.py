"""`regard look --json`: what was found, as one object."""

from __future__ import annotations

import json
from typing import Any

from ..analysis.look import Look
from .answers_json import asked_dict
from .links import link_dict


def as_dict(found: Look) -> dict[str, Any]:
    """The object that ``regard look --json`` prints; its help says what each field means."""
    names = [word.text for word in found.words]
    behaviours = {
        (layer, head): behaviour.place
        for behaviour in found.summary.behaviours
        for layer, head, _ in behaviour.heads
    }
    return {
        "model": found.model,
        "words": names,
        "links": [link_dict(link, names) for link in found.links],
        "pairs": [
            {
                "from": names[pair.source],
                "to": names[pair.target],
                "from_index": pair.source,
                "to_index": pair.target,
                "kind": kind,
                "heads": [
                    {"layer": link.layer, "head": link.head, "weight": link.weight}
                    for link in pair.heads
                ],
            }
            for kind, pairs in found.summary.kinds.items()
            for pair in pairs
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
                        "queries": int(part.queries[i, place]),
                    }
                    for place in part.sinks[i].nonzero().flatten().tolist()
                ],
                "apart": float(part.received[i, part.special | part.sinks[i]].sum()),
                "behaviour": behaviours.get((layer, head)),
            }
            for part in found.parts
            for i, (layer, head) in enumerate(part.heads)
        ],
        "shown_mass": found.shown_mass,
    } | asked_dict(found)


def as_json(found: Look, ascii_only: bool = False) -> str:
    """``as_dict`` as one line. Whatever a terminal would obey is escaped, other letters are not."""
    line = json.dumps(as_dict(found), ensure_ascii=ascii_only)
    return "".join(char if char.isprintable() else _escaped(char) for char in line)


def _escaped(char: str) -> str:
    return "\\u007f" if char == "\x7f" else json.dumps(char)[1:-1]
