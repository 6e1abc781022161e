"""What `watch` saw: one `Layer` a module that computes attention, filled call by call."""

from __future__ import annotations

import contextlib
import fnmatch
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .brief import shortened
from .call import Call
from .errors import RegardError
from .masks import Mask
from .observers import NormTopK, Observer
from .picking import Which, pick
from .projection import output_projection
from .recording import RecordedLayer, Recording
from .tracking import Tracker, module_of
from .weigh import weigh

_LOCAL = threading.local()


def active() -> list[Watched]:
    """The watches that this thread is inside of, the newest first."""
    watches: list[Watched] = getattr(_LOCAL, "watches", [])
    return watches[::-1]


class Cut(NamedTuple):
    """Edges to remove from a layer: those that `mask` shows.

    layer: its number, its module's name, or a pattern. `Cut(3, Edges([(10, 1)]) & Heads([1]))` cuts
    one edge of head 3.1; `Cut(3, Heads([1]))` the whole head, whose output becomes 0.
    """

    layer: int | str
    mask: Mask


@dataclass(eq=False, repr=False)
class Layer:
    """One module that computes attention.

    name: its qualified name (`tracking.Tracker.call`); index: its layer, the first number in the
    name, or, where one module serves every layer, which run it is. kind: "self" or "cross".
    pattern: False for a layer without softmax attention; `reason` says why, and `seen` is empty.
    heads, kv_heads, q_len (queries so far), k_len (the last call's keys). layer[TopK] is the result
    of that observer: by its class, itself, or its place.
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
    observers: tuple[Observer, ...] = ()
    _results: list[tuple[Any, ...]] = field(default_factory=list, repr=False)
    _end: int = field(default=0, repr=False)
    _last_key: Tensor | None = field(default=None, repr=False)

    def __getitem__(self, which: Which) -> Any:
        if not self.pattern:
            raise RegardError(f"{self.name} has no results: {self.reason}")
        return pick(self.seen, self.observers, which, self.name or "the model")

    def __repr__(self) -> str:
        if not self.pattern:
            return f"Layer({self.name!r}, no pattern: {shortened(self.reason, 80)})"
        sizes = f"heads {self.heads}, q_len {self.q_len}, k_len {self.k_len}"
        return f"Layer({self.name!r}, {self.kind}, {sizes}, observed by {list(self.observers)})"

    @property
    def index(self) -> int:
        """The number of the layer (encoder.layer.3.attention.self: 3)."""
        again = re.search(r"#(\d+)", self.name)
        if again:
            return int(again[1]) - 1
        found = re.search(r"(?:^|\.)(\d+)(?:\.|~|$)", self.name)
        return int(found[1]) if found else 0

    @property
    def seen(self) -> tuple[Any, ...]:
        """The results in the order of `observe`, decode steps merged."""
        if len(self._results) > 1:
            merged = [reduce(lambda a, b: a.then(b), parts) for parts in zip(*self._results)]  # noqa: B905
            self._results = [tuple(merged)]
        return self._results[0] if self._results else ()

    def add(
        self, call: Call, lse: Tensor, out: Tensor | None, seen: Mapping[int, Any], keep_qk: bool
    ) -> None:
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
        self._results.append(weigh(call, lse, out, seen=seen))
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
        if now.shape == self._last_key.shape:
            # What a cache has evicted is 0 in the call
            now = now.where((now != 0).any(-1, keepdim=True), self._last_key)
        if now.shape != self._last_key.shape or not torch.equal(now, self._last_key):
            raise RegardError(
                f"{self.name}: the cache was reordered between two steps (beam search?); "
                "generate with num_beams=1 to watch"
            )


class Watched:
    """The layers that a watched model ran, in its order: iterate, index by place or name."""

    def __init__(
        self,
        model: nn.Module,
        observe: Sequence[Observer],
        layers: Sequence[int | str] | int | str | None,
        keep_qk: bool,
        cut: Sequence[Cut] = (),
        verify: bool = False,
    ) -> None:
        self.verifying, self.within = verify, False
        self.observe, self.keep_qk = tuple(observe), keep_qk
        self._cuts, self._done = tuple(cut), set[int]()
        self.modules = dict(model.named_modules())
        self._wanted = _several(layers)
        self._model = type(model).__name__
        self.tracker = Tracker(model)
        self._order = {n: i for i, n in enumerate(self.tracker.names.values())}
        self._blocks = _blocks(model)
        self._layers: dict[str, Layer] = {}
        self._touched: set[str] = set()
        self._continuing = False

    def call_of(self, module: nn.Module) -> str | None:
        """The name of the call that a module of the watched model makes; None for a stranger."""
        name = self.tracker.names.get(id(module))
        return None if name is None else self.tracker.call(name)

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

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """While inside, the model's own attention runs, and what it calls is not recorded apart."""
        self.within = True
        try:
            yield
        finally:
            self.within = False

    def asking(self, name: str, call: Call) -> Call:
        """A call of the module `name`, with the observers of this watch."""
        return replace(call, observers=tuple(self._fitted(o, name, call) for o in self.observe))

    def record(
        self,
        name: str,
        kind: str,
        call: Call,
        lse: Tensor,
        out: Tensor | None = None,
        seen: Mapping[int, Any] = MappingProxyType({}),
    ) -> None:
        """Take in a call of the module `name`; out (batch, heads, q_len, v_dim), as computed.

        seen: results that the engine gathered already, by the number of their observer.
        """
        layer = self._layers.setdefault(name, Layer(name, kind, observers=self.observe))
        layer.add(self.asking(name, call), lse, out, seen, self.keep_qk)

    def _fitted(self, observer: Observer, name: str, call: Call) -> Observer:
        """A NormTopK with the module's own output projection."""
        if not isinstance(observer, NormTopK) or observer.projection is not None:
            return observer
        width = call.place.heads * (0 if call.value is None else call.value.shape[-1])
        return replace(observer, projection=output_projection(self.modules, name, width))

    def cut_of(self, name: str) -> Mask | None:
        """What stays visible in a call of this module, where something is cut."""
        shown: Mask | None = None
        for number, cut in enumerate(self._cuts):
            if self._matches(cut.layer, Layer(name)):
                self._done.add(number)
                shown = ~cut.mask if shown is None else shown & ~cut.mask
        return shown

    @property
    def undone(self) -> list[Cut]:
        """The cuts that matched no call."""
        return [c for number, c in enumerate(self._cuts) if number not in self._done]

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
        found = [*self._layers.values(), *filter(self._asked, self._silent())]
        return sorted(found, key=lambda layer: self._place(layer.name))

    def _silent(self) -> list[Layer]:
        """The layers that ran without softmax attention."""
        silent = []
        for container, blocks in self._blocks.items():
            spoken = {n for n in self._touched if _inside(n, container)}
            for block in blocks:
                ran = block.name in self.tracker.ran
                heard = any(n == block.name or _inside(n, block.name) for n in spoken)
                if ran and not heard and (spoken or block.has_attention):
                    silent.append(Layer(block.name, pattern=False, reason=block.reason))
        return silent

    def _asked(self, layer: Layer) -> bool:
        return self._wanted is None or any(self._matches(w, layer) for w in self._wanted)

    def _matches(self, which: int | str, layer: Layer) -> bool:
        """Whether a layer's number (below 0: from the end of its list), or a pattern, means it."""
        if isinstance(which, str):
            return fnmatch.fnmatch(layer.name, which)
        if which >= 0:
            return which == layer.index
        counts = (len(blocks) for at, blocks in self._blocks.items() if _inside(layer.name, at))
        return layer.index - next(counts, 0) == which

    def check_wanted(self) -> None:
        """RegardError where `layers` asked for one that did not run."""
        ran = [*map(Layer, sorted(self._touched, key=self._place)), *self._silent()]
        for which in self._wanted or ():
            if not any(self._matches(which, layer) for layer in ran):
                names = [layer.name for layer in ran]
                if len(names) > 12:
                    names = [*names[:4], "…", *names[-2:]]
                raise RegardError(
                    f"layers: {which!r} is none of the {len(ran)} that ran: {', '.join(names)}"
                )

    def _place(self, name: str) -> int:
        return self._order.get(module_of(name), 0)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        names = [layer.name for layer in self.layers]
        several = f"{len(names)} layer{'' if len(names) == 1 else 's'}"
        ends = ": " + " … ".join(dict.fromkeys((names[0], names[-1]))) if names else " so far"
        return f"Watched({self._model}, {several}{ends}, observed by {list(self.observe)})"

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


