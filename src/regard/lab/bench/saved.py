"""The last saved run: kept in the user's cache, and what has become of its figures since."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import RegardError, reason
from .runner import Outcome
from .timing import Ratio

SAME = ("processor", "cores", "threads", "bound", "kernels", "torch")
"""What of a machine must be the same for figures to be compared."""


class Pair(NamedTuple):
    """A figure that both runs have: a peer's time over ours."""

    name: str
    peer: str
    now: Ratio
    was: Ratio

    @property
    def below(self) -> bool:
        """Every round is below every round of the saved run."""
        return self.now.high < self.was.low

    @property
    def above(self) -> bool:
        """Every round is above every round of the saved run."""
        return self.now.low > self.was.high


def path() -> Path:
    """Where `regard bench --save` writes."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "regard" / "bench.json"


def save(run: Mapping[str, Any]) -> None:
    """Keep a run, as `written.as_dict` has it, in the place of the last one."""
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        path().write_text(json.dumps(run, indent=1), "utf-8")
    except OSError as error:
        raise RegardError(f"cannot save the run in {path()}: {reason(error)}") from error


def last() -> Mapping[str, Any] | None:
    """The saved run; None if there is none."""
    try:
        found: Mapping[str, Any] = json.loads(path().read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RegardError(
            f"{path()} is no saved run: {reason(error)}; regard bench --save writes one"
        ) from error
    return found


def other(saved: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    """In what the saved run's machine differs from this one, so that nothing is compared."""
    was = saved["machine"]
    return [f"{name} {was.get(name)}" for name in SAME if was.get(name) != machine.get(name)]


def paired(outcomes: Sequence[Outcome], saved: Mapping[str, Any]) -> list[Pair]:
    """The figures that both runs have."""
    before = {
        (entry["name"], peer["name"]): Ratio(**peer["ratio"])
        for entry in saved["entries"]
        for peer in entry["peers"]
        if peer["ratio"] is not None
    }
    found = []
    for outcome in outcomes:
        for peer in outcome.entry.peers:
            now, was = outcome.ratio(peer), before.get((outcome.entry.name, peer))
            if now is not None and was is not None:
                found.append(Pair(outcome.entry.name, peer, now, was))
    return found
