"""What a study is, what it is given, and what it found: the same for all of them."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ...errors import RegardError
from ..bench import machine

Told = Callable[[str, float | None], None]
Cell = str | int | float | None
Mode = Literal["tiny", "quick", "full"]

DATA = "REGARD_DATA"
"""The environment's folder of data, where --data names none."""


@dataclass(frozen=True)
class Verdict:
    """A claim, whether it holds here, and the figure that says so. clock: the figure is a time or
    a size of memory, which a seed does not fix."""

    claim: str
    holds: bool
    figure: str
    clock: bool = False


@dataclass(frozen=True)
class Panel:
    """One part of a picture: lines {name: (xs, ys)}, or bars {name: (labels, heights)}.

    level: a dashed line across, such as chance. clock: as of `Verdict`.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[Any], Sequence[float]]]
    log: str = ""
    bars: bool = False
    level: float | None = None
    clock: bool = False


@dataclass
class Result:
    """What a study found. clock: the columns that hold times or sizes of memory.

    notes: what has to be said of the figures. more: further figures, for JSON alone.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    verdicts: list[Verdict]
    panels: list[Panel] = field(default_factory=list)
    clock: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.columns
        assert {*self.clock} <= {*self.columns}


@dataclass
class Setting:
    """What a study runs with: its sizes as attributes of `size`, a seed, and where data lies."""

    size: Any
    seed: int
    mode: Mode = "quick"
    data: Path | None = None
    models: Path | None = None
    translators: tuple[Path, ...] = ()
    told: Told = lambda what, share: None
    reads: bool = False  # whether a file was asked for

    def file(self, name: str) -> Path:
        """A file of the folder of data. RegardError where there is none."""
        self.reads = True
        return _within(self.data, name, "--data FOLDER", f"or set {DATA}")

    def model(self, name: str) -> Path:
        """A model's folder or file: of --models, by default `models` beside the data."""
        self.reads = True
        models = self.models
        if models is None and self.data is not None:
            models = self.data.absolute().parent / "models"
        return _within(models, name, "--models FOLDER", "or keep it as `models` beside the data")

    def training(self, what: str, place: int, of: int, steps: int) -> Callable[[int, float], None]:
        """Tells of the steps of one training among several: called with step and loss."""

        def each(step: int, loss: float) -> None:
            self.told(f"{what}: loss {loss:.2f}", (place + step / steps) / of)

        return each

    def random(self, salt: object = "") -> random.Random:
        """Draws that depend on the seed and on what they are for."""
        return random.Random(f"{self.seed} {salt}")

    def generator(self, salt: int = 0) -> torch.Generator:
        """The same for tensors."""
        return torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + salt)


def _within(folder: Path | None, name: str, option: str, otherwise: str) -> Path:
    if folder is None:
        raise RegardError(f"this study reads {name}; give its folder by {option}, {otherwise}")
    if not (folder / name).exists():
        raise RegardError(f"there is no {name} in {folder}; give another by {option}, {otherwise}")
    return folder / name


@dataclass(frozen=True)
class Study:
    """A claim and the experiment that measures it.

    claim: one line. method: how it is measured, for the docs. tiny, quick, full: the sizes, with
    the same names: for tests, for a first look, and for figures.
    """

    name: str
    claim: str
    method: str
    run: Callable[[Setting], Result]
    tiny: Mapping[str, Any]
    quick: Mapping[str, Any]
    full: Mapping[str, Any]

    def sizes(self, mode: Mode) -> Any:
        """The sizes of a mode as attributes."""
        return _Sizes({"tiny": self.tiny, "quick": self.quick, "full": self.full}[mode])


class _Sizes:
    def __init__(self, given: Mapping[str, Any]) -> None:
        self.__dict__.update(given)


@dataclass(frozen=True)
class Measured:
    """A study that was run, with all that it takes to run it again."""

    study: Study
    result: Result
    mode: Mode
    seed: int
    seconds: float
    machine: Mapping[str, Any]
    reads: bool = False
    translators: tuple[Path, ...] = ()

    @property
    def command(self) -> str:
        """The command that gives these figures again."""
        quick = "" if self.mode == "full" else f" --{self.mode}"
        data = " --data ../shared/data" if self.reads else ""
        given = "".join(f" --translator {folder.resolve().name}" for folder in self.translators)
        return f"{_threads()}regard study {self.study.name}{quick} --seed {self.seed}{data}{given}"

    def to_json(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {
            "study": self.study.name,
            "claim": self.study.claim,
            "method": self.study.method,
            "command": self.command,
            "mode": self.mode,
            "sizes": dict(getattr(self.study, self.mode)),
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "machine": dict(self.machine),
        } | {one.name: _plain(getattr(self.result, one.name)) for one in fields(Result)}


def _threads() -> str:
    """What the environment says of threads: sums over other threads round otherwise."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return f"OMP_NUM_THREADS={threads} " if threads else ""


def reproducible(found: Mapping[str, Any]) -> dict[str, Any]:
    """A study's JSON without what the clock, the memory and the machine decide."""
    kept = {k: v for k, v in found.items() if k not in ("seconds", "machine", "rows", "clock")}
    untimed = [i for i, name in enumerate(found["columns"]) if name not in found["clock"]]
    kept["rows"] = [[row[i] for i in untimed] for row in found["rows"]]
    for part in ("verdicts", "panels"):
        kept[part] = [one for one in found[part] if not one["clock"]]
    return kept


def measure(study: Study, setting: Setting) -> Measured:
    """Run a study; torch's own generator starts from the seed and is put back."""
    with _seeded(setting.seed):
        start = time.perf_counter()
        result = study.run(setting)
        taken = time.perf_counter() - start
    about = machine.describe()
    return Measured(
        study, result, setting.mode, setting.seed, taken, about, setting.reads, setting.translators
    )


def data_folder(given: Path | None) -> Path | None:
    """--data, or what the environment names. RegardError where that is no folder."""
    named = os.environ.get(DATA)
    folder = given if given is not None else Path(named).expanduser() if named else None
    if folder is not None and not folder.is_dir():
        raise RegardError(f"there is no folder of data {folder}")
    return folder


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and floats as JSON has them; floats to nine digits, NaN as null."""
    if isinstance(value, Verdict | Panel):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if abs(value) < float("inf") else None
    return value
