"""`regard look --html`: what was found, as one page that needs nothing but itself.

The page holds the word weights of every head shown, so that any word can be asked what it reads:
all of them for a text of a few hundred words, the strongest of each word and head beyond that.
Text reaches the page as JSON only and is set as text, never as markup; the page's policy lets it
run its own script and load nothing.
"""

from __future__ import annotations

import base64
import html
import re
import shlex
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..analysis.compare import NOISE, align
from ..analysis.look import Look
from ..analysis.parts import Part, ReadText
from ..analysis.tables import tables
from ..analysis.text_model import DEFAULT
from .inline_page import check_html, digest, inert, write_page
from .links import link_dict
from .screen import clean, word_name

if TYPE_CHECKING:
    from ..analysis.compare import Versus
    from ..analysis.effect import Effects
    from ..capture.recording import Recording

UNIT = 10_000
"""Weights are written in units of 1/UNIT."""
FULL = 12_000_000
"""A map of up to this many weights is written whole: about 400 words in 72 heads."""
LINKS = 2_000_000
"""Beyond, this many of the strongest links are, spread evenly over words and heads."""

_TYPED = 400  # characters of a text that a command to copy holds
_SCRIPTS = (  # one after another
    "shared", "look-weights", "look-draw", "look-grid", "look-list", "look-versus", "look-tools",
    "look",
)  # fmt: skip


def write_html(
    found: Look,
    recording: Recording,
    path: Path,
    *,
    other: Recording | None = None,
    progress: Callable[[float], object] | None = None,
) -> None:
    """Write the page of ``as_html`` to ``path``."""
    check_html(path)
    write_page(path, as_html(found, recording, other=other, progress=progress))


def as_html(
    found: Look,
    recording: Recording,
    *,
    other: Recording | None = None,
    progress: Callable[[float], object] | None = None,
) -> str:
    """The page, of about a byte a weight.

    ``recording`` is the one that ``found`` is of; ``other`` that of ``found.other``, if any.
    """
    maps: list[str] = []
    data: dict[str, Any] = {"unit": UNIT}
    data["readings"] = [_reading(found, recording, maps, progress)]
    if found.other is not None and other is not None:
        data["readings"].append(_reading(found.other, other, maps, progress))
        pairs = {one: two for one, two in align(found.words, found.other.words) if one is not None}
        data["aligned"] = [pairs.get(i) for i in range(len(found.words))]
        data["min_flip"] = NOISE
        data["versus"] = [
            said for versus in found.versus for said in _versus(versus, found, found.other)
        ]
    data["effects"] = [_effects(one) for one in found.effects]
    if found.cut is not None:
        data["cut"] = ", ".join(clean(str(cut.edge)) for cut in found.cut.cuts)
    page = files(__package__).joinpath("page")
    style, frame = (page.joinpath(f"look.{kind}").read_text("utf-8") for kind in ("css", "html"))
    scripts = (page.joinpath(f"{name}.js").read_text("utf-8") for name in _SCRIPTS)
    script = re.sub(r"^export \{.*\};$", "", "\n".join(scripts), flags=re.MULTILINE)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src '{digest(style)}'",
            f"script-src '{digest(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    filled = {
        "policy": policy,
        "title": html.escape(f"{clean(found.model)} · regard look"),
        "style": style,
        "script": script,
        "data": inert(data),
        "maps": "\n".join(
            f'<script type="text/plain" id="map-{i}">{text}</script>' for i, text in enumerate(maps)
        ),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], frame)


def _reading(
    found: Look,
    recording: Recording,
    maps: list[str],
    progress: Callable[[float], object] | None,
) -> dict[str, Any]:
    """One model on one input. The weights go into ``maps``, a base64 text for each part."""
    total = sum(len(part.readers.words) for part in found.parts)
    done = 0

    def step(words: int) -> None:
        nonlocal done
        done += words
        if progress:
            progress(done / max(1, total))

    parts = []
    for part in found.parts:
        packed = _packed(part, recording, step)
        parts.append(_part(part, packed, len(maps)))
        maps.append(packed.text)
    starts = [focus.found.number for focus in found.focuses] or [
        pair.source for pair in found.summary.pairs[:1]
    ]
    return {
        "model": clean(found.model),
        "words": [word_name(word.text) or "\N{REPLACEMENT CHARACTER}" for word in found.words],
        "labels": [
            word_name(word.text) + name[len(word.text) :]
            for word, name in zip(found.words, found.labels, strict=True)
        ],
        "special": [i for i, word in enumerate(found.words) if word.special],
        "generated": [found.generated.start, found.generated.stop],
        "sides": [_side(side) for side in found.sides],
        "parts": parts,
        "blanks": [
            {"layer": blank.layer, "name": clean(blank.name), "reason": clean(blank.reason)}
            for blank in found.blanks
        ],
        "starts": starts,
        "top": found.top,
        "walk": _command(found),
    }


