"""The files of the page: its own, and those that it shares with the page of `look`."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable


def page_file(name: str) -> Traversable | None:
    """A file of this page, or one that it shares with the page of `look`."""
    for package in (__package__, __package__.rpartition(".")[0]):
        found = (files(package) / "page").joinpath(*name.split("/"))
        if found.is_file():
            return found
    return None
