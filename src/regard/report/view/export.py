"""The page as one file that needs no server: its modules in one script, its answers beside them."""

from __future__ import annotations

import html
import json
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import RegardError
from ..inline_page import digest, inert, write_page
from .held import Held
from .in_view import InView
from .opened import Opened
from .page_files import page_file

TOKENS = 200_000
_IMPORT = re.compile(r'^import\s+(?:\{([^}]*)\}\s*from\s+)?"(\.[^"]+)";[ \t]*$', re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_EXPORT = re.compile(r"^export \{([^}]*)\};[ \t]*$", re.MULTILINE)


def write_export(opened: Sequence[Opened], path: Path, address: str) -> None:
    """Write what an address of the page shows, as a page: a head's map, the text, and what tokens
    read."""
    write_page(path, export_page(opened, address))


def export_page(opened: Sequence[Opened], address: str) -> str:
    """The same as HTML. RegardError where it is too long."""
    if len(opened[0].pieces("text")) > TOKENS:
        raise RegardError(f"a page holds texts of up to {TOKENS:,} tokens; this one has more")
    return inline(Held(opened, InView.read(address, opened)).all())


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
