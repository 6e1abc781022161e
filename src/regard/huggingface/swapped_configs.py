"""A watched Hugging Face model's configs: copies that name our functions, for one block."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .config import NAME

# Of masks that are left out, or copied on the way: (q_len, k_len) → starts
SKIPPED = threading.local()


class Watching(str):
    """The name of a model's own attention implementation, which dictionaries take for ours.

    It equals both names and has the hash of ours: whoever compares it finds the model's own, and
    transformers' registries answer with our `attend` and `mask`, which call those of the model. So
    nothing is registered or patched, and no other model is touched. Once the block is over it is
    what any string is: copies of the model that were made inside still hold it.
    """

    over = False

    def __hash__(self) -> int:
        return str.__hash__(self) if self.over else hash(NAME)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or (not self.over and other == NAME)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __deepcopy__(self, memo: Any) -> Watching:
        return self  # generation copies configs, and makes masks by them

    def __reduce__(self) -> Any:
        return str, (self.own,)  # what is saved holds the plain name

    @property
    def own(self) -> str:
        """The name itself, as any other string."""
        return "".join(self)


def watched_name(*holders: Any) -> Watching | None:
    """The model's own implementation, if it is being watched."""
    for holder in holders:
        for config in vars(holder).values() if isinstance(holder, nn.Module) else ():
            name = getattr(config, "_attn_implementation_internal", None)
            if isinstance(name, Watching) and not name.over:
                return name
    return None


@contextlib.contextmanager
def using_regard(model: nn.Module) -> Iterator[None]:
    """Let all Hugging Face models in a module find our functions, on copies of their configs."""
    memo: dict[int, Any] = {}
    names: dict[int, Watching] = {}
    swapped: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            for attribute, config in list(vars(module).items()):
                if isinstance(config, PreTrainedConfig):
                    own = copy.deepcopy(config, memo)
                    _set(own, names)
                    swapped.append((module, attribute, config))
                    vars(module)[attribute] = own
        yield
    finally:
        for module, attribute, config in swapped:
            vars(module)[attribute] = config
        for name in names.values():
            name.over = True
        vars(SKIPPED).clear()


def _set(config: PreTrainedConfig, names: dict[int, Watching]) -> None:
    """Name our functions in a config and those below it; names: the new names by config."""
    own = config._attn_implementation_internal
    # A copy of a model, made while that is watched, has its name
    if id(config) not in names and (isinstance(own, Watching) or own != NAME):
        config._attn_implementation_internal = names[id(config)] = Watching(own or "eager")
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            _set(getattr(config, key), names)
