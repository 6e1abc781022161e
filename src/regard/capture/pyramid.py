"""What is read beside a recording while the model runs, by observers inside the forward.

The pooled maps (sum and max) are the top of a pyramid: cells of at least `LEAST` tokens, at most
`MOST` of them a side, so that memory does not grow with N². Every coarser zoom is pooled from them,
exactly; every finer one is computed again from q, k and lse. Where values are kept there are two
more, of weight · ‖W_O v‖ (`by_value.pooled_maps`), in the same cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..call.brief import Brief
from ..call.edge_results import TopKSeen
from ..call.observers import Distances, Entropy, Map, Observer, Received, TopK
from ..call.results import (
    Cells,
    DistancesSeen,
    EntropySeen,
    MapSeen,
    ReceivedSeen,
)
from ..engines.second_pass.pooled import SIDE
from .beams import picked
from .saved_files import Fields
from .stored import read

LEAST, MOST = 64, 2048  # the side of a cell; cells a side: 2,048 of 64 at 131,072 tokens
_BY_VALUE = {"value_sums.weights": "sum", "value_maxima.weights": "max"}
_ALL_MAPS = {"sums.weights": "sum", "maxima.weights": "max"} | _BY_VALUE
BINS = 20  # of distances: the last one begins at 2**18


def observers(k: int) -> tuple[Observer, ...]:
    """What is read beside a recording, in the order of the fields of `Results`."""
    maps = (Map(MOST, MOST, "sum", LEAST), Map(MOST, MOST, "max", LEAST))
    return (TopK(k), Received(), Entropy(), Distances(BINS), *maps)


@dataclass(frozen=True, eq=False)
class Results(Brief):
    """What the `observers` saw of a layer, all batch items and heads; None where nothing looked.

    value_sums, value_maxima: maps of weight · ‖W_O v‖, in the cells of `sums` and `maxima`.
    """

    top: TopKSeen | None = None
    received: ReceivedSeen | None = None
    entropy: EntropySeen | None = None
    distances: DistancesSeen | None = None
    sums: MapSeen | None = None
    maxima: MapSeen | None = None
    value_sums: MapSeen | None = None
    value_maxima: MapSeen | None = None

    def __bool__(self) -> bool:
        return self.top is not None

    def then(self, later: Results) -> Results:
        """With what was seen of later queries."""
        if not (self and later):
            return self if self else later
        pairs = ((getattr(self, f.name), getattr(later, f.name)) for f in fields(self))
        return Results(*(None if a is None or b is None else a.then(b) for a, b in pairs))

    def pick(self, rows: list[int]) -> Results:
        """With the batch made of these of its items."""
        if not self:
            return self
        return Results(*(picked(getattr(self, f.name), rows) for f in fields(self)))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that they have in a file."""
        return {
            f"{f.name}.{inner.name}": held
            for f in fields(self) if (seen := getattr(self, f.name)) is not None
            for inner in fields(seen) if isinstance(held := getattr(seen, inner.name), Tensor)
        }  # fmt: skip

    def said(self) -> dict[str, Any]:
        """What JSON says of them."""
        if self.received is None or self.distances is None or self.sums is None:
            return {}
        return {
            "q_len": self.received.q_len,
            "key_start": self.received.key_start,
            "edges": list(self.distances.edges),
            "rows": [self.sums.rows.first, self.sums.rows.count, self.sums.rows.size],
            "cols": [self.sums.cols.first, self.sums.cols.count, self.sums.cols.size],
        }

    @classmethod
    def heard(cls, said: Fields, given: Mapping[str, Tensor], sizes: Sequence[int]) -> Results:
        """From JSON and the file's tensors; sizes: batch, heads, q_len of the file.

        ValueError where they do not fit together.
        """
        if not said:
            return cls()
        edges = tuple(said.integers("edges"))
        rows, cols = (Cells(*said.integers(name, 3)) for name in ("rows", "cols"))
        if min(rows.size, cols.size, rows.count, cols.count) < 1:
            raise ValueError("cells of no size")
        batch, heads, q_len = sizes
        k_len = given["received.sum"].shape[-1] if given["received.sum"].dim() else 0
        row, map_shape = (batch, heads, q_len), (batch, heads, rows.count, cols.count)
        k = given["top.weights"].shape[-1] if given["top.weights"].dim() else 0
        shapes = {
            "top.indices": (*row, k), "top.weights": (*row, k), "top.rest": row, "top.sink": row,
            "received.sum": (batch, heads, k_len), "received.count": (batch, heads, k_len),
            "entropy.values": row, "distances.past": (batch, heads, len(edges)),
            "distances.future": (batch, heads, len(edges)), "sums.weights": map_shape,
            "maxima.weights": map_shape,
        }  # fmt: skip
        by_value = [name for name in _BY_VALUE if name in given]
        shapes |= dict.fromkeys(by_value, map_shape)
        for name, shape in shapes.items():
            whole = name in ("top.indices", "received.count")
            dtype = torch.int32 if whole else given[name].dtype
            wrong = given[name].shape != shape or given[name].dtype != dtype
            if wrong or (not whole and not dtype.is_floating_point):
                raise ValueError(f"{name} is {tuple(given[name].shape)}; it must be {shape}")
        top = (given[f"top.{n}"] for n in ("indices", "weights", "rest", "sink"))
        return cls(
            TopKSeen(*top),
            ReceivedSeen(
                given["received.sum"], given["received.count"], said.count("q_len"),
                said.count("key_start"),
            ),
            EntropySeen(given["entropy.values"]),
            DistancesSeen(given["distances.past"], given["distances.future"], edges),
            *(
                MapSeen(given[name], rows, cols, reduce, (MOST, MOST)) if name in given else None
                for name, reduce in _ALL_MAPS.items()
            ),
        )  # fmt: skip

    def tile(
        self, starts: tuple[int, int], where: Sequence[int], reduce: str, batch: int,
        by_value: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """A tile (SIDE, SIDE) of a coarser zoom; None where it is to be computed again.

        starts: positions of the first recorded query and key; where: head, zoom, row, col.
        by_value: of weight · ‖W_O v‖, not of weights.
        """
        sums, maxima = (
            (self.value_sums, self.value_maxima) if by_value else (self.sums, self.maxima)
        )
        held = sums if reduce == "sum" else maxima
        head, zoom, *corner = where
        cell = 1 << zoom
        if held is None or cell < max(held.rows.size, held.cols.size):
            return None
        if any(start % cell for start in starts):  # cells of other borders
            return None
        part, placed = held.weights[batch, head], []
        for dim, cells in enumerate((held.rows, held.cols)):
            # The tile's cells, each of `factor` ones that are stored, some before or after them
            factor = cell // cells.size
            first = starts[dim] // cells.size + corner[dim] * SIDE * factor - cells.first
            last = first + SIDE * factor
            part = part.narrow(dim, begin := min(max(first, 0), cells.count),
                               max(min(last, cells.count) - begin, 0))  # fmt: skip
            before = min(max(-first, 0), SIDE * factor)
            placed.append((factor, before, SIDE * factor - before - part.shape[dim]))
        part = read(part)
        for dim, (factor, before, after) in enumerate(placed):
            pad = (before, after) if dim else (0, 0, before, after)
            padded = torch.nn.functional.pad(part, pad).unflatten(dim, (SIDE, factor))
            part = padded.sum(dim + 1) if reduce == "sum" else padded.amax(dim + 1)
        return part.float()
