"""What a number given by a caller must be, said in one RegardError."""

from __future__ import annotations

import operator
import re
from typing import Any

from ..errors import RegardError

# Positions of queries and keys lie within ± this: engines and results count them in int32
FARTHEST = 2**31


def whole(number: Any, what: str) -> int:
    """A whole number, of whatever type counts as one (NumPy's, a tensor of one integer)."""
    if isinstance(number, int):
        return number
    try:
        return operator.index(number)
    except (TypeError, ValueError, RuntimeError):
        raise RegardError(f"{what} is {number!r}; give a whole number") from None


def at_least(least: int, number: Any, what: str) -> int:
    """A whole number, of at least so much."""
    made = whole(number, what)
    if made < least:
        raise RegardError(f"{what} is {made}; give a number ≥ {least}")
    return made


def head_counts(dim: Any, heads: Any, kv_heads: Any = None) -> tuple[int, int, int]:
    """dim, heads and kv_heads (default: heads) of a module, each ≥ 1."""
    kv_heads = heads if kv_heads is None else kv_heads
    named = {"dim": dim, "heads": heads, "kv_heads": kv_heads}
    dim, heads, kv_heads = (whole(number, name) for name, number in named.items())
    if min(dim, heads, kv_heads) < 1 or heads % kv_heads:
        raise RegardError(
            f"dim {dim}, heads {heads}, kv_heads {kv_heads}: give numbers ≥ 1 of which "
            "kv_heads divides heads"
        )
    return dim, heads, kv_heads


def whole_fields(value: Any, *names: str) -> None:
    """Make these fields of a frozen dataclass whole numbers, where they are not."""
    for name in names:
        given = getattr(value, name)
        if not isinstance(given, int):
            made = whole(given, f"{type(value).__name__}: {name}")
            object.__setattr__(value, name, made)


def wholes(given: Any, what: str) -> tuple[int, ...]:
    """Several whole numbers: of a list, a tuple, a range, an array or a tensor."""
    try:
        each = tuple(given)
    except TypeError:
        raise RegardError(f"{what} is {given!r}; give a list of whole numbers") from None
    return tuple(whole(number, what) for number in each)


def named_head(name: str, what: str) -> tuple[int, int] | int:
    """Layer and head from "3.1", a head of every layer from "1"."""
    match = re.fullmatch(r"\s*(?:(\d{1,6})\.)?(\d{1,6})\s*", name, re.ASCII)
    if match is None:
        raise RegardError(f"{what} {name!r}: give layer and head, as 3.1, or a head, as 1")
    head = int(match[2])
    return head if match[1] is None else (int(match[1]), head)


def real(number: Any, what: str) -> float:
    """A finite number. A tensor that needs a gradient is refused: as a number it would lose it."""
    if getattr(number, "requires_grad", False):
        raise RegardError(
            f"{what} is a tensor that needs a gradient, which a number has none of; multiply the "
            "query by it and give a number"
        )
    try:
        made = float(number)
    except (TypeError, ValueError, RuntimeError):
        raise RegardError(f"{what} is {number!r}; give a number") from None
    if not abs(made) < float("inf"):
        raise RegardError(f"{what} is {made}; give a finite number")
    return made
