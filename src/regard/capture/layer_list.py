"""Layers in a model's order, to be picked by place or by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ..call.display.frame import joined
from ..call.observers import Effect, Observer
from ..call.picking import Which
from ..errors import RegardError
from .head_grid import grid, labels, layers_box, observer_named, plot
from .recorded_layer import RecordedLayer
from .recording import Recording


class Named(Protocol):
    """What a list of layers asks of each."""

    name: str
    kind: str
    pattern: bool
    reason: str
    qk: RecordedLayer | None
    observers: tuple[Observer, ...]

    @property
    def index(self) -> int:
        """The number of the layer."""
        ...

    @property
    def q_len(self) -> int:
        """How many queries there were."""
        ...

    def __getitem__(self, which: Which) -> Any:
        """A result."""
        ...


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

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

    def _results(self, which: Which | str) -> list[Any]:
        """Each layer's result of one observer; None of those without a pattern."""
        named = observer_named(which)
        return [layer[named] if layer.pattern else None for layer in self.layers]

    def plot(
        self, which: Which | str = "entropy", ax: Axes | None = None, *, batch: int = 0
    ) -> Axes:
        """Layers × heads: the most telling number of each head, by one observer; the Axes.

            seen.plot("entropy")

        which: an observer that watched, by name, class, itself or place. Of Entropy, MaxScore and
        LogSumExp it is the mean over queries, of TopK the mean of each query's largest weight, of
        Received the largest mean weight of a key, of Distances the share within 8 positions.
        RegardError where matplotlib is missing.
        """
        return plot(grid(self.layers, self._results(which), batch), ax)

    def to_pandas(self, which: Which | str) -> DataFrame:
        """The results of one observer in all layers, as a DataFrame whose index begins with layer.

        Layers by number, or by name where several have one. RegardError where pandas is missing.
        """
        found = zip(labels(self.layers), self._results(which), strict=True)
        single = len({layer.index for layer in self.layers}) == len(self.layers)
        parts = {
            int(name) if single else name: result.to_pandas()
            for name, result in found
            if result is not None
        }
        if not parts:
            raise RegardError("to_pandas: no layer here has a result")
        return joined(parts, "layer")

    def _repr_html_(self) -> str:
        layers, observers = self.layers, next((x.observers for x in self.layers if x.pattern), ())
        pictures = [
            grid(layers, self._results(number), 0)
            for number, observer in enumerate(observers)
            if not isinstance(observer, Effect)  # measuring may take long
        ]
        return layers_box(repr(self), layers, pictures)

    def recording(self, **about: Any) -> Recording:
        """What was kept with `keep_qk=True`, as a Recording; `about` describes the input."""
        if not self._keeps_qk:
            raise RegardError("q and k were not kept; watch with keep_qk=True to make a recording")
        if any(layer.pattern and layer.q_len and layer.qk is None for layer in self.layers):
            raise RegardError("what ranks kept is read in the first of them; make it there")
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
