"""`regard look` on a terminal: 80 columns, readable without colour and when piped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from rich.console import Console
from rich.text import Text
from torch import Tensor

from ..words import SINK, Link
from .looking import Focus, Look, Part, Row, Side
from .screen import Bit, bar, clean, fit, word_name, wrapped

_READS = {
    "self": "reads",
    "encoder": "reads in the encoder",
    "decoder": "reads in the decoder",
    "cross": "reads across, in the encoder's text",
}
_OF = {"self": "", "encoder": " of the encoder", "decoder": " of the decoder", "cross": " across"}
_LINES = 12  # a text longer than this is cut around what is looked at
_WORD = 16
_BAR = 10


def print_look(found: Look, console: Console) -> None:
    """Print what was found on ``console``, in at most 100 columns."""
    for line in _Page(found, console).lines():
        console.print(line, no_wrap=True, overflow="crop", crop=True, highlight=False)


class _Page:
    def __init__(self, found: Look, console: Console) -> None:
        self.found = found
        self.width = max(40, min(console.width, 100))
        self.colour = bool(console.color_system) and not console.no_color
        self.ascii = console.options.ascii_only
        self.names = [word_name(name) for name in found.labels]
        self.word = max(8, min(_WORD, (self.width - 48) // 2))

    def lines(self) -> Iterator[Text]:
        found = self.found
        if not found.focuses:
            yield from self.text(None)
            yield self.model()
            yield Text()
            yield from self.strongest()
            yield from self.written()
            yield from self.named_apart()
            for part in found.parts:
                yield Text()
                yield from self.left_to_words(part)
        for i, focus in enumerate(found.focuses):
            if i:
                yield Text()
            yield from self.text(focus)
            yield self.model()
            for row in focus.rows:
                yield Text()
                yield from self.reading(focus, row)
        yield Text()
        yield from self.footer()
