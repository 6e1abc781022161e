"""Short reprs: sizes and the few most telling numbers, never what a tensor holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_MOST = 60  # characters of one field
_LISTED = 8  # numbers of one list


class Brief:
    """Its repr is its `__str__`, where the class has one, else its fields, each in short."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        # A dataclass writes a repr of its own where the class itself has none
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        given: Any = self
        if type(self).__str__ is not object.__str__:
            return str(self)
        if not is_dataclass(given):  # a base class alone
            return f"{type(self).__name__}()"
        held = [f"{f.name}={in_short(getattr(self, f.name))}" for f in fields(given) if f.repr]
        return f"{type(self).__name__}({', '.join(held)})"


def in_short(value: object) -> str:
    """The repr of a field; of a tensor its dtype and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, tuple) and len(value) > _LISTED:
        return f"({', '.join(map(in_short, value[:_LISTED]))}, … {len(value) - _LISTED} more)"
    return shortened(repr(value), _MOST)


def listed(numbers: Sequence[int]) -> str:
    """A list of numbers, of which the first stand for many."""
    more = [f"… {len(numbers) - _LISTED} more"] if len(numbers) > _LISTED else []
    return f"[{', '.join([*map(str, numbers[:_LISTED]), *more])}]"


def shortened(text: str, most: int) -> str:
    """The text, at most so many characters of it, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def summary(
    result: object,
    dims: Iterable[str],
    of: Tensor,
    *telling: tuple[str, Callable[[], float | Tensor]],
) -> str:
    """A result's repr: the sizes of its tensor, then each number in its words ("largest {:.2f}").

    A number that is not there (an empty tensor's, one without data) is left out.
    """
    sizes = ", ".join(f"{dim} {size}" for dim, size in zip(dims, of.shape, strict=True))
    said = [
        words.format(number) for words, make in telling if (number := _number(make)) is not None
    ]
    return f"{type(result).__name__}({'; '.join(filter(None, (sizes, ', '.join(said))))})"


def _number(make: Callable[[], float | Tensor]) -> float | None:
    try:
        with torch.no_grad():
            number = float(make())
    except (RuntimeError, IndexError, ZeroDivisionError):  # nothing there, or no data (meta, fake)
        return None
    return None if number != number else number
