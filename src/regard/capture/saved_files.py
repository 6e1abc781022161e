"""Files of a recording: a folder that is whole or not there, JSON of known types."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import RegardError


@contextlib.contextmanager
def whole_folder(folder: Path, index: str, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` once all is written.

    index: the file that a folder of ours has; any other that is not empty is left alone.
    RegardError where something is there, unless it is ours and `overwrite`.
    """
    folder = free_folder(folder, index, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, old = (folder.with_name(f".{folder.name}.{n}-{os.getpid()}") for n in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
    clean(folder)


def free_folder(folder: Path, index: str, overwrite: bool) -> Path:
    """The folder, made absolute. RegardError where something is there that is not to be replaced.

    index: the file that a folder of ours has; any other that is not empty is left alone.
    """
    if folder.exists() and not folder.is_dir():
        raise RegardError(f"{folder} is a file; name a folder")
    held = folder.exists() and any(folder.iterdir())
    if held and not (folder / index).exists():
        raise RegardError(f"{folder} holds other files; name a new folder")
    if held and not overwrite:
        raise RegardError(
            f"{folder} holds a recording already; name a new folder, or give overwrite=True"
        )
    return folder.resolve()


def clean(folder: Path) -> None:
    """Remove what killed processes left beside a folder that is whole now."""
    for kind in ("part", "old"):
        for left in folder.parent.glob(f".{folder.name}.{kind}-*"):
            number = left.name.rpartition("-")[2]
            if number.isdigit() and not _runs(int(number)):
                shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or not to be known here
        return True
    return True


class Fields:
    """The fields of one object of a JSON file, each of a type that is known."""

    def __init__(self, given: Any, where: str) -> None:
        if not isinstance(given, dict):
            raise ValueError(f"{where} is a {type(given).__name__}, not an object")
        self._given, self._where = given, where

    def __getitem__(self, name: str) -> Any:
        if name not in self._given:
            raise ValueError(f"{self._where} has no {name}")
        return self._given[name]

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __bool__(self) -> bool:
        return bool(self._given)

    def of(self, kind: type | tuple[type, ...], name: str) -> Any:
        """A field of one of these types; a truth value is no number."""
        value = self[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(k.__name__ for k in kinds)
            raise ValueError(
                f"{self._where}: {name} is a {type(value).__name__}; it must be {wanted}"
            )
        return value

    def count(self, name: str) -> int:
        """A whole number from 0 on."""
        value: int = self.of(int, name)
        if value < 0:
            raise ValueError(f"{self._where}: {name} is {value}; it counts from 0")
        return value

    def integers(self, name: str, length: int | None = None) -> list[int]:
        """A list of whole numbers, of a length where one is given."""
        value: list[int] = self.of(list, name)
        if any(type(each) is not int for each in value) or length not in (None, len(value)):
            raise ValueError(f"{self._where}: {name} must be a list of whole numbers")
        return value
