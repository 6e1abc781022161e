"""What an exported page asks, with the answers: those about what was in view when it was written.

Tiles are packed (zlib): half of a causal map, and nearly all of a map of effects, is 0.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import along
from .in_view import InView, measures
from .opened import Opened
from .page_facts import PAGE, SIDE, page_facts

if TYPE_CHECKING:
    from ...capture.recorded_layer import RecordedLayer

TILES = 85
"""Tiles of a map that the file holds at most: four zooms of a square one."""
AROUND = 2
"""Tiles on each side of the one in the middle of what is in view."""
FANS = 600
"""Tokens whose weights the file holds, where the text has no more; else those in view."""


class Held:
    """What the page will ask, with the answers: those about what is in view."""

    def __init__(self, opened: Sequence[Opened], view: InView) -> None:
        self.every, self.view = opened, view
        self.opened = opened[view.recording]
        self.layer = self.opened.layer(view.layer, view.head, view.batch)
        self.whole = max(self.layer.q_len, self.layer.k_len) <= FANS
        self.measures = measures(self.layer) if self.whole else [view.measure]
        self.answers: dict[str, Any] = {}

    def all(self) -> dict[str, Any]:
        """{answers, least: the finest zoom whose tiles are among them, opens: the address, whole:
        whether what each token reads is, measures: of what}."""
        texts = [one.pieces("text") for one in self.every]
        self.put("about", page_facts([one.about() for one in self.every], texts))
        for number, one in enumerate(self.every):
            self.put_texts(number, one)
            for layer in range(len(one.recording.layers)):
                if one.shows(layer):
                    told = one.overview(layer, self.view.batch)
                    self.put("overview", told, r=number, batch=self.view.batch, layer=layer)
        for what in along.LINES:
            line = self.opened.along(self.view.layer, self.view.head, self.view.batch, what)
            self.put("along", line, **self.head(), what=what)
        self.put_fans()
        self.put_asked()
        least = max(self.put_tiles(number) for number in self.view.compared)
        return {
            "answers": self.answers, "least": least, "opens": self.view.address,
            "whole": self.whole, "measures": self.measures,
        }  # fmt: skip

    def put(self, path: str, answer: Any, **query: Any) -> None:
        pairs = sorted([name, str(value)] for name, value in query.items())
        said = json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))
        self.answers[f"{path} {said}"] = answer

    def head(self, r: int | None = None) -> dict[str, int]:
        """Which head is asked about."""
        which = self.view.recording if r is None else r
        return {"r": which, "layer": self.view.layer, "head": self.view.head,
                "batch": self.view.batch}  # fmt: skip

    def put_texts(self, number: int, opened: Opened) -> None:
        """All tokens, and the words that they make up."""
        texts: dict[str, Sequence[Any]] = {side: opened.pieces(side) for side in opened.sides}
        if opened.units is not None:
            texts["words"] = opened.words()
        for side, pieces in texts.items():
            for page in range(-(-len(pieces) // PAGE)):
                part = {"start": page * PAGE, "pieces": pieces[page * PAGE : (page + 1) * PAGE]}
                self.put("tokens", part, r=number, side=side, page=page)

    def put_fans(self) -> None:
        """What tokens read and are read by: all where the text is short, else the one in view."""
        view, opened = self.view, self.opened
        kept = [] if view.word is None else [view.word]
        where = (view.layer, view.head)
        for by in self.measures:
            more: dict[str, Any] = {} if by == "weight" else {"measure": by}
            for way, count in (("out", self.layer.q_len), ("in", self.layer.k_len)):
                how: Any = {"batch": view.batch, "inward": way == "in", "by": by}
                for index in range(count) if self.whole else kept:
                    if index >= count:
                        continue
                    asked = self.head() | more | {"way": way}
                    self.put("fan", opened.fan(*where, index, **how), **asked, index=index)
                    if opened.units is not None:
                        fan = opened.word_fan(*where, index, **how)
                        self.put("fan", fan, **asked, index=fan["index"], by="words")

    def put_asked(self) -> None:
        """What was looked for: places in the text, heads that read a word, shares of segments."""
        view, asked = self.view, {"r": self.view.recording, "batch": self.view.batch}
        if view.find:
            side = self.opened.side(self.layer, "q")
            found = self.opened.matching(view.find, side)
            self.put("matching", found, r=view.recording, text=view.find, side=side)
        if view.source and view.target:
            reads = self.opened.reads(view.source, view.target, view.batch)
            self.put("reads", reads, **asked, source=view.source, target=view.target)
        if not view.segments:
            return
        words: dict[str, Any] = {"by": "words"} if view.by_words else {}
        for index in {None, view.word}:
            token: dict[str, Any] = {} if index is None else {"index": index}
            for number in range(len(self.opened.recording.layers)):
                if self.opened.shows(number):
                    shares = self.opened.segments(
                        view.segments, number, index, view.batch, view.by_words
                    )
                    self.put("segments", shares, **asked, **words, **token,
                             given=view.segments, layer=number)  # fmt: skip

    @property
    def deepest(self) -> int:
        """The page's zoom at which a cell is one token; it counts from the first map that is shown,
        which is, of a difference, as long as what both have."""
        layers = [
            self.every[number].layer(self.view.layer, self.view.head, self.view.batch)
            for number in (self.view.compared if self.view.differs else self.view.compared[:1])
        ]
        sides = (min(x.q_len for x in layers), min(x.k_len for x in layers))
        return max(0, math.ceil(math.log2(max(*sides, 1) / SIDE)))

    def put_tiles(self, number: int) -> int:
        """The tiles of a recording's whole map, then finer ones while there is room, and those
        around what is in view; the finest zoom held."""
        opened = self.every[number]
        shown = opened.layer(self.view.layer, self.view.head, self.view.batch)
        places, least = _whole(shown, opened.recording.zooms(self.view.layer))
        if self.view.place is not None:
            least = _around(self.view.place, shown, self.deepest, least, places)
        plain = {} if self.view.sinks else {"sinks": 0}
        for by in (one for one in self.measures if one in measures(shown)):
            more = plain if by == "weight" else plain | {"measure": by}
            for zoom, row, col in places:
                tile = opened.tile(
                    self.view.layer, (self.view.head, zoom, row, col), self.view.reduce,
                    self.view.batch, self.view.sinks, by,
                )  # fmt: skip
                packed = base64.b64encode(zlib.compress(tile)).decode()
                self.put("tiles", packed, **self.head(number), **more, zoom=zoom,
                         reduce=self.view.reduce, at=f"{row}.{col}")  # fmt: skip
        return least


def _whole(layer: RecordedLayer, zooms: int) -> tuple[set[tuple[int, int, int]], int]:
    """Tiles (zoom, row, col) of a whole map, from the coarsest zoom on; the finest of these."""
    places: set[tuple[int, int, int]] = set()
    for zoom in reversed(range(zooms)):
        rows, cols = (-(-length // (SIDE << zoom)) for length in (layer.q_len, layer.k_len))
        if len(places) + rows * cols > TILES:
            return places, zoom + 1
        places |= {(zoom, row, col) for row in range(rows) for col in range(cols)}
    return places, 0


def _around(
    place: tuple[float, int, int], layer: RecordedLayer, deepest: int, least: int,
    places: set[tuple[int, int, int]],
) -> int:  # fmt: skip
    """Add the tiles around a place of the map at the zoom it is seen with, and at coarser ones;
    returns the finest zoom held. deepest: the zoom of the page at which cells are single tokens."""
    finest = max(0, deepest - max(0, min(deepest, math.floor(place[0] + 0.5))))
    for zoom in range(finest, least):
        size = SIDE << zoom
        rows, cols = (-(-length // size) for length in (layer.q_len, layer.k_len))
        row, col = place[1] // size, place[2] // size
        places |= {
            (zoom, y, x)
            for y in range(max(0, row - AROUND), min(rows, row + AROUND + 1))
            for x in range(max(0, col - AROUND), min(cols, col + AROUND + 1))
        }
    return min(least, finest)
