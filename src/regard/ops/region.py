"""The context-parallel region that this thread is inside of: `attention` asks for it first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..call.checked import Call

_OPEN = threading.local()


class Region(Protocol):
    """Computes attention over the ranks that hold the sequence."""

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, engine: str, **request: Any
    ) -> Any:
        """As `regard.attention`, on this rank's part of the sequence."""

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        asking: Callable[[Call], Call] | None = None,
        **request: Any,
    ) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
        """(out, lse, results). asking: gives the whole call the observers of a watch."""

    @property
    def first(self) -> bool:
        """Whether this is the first rank."""

    @property
    def place(self) -> tuple[int, int]:
        """(this rank, how many there are)."""

    def tell(self, text: str) -> list[str]:
        """What each rank says. None goes on before the last has spoken."""

    def joined(self, own: Tensor, dim: int) -> Tensor:
        """The whole of what lies on each rank, in every rank."""

    def shard(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Any:
        """This rank's part of a whole call, with what its observers see (`distributed.Shard`)."""

    def read(self, call: Call, query: Tensor, key: Tensor) -> tuple[Any, ...]:
        """What the observers of a whole call see, sharded."""

    def together(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """The whole call with its numbers, gathered in every rank; without gradients."""

    def cut(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a model's arguments, as `shard` cuts them."""

    def ranges(self, length: int) -> list[tuple[int, int]]:
        """The ranges (start, stop) of a sequence's positions that this rank holds."""

    def step(
        self, query: Tensor, held: Any, *, asking: Callable[[Call], Call] | None = None,
        **request: Any,
    ) -> tuple[Tensor, Call, tuple[Any, ...]]:  # fmt: skip
        """(out, the whole call without its keys, results) of queries that all ranks have.

        held: the keys of this rank (`distributed.Held`).
        """

    def positions(self, length: int, start: int, device: torch.device) -> Tensor:
        """The positions of this rank's tokens, of which there are `length`."""

    def explain(
        self, query: Tensor, key: Tensor, value: Tensor, **request: Any
    ) -> dict[str, list[str]]:
        """As `regard.explain`."""


def current() -> Region | None:
    """The innermost region of this thread; None outside of any."""
    return getattr(_OPEN, "region", None)


@contextmanager
def inside(region: Region | None) -> Iterator[None]:
    """While inside, attention of this thread goes through the region; None: through none."""
    before = current()
    _OPEN.region = region
    try:
        yield
    finally:
        _OPEN.region = before
