"""The texts of a corpus, one after another: a .txt, .jsonl or .conllu file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..errors import RegardError
from .relations import Sentence, read_conllu

_LOOKED_AT = 1000  # lines, to tell paragraphs from a text a line


def sentences_of(path: Path) -> Iterator[Sentence]:
    """The texts, with their dependencies where the file has them. Blank ones are left out.

    .jsonl: the field "text" of each line; .conllu: sentences; else paragraphs where blank lines
    stand between lines (in the first 1,000), and one text a line where none do.
    """
    if path.suffix == ".conllu":
        yield from read_conllu(path)
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            texts = _fields(file, path) if path.suffix == ".jsonl" else _plain(file, path)
            for text in texts:
                if text.strip():
                    yield Sentence(text.strip(), [], [])
    except OSError as error:
        raise RegardError(f"cannot read the file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RegardError(f"{path} is not text: byte {error.start} is not UTF-8") from error


def _fields(lines: Iterator[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise RegardError(f'{path}, line {number}: give {{"text": "…"}} on each line')
        yield text


def _plain(lines: Iterator[str], path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        first = [line.strip() for line in islice(file, _LOOKED_AT)]
    while first and not first[-1]:
        first.pop()
    if all(first):
        yield from lines
        return
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held)
            held = []
    yield "".join(held)


def fingerprint(path: Path) -> str:
    """What tells one corpus from another: a digest of the file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RegardError(f"cannot read the file {path}: {error.strerror}") from error
