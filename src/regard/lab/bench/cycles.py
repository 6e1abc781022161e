"""Where the cycles of our kernels go, a tile of 64 rows × 128 keys: `regard bench --parts`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...engines.cpu import native
from ...errors import RegardError
from .inputs import Inputs
from .peers import ours
from .suites import Entry

CALLS = 5  # of each shape, after one that is not counted
BUILD = "pip install --no-deps -C cmake.define.REGARD_PARTS=ON -e ."


def check() -> None:
    """RegardError where the library does not count."""
    if native.cycles() is None:
        raise RegardError(
            f"these kernels count no cycles, which would cost time; build some that do: {BUILD}"
        )


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """A line an entry that these kernels compute, from the head on."""
    yield f"{'cycles a tile':<34} " + " ".join(f"{part:>9}" for part in native.PARTS)
    for entry in entries:
        if entry.problem.form is not None:
            continue
        run = ours(Inputs(entry.problem), "cpu").run
        run()
        native.cycles()
        for _ in range(CALLS):
            run()
        counted = native.cycles()
        assert counted is not None
        tiles, cycles = counted
        if tiles:
            yield f"{entry.name:<34} " + " ".join(f"{c / tiles:>9.0f}" for c in cycles.values())
