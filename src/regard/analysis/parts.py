"""What reads and what is read: texts in words, and the heads by kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .words import Words

if TYPE_CHECKING:
    from ..capture.recorded_layer import RecordedLayer

Heads = list[tuple[int, int]]


@dataclass(frozen=True)
class ReadText:
    """A text that is read, with its words, the first of which has the number ``first``."""

    text: str
    words: Words
    first: int


@dataclass(frozen=True)
class Part:
    """The heads of one kind, "self", "encoder", "decoder" or "cross", and what they read.

    ``layers`` are the heads shown of each layer shown, ``names`` the layers' modules. ``means``,
    ``received``, ``sinks`` and ``queries`` (heads, words of ``keys``) are as in ``Columns``, over
    all of them.
    """

    kind: str
    layers: dict[int, list[int]]
    names: dict[int, str]
    readers: ReadText
    keys: ReadText
    means: Tensor
    received: Tensor
    sinks: Tensor
    queries: Tensor

    @property
    def heads(self) -> Heads:
        """The heads shown, (layer, head)."""
        return [(layer, head) for layer, heads in self.layers.items() for head in heads]

    @property
    def special(self) -> Tensor:
        """Which words of ``keys`` are special tokens: bool (words,)."""
        return torch.tensor(
            [word.special for word in self.keys.words], dtype=torch.bool, device="cpu"
        )

    @property
    def sink(self) -> Tensor:
        """Which words are sinks in at least half of the heads shown: bool (words,)."""
        return self.sinks.float().mean(0) >= 0.5

    @property
    def apart(self) -> Tensor:
        """The words named apart, special tokens and sinks: bool (words,)."""
        return self.special | self.sink


def kind_of(layer: RecordedLayer, texts: int) -> str:
    """What a layer reads: "self"; of two texts "encoder", "decoder" or "cross"."""
    if texts == 1:
        return "self"
    if layer.kind == "cross":
        return "cross"
    return "decoder" if "decoder" in layer.name.split(".") else "encoder"
