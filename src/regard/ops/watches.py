"""The watches that this thread is inside of, and the one way to report a call of attention to them.

`capture` opens a watch; `huggingface` and `capture` meet the calls that a watched model makes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from ..call.checked import Call
from ..call.masks import Mask
from ..engines import run
from ..errors import RegardError
from . import beside
from .region import Region

T = TypeVar("T")

_OPEN = threading.local()


class Watch(Protocol):
    """What a call asks of the watch that it is met in. name: the call's; kind: self or cross."""

    def meet(self, module: nn.Module) -> WatchedCall | None:
        """The call of attention that a module makes now; None for a stranger."""

    def position(self, name: str, kind: str, start: int | None) -> int:
        """Where its queries stand."""

    def asking(self, name: str, kind: str, call: Call) -> Call:
        """The call with the watch's observers."""

    def computing(self) -> AbstractContextManager[None]:
        """While inside, what the model's own attention calls is not met apart."""

    def record(
        self, name: str, kind: str, call: Call, lse: Tensor, out: Tensor | None,
        seen: Mapping[int, Any],
    ) -> None:  # fmt: skip
        """Take it in."""

    @property
    def keeps(self) -> bool:
        """Whether queries and keys are kept."""

    @property
    def keeps_calls(self) -> bool:
        """Whether whole calls are kept: one over ranks comes together in the first."""

    @property
    def records_shards(self) -> bool:
        """Whether each rank writes its own part of a recording."""

    def keep_parts(
        self, name: str, kind: str, region: Region, call: Call, own: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Keep this rank's own query, key and value of a whole call for the first rank to read."""

    def record_shard(self, name: str, kind: str, shard: Any) -> None:
        """Take in this rank's part of a call over several (`distributed.Shard`)."""

    def record_step(self, name: str, kind: str, call: Call, seen: tuple[Any, ...]) -> None:
        """Take in a step over keys on several ranks; its results are whole."""

    def record_sharded(
        self, name: str, kind: str, call: Call, seen: tuple[Any, ...],
        read: Callable[[Call], tuple[Any, ...]],
    ) -> None:  # fmt: skip
        """Take in what was seen over several ranks; call: the whole one, without its numbers.

        read: what the observers of another whole call on these queries and keys see.
        """


@dataclass(eq=False)
class WatchedCall:
    """A call of attention that a watched model makes, from when it is met until it is recorded.

    name: the module's call; kind: self or cross, by the module until the tensors say better.
    wanted: whether it is recorded; kept: what stays visible in it, where edges are cut.
    effects: whether effects are asked for; verifying: whether the weights as read are checked.
    """

    watch: Watch
    name: str
    kind: str
    wanted: bool
    kept: Mask | None
    effects: bool
    verifying: bool

    @property
    def replaced(self) -> bool:
        """Whether regard computes it in the model's place: to cut edges, or for their effects."""
        return self.kept is not None or (self.wanted and self.effects)

    def visible(self, mask: Mask) -> Mask:
        """What a mask shows, less what is cut."""
        return mask if self.kept is None else mask & self.kept

    def position(self, start: int | None) -> int:
        """Where its queries stand; start: as far as the call itself says it."""
        return self.watch.position(self.name, self.kind, start)

    def run(self, call: Call, engine: str = "auto") -> tuple[Tensor, Tensor, dict[int, Any]]:
        """(out, lse, results by observer), computed by regard, and recorded if that is wanted."""
        asked = self.watch.asking(self.name, self.kind, call) if self.wanted else call
        with self.watch.computing():
            out, lse, seen = run(asked, engine)
        if self.wanted:
            self.record(call, lse, out, seen)
        return out, lse, seen

    def over_ranks(
        self, parallel: Region, query: Tensor, key: Tensor, value: Tensor, request: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """(out, lse), computed over the ranks of `context_parallel`; what is seen is sharded."""
        wholes: list[Call] = []

        def asking(call: Call) -> Call:
            # A recording's is read of the numbers as they are kept, in a pass of its own
            apart = self.watch.records_shards or self.watch.keeps_calls
            watched = self.wanted and not apart
            asked = self.watch.asking(self.name, self.kind, call) if watched else call
            wholes.append(asked)
            return asked

        with self.watch.computing():
            out, lse, seen = parallel.run(query, key, value, asking=asking, **request)
        if self.wanted:
            self._record_over(parallel, wholes[0], query, key, value, seen)
        return out, lse

    def step(self, parallel: Region, query: Tensor, held: Any, request: dict[str, Any]) -> Tensor:
        """out of a few queries on keys that lie on several ranks; results are whole in each."""
        if self.wanted and (self.watch.keeps or self.watch.keeps_calls):
            raise RegardError(
                f"{self.name}: queries and keys are not kept in generate() over ranks; watch it "
                "without keep_qk"
            )

        def asking(call: Call) -> Call:
            return self.watch.asking(self.name, self.kind, call) if self.wanted else call

        with self.watch.computing():
            out, call, seen = parallel.step(query, held, asking=asking, **request)
        if self.wanted:
            self.watch.record_step(self.name, self.kind, call, seen)
        return out

    def _record_over(
        self, parallel: Region, whole: Call, query: Tensor, key: Tensor, value: Tensor,
        seen: tuple[Any, ...],
    ) -> None:  # fmt: skip
        """Record a call over ranks, of which this one has its own query, key and value."""
        if self.watch.records_shards:
            call = self.watch.asking(self.name, self.kind, whole)
            shard = parallel.shard(call, *beside.rounded(query, key, value))
            self.watch.record_shard(self.name, self.kind, shard)
            return
        if self.watch.keeps_calls:
            call = parallel.together(whole, query, key, value)
            if parallel.first:
                asked = self.watch.asking(self.name, self.kind, call)
                own, found = beside.gathered(asked)
                self.record(call, own, None, found)
            return

        def read(call: Call) -> tuple[Any, ...]:
            return parallel.read(call, query, key)

        self.watch.record_sharded(self.name, self.kind, whole, seen, read)
        if self.watch.keeps:
            still = replace(whole, observers=())
            self.watch.keep_parts(self.name, self.kind, parallel, still, (query, key, value))

    def beside(
        self,
        own: Callable[[], T],
        read: Callable[[], Call | None],
        output: Callable[[T], Tensor] | None = None,
    ) -> T:
        """What the model's own function gives, to the bit; its weights are read beside it.

        read: what it computed, as a call without gradients; None where there is nothing to read.
        output: the answer's out (batch, heads, q_len, v_dim), which the weights must explain.
        """
        with self.watch.computing(), beside.Capture() as capture:
            answer = own()
        call = read() if self.wanted else None
        if call is None:
            return answer
        given = capture.found(call.query.shape[:3])
        lse, seen = beside.gathered(self.watch.asking(self.name, self.kind, call), given)
        if self.verifying and output is not None:
            beside.verify(call, lse, output(answer).detach(), self.name)
        self.record(call, lse, None, seen)
        return answer

    def record(
        self,
        call: Call,
        lse: Tensor,
        out: Tensor | None = None,
        seen: Mapping[int, Any] = MappingProxyType({}),
    ) -> None:
        """Hand it on; seen: what the engine gathered already, by the number of the observer."""
        self.watch.record(self.name, self.kind, call, lse, out, seen)


def meet(module: nn.Module) -> WatchedCall | None:
    """The call that a module makes now, met by the newest watch of this thread that knows it."""
    watches: list[Watch] = getattr(_OPEN, "watches", [])
    return next((met for watch in reversed(watches) if (met := watch.meet(module))), None)


def watched() -> bool:
    """Whether this thread is inside of a watch."""
    return bool(getattr(_OPEN, "watches", []))


@contextmanager
def inside_of(watch: Watch) -> Iterator[None]:
    """While inside, the watch is active."""
    _OPEN.watches = [*getattr(_OPEN, "watches", []), watch]
    try:
        yield
    finally:
        _OPEN.watches = [w for w in _OPEN.watches if w is not watch]
