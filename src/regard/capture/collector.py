"""Takes in the calls of a watched model, and says what is asked of each."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..call.checked import Call
from ..call.masks import Mask
from ..call.observers import Effect, NormTopK, Observer
from ..engines.second_pass.weigh import weigh
from ..errors import RegardError
from ..ops import beside
from ..ops.distributed.reading import Shard
from ..ops.region import Region
from ..ops.watches import WatchedCall
from .layers import Cut, Layer, Watched
from .module_stack import Tracker, module_of
from .module_tree import CROSS, Blocks, inside, kind_of
from .options import WatchOptions
from .projection import output_projection
from .real_queries import real_queries, summed, without
from .recorded_layer import recorded, streaming
from .shard_layer import shard_maker
from .temporary_shards import TemporaryShards


class Collector:
    """Takes in the calls of a watched model, layer by layer; what a user sees of it is `watched`.

    within: whether the model's own attention runs, whose inner calls are not met apart.
    """

    def __init__(self, model: nn.Module, options: WatchOptions) -> None:
        self.options = options = options.checked()
        self.within = False
        self.modules = dict(model.named_modules())
        self.tracker = Tracker(model)
        self.observe: tuple[Observer, ...] = tuple(options.observe or ())
        self._cuts, self._done = tuple(options.cut or ()), set[int]()
        self._wanted: Any = options.layers
        self._order = {n: i for i, n in enumerate(self.tracker.names.values())}
        self._blocks = Blocks(model)
        self._layers: dict[str, Layer] = {}
        self._forwards: list[dict[str, Layer]] = []
        self._touched: set[str] = set()
        self._continuing = False
        self._real: dict[str, Tensor | None] = {}  # by block: bool (batch, q_len), or none padding
        self._leading: dict[str, bool] = {}
        self._shards: TemporaryShards | None = None
        self._orders: dict[str, list[int] | None] = {}  # by block: of the last step's rows
        self.watched = Watched(
            type(model).__name__, self.observe, options.keep_qk, self.layers, self.forwards
        )

    def meet(self, module: nn.Module) -> WatchedCall | None:
        """The attention call that a module of the model makes now; None for a stranger."""
        name = self.tracker.names.get(id(module))
        return None if name is None else self.met(name)

    def met(self, name: str) -> WatchedCall:
        """The attention call that the module of this name makes now."""
        module, call = self.modules[name], self.tracker.call(name)
        self._touched.add(call)
        return WatchedCall(
            self,
            call,
            kind_of(module, call),
            wanted=self._asked(self._layer(call)) or self._leads(call),
            kept=self._kept(call),
            effects=any(isinstance(o, Effect) for o in self.observe),
            verifying=bool(self.options.verify) and not module.training,
        )

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
        # Cross-attention reads the same keys in every step, so it cannot say how far it is
        if kind == "self":
            self._continuing = bool(start)
            return start or 0
        layer = self._layers.get(name)
        return layer._end if layer and self._continuing else 0

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """While inside, the model's own attention runs, and what it calls is not recorded apart."""
        before, self.within = self.within, True
        try:
            yield
        finally:
            self.within = before

    def asking(self, name: str, kind: str, call: Call) -> Call:
        """A call of the module `name`, with the observers of this watch.

        Those that leave out padding's queries, where there are any, wait for `record`.
        """
        if not self._asked(self._layer(name)):  # only followed
            return replace(call, observers=())
        for observer in self.observe:
            observer.check(call.place)
        now = [o for o in self.observe if not o.sums_queries]
        if len(now) == len(self.observe) or self._padded(name, kind, call) is None:
            now = list(self.observe)
        return replace(call, observers=tuple(self._fitted(o, name, call) for o in now))

    def _padded(self, name: str, kind: str, call: Call) -> Tensor | None:
        """The queries that are not padding (batch, q_len); None if all are, or padding counts.

        A cross layer's queries are those of the self-attention beside it.
        """
        if self.options.count_padding:
            return None
        block = _block_of(name)
        if kind == "self":
            self._real[block] = real_queries(call)
        real = self._real.get(block)
        return real if real is not None and real.shape == call.query.shape[:3:2] else None

    def record(
        self, name: str, kind: str, call: Call, lse: Tensor, out: Tensor | None,
        seen: Mapping[int, Any],
    ) -> None:  # fmt: skip
        """Take in a call of the module `name`; out (batch, heads, q_len, v_dim), as computed.

        seen: results that the engine gathered already, by the number of their observer.
        """
        # The order is read before the layer takes the call in: it compares with the last one
        layer = self._taking(name, kind, call)
        order = self._ordered(layer, call)
        asked = self.asking(name, kind, call)
        results = weigh(asked, lse, out, seen=seen)
        if len(asked.observers) < len(self.observe) and self._asked(layer):
            results = self._with_summed(name, call, kind, lse, results)
        layer.add(call, lse, results, self.options.keep_qk and self._asked(layer), order)
        if self.options.keep_calls:
            layer.call = call

    @property
    def keeps(self) -> bool:
        """Whether queries and keys are kept."""
        return self.options.keep_qk

    @property
    def keeps_calls(self) -> bool:
        """Whether whole calls are kept: one over ranks comes together in the first."""
        return self.options.keep_calls

    @property
    def records_shards(self) -> bool:
        """Whether each rank writes its own part of a recording."""
        if self.options.keep_qk and shard_maker() is None and streaming():
            raise RegardError(
                "record: context_parallel begins inside the recording; begin it before, so that "
                "each rank writes its part"
            )
        return self.options.keep_qk and shard_maker() is not None

    def keep_parts(
        self, name: str, kind: str, region: Region, call: Call, own: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Keep queries and keys of a call over ranks, for the first one to read.

        Each rank keeps its part in temporary files. Ranks that share no folder for these bring
        them together in the memory of the first.
        """
        layer = self._layers[name]
        if not self._asked(layer):
            return
        if self._shards is None:
            self._shards = TemporaryShards(region)
        if self._shards.shared:
            shard = region.shard(call, *own)
            layer.qk = self._shards.take(layer.name, layer.index, layer.kind, shard)
            return
        call = region.together(call, *own)
        if region.first:
            layer.qk = recorded(layer.name, layer.index, layer.kind)
            layer.qk.add(call, beside.gathered(call)[0])

    def record_shard(self, name: str, kind: str, shard: Shard) -> None:
        """Take in this rank's part of a call over several."""
        layer, make = self._taking(name, kind, shard), shard_maker()
        assert make is not None
        layer.add_sharded(shard.place, ())
        make(layer.name, layer.index, layer.kind).take(shard)

    def record_sharded(
        self, name: str, kind: str, call: Call, seen: tuple[Any, ...],
        read: Callable[[Call], tuple[Any, ...]],
    ) -> None:  # fmt: skip
        """Take in a call that was computed over several ranks; seen: a sharded result each."""
        layer = self._taking(name, kind, call)
        if not self._asked(layer):
            return
        if len(seen) < len(self.observe):  # padding's queries are left out of sums over queries
            real = self._padded(name, kind, call)
            assert real is not None
            sums = tuple(o for o in self.observe if o.sums_queries)
            seen = self._among(seen, read(replace(without(call, real), observers=sums)))
        layer.add_sharded(call.place, seen)

    def record_step(self, name: str, kind: str, call: Call, seen: tuple[Any, ...]) -> None:
        """Take in a step over keys on several ranks; its results are whole."""
        layer = self._taking(name, kind, call)
        if self._asked(layer):
            layer.add_step(call.place, seen)

    def _taking(self, name: str, kind: str, call: Call | Shard) -> Layer:
        """The layer that takes in a call: where all are kept, a new one for each sequence.

        The next forward begins where a layer of the last begins again.
        """
        layer = self._layers.get(name)
        anew = self.options.keep == "all"
        if layer is None or (anew and layer.q_len and not layer.follows(call)):
            if not self._forwards or name in self._forwards[-1]:
                self._forwards.append({})
            layer = self._layers[name] = self._forwards[-1][name] = self._layer(name, kind)
        return layer

    def forwards(self) -> list[list[Layer]]:
        """The layers of each forward, in the model's order."""
        return [
            sorted(filter(self._asked, layers.values()), key=lambda layer: self._place(layer.name))
            for layers in self._forwards
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
        real = self._padded(name, kind, call)
        assert real is not None
        sums = summed(call, [o for o in self.observe if o.sums_queries], lse, real)
        return self._among(results, sums)

    def _among(self, rows: Sequence[Any], sums: Sequence[Any]) -> tuple[Any, ...]:
        """The results of all observers, of which those that sum over queries were read apart."""
        first, second = iter(rows), iter(sums)
        return tuple(next(second if o.sums_queries else first) for o in self.observe)

    def _fitted(self, observer: Observer, name: str, call: Call) -> Observer:
        """A NormTopK with the module's own output projection."""
        if not isinstance(observer, NormTopK) or observer.projection is not None:
            return observer
        width = call.place.heads * (0 if call.value is None else call.value.shape[-1])
        return replace(observer, projection=output_projection(self.modules, name, width))

    def _kept(self, name: str) -> Mask | None:
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
                # Where nothing in the list spoke, it is no list of layers unless by its classes
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


def _block_of(name: str) -> str:
    """What a layer's self- and cross-attention have in common: the name up to its number."""
    return re.sub(r"(\.\d+)\..*", r"\1", name)
