"""A recording that several ranks write: the first the folder and its JSON, each its own parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import RegardError
from ..ops.beside import Rounding
from ..ops.region import Region
from .layers import Layer
from .projection import output_projection
from .shard_layer import ShardLayer, shard_file, shards_kept_by


class Folder(AbstractContextManager[Any], Protocol):
    """A recording's folder, as one process writes it."""

    folder: Path
    layers: dict[str, Any]

    def finish(self, order: Sequence[Layer]) -> None:
        """Write the index."""


class ShardWriter:
    """The same among ranks. Where the first cannot begin, or finish, all raise what it says."""

    def __init__(
        self, region: Region, begin: Callable[[], Folder], model: nn.Module, values: bool
    ) -> None:
        """begin: makes the folder, in the first rank."""
        self._region, self._begin = region, begin
        self._modules, self._values = dict(model.named_modules()), values
        self._first: Folder | None = None

    def __enter__(self) -> ShardWriter:
        def begun() -> str:
            self._first = self._begin()
            self._first.__enter__()
            return f"{os.urandom(8).hex()} {self._first.folder}"

        said = self._by_first(begun)
        self._run, _, folder = said.partition(" ")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)  # on another machine it is not there yet
        self.layers: dict[str, ShardLayer] = {} if self._first is None else self._first.layers
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._first is not None:
            self._first.__exit__(*raised)

    def keeping(self, rounding: Rounding, asked: Sequence[Any]) -> AbstractContextManager[None]:
        """While inside, what the watch keeps goes to this rank's files."""
        return shards_kept_by(self._make)

    def _make(self, name: str, index: int, kind: str) -> ShardLayer:
        if name not in self.layers:
            path = shard_file(self.folder, len(self.layers), *self._region.place)
            of = self._projection if self._values else None
            self.layers[name] = ShardLayer(name, index, kind, path, self._run, of)
        return self.layers[name]

    def _projection(self, name: str, width: int) -> Tensor:
        return output_projection(self._modules, name, width)

    def finish(self, order: Sequence[Layer]) -> None:
        """The index, once every rank has written its parts."""
        self._region.tell("")

        def finished() -> str:
            assert self._first is not None
            self._first.finish(order)
            return ""

        self._by_first(finished)

    def opened(self) -> None:
        """Wait until every rank has opened what was written."""
        self._region.tell("")

    def _by_first(self, act: Callable[[], str]) -> str:
        """What the first rank's act returns, in every rank; its error in every rank."""
        mine, error = "", None
        if self._region.first:
            try:
                mine = f"+{act()}"
            except (RegardError, OSError) as wrong:
                mine, error = f"-{wrong}", wrong
        said = self._region.tell(mine)[0]
        if error is not None:
            raise error
        if said[0] == "-":
            raise RegardError(said[1:])
        return said[1:]
