"""The watches that this thread is inside of: what `capture` opens, and `huggingface` asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from ..call.checked import Call
from ..call.masks import Mask
from ..call.observers import Observer

_OPEN = threading.local()


class Watch(Protocol):
    """What a model's attention functions ask of the watch that they run inside of.

    `name` is that of a module's call, as `call_of` gives it.
    """

    observe: tuple[Observer, ...]
    verifying: bool

    def call_of(self, module: nn.Module) -> str | None:
        """The name of the call that a module makes; None for a stranger."""

    def kind_of(self, module: nn.Module, name: str) -> str:
        """Self or cross."""

    def wants(self, name: str) -> bool:
        """Whether it is to be recorded."""

    def position(self, name: str, kind: str, start: int | None) -> int:
        """Where its queries stand."""

    def cut_of(self, name: str) -> Mask | None:
        """What stays visible in it, where something is cut."""

    def computing(self) -> AbstractContextManager[None]:
        """While inside, what the model's own attention calls is not recorded apart."""

    def asking(self, name: str, call: Call, kind: str) -> Call:
        """The call with the watch's observers."""

    def record(
        self,
        name: str,
        kind: str,
        call: Call,
        lse: Tensor,
        out: Tensor | None = None,
        seen: Mapping[int, Any] = ...,
    ) -> None:
        """Take it in."""


def active() -> Sequence[Watch]:
    """The watches that this thread is inside of, the newest first."""
    watches: list[Watch] = getattr(_OPEN, "watches", [])
    return watches[::-1]


@contextmanager
def inside_of(watch: Watch) -> Iterator[None]:
    """While inside, the watch is active."""
    _OPEN.watches = [*getattr(_OPEN, "watches", []), watch]
    try:
        yield
    finally:
        _OPEN.watches = [w for w in _OPEN.watches if w is not watch]
