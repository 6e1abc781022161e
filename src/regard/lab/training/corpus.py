"""Texts and pairs of sentences from files: plain, .gz or .zip, tables or two parallel files."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ...errors import RegardError

Pair = tuple[str, str]


def read_text(path: str | Path) -> str:
    """A text file, or every .txt and .raw file of a folder, one after another."""
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in (".txt", ".raw"))
        if not found:
            raise RegardError(f"{path} has no .txt or .raw files to read")
        return "\n".join(read_text(p) for p in found)
    text = _decoded(path)
    if not text.strip():
        raise RegardError(f"{path} is empty")
    return text


def read_pairs(
    path: str, source: str = "en", target: str = "fr", part: str = "train"
) -> list[Pair]:
    """Pairs of sentences, by what the path names.

    FILE,FILE2: two parallel files, a sentence a line. A table, .tsv, .txt or a .zip of one: source
    and target are its first two columns. A folder: its {part}.{source} and {part}.{target} (with
    .gz or not), or else, for the part "train", the tables and .zip files in it.
    """
    if "," in path and not Path(path).expanduser().exists():
        first, _, second = path.partition(",")
        return _parallel(Path(first).expanduser(), Path(second).expanduser())
    place = Path(path).expanduser()
    if not place.is_dir():
        return _table(place)
    both = [_named(place, part, language) for language in (source, target)]
    if both[0] is not None and both[1] is not None:
        return _parallel(both[0], both[1])
    tables = sorted(p for p in place.iterdir() if p.suffix in (".tsv", ".zip"))
    if part != "train":
        return []
    if not tables:
        raise RegardError(
            f"{place} has no {part}.{source} and {part}.{target}, and no .tsv or .zip"
        )
    return [pair for table in tables for pair in _table(table)]


def _named(folder: Path, part: str, language: str) -> Path | None:
    """folder/part.language, or part_….language, with .gz or not."""
    for pattern in (f"{part}.{language}", f"{part}_*.{language}"):
        for ending in ("", ".gz"):
            for found in sorted(folder.glob(pattern + ending)):
                return found
    return None


def _parallel(source: Path, target: Path) -> list[Pair]:
    lines = [_decoded(path).splitlines() for path in (source, target)]
    if len(lines[0]) != len(lines[1]):
        raise RegardError(
            f"{source} has {len(lines[0])} lines, {target} {len(lines[1])}; parallel files have "
            "a sentence a line"
        )
    return [(a.strip(), b.strip()) for a, b in zip(*lines, strict=True) if a.strip() and b.strip()]


def _table(path: Path) -> list[Pair]:
    rows = [line.split("\t") for line in _decoded(path).splitlines()]
    pairs = [(row[0].strip(), row[1].strip()) for row in rows if len(row) > 1]
    pairs = [pair for pair in pairs if all(pair)]
    if not pairs:
        raise RegardError(f"{path} is no table: no line has two columns with a tab between")
    return pairs


def _decoded(path: Path) -> str:
    try:
        if path.suffix == ".zip":
            return _unzipped(path)
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except OSError as error:
        raise RegardError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RegardError(f"{path} is not text: byte {error.start} is not UTF-8") from error


def _unzipped(path: Path) -> str:
    """The largest .txt or .tsv file of an archive: the others say what it is."""
    with zipfile.ZipFile(path) as archive:
        found = [i for i in archive.infolist() if i.filename.endswith((".txt", ".tsv"))]
        if not found:
            raise RegardError(f"{path} has no .txt or .tsv file")
        return archive.read(max(found, key=lambda i: i.file_size)).decode("utf-8-sig")


def split_pairs(
    paths: Sequence[str], source: str, target: str
) -> tuple[list[Pair], list[Pair], int]:
    """(pairs to train on, pairs held out, how many of the first belong to the first path).

    Held out is the part "val" of the paths that have one, else every 100th pair, at most 1,000.
    """
    train = [read_pairs(path, source, target) for path in paths]
    valid = [
        pair
        for path in paths
        if Path(path).expanduser().is_dir()
        for pair in read_pairs(path, source, target, "val")
    ]
    if valid:
        return [pair for pairs in train for pair in pairs], valid, len(train[0])
    kept = [[p for n, p in enumerate(pairs) if n % 100] for pairs in train]
    held = [pair for pairs in train for pair in pairs[::100]][:1000]
    return [pair for pairs in kept for pair in pairs], held, len(kept[0])
