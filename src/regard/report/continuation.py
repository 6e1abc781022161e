"""What a model added to a text: as text, then word by word with the probabilities it gave."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from ..analysis.look import Look
from .screen import clean, fit, word_name

_WORDS = 60  # listed with a probability


def probabilities(found: Look) -> dict[int, float | None]:
    """The generated words by number, each with the product of its tokens' probabilities.

    Each token's is given all before it, so the product is the word's. None: nothing was chosen,
    as for a decoder's first token, or it was not recorded.
    """
    given = found.probabilities
    chances: dict[int, float | None] = {}
    for number in found.generated:
        word, side = found.words[number], found.sides[-1]
        begun = len(side.words.of_token) - len(given)
        known = [given[i - begun] for i in word.tokens if i >= begun]
        told = [chance for chance in known if chance is not None]
        chances[number] = math.prod(told) if told else None
    return chances


def continuation_dict(found: Look) -> dict[str, Any]:
    """The same for JSON."""
    chances = probabilities(found)
    return {
        "text": _text(found),
        "words": [
            {"index": number, "word": found.words[number].text, "probability": chance}
            for number, chance in chances.items()
        ],
    } | ({"beams": found.beams} if found.beams else {})


def continuation(found: Look, width: int) -> Iterator[Text]:
    """Nothing where no text was generated; else what was, before all else."""
    chances = {n: chance for n, chance in probabilities(found).items() if chance is not None}
    if not chances:
        return
    said = clean(" ".join(_text(found).split())) or "nothing but the end"
    for line in textwrap.wrap(f"» {said}", width):
        yield Text(line, style="bold")
    cells = [f"{_name(found, n)} {chance:.2f}" for n, chance in list(chances.items())[:_WORDS]]
    if len(chances) > _WORDS:
        cells.append(f"… and {len(chances) - _WORDS} more words; --json has all")
    for beam in found.beams[1:]:
        said = " ".join(str(beam["text"]).split())
        yield Text(fit(f"beam {beam['score']:.2f}: {clean(said)}", width).rstrip(), style="dim")
    line = "probability of each word: "
    for cell in cells:
        if cell_len(line) + cell_len(cell) > width:
            yield Text(line.rstrip(), style="dim")
            line = ""
        line += cell + "  "
    yield Text(line.rstrip(), style="dim")
    yield Text()


def _name(found: Look, number: int) -> str:
    return word_name(found.words[number].text)


def _text(found: Look) -> str:
    """The text that was generated."""
    words = [found.words[number] for number in found.generated]
    start = min((word.start for word in words), default=0)
    return found.sides[-1].text[start:] if words else ""
