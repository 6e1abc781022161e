"""A page of HTML that needs nothing but itself: written whole, its data inert."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path

from ..errors import RegardError

_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def document(title: str, body: str, style: str, script: str) -> str:
    """A page of markup, title and body escaped already, that obeys its own style and script."""
    policy = (
        f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return _FRAME.format(policy=policy, title=title, style=style, body=body, script=script)


def check_html(path: Path, option: str = "--html") -> None:
    """Raise RegardError where ``write_html`` could not write: a folder, or in one that is not."""
    if path.is_dir():
        raise RegardError(f"{path} is a folder; {option} writes a file")
    if path.exists() and not path.is_file():
        raise RegardError(f"{path} is no ordinary file; {option} writes one")
    if not path.parent.is_dir():
        raise RegardError(f"there is no folder {path.parent} to write {path.name} in")


def write_page(path: Path, page: str) -> None:
    """Write ``page`` to ``path``: under another name until it is whole."""
    path = path.resolve()
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        part.write_text(page, "utf-8")
        os.replace(part, path)
    except OSError as error:
        raise RegardError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def digest(source: str) -> str:
    """A script or a style as a page's policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def inert(data: object) -> str:
    """``data`` as JSON of plain ASCII in which nothing can end a script or begin a tag."""
    line = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", line)
