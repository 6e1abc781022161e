"""A page of HTML that needs nothing but itself: written whole, its data inert."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path

from ..errors import RegardError


def check_html(path: Path) -> None:
    """Raise RegardError where ``write_html`` could not write: a folder, or in one that is not."""
    if path.is_dir():
        raise RegardError(f"{path} is a folder; --html writes a file")
    if path.exists() and not path.is_file():
        raise RegardError(f"{path} is no ordinary file; --html writes one")
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
