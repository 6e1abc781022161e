"""Layers × heads: one telling number of each head of a model, drawn; and results of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..call.display.html import box, svg, table
from ..call.display.picture import Picture, Side
from ..call.observers import Observer
from ..call.picking import Which
from ..errors import RegardError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 16  # layers of a table


class Named(Protocol):
    """What a layer says of itself."""

    name: str
    pattern: bool
    reason: str

    @property
    def index(self) -> int:
        """The number of the layer."""
        ...


def observer_named(which: Which | str) -> Which:
    """An observer's class by its name, such as "entropy" or "TopK"; all else as it is."""
    if not isinstance(which, str):
        return which
    classes = {c.__name__.lower(): c for c in _below(Observer) if not c.__name__.startswith("_")}
    found = classes.get(which.lower().replace("_", ""))
    if found is None:
        raise RegardError(f"{which!r} is no observer; there are {', '.join(sorted(classes))}")
    return found


def _below(kind: type[Observer]) -> list[type[Observer]]:
    return [c for sub in kind.__subclasses__() for c in (sub, *_below(sub))]


def labels(layers: Sequence[Named]) -> list[str]:
    """Layers by their numbers, or by their names where several have one number."""
    numbers = [layer.index for layer in layers]
    return [
        str(layer.index) if len(set(numbers)) == len(numbers) else layer.name or "the model"
        for layer in layers
    ]


def grid(layers: Sequence[Named], results: Sequence[Any], batch: int) -> Picture:
    """One number a head, of each layer's result; nothing where a layer has none (None)."""
    rows: list[Tensor] = []
    unit = ""
    for result in results:
        if result is None:
            rows.append(torch.zeros(0, dtype=torch.float64, device="cpu"))
            continue
        numbers, unit = result._per_head()
        if not 0 <= batch < len(numbers):
            raise RegardError(f"plot: batch is {batch}; the result has {len(numbers)}")
        rows.append(numbers[batch].detach().double().cpu())
    if not unit:
        raise RegardError("plot: no layer here has a result to draw")
    values = torch.full(
        (len(rows), max(map(len, rows))), torch.nan, dtype=torch.float64, device="cpu"
    )
    for row, numbers in zip(values, rows, strict=True):
        row[: len(numbers)] = numbers
    return Picture(values, Side("layer", labels=tuple(labels(layers))), Side("head"), unit)


def plot(picture: Picture, ax: Axes | None) -> Axes:
    """Draw the grid; returns the Axes. RegardError where matplotlib is missing."""
    from ..call.display.plots import draw

    return draw(picture, ax)


def layers_box(title: str, layers: Sequence[Any], pictures: Sequence[Picture] = ()) -> str:
    """Layers as a table below a title, and grids of their heads."""
    rows = [
        (layer.name or "the model", layer.kind, layer.heads, layer.q_len, layer.k_len, "")
        if layer.pattern
        else (layer.name, "no pattern", "", "", "", layer.reason)
        for layer in layers[:MOST]
    ]
    listed = table(("layer", "", "heads", "q_len", "k_len", ""), rows, max(len(layers) - MOST, 0))
    return box(title, *map(svg, pictures), listed)