def _versus(versus: Versus, found: Look, other: Look) -> Iterator[dict[str, Any]]:
    """The change of one word's reading: the head that changed most, and those that flip."""
    first, second = (
        next(part.keys.first for part in some.parts if part.kind == versus.one.kind)
        for some in (found, other)
    )
    moves = versus.moves(2 * len(versus.one.heads), special=False)
    moves = [move for move in moves if move.pair.one != versus.one.word]
    if versus.one.word < 0 or not moves:
        return
    most = moves[0]
    yield {
        "word": first + versus.one.word,
        "moved": round(versus.moved, 4),
        "head": [most.layer, most.head],
        "to": None if most.pair.one is None else first + most.pair.one,
        "flips": [
            {
                "head": [flip.layer, flip.head],
                "to": [first + flip.one, second + flip.two],
                "weights": [round(weight, 4) for weight in flip.weights],
            }
            for flip in versus.flips
        ],
    }


def _command(found: Look) -> str | None:
    """The beginning of a ``regard walk`` of the same text, or of a file that holds it.

    None where a text was generated, or is another's answer: it cannot be walked as it stands. A
    text that a shell or a terminal would obey is not to be copied.
    """
    (side, *more) = found.sides
    if more or len(found.generated):
        return None
    text = "@FILE"
    if len(side.text) <= _TYPED and side.text.isprintable() and side.text[0] not in "@-":
        plain = not set('"$`\\!') & set(side.text)
        text = f'"{side.text}"' if plain else shlex.quote(side.text)
    named = "" if found.model == DEFAULT else f" --model {shlex.quote(clean(found.model))}"
    return f"regard walk {text}{named}"


def _effects(found: Effects) -> dict[str, Any]:
    """Links by effect, words by number."""
    return {
        "word": found.word,
        "token": None if found.token is None else word_name(found.token),
        "size": found.size,
        "directions": found.directions,
        "width": found.width,
        "edges": found.edges,
        "links": [link_dict(link) for link in found.links],
    }


def _side(side: ReadText) -> dict[str, Any]:
    """A text as pieces: the number of a word, or what lies between two."""
    pieces: list[int | str] = []
    reached = 0
    for i, word in enumerate(side.words):
        if word.start < word.end:
            pieces += _gap(side.text[reached : word.start])
            reached = max(reached, word.end)
        pieces.append(side.first + i)
    pieces += _gap(side.text[reached:].rstrip())
    return {
        "first": side.first,
        "count": len(side.words),
        "pieces": pieces,
        "rtl": _right_to_left(side.text),
    }


def _gap(text: str) -> list[str]:
    """What lies between two words: a new line, a space, or characters that have no token."""
    if not text:
        return []
    said = clean("".join(" " if char.isspace() else char for char in text)).strip()
    before = "\n" if "\n" in text else " " if text[0].isspace() else ""
    after = " " if said and text[-1].isspace() else ""
    return [piece for piece in (before, said, after) if piece]


def _right_to_left(text: str) -> bool:
    """Whether the first letter with a direction is of a script written from right to left."""
    for char in text:
        kind = unicodedata.bidirectional(char)
        if kind in ("L", "R", "AL"):
            return kind != "L"
    return False


