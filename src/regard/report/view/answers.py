"""What the page asks of recordings, and the answers: over HTTP (`server.py`) or in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ...errors import RegardError
from .page_facts import PAGE, page_facts

if TYPE_CHECKING:  # it imports torch: the page is there before that is done
    from .opened import By, Opened

TILES = 64
"""Tiles that one request may ask for."""
NAMES = (
    "about", "tokens", "overview", "along", "fan", "segments", "weight", "matching", "reads",
    "export",
)  # fmt: skip
"""What can be asked, each a method of `Answers`; and tiles."""


class Asked:
    """The numbers and words of a question, checked."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given

    def number(self, name: str, default: int | None = None) -> int:
        text = self._given.get(name, "" if default is None else str(default))
        if not text.isascii() or not text.isdecimal() or len(text) > 12:
            raise RegardError(f"{name}: a whole number from 0 on is wanted")
        return int(text)

    def one_of(self, name: str, *choices: str) -> str:
        text = self._given.get(name, choices[0])
        if text not in choices:
            raise RegardError(f"{name}: one of {', '.join(choices)} is wanted")
        return text

    def measure(self) -> By:
        """What is shown of each edge."""
        return cast("By", self.one_of("measure", "weight", "value", "effect"))

    def word(self, name: str) -> str:
        return self._given.get(name, "")[:1000]

    def text(self, name: str) -> str:
        return self._given.get(name, "")[:10_000]

    def places(self, name: str) -> list[tuple[int, int]]:
        """Rows and columns of tiles, "3.1,3.2"."""
        pairs = [pair.split(".") for pair in self._given.get(name, "").split(",")]
        fit = all(
            len(pair) == 2 and all(n.isascii() and n.isdecimal() and len(n) < 9 for n in pair)
            for pair in pairs
        )
        if not fit or len(pairs) > TILES:
            raise RegardError(f"{name}: at most {TILES} places, as 3.1,3.2, are wanted")
        return [(int(row), int(col)) for row, col in pairs]


class TilesAsked(NamedTuple):
    """Which tiles are wanted: places are (row, col)."""

    layer: int
    head: int
    zoom: int
    batch: int
    reduce: str
    sinks: bool
    by: By
    places: list[tuple[int, int]]

    @classmethod
    def of(cls, asked: Asked) -> TilesAsked:
        """From a question; RegardError where it is none."""
        layer, head, zoom = (asked.number(name) for name in ("layer", "head", "zoom"))
        batch, reduce = asked.number("batch", 0), asked.one_of("reduce", "sum", "max")
        sinks = asked.number("sinks", 1) > 0
        by = asked.measure()
        return cls(layer, head, zoom, batch, reduce, sinks, by, asked.places("at"))


class Answers:
    """The answers about some recordings that are open."""

    def __init__(self, opened: Sequence[Opened]) -> None:
        self.opened = opened

    def answer(self, name: str, given: Mapping[str, str]) -> Any:
        """To one of `NAMES`, as JSON can say it. RegardError, OSError where it is refused."""
        if name not in NAMES:
            raise RegardError(f"nothing is called {name!r}; ask {', '.join(NAMES)} or tiles")
        asked = Asked(given)
        return getattr(self, name)(asked, self.which(asked))

    def which(self, asked: Asked) -> Opened:
        """The recording that is asked, which is there."""
        number = asked.number("r", 0)
        if number >= len(self.opened):
            raise RegardError(f"no recording {number}: {len(self.opened)} are open")
        opened = self.opened[number]
        opened.check()
        return opened

    def tiles(self, given: Mapping[str, str]) -> Iterator[bytes]:
        """Tiles one after another, each 65,536 bytes, computed when it is fetched."""
        asked = Asked(given)
        opened, wanted = self.which(asked), TilesAsked.of(asked)
        opened.layer(wanted.layer, wanted.head, wanted.batch)
        return (self.tile(opened, wanted, place) for place in wanted.places)

    def tile(self, opened: Opened, wanted: TilesAsked, place: tuple[int, int]) -> bytes:
        """One of them."""
        opened.check()
        tile = (wanted.head, wanted.zoom, *place)
        return opened.tile(wanted.layer, tile, wanted.reduce, wanted.batch, wanted.sinks, wanted.by)

    def about(self, asked: Asked, opened: Opened) -> Any:
        texts = [one.pieces("text") for one in self.opened]
        return page_facts([one.about() for one in self.opened], texts)

    def tokens(self, asked: Asked, opened: Opened) -> Any:
        side = asked.one_of("side", "text", "decoder", "words")
        pieces = opened.words() if side == "words" else opened.pieces(side)
        return page_of(pieces, asked.number("page", 0))

    def overview(self, asked: Asked, opened: Opened) -> Any:
        return opened.overview(asked.number("layer"), asked.number("batch", 0))

    def along(self, asked: Asked, opened: Opened) -> Any:
        what = asked.one_of("what", "entropy", "received")
        layer, head = asked.number("layer"), asked.number("head")
        return opened.along(layer, head, asked.number("batch", 0), what)

    def fan(self, asked: Asked, opened: Opened) -> Any:
        inward = asked.one_of("way", "out", "in") == "in"
        layer, head, index = (asked.number(name) for name in ("layer", "head", "index"))
        by_words = asked.one_of("by", "tokens", "words") == "words"
        fan, batch = opened.word_fan if by_words else opened.fan, asked.number("batch", 0)
        by = asked.measure()
        return fan(layer, head, index, batch=batch, inward=inward, by=by)

    def segments(self, asked: Asked, opened: Opened) -> Any:
        token = asked.number("index") if asked.word("index") else None
        by_words = asked.one_of("by", "tokens", "words") == "words"
        layer, batch = asked.number("layer"), asked.number("batch", 0)
        return opened.segments(asked.word("given"), layer, token, batch, by_words)

    def weight(self, asked: Asked, opened: Opened) -> Any:
        layer, head, row, col = (asked.number(name) for name in ("layer", "head", "row", "col"))
        return opened.weight(layer, head, row, col, asked.number("batch", 0))

    def matching(self, asked: Asked, opened: Opened) -> Any:
        return opened.matching(asked.word("text"), asked.one_of("side", "text", "decoder"))

    def reads(self, asked: Asked, opened: Opened) -> Any:
        return opened.reads(asked.word("source"), asked.word("target"), asked.number("batch", 0))

    def export(self, asked: Asked, opened: Opened) -> Any:
        """What the page's address shows, as a page of its own that needs no server."""
        from .export import export_page

        return export_page(self.opened, asked.text("address"))


def page_of(pieces: Sequence[Any], number: int) -> dict[str, Any]:
    """A page of tokens."""
    start = number * PAGE
    return {"start": start, "pieces": pieces[start : start + PAGE]}
