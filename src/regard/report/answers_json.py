"""The fields that --generate, --versus, --cut and --effect add to `regard look --json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..analysis.compare import Versus
from ..analysis.look import Look
from .continuation import continuation_dict
from .links import link_dict

if TYPE_CHECKING:
    from ..analysis.cut import Changed
    from ..analysis.effect import Effects


def asked_dict(found: Look) -> dict[str, Any]:
    """What was asked for beyond the plain look; the help of `look` says what each field means."""
    said: dict[str, Any] = {}
    if found.generated:
        said["generated"] = continuation_dict(found)
    if found.versus:
        said["versus"] = [versus_dict(v, found.top, found.special) for v in found.versus]
    if found.cut is not None:
        said["cut"] = _cut(found.cut, found.top, found.special)
    if found.effects:
        names = [word.text for word in found.words]
        said["effect"] = [_effect(e, names) for e in found.effects]
    return said


def versus_dict(versus: Versus, top: int, special: bool = True) -> dict[str, Any]:
    """One comparison."""
    one, two = versus.one, versus.two
    flips = versus.flips
    return {
        "from": versus.name,
        "kind": one.kind,
        "models": [one.model, two.model],
        "words": [[word.text for word in side.words] for side in (one, two)],
        "aligned": [list(pair) for pair in versus.pairs],
        "moved": versus.moved,
        "means": [[before, after] for _, before, after in versus.means],
        "links": [
            {
                "layer": move.layer,
                "head": move.head,
                "to": _text(versus, move.pair.one, move.pair.two),
                "to_index": move.pair.one,
                "to_index2": move.pair.two,
                "weight": move.one,
                "weight2": move.two,
            }
            for move in versus.moves(top, special, per_head=True)
        ],
        "flips": [
            {
                "layer": flip.layer,
                "head": flip.head,
                "to": one.words[flip.one].text,
                "to2": two.words[flip.two].text,
                "to_index": flip.one,
                "to_index2": flip.two,
                "weight": flip.weights[0],
                "weight2": flip.weights[3],
            }
            for flip in flips
        ],
    }


def _text(versus: Versus, one: int | None, two: int | None) -> str:
    if one is not None:
        return versus.one.words[one].text
    assert two is not None
    return versus.two.words[two].text


def _cut(changed: Changed, top: int, special: bool) -> dict[str, Any]:
    names = [word.text for word in changed.words]
    return {
        "cuts": [
            {
                "layer": cut.edge.layer,
                "head": cut.edge.head,
                "from_index": cut.source,
                "to_index": cut.target,
                "weights": {str(head): weight for head, weight in cut.weights},
            }
            for cut in changed.cuts
        ],
        "words": [
            {"word": names[m.word], "index": m.word, "change": m.change, "cosine": m.cosine}
            for m in changed.moved
        ],
        "reads": [
            {"from_index": word} | versus_dict(versus, top, special)
            for word, versus in changed.readings
        ],
        "next": None
        if changed.next is None
        else {
            "kl": changed.next.kl,
            "tokens": [
                {"token": token, "before": before, "after": after}
                for token, before, after in changed.next.tokens
            ],
        },
    }


def _effect(effects: Effects, names: list[str]) -> dict[str, Any]:
    word = effects.word
    return {
        "target": "next token" if word is None else "final vector",
        "word": effects.token if word is None else names[word],
        "index": word,
        "size": effects.size,
        "directions": effects.directions,
        "width": effects.width,
        "edges": effects.edges,
        "links": [link_dict(link, names) for link in effects.links],
    }
