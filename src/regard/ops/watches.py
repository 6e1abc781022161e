"""The watches that this thread is inside of: what `capture` opens, and `huggingface` asks."""

from __future__ import annotations

import threading
from typing import Any

_LOCAL = threading.local()


def active() -> list[Any]:
    """The watches that this thread is inside of, the newest first."""
    watches: list[Any] = getattr(_LOCAL, "watches", [])
    return watches[::-1]