def _part(part: Part, packed: _Packed, number: int) -> dict[str, Any]:
    return {
        "kind": part.kind,
        "heads": part.heads,
        "names": {str(layer): clean(name) for layer, name in part.names.items()},
        "readers": [part.readers.first, len(part.readers.words)],
        "keys": [part.keys.first, len(part.keys.words)],
        "same": part.readers is part.keys,
        "sinks": [row.nonzero().flatten().tolist() for row in part.sinks],
        "map": number,
        "listed": packed.listed,
        "metrics": {
            "left": _rounded((part.received * ~(part.special | part.sinks)).sum(1)),
            **{name: _rounded(values) for name, values in packed.metrics.items()},
        },
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


@dataclass(frozen=True)
class _Packed:
    """A part's weights as text. ``listed``: links a word and head; 0 where all weights are there.

    ``metrics`` float32 (heads,): means over the words that are not special tokens.
    """

    text: str
    listed: int
    metrics: dict[str, Tensor]


def _packed(part: Part, recording: Recording, step: Callable[[int], object]) -> _Packed:
    """The weights of a part, whole if they are few enough, and what is measured on the way.

    Whole: (heads, readers, keys). Else the strongest of each row of the heads, of each layer's
    mean and of the mean over all: the keys' numbers, the weights, and the rows' sums. Numbers
    are written bytes of one place after another, which deflate likes.
    """
    heads, readers, keys = len(part.heads), len(part.readers.words), len(part.keys.words)
    whole = heads * readers * keys <= FULL
    series = heads + len(part.layers) + 1
    listed = 0 if whole else min(keys, max(1, LINKS // (series * readers)))
    measured = _Measured(part)
    weights = torch.zeros(
        heads if whole else series,
        readers,
        keys if whole else listed,
        dtype=torch.int16,
        device="cpu",
    )
    places = torch.zeros(0 if whole else series, readers, listed, dtype=torch.int32, device="cpu")
    sums = torch.zeros(0 if whole else series, readers, dtype=torch.int16, device="cpu")
    for rows, layers in tables(recording, part.layers, part.readers.words, part.keys.words):
        mean = torch.zeros(len(rows), keys, dtype=torch.float32, device="cpu")
        at = 0
        for number, table in enumerate(layers):
            span = slice(at, at + len(table))
            measured.add(span, rows, table)
            if whole:
                weights[span, rows.start : rows.stop] = _in_units(table)
            else:
                here = mean.new_zeros(len(table) + 1, len(rows), keys)
                here[:-1], here[-1] = table, table.mean(0)
                to = [*range(at, at + len(table)), heads + number]
                _list(here, to, rows, weights, places, sums)
                mean += table.sum(0)
            at += len(table)
        if not whole:
            _list((mean / heads)[None], [series - 1], rows, weights, places, sums)
        step(len(rows))
    planes = [_bytes(weights, 2)]
    if not whole:
        planes = [_bytes(places, 3), *planes, _bytes(sums, 2)]
    text = base64.b64encode(zlib.compress(b"".join(planes), 9)).decode()
    return _Packed(text, listed, measured.means())


def _in_units(table: Tensor) -> Tensor:
    """Weights as whole units, each within one, so rounded that rows keep their sums."""
    ends = (table.double().cumsum(-1) * UNIT).round()
    return torch.diff(ends, dim=-1, prepend=torch.zeros_like(ends[..., :1])).short()


def _list(
    table: Tensor, to: list[int], rows: range, weights: Tensor, places: Tensor, sums: Tensor
) -> None:
    """Write the strongest of each row of ``table`` (series, rows, keys)."""
    best = table.topk(weights.shape[2], -1)
    for i, series in enumerate(to):
        weights[series, rows.start : rows.stop] = (best.values[i] * UNIT).round().short()
        places[series, rows.start : rows.stop] = best.indices[i].int()
        sums[series, rows.start : rows.stop] = (table[i].sum(-1) * UNIT).round().short()


def _bytes(values: Tensor, places: int) -> bytes:
    """Whole numbers from 0 on as bytes: all lowest ones, then the next, …"""
    flat = values.flatten().to(torch.int32)
    return b"".join(
        ((flat >> 8 * place) & 255).to(torch.uint8).numpy().tobytes() for place in range(places)
    )


class _Measured:
    """What is said of each head, summed over words: the page explains each by its name."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.special = torch.tensor(
            [word.special for word in part.readers.words], dtype=torch.bool, device="cpu"
        )
        self.apart = part.special | part.sinks
        names = ["entropy"]
        if part.readers is part.keys:
            names += ["before", "after", "itself", "distance"]
        self.sums = {
            name: torch.zeros(len(part.heads), dtype=torch.float32, device="cpu") for name in names
        }

    def add(self, heads: slice, rows: range, table: Tensor) -> None:
        """Add a table (heads, rows, keys)."""
        at = torch.arange(rows.start, rows.stop, dtype=torch.int64, device="cpu")
        counts = ~self.special[at]
        table, at = table[:, counts], at[counts]
        self.sums["entropy"][heads] -= torch.xlogy(table, table).sum((1, 2))
        if "before" not in self.sums:
            return
        here = torch.arange(len(at), dtype=torch.int64, device="cpu")
        for name, by in (("before", -1), ("itself", 0), ("after", 1)):
            inside = (at + by >= 0) & (at + by < table.shape[2])
            self.sums[name][heads] += table[:, here[inside], at[inside] + by].sum(1)
        rest = table.masked_fill(self.apart[heads, None], 0)
        away = (torch.arange(table.shape[2], dtype=torch.int64, device="cpu") - at[:, None]).abs()
        self.sums["distance"][heads] += (rest * away).sum(2).div(rest.sum(2) + 1e-9).sum(1)

    def means(self) -> dict[str, Tensor]:
        """By name: float32 (heads,)."""
        count = max(1, int((~self.special).sum()))
        return {name: values / count for name, values in self.sums.items()}
