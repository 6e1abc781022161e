"""What `watch` saw: one `Layer` a module that computes attention, filled call by call."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ..call.brief import shortened
from ..call.checked import Call
from ..call.masks import Mask
from ..call.numbers import whole
from ..call.observers import NormTopK, Observer, listed
from ..call.picking import Which, pick
from ..engines.second_pass.weigh import weigh
from ..errors import RegardError
from .beams import Trail, picked
from .layer_list import Forward, LayerList
from .module_stack import Tracker, module_of
from .module_tree import CROSS, Blocks, inside, kind_of
from .projection import output_projection
from .real_queries import SUMMED, real_queries, summed
from .recorded_layer import RecordedLayer, recorded


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

    name: its qualified name (`tracking.Tracker.call`); index: its layer's number
    (`module_tree.Blocks.index`). kind: "self" or "cross".
    pattern: False for a layer without softmax attention; `reason` says why, and `seen` is empty.
    heads, kv_heads, q_len (queries so far), k_len (the last call's keys). layer[TopK] is the result
    of that observer: by its class, itself, or its place.
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
    observers: tuple[Observer, ...] = ()
    _results: list[tuple[Any, ...]] = field(default_factory=list, repr=False)
    _end: int = field(default=0, repr=False)
    _trail: Trail | None = field(default=None, repr=False)

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
    def seen(self) -> tuple[Any, ...]:
        """The results in the order of `observe`, decode steps merged."""
        if len(self._results) > 1:
            merged = [reduce(lambda a, b: a.then(b), parts) for parts in zip(*self._results)]  # noqa: B905
            self._results = [tuple(merged)]
        return self._results[0] if self._results else ()

    def follows(self, call: Call) -> bool:
        """Whether a call continues the last one; else it begins anew."""
        start = call.place.query_start
        if self.q_len and 0 < start < self._end:
            raise RegardError(
                f"{self.name}: queries from position {start} were computed twice "
                "(assisted decoding?); this way of generating cannot be watched"
            )
        return self.q_len > 0 and start == self._end and start > 0

    def order(self, call: Call) -> list[int] | None:
        """Which row of the last call each row of a self layer's goes on from; None: its own."""
        if self._trail is None or not self.follows(call):
            return None
        return self._trail.order(call)

    def add(
        self, call: Call, lse: Tensor, results: tuple[Any, ...], keep_qk: bool,
        order: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Take in a call: it continues the last one, its rows in this order, or begins anew."""
        place = call.place
        if not self.follows(call):
            self._results, self.q_len, self.qk, self._trail, order = [], 0, None, None, None
        if order is not None:
            self._results = [tuple(picked(result, order) for result in self.seen)]
            if self.qk:
                self.qk.pick(order)
        self._results.append(results)
        if keep_qk:
            self.qk = self.qk or recorded(self.name, self.index, self.kind)
            self._results = self.qk.take(call, lse, self._results)
        self.heads, self.kv_heads = place.heads, place.kv_heads
        self.q_len, self.k_len = self.q_len + place.q_len, place.k_len
        self._end = place.query_start + place.q_len
        if self.kind == "cross" or not place.q_len:
            return  # whose keys never change: its rows follow the self-attention beside it
        if self._trail is not None:
            self._trail.extend(call, order)
        elif place.query_start + place.q_len - place.key_start <= place.k_len:
            self._trail = Trail(call)


class Watched(LayerList[Layer]):
    """The layers that a watched model ran, in its order: iterate, index by place or name.

    They hold what the last forward gave, with the decode steps that followed it; `forwards` holds
    that of each, where all are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        observe: Sequence[Observer] | None,
        layers: Sequence[int | str] | int | str | None,
        keep_qk: bool,
        cut: Sequence[Cut] | None = (),
        verify: bool = False,
        count_padding: bool = False,
        keep: Literal["last", "all"] = "last",
    ) -> None:
        if keep not in ("last", "all"):
            raise RegardError(f"keep is {keep!r}; give 'last' or 'all'")
        self._keeps_all, self._forwards = keep == "all", list[dict[str, Layer]]()
        self.verifying, self.within, self.count_padding = verify, False, count_padding
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
        self._real: dict[str, Tensor | None] = {}  # by block: bool (batch, q_len), or none padding
        self._leading: dict[str, bool] = {}
        self._orders: dict[str, list[int] | None] = {}  # by block: of the last step's rows

    def call_of(self, module: nn.Module) -> str | None:
        """The name of the call that a module of the watched model makes; None for a stranger."""
        name = self.tracker.names.get(id(module))
        return None if name is None else self.tracker.call(name)

    def kind_of(self, module: nn.Module, name: str) -> str:
        """Self or cross: whose keys the call of this module reads."""
        return kind_of(module, name)

    def wants(self, name: str) -> bool:
        """Whether `layers` names this module, by its layer's number, its name or a pattern."""
        self._touched.add(name)
        return self._asked(self._layer(name)) or self._leads(name)

    def _leads(self, name: str) -> bool:
        """Whether a cross layer that is asked for stands beside this self layer, and follows it."""
        block = _block_of(name)
        if self._wanted is None:
            return False
        if block not in self._leading:
            beside = (m for m in self.modules if inside(m, block))
            cross = [m for m in beside if any(part in m.lower() for part in CROSS)]
            self._leading[block] = any(self._asked(self._layer(m)) for m in cross)
        return self._leading[block] and not any(part in name.lower() for part in CROSS)

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

    def asking(self, name: str, call: Call, kind: str) -> Call:
        """A call of the module `name`, with the observers of this watch.

        Those that leave out padding's queries, where there are any, wait for `record`.
        """
        if not self._asked(self._layer(name)):  # only followed
            return replace(call, observers=())
        for observer in self.observe:
            observer.check(call.place)
        now = [o for o in self.observe if not isinstance(o, SUMMED)]
        if len(now) == len(self.observe) or self._padded(name, call, kind) is None:
            now = list(self.observe)
        return replace(call, observers=tuple(self._fitted(o, name, call) for o in now))

    def _padded(self, name: str, call: Call, kind: str) -> Tensor | None:
        """The queries that are not padding (batch, q_len); None if all are, or padding counts.

        A cross layer's queries are those of the self-attention beside it.
        """
        if self.count_padding:
            return None
        block = _block_of(name)
        if kind == "self":
            self._real[block] = real_queries(call)
        real = self._real.get(block)
        return real if real is not None and real.shape == call.query.shape[:3:2] else None

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
        layer = self._taking(name, kind, call)
        order = self._ordered(layer, call)
        asked = self.asking(name, call, kind)
        results = weigh(asked, lse, out, seen=seen)
        if len(asked.observers) < len(self.observe) and self._asked(layer):
            results = self._with_summed(name, call, kind, lse, results)
        layer.add(call, lse, results, self.keep_qk and self._asked(layer), order)

    def _taking(self, name: str, kind: str, call: Call) -> Layer:
        """The layer that takes in a call: where all are kept, a new one for each sequence.

        The next forward begins where a layer of the last begins again.
        """
        layer = self._layers.get(name)
        if layer is None or (self._keeps_all and layer.q_len and not layer.follows(call)):
            if not self._forwards or name in self._forwards[-1]:
                self._forwards.append({})
            layer = self._layers[name] = self._forwards[-1][name] = self._layer(name, kind)
        return layer

    @property
    def forwards(self) -> list[Forward[Layer]]:
        """What each forward gave, each with the decode steps that followed it.

        All of them with `keep="all"`, else the last alone.
        """
        each = (filter(self._asked, layers.values()) for layers in self._forwards)
        return [
            Forward(sorted(e, key=lambda la: self._place(la.name)), self.keep_qk, self._model)
            for e in each
        ]

    def _ordered(self, layer: Layer, call: Call) -> list[int] | None:
        """Which row of its last call each of a layer's goes on from; None: its own."""
        if layer.kind == "self":
            self._orders[_block_of(layer.name)] = layer.order(call)
        return self._orders.get(_block_of(layer.name))

    def _with_summed(
        self, name: str, call: Call, kind: str, lse: Tensor, results: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """The results of all observers, those that sum over queries without padding's."""
        real, others = self._padded(name, call, kind), iter(results)
        assert real is not None
        sums = iter(summed(call, [o for o in self.observe if isinstance(o, SUMMED)], lse, real))
        return tuple(next(sums if isinstance(o, SUMMED) else others) for o in self.observe)

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

    @property
    def touched(self) -> bool:
        """Whether any attention at all was computed, observed or not."""
        return bool(self._touched)

    @property
    def layers(self) -> list[Layer]:
        """The layers in the model's order, those without softmax attention among them."""
        found = filter(self._asked, [*self._layers.values(), *self._silent()])
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
        return Layer(name, self._blocks.index(name), kind, observers=self.observe)

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

    def __repr__(self) -> str:
        names = [layer.name for layer in self.layers]
        several = f"{len(names)} layer{'' if len(names) == 1 else 's'}"
        ends = ": " + " … ".join(dict.fromkeys((names[0], names[-1]))) if names else " so far"
        return f"Watched({self._model}, {several}{ends}, observed by {list(self.observe)})"


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


def _block_of(name: str) -> str:
    """What a layer's self- and cross-attention have in common: the name up to its number."""
    return re.sub(r"(\.\d+)\..*", r"\1", name)
