"""Queries and keys that a watch keeps over ranks: in temporary files, each rank its part.

No rank holds the whole: the first maps the parts of all, and reads what is asked for.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..ops.distributed.reading import Shard
from ..ops.region import Region
from .recorded_layer import RecordedLayer
from .shard_files import open_parts
from .shard_layer import ShardLayer, shard_file


class TemporaryShards:
    """The files of one watch, in a folder that the first rank makes."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._made = (
            tempfile.TemporaryDirectory(prefix="regard-", ignore_cleanup_errors=True)
            if region.first
            else None
        )
        told = region.tell(
            "" if self._made is None else f"{self._made.name}\n{os.urandom(8).hex()}"
        )
        folder, _, self._run = told[0].partition("\n")
        self._folder = Path(folder)
        # On another machine it is not there, if the ranks share no folder for temporary files
        self.shared = "no" not in region.tell("yes" if self._folder.is_dir() else "no")
        self._layers: dict[str, ShardLayer] = {}

    def take(self, name: str, index: int, kind: str, shard: Shard) -> RecordedLayer | None:
        """Write this rank's part of a call; in the first rank, the layer of all parts."""
        if name not in self._layers:
            path = shard_file(self._folder, len(self._layers), *self._region.place)
            self._layers[name] = ShardLayer(name, index, kind, path, self._run, None)
        layer = self._layers[name]
        layer.take(shard)
        self._region.tell("")  # every part is there
        if self._made is None:
            return None
        number, (_, ranks) = list(self._layers).index(name), self._region.place
        paths = [shard_file(self._folder, number, rank, ranks) for rank in range(ranks)]
        whole = open_parts(paths)
        if os.name == "posix":  # what is mapped stays until nobody reads it any more
            for path in paths:
                path.unlink()
        return whole
