"""Processes of one group, for benchmarks over several ranks."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answers_of(size: int, rank: Callable[..., None], *given: Any) -> list[Any]:
    """What `size` processes put into a queue: rank(number, size, store, *given, queue)."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=rank, args=(r, size, store, *given, found)) for r in range(size)
        ]
        for process in processes:
            process.start()
        answers = [found.get() for _ in processes]
        for process in processes:
            process.join()
    return answers
