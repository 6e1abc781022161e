"""What a side of a comparison is: a call to time, and how to read its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .dense import Answer


class Refused(Exception):
    """A side cannot run a problem; the message is the reason."""


@dataclass(frozen=True)
class Contestant:
    """run: the call that is timed. read: its result by name, not timed.

    A yardstick computes something else, of which only the time is of use: it has no `read`.
    """

    run: Callable[[], Any]
    read: Callable[[Any], Answer] | None = lambda out: {"out": out}
