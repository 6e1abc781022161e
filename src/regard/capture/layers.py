"""What `watch` saw: one `Layer` a module that computes attention, filled call by call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

from torch import Tensor

from ..call.brief import shortened
from ..call.checked import Call
from ..call.display.html import box
from ..call.geometry import Place
from ..call.masks import Mask
from ..call.observers import Observer
from ..call.picking import Which, pick
from ..errors import RegardError
from ..ops.distributed.reading import Shard
from .beams import Trail, picked
from .layer_list import Forward, LayerList
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
    of that observer: by its class, itself, or its place. qk: what `keep_qk` kept; call: the last
    call whole, where regard itself asked for it.
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
    call: Call | None = None
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

    def _repr_html_(self) -> str:
        return box(repr(self), *(result._repr_html_() for result in self.seen))

    @property
    def seen(self) -> tuple[Any, ...]:
        """The results in the order of `observe`, decode steps merged."""
        if len(self._results) > 1:
            merged = [reduce(lambda a, b: a.then(b), parts) for parts in zip(*self._results)]  # noqa: B905
            self._results = [tuple(merged)]
        return self._results[0] if self._results else ()

    def follows(self, call: Call | Shard) -> bool:
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
        if order is not None:  # beam search: histories follow their beams, before this step's rows
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

    def add_step(self, place: Place, results: tuple[Any, ...]) -> None:
        """Take in a step over keys on several ranks: it continues the last one, or begins anew."""
        before = self._results if self.q_len and place.query_start == self._end else []
        rows = self.q_len if before else 0
        self.add_sharded(place, results)
        self._results, self.q_len = [*before, results], rows + place.q_len

    def add_sharded(self, place: Place, results: tuple[Any, ...]) -> None:
        """Take in a call over several ranks, the whole of which stands at `place`."""
        self._results, self.qk, self._trail = [results], None, None
        self.heads, self.kv_heads = place.heads, place.kv_heads
        self.q_len, self.k_len = place.q_len, place.k_len
        self._end = place.query_start + place.q_len


class Watched(LayerList[Layer]):
    """The layers that a watched model ran, in its order: iterate, index by place or name.

    They hold what the last forward gave, with the decode steps that followed it; `forwards` holds
    that of each, where all are kept.
    """

    def __init__(
        self,
        model: str,
        observe: Sequence[Observer],
        keep_qk: bool,
        layers: Callable[[], list[Layer]],
        forwards: Callable[[], list[list[Layer]]],
    ) -> None:
        super().__init__(model, keep_qk)
        self._observe, self._layers, self._by_forward = observe, layers, forwards

    @property
    def layers(self) -> list[Layer]:
        """The layers in the model's order, those without softmax attention among them."""
        return self._layers()

    @property
    def forwards(self) -> list[Forward[Layer]]:
        """What each forward gave, each with the decode steps that followed it.

        All of them with `keep="all"`, else the last alone.
        """
        return [Forward(found, self._keeps_qk, self._model) for found in self._by_forward()]

    def __repr__(self) -> str:
        names = [layer.name for layer in self.layers]
        several = f"{len(names)} layer{'' if len(names) == 1 else 's'}"
        ends = ": " + " … ".join(dict.fromkeys((names[0], names[-1]))) if names else " so far"
        return f"Watched({self._model}, {several}{ends}, observed by {list(self._observe)})"
