"""Claims about attention, measured: `regard study`. One file a study, most of it the experiment."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ...errors import RegardError

if TYPE_CHECKING:
    from .study import Study

NAMES = (
    "cost", "recall", "parallel", "gradient", "pronouns", "heads", "context", "learned",
    "translation", "window", "scaling", "positions", "equal", "memory", "constraint",
)  # fmt: skip
"""The studies there are; each is the module of that name."""


def study_named(name: str) -> Study:
    """The study of that name. RegardError where there is none."""
    if name not in NAMES:
        raise RegardError(f"no study {name!r}; there are {', '.join(NAMES)}")
    found: Study = import_module(f".{name}", __name__).STUDY
    return found