def _several(layers: Sequence[int | str] | int | str | None) -> list[int | str] | None:
    """What `layers` asks for, one of a kind alone too; RegardError where it is neither."""
    if layers is None:
        return None
    wanted: list[Any] = [layers] if isinstance(layers, int | str) else list(layers)
    for which in wanted:
        if not isinstance(which, int | str) or isinstance(which, bool):
            raise RegardError(
                f"layers takes numbers of layers, and names or patterns of modules, not {which!r}"
            )
    return wanted


def _inside(name: str, container: str) -> bool:
    return name.startswith(container + ".")


@dataclass(frozen=True)
class _Block:
    """One of a list of blocks: a layer of the model, whatever it computes."""

    name: str
    has_attention: bool
    reason: str


def _blocks(model: nn.Module) -> dict[str, list[_Block]]:
    """The outermost lists of blocks, by the list's name."""
    found: dict[str, list[_Block]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(outer + ".") for outer in found
        ):
            found[name] = [_block(f"{name}.{n}", block) for n, block in module.named_children()]
    return found


def _block(name: str, block: nn.Module) -> _Block:
    kinds = dict.fromkeys(type(part).__name__ for part in block.modules())
    attention = any("Attention" in kind for kind in kinds)
    why = "computes attention by itself" if attention else "computes no softmax attention"
    parts = ", ".join(dict.fromkeys(type(part).__name__ for part in block.children()))
    return _Block(name, attention, f"{type(block).__name__} {why}; its parts: {parts}")
