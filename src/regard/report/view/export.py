"""The page as one file that needs no server: its modules in one script, its answers beside them."""

from __future__ import annotations

import base64
import html
import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ...errors import RegardError
from ..inline_page import digest, inert, write_page
from . import along
from .opened import Opened, readable
from .page_facts import PAGE, SIDE, page_facts
from .page_files import page_file

TILES = 85
"""Tiles of a map that the file holds at most: four zooms of a square one."""
FANS = 600
"""Tokens whose weights the file holds, where the text has no more; else those asked for."""
TOKENS = 200_000
_IMPORT = re.compile(r'^import\s+(?:\{([^}]*)\}\s*from\s+)?"(\.[^"]+)";[ \t]*$', re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_EXPORT = re.compile(r"^export \{([^}]*)\};[ \t]*$", re.MULTILINE)


def write_export(opened: Opened, path: Path, layer: int, head: int, words: list[int]) -> None:
    """Write one head of a recording as a page: its map, the text, and what tokens read."""
    if len(opened.pieces("text")) > TOKENS:
        raise RegardError(f"--export holds texts of up to {TOKENS:,} tokens; this one has more")
    answers, least = _answers(opened, layer, head, words)
    opens = f"head={layer}.{head}" + (f"&word={words[0]}" if words else "")
    write_page(path, inline({"answers": answers, "least": least, "opens": opens}))


def inline(held: dict[str, Any]) -> str:
    """The page with its modules and styles in it; held: what it finds there when it begins."""
    script = bundle("view.js")
    styles = ("vendor/leaflet/leaflet.css", "vendor/uplot/uPlot.css", "look.css", "view.css")
    style = "\n".join(_text(name) for name in styles)
    policy = (
        f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        r'<link rel="stylesheet"[^>]*>\n': "",
        r'<link rel="icon"[^>]*>\n': f'<meta http-equiv="Content-Security-Policy" '
        f'content="{html.escape(policy)}">\n<style>{style}</style>\n',
        r'<script type="module"[^>]*></script>\n': "",
        r"</body>": f'<script type="application/json" id="held">{inert(held)}</script>\n'
        f"<script>{script}</script>\n</body>",
    }
    page = _text("index.html")
    for found, put in parts.items():
        page = re.sub(found, lambda _, put=put: put, page)  # type: ignore[misc]
    return page


def bundle(first: str) -> str:
    """The modules that one imports, and itself, as one script: each a function called once."""
    order: list[str] = []
    sources: dict[str, str] = {}

    def visit(name: str) -> None:
        if name in sources:
            return
        sources[name] = text = _text(name)
        for _, other in _IMPORT.findall(text):
            visit(posixpath.normpath(posixpath.join(posixpath.dirname(name), other)))
        order.append(name)

    visit(first)
    return "const modules = {};\n" + "\n".join(_wrapped(name, sources[name]) for name in order)


def _wrapped(name: str, text: str) -> str:
    """A module as a function; what it exports is kept under its name."""

    def taken(match: re.Match[str]) -> str:
        other = posixpath.normpath(posixpath.join(posixpath.dirname(name), match[2]))
        names = re.sub(r"\s+as\s+", ": ", match[1] or "")
        return f"const {{{names}}} = modules[{json.dumps(other)}];" if match[1] else ""

    def given(match: re.Match[str]) -> str:
        names = re.sub(r"(\w+)\s+as\s+(\w+)", r"\2: \1", match[1])
        return f"return {{{names}}};"

    body = _EXPORT.sub(given, _IMPORT.sub(taken, text))
    code = _COMMENT.sub("", body)
    if re.search(r"^(import|export)\b", code, re.MULTILINE) or "</script" in body:
        raise RegardError(f"{name} cannot stand in one script with others")
    return f"modules[{json.dumps(name)}] = (() => {{\n{body}\n}})();"


def _text(name: str) -> str:
    found = page_file(name)
    if found is None:
        raise RegardError(f"the page has no file {name}; install regard again")
    return found.read_text("utf-8")


def _answers(opened: Opened, layer: int, head: int, words: list[int]) -> tuple[dict[str, Any], int]:
    """What the page will ask, by address; and the finest zoom whose tiles are among it."""
    shown = opened.layer(layer, head, 0)
    about = page_facts([opened.about()])
    answers: dict[str, Any] = {"api/about?": about}

    def put(path: str, answer: Any, **query: Any) -> None:
        answers[f"api/{path}?{urlencode(query)}"] = answer

    for side, count in about["recordings"][0]["sides"].items():
        pieces = opened.pieces(side)
        for page in range(-(-count // PAGE)):
            held = {"start": page * PAGE, "pieces": pieces[page * PAGE : (page + 1) * PAGE]}
            put("tokens", held, r=0, side=side, page=page)
    joined = [] if opened.units is None else opened.words()
    for page in range(-(-len(joined) // PAGE)):
        held = {"start": page * PAGE, "pieces": joined[page * PAGE : (page + 1) * PAGE]}
        put("tokens", held, r=0, side="words", page=page)
    for number, one in enumerate(opened.recording.layers):
        if readable(one):
            put("overview", opened.overview(number, 0), r=0, batch=0, layer=number)
    for what in along.LINES:
        line = opened.along(layer, head, 0, what)
        put("along", line, r=0, layer=layer, head=head, batch=0, what=what)
    for way, count in (("out", shown.q_len), ("in", shown.k_len)):
        asked = {"r": 0, "layer": layer, "head": head, "batch": 0}
        for index in range(count) if count <= FANS else words:
            if index >= count:
                continue
            inward = way == "in"
            put("fan", opened.fan(layer, head, index, batch=0, inward=inward),
                **asked, index=index, way=way)  # fmt: skip
            if joined:
                fan = opened.word_fan(layer, head, index, batch=0, inward=inward)
                put("fan", fan, **asked, index=fan["index"], way=way, by="words")
    return answers, _tiles(opened, layer, head, put)


def _tiles(opened: Opened, layer: int, head: int, put: Callable[..., None]) -> int:
    """The tiles of the whole map, then finer ones while there is room; the finest zoom held."""
    shown, left = opened.recording.layers[layer], TILES
    zooms = opened.recording.zooms(layer)
    for zoom in reversed(range(zooms)):
        size = SIDE << zoom
        places = [
            (row, col)
            for row in range(-(-shown.q_len // size))
            for col in range(-(-shown.k_len // size))
        ]
        if len(places) > left:
            return zoom + 1
        left -= len(places)
        for row, col in places:
            tile = opened.tile(layer, (head, zoom, row, col), "sum", 0, True)
            put(
                "tiles", base64.b64encode(tile).decode(), r=0, layer=layer, head=head, batch=0,
                zoom=zoom, reduce="sum", at=f"{row}.{col}",
            )  # fmt: skip
    return 0
