"""Which of an attention's results: by its observer's class, by the observer itself, or by place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from ..errors import RegardError
from .observers import Observer

Which = type[Observer] | Observer | int


def pick(results: Sequence[Any], observers: Sequence[Observer], which: Which, where: str) -> Any:
    """The result of the observer that `which` names; RegardError where that is none, or several.

    An IndexError for a place beyond the last, so that the results can be unpacked.
    """
    if isinstance(which, int):
        return results[which]
    if isinstance(which, type) and issubclass(which, Observer):
        found = [n for n, observer in enumerate(observers) if isinstance(observer, which)]
    elif isinstance(which, Observer):
        found = [n for n, observer in enumerate(observers) if _same(observer, which)][:1]
    else:
        raise RegardError(f"{where}[{which!r}]: give an observer, its class, or a number")
    watched = ", ".join(map(repr, observers)) or "nothing"
    name = which.__name__ if isinstance(which, type) else repr(which)
    if not found:
        raise RegardError(f"{where} was not observed by {name}, but by {watched}")
    if len(found) > 1:
        raise RegardError(f"{where} was observed by several {name}: name one of {watched}")
    return results[found[0]]


def _same(one: Any, other: Any) -> bool:
    """Equality for an observer that holds a tensor (NormTopK), too: that must be the same one."""
    if type(one) is not type(other):
        return False
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
    return all(a is b or (not isinstance(a, Tensor) and bool(a == b)) for a, b in pairs)
