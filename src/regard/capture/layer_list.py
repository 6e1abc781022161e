"""Layers in a model's order, to be picked by place or by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from ..errors import RegardError
from .recorded_layer import RecordedLayer
from .recording import Recording


class Named(Protocol):
    """What a list of layers asks of each."""

    name: str
    kind: str
    pattern: bool
    reason: str
    qk: RecordedLayer | None

    @property
    def index(self) -> int:
        """The number of the layer."""
        ...


L = TypeVar("L", bound=Named)


class LayerList(Generic[L]):
    """The layers that ran, in the model's order: iterate, index by place or name."""

    def __init__(self, model: str, keep_qk: bool) -> None:
        self._model, self._keeps_qk = model, keep_qk

    @property
    def layers(self) -> Sequence[L]:
        """The layers in the model's order."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[L]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, which: int | str) -> L:
        layers = self.layers
        if isinstance(which, int) and -len(layers) <= which < len(layers):
            return layers[which]
        for layer in layers:
            if layer.name == which:
                return layer
        names = ", ".join(layer.name for layer in layers) or "none yet"
        raise KeyError(f"no layer {which!r}; watched were: {names}")

    def recording(self, **about: Any) -> Recording:
        """What was kept with `keep_qk=True`, as a Recording; `about` describes the input."""
        if not self._keeps_qk:
            raise RegardError("q and k were not kept; watch with keep_qk=True to make a recording")
        layers = [
            layer.qk or RecordedLayer(layer.name, layer.index, layer.kind, False, layer.reason)
            for layer in self.layers
        ]
        return Recording(layers, {"model": self._model} | about)


class Forward(LayerList[L]):
    """The layers of one sequence that a watched model read, whether in one forward or in steps."""

    def __init__(self, layers: Sequence[L], keep_qk: bool, model: str) -> None:
        super().__init__(model, keep_qk)
        self._found = list(layers)

    @property
    def layers(self) -> Sequence[L]:
        """The layers in the model's order."""
        return self._found
