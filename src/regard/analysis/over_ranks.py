"""A model run by several processes, which torchrun started: each has a part of the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from ..errors import RegardError

T = TypeVar("T")
_MESH: list[Any] = []  # the ranks that texts are run by; none: this process alone


class Done(Exception):
    """This process is not the first: its part is computed, and the first goes on alone."""


@contextmanager
def over(mesh: Any) -> Iterator[None]:
    """Inside, models read texts over the ranks of a mesh."""
    _MESH.append(mesh)
    try:
        yield
    finally:
        _MESH.pop()


def alone(what: str) -> None:
    """RegardError where several processes would do what only one can."""
    if _MESH:
        raise RegardError(f"{what} takes one process; start it without torchrun")


def run(model: Any, inputs: Mapping[str, Any]) -> None:
    """Run a model on its inputs, or each rank on its part of them."""
    with _part(model, inputs) as own:
        model(**own)


@contextmanager
def _part(model: Any, inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """This rank's part of a model's inputs; inside, attention goes over the ranks."""
    if not _MESH:
        yield inputs
        return
    from ..ops.distributed.front import context_parallel
    from ..ops.distributed.shards import shard

    if "decoder_input_ids" in inputs or getattr(model.config, "is_encoder_decoder", False):
        raise RegardError("an encoder-decoder has two sequences; start it without torchrun")
    own = shard(dict(inputs), _MESH[-1])
    taken = inspect.signature(model.forward).parameters
    if "position_ids" not in taken:
        raise RegardError(
            f"{type(model).__name__} takes no position_ids, so no part of a text; start it without "
            "torchrun"
        )
    with context_parallel(_MESH[-1]):
        yield own


def of_first(result: Callable[[], T]) -> T:
    """What the first process makes of it; the others are done."""
    if _MESH and _MESH[-1].get_local_rank():
        raise Done
    return result()


def recorded(model: Any, inputs: Mapping[str, Any], write: Callable[[Any], T]) -> T:
    """A recording, of which each process writes its part, layer by layer; the first opens it."""
    with _part(model, inputs) as own:
        made = write(own)
    return of_first(lambda: made)
