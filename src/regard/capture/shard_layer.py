"""One rank's part of a recorded layer, written as it comes: its rows, its keys, what it read.

A layer of a recording that several ranks wrote is `layer-000.rank0of2.safetensors` and so on, a
file a rank; `shard_files` opens them as one layer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..call.observers import NormTopK
from ..call.op_schema import pack
from ..ops.distributed.reading import OwnRows, Shard
from .chunk_json import to_json
from .pyramid import Results
from .recorded_layer import Chunk
from .stored import write

NAME = re.compile(r"layer-(\d{3,6})\.rank(\d{1,6})of(\d{1,6})\.safetensors")
_OPEN = threading.local()


def shard_file(folder: Path, number: int, rank: int, ranks: int) -> Path:
    """The file of a rank's part of a layer."""
    return folder / f"layer-{number:03}.rank{rank}of{ranks}.safetensors"


@contextmanager
def shards_kept_by(make: Callable[[str, int, str], ShardLayer]) -> Iterator[None]:
    """While inside, this thread's watches keep a rank's part in the layers that `make` makes."""
    before, _OPEN.make = getattr(_OPEN, "make", None), make
    try:
        yield
    finally:
        _OPEN.make = before


def shard_maker() -> Callable[[str, int, str], ShardLayer] | None:
    """What makes the layers that keep a rank's part; None where the first rank keeps all."""
    return getattr(_OPEN, "make", None)


class ShardLayer:
    """A layer whose part of this rank goes to a file when it comes.

    run: what tells the parts of one recording from another's. projection: W_O of a module, where
    values are kept. parts: files that are written.
    """

    def __init__(
        self, name: str, index: int, kind: str, path: Path, run: str,
        projection: Callable[[str, int], Tensor] | None,
    ) -> None:  # fmt: skip
        self.name, self.index, self.kind, self.path = name, index, kind, path
        self._run, self._projection = run, projection
        self.parts = 0

    def take(self, shard: Shard) -> None:
        """Write this rank's part of a call; an earlier sequence's is replaced."""
        self.parts += 1
        tensors = self._keys(shard)
        said = {"name": self.name, "index": self.index, "kind": self.kind, "ranks": shard.ranks}
        # The n-th sequence of a run is that of all its ranks
        said |= {"rank": shard.rank, "run": f"{self._run}.{self.parts}"}
        said["keys"] = [[start, start + key.shape[2]] for start, key in shard.keys]
        said["chunks"] = [_row(shard, rows, n, tensors) for n, rows in enumerate(shard.rows)]
        said["results"] = [_seen(rows, n, tensors) for n, rows in enumerate(shard.rows)]
        for name in ("sum", "count") if shard.received else ():
            tensors[f"received.{name}"] = torch.cat([getattr(r, name) for r in shard.received], 2)
        said["q_len"] = shard.place.q_len if shard.received else None
        write(self.path, tensors, said)

    def _keys(self, shard: Shard) -> dict[str, Tensor]:
        """Keys, and where they are kept values and ‖W_O v‖, of this rank's positions."""
        if not shard.keys:
            return {}
        tensors = {"key": torch.cat([key for _, key in shard.keys], 2)}
        if self._projection is not None:
            value = torch.cat([value for _, value in shard.values], 2)
            weights = NormTopK(1, self._projection(self.name, shard.place.heads * value.shape[-1]))
            tensors |= {"value": value, "norm": weights.norms(value.float(), shard.place.heads)}
        return tensors

    def close(self) -> None:
        """Everything is written already."""


def _row(shard: Shard, rows: OwnRows, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The calls of a range of queries, on all keys: as JSON, and its tensors."""
    start = shard.place.key_start
    chunk = Chunk(rows.call.query, rows.lse, pack(rows.call), (start, start + shard.place.k_len))
    return to_json(chunk, number, tensors)


def _seen(rows: OwnRows, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What was read of a range of queries: as JSON, and its tensors."""
    seen = Results(*rows.seen)
    tensors.update({f"{number}.{name}": held for name, held in seen.tensors().items()})
    if seen.distances is None or seen.sums is None:
        return {}
    cells: Sequence[Any] = (seen.sums.rows, seen.sums.cols)
    rows_of, cols_of = ([c.first, c.count, c.size] for c in cells)
    return {"edges": list(seen.distances.edges), "rows": rows_of, "cols": cols_of}
