"""What `watch` saw: one `Layer` a module that computes attention, filled call by call."""

from __future__ import annotations

import fnmatch
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .call import Call
from .errors import RegardError
from .observers import Observer
from .recording import RecordedLayer, Recording
from .weigh import weigh

_LOCAL = threading.local()


def active() -> list[Watched]:
    """The watches that this thread is inside of, the newest first."""
    watches: list[Watched] = getattr(_LOCAL, "watches", [])
    return watches[::-1]


@dataclass(eq=False)
class Layer:
    """One module that computes attention.

    name: its qualified name; index: the first number in it (its layer), kind: "self" or "cross".
    pattern: False for a layer without softmax attention; `reason` says why, and `seen` is empty.
    heads, kv_heads, q_len (queries so far), k_len (the last call's keys).
    """

    name: str
    kind: str = "self"
    pattern: bool = True
    reason: str = ""
    heads: int = 0
    kv_heads: int = 0
    q_len: int = 0
    k_len: int = 0
    qk: RecordedLayer | None = None
    _results: list[tuple[Any, ...]] = field(default_factory=list, repr=False)
    _end: int = field(default=0, repr=False)
    _last_key: Tensor | None = field(default=None, repr=False)

    @property
    def index(self) -> int:
        """The number of the layer: the first in its name (encoder.layer.3.attention.self: 3)."""
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(found[1]) if found else 0

    @property
    def seen(self) -> tuple[Any, ...]:
        """The results in the order of `observe`; over decode steps, rows appended, columns added."""
        if len(self._results) > 1:
            merged = [reduce(lambda a, b: a.then(b), parts) for parts in zip(*self._results)]  # noqa: B905
            self._results = [tuple(merged)]
        return self._results[0] if self._results else ()

    def add(self, call: Call, lse: Tensor, keep_qk: bool) -> None:
        """Take in a call: it continues the last one, or begins anew."""
        place = call.place
        continues = self.q_len > 0 and place.query_start == self._end and place.query_start > 0
        if continues:
            self._check_same_batch(call)
        elif self.q_len and 0 < place.query_start < self._end:
            raise RegardError(
                f"{self.name}: queries from position {place.query_start} were computed twice "
                "(assisted decoding?); this way of generating cannot be watched"
            )
        if not continues:
            self._results, self.q_len, self.qk = [], 0, None
        self._results.append(weigh(call, lse))
        if keep_qk:
            self.qk = self.qk or RecordedLayer(self.name, self.index, self.kind)
            self.qk.add(call, lse)
        self.heads, self.kv_heads = place.heads, place.kv_heads
        self.q_len, self.k_len = self.q_len + place.q_len, place.k_len
        self._end = place.query_start + place.q_len
        if place.k_len and place.q_len:
            self._last_key = call.key[:, :, self._own(call, self._end - 1)].detach().clone()

    def _own(self, call: Call, position: int) -> int:
        """The index of the key at a query's position; a cross layer's keys never change."""
        return 0 if self.kind == "cross" else position - call.place.key_start

    def _check_same_batch(self, call: Call) -> None:
        """A cache whose batch was reordered (beam search) would append rows to the wrong item."""
        at = self._own(call, self._end - 1)
        if self._last_key is None or not 0 <= at < call.place.k_len:
            return
        now = call.key[:, :, at].detach()
        if now.shape != self._last_key.shape or not torch.equal(now, self._last_key):
            raise RegardError(
                f"{self.name}: the cache was reordered between two steps (beam search?); "
                "generate with num_beams=1 to watch"
            )


class Watched:
    """The layers that a watched model ran, in the model's order: iterate, index by place or name."""

    def __init__(
        self,
        model: nn.Module,
        observe: Sequence[Observer],
        layers: Sequence[int | str] | None,
        keep_qk: bool,
    ) -> None:
        self.observe, self.keep_qk = tuple(observe), keep_qk
        self._wanted = None if layers is None else list(layers)
        self._model = type(model).__name__
        self._names = {id(m): n for n, m in model.named_modules()}
        self._order = {n: i for i, n in enumerate(self._names.values())}
        self._blocks = _blocks(model)
        self._layers: dict[str, Layer] = {}
        self._touched: set[str] = set()
        self._continuing = False

    def name_of(self, module: nn.Module) -> str | None:
        """The qualified name of a module of the watched model; None for a stranger."""
        return self._names.get(id(module))

    def wants(self, name: str) -> bool:
        """Whether `layers` names this module, by its layer's number, its name or a pattern."""
        self._touched.add(name)
        return self._asked(Layer(name))

    def position(self, name: str, kind: str, start: int | None) -> int:
        """Where a call's queries stand. A cross layer follows the self-attention beside it."""
        if kind == "self":
            self._continuing = bool(start)
            return start or 0
        layer = self._layers.get(name)
        return layer._end if layer and self._continuing else 0

    def record(self, name: str, kind: str, call: Call, lse: Tensor) -> None:
        """Take in a call of the module `name`."""
        layer = self._layers.setdefault(name, Layer(name, kind))
        layer.add(call, lse, self.keep_qk)

    def __enter__(self) -> Watched:
        _LOCAL.watches = [*getattr(_LOCAL, "watches", []), self]
        return self

    def __exit__(self, *_: object) -> None:
        _LOCAL.watches = [w for w in _LOCAL.watches if w is not self]

    @property
    def touched(self) -> bool:
        """Whether any attention at all was computed, observed or not."""
        return bool(self._touched)

    @property
    def layers(self) -> list[Layer]:
        """The layers in the model's order, those without softmax attention among them."""
        silent = []
        for container, blocks in self._blocks.items():
            spoken = {n for n in self._touched if n.startswith(container + ".")}
            if spoken:
                silent += [
                    Layer(name, pattern=False, reason=reason)
                    for name, reason in blocks
                    if not any(n == name or n.startswith(name + ".") for n in spoken)
                ]
        found = [*self._layers.values(), *filter(self._asked, silent)]
        return sorted(found, key=lambda layer: self._order.get(layer.name.split("#")[0], 0))

    def _asked(self, layer: Layer) -> bool:
        return self._wanted is None or any(
            w == layer.index if isinstance(w, int) else fnmatch.fnmatch(layer.name, w)
            for w in self._wanted
        )

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, which: int | str) -> Layer:
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
        if not self.keep_qk:
            raise RegardError("q and k were not kept; watch with keep_qk=True to make a recording")
        layers = [
            layer.qk or RecordedLayer(layer.name, layer.index, layer.kind, False, layer.reason)
            for layer in self.layers
        ]
        return Recording(layers, {"model": self._model} | about)


def _blocks(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """The outermost lists of blocks: name → (block's name, why it would have no pattern)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(outer + ".") for outer in found
        ):
            found[name] = [
                (
                    f"{name}.{n}",
                    f"{type(block).__name__} computes no softmax attention: {_parts(block)}",
                )
                for n, block in module.named_children()
            ]
    return found


def _parts(block: nn.Module) -> str:
    return "its parts are " + ", ".join(
        dict.fromkeys(type(part).__name__ for part in block.children())
    )
