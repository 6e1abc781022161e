"""Tensors as a tidy pandas DataFrame: one row an observation, its place in a named index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import RegardError

Start = int | tuple[int, ...]  # of the first of a dimension's positions; or one per batch item


@dataclass(frozen=True, eq=False)
class Table:
    """What becomes a DataFrame.

    index: the name of each dimension, in order, and its labels: those of a sequence, or numbers
    from a start on; where that is a tuple, each batch item (dimension 0) has its own. columns: by
    name, tensors of those dimensions. kept: bool tensor, False for what holds nothing.
    """

    index: Mapping[str, Start | Sequence[Any]]
    columns: Mapping[str, Tensor]
    kept: Tensor | None = None


def first_of(start: Start, batch: int) -> int:
    """Where the first query of one batch item stands."""
    return start if isinstance(start, int) else start[batch]


def frame(table: Table) -> Any:
    """The DataFrame. RegardError where pandas is missing."""
    pandas = needed()
    shape = next(iter(table.columns.values())).shape
    started = [name for name, labels in table.index.items() if isinstance(labels, tuple)]
    if started:
        return pandas.concat([_item(table, started[0], b) for b in range(shape[0])])
    labels = [
        range(given, given + size) if isinstance(given, int) else given
        for given, size in zip(table.index.values(), shape, strict=True)
    ]
    index = pandas.MultiIndex.from_product(labels, names=list(table.index))
    columns = {name: _flat(tensor) for name, tensor in table.columns.items()}
    made = pandas.DataFrame(columns, index=index)
    return made if table.kept is None else made[_flat(table.kept)]


def needed() -> Any:
    """The module pandas; RegardError where it is missing."""
    try:
        import pandas
    except ImportError as error:
        raise RegardError('to_pandas needs pandas: pip install "regard[plot]"') from error
    return pandas


def joined(parts: dict[Any, Any], name: str) -> Any:
    """Frames under one more level of the index, with the keys of `parts`."""
    return needed().concat(parts, names=[name])


def _item(table: Table, started: str, b: int) -> Any:
    """The rows of one batch item, whose positions start at its own."""
    starts: Any = table.index[started]
    index = dict(table.index) | {next(iter(table.index)): b, started: starts[b]}
    columns = {name: tensor[b : b + 1] for name, tensor in table.columns.items()}
    return frame(Table(index, columns, None if table.kept is None else table.kept[b : b + 1]))


def _flat(tensor: Tensor) -> Any:
    held = tensor.detach().cpu()
    if held.is_floating_point() and held.element_size() < 4:  # numpy has no bfloat16
        held = held.float()
    return held.reshape(-1).numpy()
