"""A link, one word reading another in one head, as an object of JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Link(Protocol):
    """What every link has; those of effects also have `effect` and `value`."""

    @property
    def layer(self) -> int: ...
    @property
    def head(self) -> int: ...
    @property
    def source(self) -> int: ...
    @property
    def target(self) -> int: ...
    @property
    def weight(self) -> float: ...


def link_dict(link: Link, names: Sequence[str] | None = None) -> dict[str, Any]:
    """From and to are the words' names, their numbers beside them; without names the numbers."""
    said: dict[str, Any] = {"layer": link.layer, "head": link.head}
    if names is None:
        said |= {"from": link.source, "to": link.target}
    else:
        said |= {"from": names[link.source], "to": names[link.target]}
        said |= {"from_index": link.source, "to_index": link.target}
    for name in ("effect", "weight", "value"):
        if hasattr(link, name):
            said[name] = getattr(link, name)
    return said
