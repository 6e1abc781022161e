"""What the page must know to begin: of the recordings, and of what it may ask. Plain values alone.

It imports no torch: the page's first answers come before torch is there (`first_answers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SIDE = 128
"""Cells along each side of a tile."""
PAGE = 8192
"""Tokens that one request brings."""
BINS = 512
"""Bars of the strip that says where along the whole text a word reads."""
LISTED = 256
"""Of one word's weights, this many are listed, largest first."""
SAMPLED = 64
"""Queries that the metrics are means over, spread evenly, where the text has more."""
METRICS = {
    "sink": ("the first token", "mean weight on the first token: a sink where it is large"),
    "before": ("the token before", "mean weight a token gives to the one before it"),
    "itself": ("the token itself", "mean weight a token gives to itself"),
    "largest": ("the strongest link", "mean of the largest weight of each token"),
    "entropy": ("entropy", "mean entropy over tokens, in nats: 0 is one token read, high is many"),
    "distance": ("distance", "how many tokens away a head reads on average"),
}
SCALED = ("entropy", "distance")
"""Metrics that are no share of the mass."""
KINDS = {
    "documents": r"(?m)^\s*(?P<name>(?:Document|Passage|Source)\W{0,2}\d+[\])]?)",
    "chat turns": r"<\|im_start\|>(\w+)|<\|start_header_id\|>(\w+)",
    "paragraphs": r"(?:\A|\n\s*\n)(?P<name>\S[^\n]{0,39})",
    "functions": r"(?m)^\s*(?:async def|def|class|function|func|fn) (\w+)",
}
"""Patterns at which segments begin, by what they find."""


@dataclass(frozen=True)
class LayerFacts:
    """One layer. readable: whether it has weights to show, else `reason`.

    norms, effects: whether lengths of what keys add, and effects of edges, can be shown.
    value_maps: whether maps of these lengths were pooled while recording.
    """

    index: int
    name: str
    kind: str
    heads: int
    q_len: int
    k_len: int
    batch: int
    readable: bool
    reason: str
    norms: bool
    effects: bool = False
    value_maps: bool = False


def page_facts(
    recordings: Sequence[dict[str, Any]], texts: Sequence[Sequence[Any]] = ()
) -> dict[str, Any]:
    """The whole of what the page needs to begin. texts: each recording's tokens, as shown."""
    metrics = [
        {"key": key, "title": title, "said": said, "share": key not in SCALED}
        for key, (title, said) in METRICS.items()
    ]
    return {
        "recordings": list(recordings),
        "alike": alike(*texts[:2]) if len(texts) > 1 else None,
        "metrics": metrics,
        "kinds": KINDS,
        "sampled": SAMPLED,
        "page": PAGE,
        "side": SIDE,
        "bins": BINS,
        "listed": LISTED,
    }


def alike(one: Sequence[Any], two: Sequence[Any]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(two)))


def recording_facts(
    name: str, about: dict[str, Any], layers: Sequence[LayerFacts], sides: dict[str, int],
    whole: bool, damaged: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Of one recording. sides: how many tokens "text" and "decoder" have."""
    begun = about.get("generated")
    return {
        "name": name,
        "model": str(about.get("model", "no model named")),
        "batch": next(layer.batch for layer in layers if layer.readable),
        "generated": begun if isinstance(begun, int) else None,
        "layers": [
            {
                "index": layer.index,
                "name": layer.name,
                "kind": layer.kind,
                "heads": layer.heads,
                "q_len": layer.q_len,
                "k_len": layer.k_len,
                "q_side": side_of(layer.kind, layer.q_len, sides, "q"),
                "k_side": side_of(layer.kind, layer.k_len, sides, "k"),
                "pattern": layer.readable,
                "reason": layer.reason,
                "norms": layer.norms,
                "effects": layer.effects,
                "value_maps": layer.value_maps,
            }
            for layer in layers
        ],
        "whole": whole,
        "damaged": list(damaged[:20]),
        "sides": sides,
        "special": special_of(about),
        "effect": effect_of(about),
        "words": names_words(about, layers, sides),
    }


def side_of(kind: str, count: int, sides: dict[str, int], of: str) -> str:
    """Whose tokens a layer's queries ("q") or keys ("k") are: the text's, or the decoder's."""
    if not sides["decoder"]:
        return "text"
    decoded = kind == "cross" and of == "q"
    return "decoder" if decoded or count != sides["text"] else "text"


def names_words(about: dict[str, Any], layers: Sequence[LayerFacts], sides: dict[str, int]) -> bool:
    """Whether a recording names words that fit its layers."""
    words = about.get("words")
    if not isinstance(words, list) or not words or sides["decoder"]:
        return False
    return all(max(x.q_len, x.k_len) <= sides["text"] for x in layers if x.readable)


def effect_of(about: dict[str, Any]) -> dict[str, Any] | None:
    """What effects were measured on, and of how many edges a query; None where they were not."""
    given = about.get("effect")
    if not isinstance(given, dict):
        return None
    target, edges = given.get("target"), given.get("edges")
    if not isinstance(target, str) or not isinstance(edges, int):
        return None
    return {"target": target[:200], "edges": edges}


def special_of(about: dict[str, Any]) -> list[int]:
    """The special tokens of a text."""
    given = about.get("special")
    if not isinstance(given, list):
        return []
    return [i for i, special in enumerate(given) if special][:100_000]
