"""What `watch` saw: one `Layer` a module that computes attention, filled call by call."""

from __future__ import annotations

import contextlib
import fnmatch
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .call import Call
from .checks import whole
from .errors import RegardError
from .masks import Mask
from .module_tree import Blocks, inside
from .observers import NormTopK, Observer, listed
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


@dataclass(eq=False)
class Layer:
    """One module that computes attention.

    name: its qualified name (`tracking.Tracker.call`); index: its layer's number
    (`module_tree.Blocks.index`). kind: "self" or "cross".
    pattern: False for a layer without softmax attention; `reason` says why, and `seen` is empty.
    heads, kv_heads, q_len (queries so far), k_len (the last call's keys).
    """

    name: str
    index: int = 0
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
        at, self._last_key = self._own(call, self._end - 1), None
        if 0 <= at < place.k_len and place.q_len:  # keys may be fewer (SegFormer's, pooled)
            self._last_key = call.key[:, :, at].detach().clone()

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
        observe: Sequence[Observer] | None,
        layers: Sequence[int | str] | int | str | None,
        keep_qk: bool,
        cut: Sequence[Cut] | None = (),
        verify: bool = False,
    ) -> None:
        self.verifying, self.within = verify, False
        self.observe, self.keep_qk = listed(observe), keep_qk
        self._cuts, self._done = _checked_cuts(cut), set[int]()
        self.modules = dict(model.named_modules())
        self._wanted = _several(layers)
        self._model = type(model).__name__
        self.tracker = Tracker(model)
        self._order = {n: i for i, n in enumerate(self.tracker.names.values())}
        self._blocks = Blocks(model)
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
        return self._asked(self._layer(name))

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
        for observer in self.observe:
            observer.check(call.place)
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
        layer = self._layers.setdefault(name, self._layer(name, kind))
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
            if self._matches(cut.layer, self._layer(name)):
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
        for container, blocks in self._blocks.lists.items():
            spoken = {n for n in self._touched if inside(n, container)}
            for block in blocks:
                ran = block.name in self.tracker.ran
                heard = any(n == block.name or inside(n, block.name) for n in spoken)
                if ran and not heard and (spoken or block.has_attention):
                    found = self._layer(block.name)
                    found.pattern, found.reason = False, block.reason
                    silent.append(found)
        return silent

    def _layer(self, name: str, kind: str = "self") -> Layer:
        return Layer(name, self._blocks.index(name), kind)

    def _asked(self, layer: Layer) -> bool:
        return self._wanted is None or any(self._matches(w, layer) for w in self._wanted)

    def _matches(self, which: int | str, layer: Layer) -> bool:
        """Whether a layer's number (below 0: from the end of its list), or a pattern, means it."""
        if isinstance(which, str):
            return fnmatch.fnmatch(layer.name, which)
        if which >= 0:
            return which == layer.index
        return layer.index - self._blocks.count(layer.name) == which

    def check_wanted(self) -> None:
        """RegardError where `layers` asked for one that did not run."""
        ran = [*map(self._layer, sorted(self._touched, key=self._place)), *self._silent()]
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


def _several(layers: Any) -> list[int | str] | None:
    """What `layers` asks for, one of a kind alone too; RegardError where it is neither."""
    if layers is None:
        return None
    try:
        several: list[Any] = [layers] if isinstance(layers, str) else list(layers)
    except TypeError:  # one of a kind alone
        several = [layers]
    return [_which(each, "layers") for each in several]


def _which(layer: Any, what: str) -> int | str:
    """A layer as it can be asked for."""
    if isinstance(layer, str):
        return layer
    try:
        if not isinstance(layer, bool):
            return whole(layer, what)
    except RegardError:
        pass
    raise RegardError(
        f"{what} takes numbers of layers, and names or patterns of modules, not {layer!r}"
    )


def _checked_cuts(cut: Any) -> tuple[Cut, ...]:
    """What `cut` removes; RegardError where it is no list of cuts."""
    if cut is None:
        return ()
    alone = " alone" if isinstance(cut, Cut | Mask | type) else ""
    if alone or not isinstance(cut, list | tuple):
        raise RegardError(f"cut is {cut!r}{alone}; give a list, such as [Cut(3, Heads([1]))]")
    for each in cut:
        if not isinstance(each, Cut):
            raise RegardError(f"cut holds {each!r}; give cuts, such as Cut(3, Heads([1]))")
        if not isinstance(each.mask, Mask):
            raise RegardError(
                f"Cut({each.layer!r}, …): mask is a {type(each.mask).__name__}; give a regard "
                "mask, such as Edges([(10, 1)]) or Heads([1])"
            )
    return tuple(each._replace(layer=_which(each.layer, "Cut: layer")) for each in cut)
