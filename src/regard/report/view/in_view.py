"""What the page shows, as its address says it: what is chosen, and where the map stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args
from urllib.parse import parse_qsl

from ...errors import RegardError
from .opened import By, Opened, keys_before

if TYPE_CHECKING:
    from ...capture.recorded_layer import RecordedLayer

_PLACE = re.compile(r"(-?\d+(?:\.\d+)?),(\d{1,9}),(\d{1,9})")
_COMPARED = {"one": (0,), "second": (1,), "both": (0, 1), "change": (0, 1)}


@dataclass(frozen=True)
class InView:
    """One head of a recording, and how it is looked at. Read as the page reads its address
    (`state.js`): what the recordings do not have is left at what the page begins with.

    word: of the queries, or, where way is "in", of the keys. place: of the map: its zoom, the query
    and the key in its middle; None: the whole.
    """

    address: str
    recording: int
    layer: int
    head: int
    batch: int
    word: int | None
    way: str
    by_words: bool
    reduce: str
    sinks: bool
    measure: By
    compared: tuple[int, ...]
    differs: bool
    place: tuple[float, int, int] | None
    segments: str
    source: str
    target: str
    find: str

    @classmethod
    def read(cls, address: str, opened: Sequence[Opened]) -> InView:
        """address: what stands behind the # of the page's address."""
        said = dict(parse_qsl(address.lstrip("#"), keep_blank_values=True))
        which = _number(said, "r", len(opened)) or 0
        chosen = opened[which]
        layer, head = _head(said.get("head", ""), chosen)
        shown = chosen.recording.layers[layer]
        way = _one_of(said, "way", "out", "in")
        place = _PLACE.fullmatch(said.get("at", ""))
        compared = _one_of(said, "compare", *_COMPARED) if len(opened) > 1 else "one"
        return cls(
            address.lstrip("#"), which, layer, head, _number(said, "batch", shown.batch) or 0,
            _number(said, "word", shown.q_len if way == "out" else shown.k_len), way,
            _one_of(said, "by", "words", "tokens") == "words" and chosen.worded,
            _one_of(said, "pool", "sum", "max"), said.get("sinks") != "off",
            cast("By", _one_of(said, "measure", *measures(shown))),
            tuple((which + n) % len(opened) for n in _COMPARED[compared]), compared == "change",
            (float(place[1]), int(place[2]), int(place[3])) if place else None,
            *(said.get(name, "")[:1000] for name in ("segments", "from", "reads", "find")),
        )  # fmt: skip


def measures(layer: RecordedLayer) -> list[By]:
    """What a layer has of each edge."""
    has = {"weight": True, "value": bool(layer.norms), "effect": layer.effects is not None}
    return [by for by in get_args(By) if has[by]]


def address_of(opened: Opened, head: tuple[int, int], word: str | None, measure: By) -> str:
    """The address of a head; word: a token's text, whose last place is kept. RegardError where the
    recording has them not."""
    layer = opened.layer(*head, 0)
    if measure not in measures(layer):
        kept = {
            "value": "values: record it with --values",
            "effect": "effects: record it with --effect",
        }
        raise RegardError(f"layer {head[0]} has no {kept[measure]}")
    said = f"head={head[0]}.{head[1]}"
    if word is not None:
        found = [i - keys_before(layer) for i in opened.matching(word, opened.side(layer, "q"))]
        found = [i for i in found if 0 <= i < layer.q_len]
        if not found:
            raise RegardError(f"no token of the text holds {word!r}")
        said += f"&word={found[-1]}"
    return said + ("" if measure == "weight" else f"&measure={measure}")


def _number(said: dict[str, str], name: str, most: int) -> int | None:
    text = said.get(name, "")
    fits = text.isascii() and text.isdecimal() and len(text) < 10
    return int(text) if fits and int(text) < most else None


def _one_of(said: dict[str, str], name: str, *choices: str) -> str:
    """The first where none is said."""
    return said[name] if said.get(name) in choices else choices[0]


def _head(given: str, opened: Opened) -> tuple[int, int]:
    """The head named "3.1"; else the first that can be shown."""
    layers = opened.recording.layers
    found = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", given, re.ASCII)
    if found:
        layer, head = int(found[1]), int(found[2])
        if layer < len(layers) and opened.shows(layer) and head < layers[layer].heads:
            return layer, head
    return next(number for number in range(len(layers)) if opened.shows(number)), 0
