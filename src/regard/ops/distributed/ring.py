"""how="ring": blocks of keys and values pass from rank to rank; no rank ever holds them all.

Rows are merged by their log-sum-exp in the working dtype, float32 or float64, while the next block
travels (Liu et al. 2023, section 3). What observers see takes a second ring, of the keys alone,
once the log-sum-exp is final. In the backward the gradients of a block travel with it, in the
working dtype, and come home with the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.edge_results import EffectSeen
from ...call.geometry import Span
from ...call.observers import Effect, NormTopK, Observer
from ...call.results import LogSumExpSeen
from ...engines import run
from ..merging import merge
from .block_observers import read_block
from .effects import BlockEffects, effects_of, waiting
from .parts import Compute, Gradients, Rows, of_sinks
from .results import Keep, collected, of_span
from .whole import Whole


class Ring:
    """One call: forward and backward, on this rank's part of the sequence."""

    def __init__(
        self, whole: Whole, engine: str, compute: Compute = run, keep: Keep = collected
    ) -> None:
        """compute, keep: see `Gather`."""
        self.whole, self.engine, self.compute, self.keep = whole, engine, compute, keep
        self.effects: dict[int, list[EffectSeen]] = {}
        self.results: tuple[Any, ...] = ()

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """(rank that holds it, block) of every rank's tensors (batch, n, own keys, dim).

        This rank's own comes first. The next travels while one is used, and then takes its place:
        the list is empty once the loop goes on.
        """
        ranks = self.whole.ranks
        held = list(tensors)
        for step in range(ranks.size):
            owner = (ranks.rank - step) % ranks.size
            last = step == ranks.size - 1
            wait = None if last else ranks.passing(held, self._before(owner, held))
            block = list(held)
            yield owner, block
            block.clear()
            if wait is not None:
                held = wait()

    def _before(self, owner: int, held: Sequence[Tensor]) -> list[list[int]]:
        """The shapes of the block of the rank before the one that holds this block."""
        length = self.whole.keys.size((owner - 1) % self.whole.ranks.size)
        return [[*t.shape[:2], length, t.shape[3]] for t in held]

    def spans(self, owner: int) -> Iterator[tuple[Span, slice, slice]]:
        """The pairs of this rank's ranges of queries with a block's ranges of keys, not all hidden.

        With each the rows here and the keys in the block.
        """
        whole = self.whole
        for at, q0, q1 in whole.queries.local(whole.ranks.rank):
            for begin, k0, k1 in whole.keys.local(owner):
                span = Span(q0, q1, k0, k1)
                if q1 > q0 and k1 > k0 and self._shown(span):
                    yield span, slice(at, at + q1 - q0), slice(begin, begin + k1 - k0)

    def _shown(self, span: Span) -> bool:
        """Whether the mask shows anything of it, as far as whole tiles say."""
        program = self.whole.call.program
        if program.full:
            return True
        side = max(span.q1 - span.q0, span.k1 - span.k0)
        return bool(program.part(span).classes(side, side)[0].any())

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of this rank's rows; `results` then holds what was seen."""
        working = self.whole.call.working
        rows = query.shape[:3]
        out = torch.zeros(*rows, value.shape[3], dtype=working, device=query.device)
        lse = torch.full(rows, -torch.inf, dtype=working, device=query.device)
        for owner, block in self.blocks(key, value):
            self._merge_block(owner, block, query, out, lse)
        if (sinks := self.whole.call.sinks) is not None:  # they belong to no block
            nothing = torch.zeros_like(out)
            out, lse = merge([out, nothing], [lse, sinks.to(working)[:, None].expand_as(lse)])
        self.effects = effects_of(self.whole)
        self.results = self._results(query, key, value, lse)
        return out.to(query.dtype), lse

    def _merge_block(
        self, owner: int, block: list[Tensor], query: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """What this rank's rows get of a block; nothing of it is held afterwards."""
        keys, values = block
        for span, here, there in self.spans(owner):
            call = self._call(query, keys, values, span, here, there)
            part, part_lse, _ = self.compute(call, self.engine)
            both = [out[:, :, here], part.to(out.dtype)], [lse[:, :, here], part_lse]
            out[:, :, here], lse[:, :, here] = merge(*both)

    def _call(
        self, query: Tensor, keys: Tensor, values: Tensor, span: Span, here: slice, there: slice,
        observers: Sequence[Any] = (), sinks: bool = False,
    ) -> Call:  # fmt: skip
        own = (keys[:, :, there], values[:, :, there])
        return self.whole.part(query[:, :, here], *own, span, observers, sinks)

    def _results(self, query: Tensor, key: Tensor, value: Tensor, lse: Tensor) -> tuple[Any, ...]:
        """What all observers see, in their order; effects wait for the backward."""
        whole = self.whole
        now = [o for o in whole.call.observers if not isinstance(o, Effect)]
        found = iter(self._observed(now, query, key, value, lse) if now else ())
        return tuple(
            waiting(whole, o, self.effects[i]) if isinstance(o, Effect) else next(found)
            for i, o in enumerate(whole.call.observers)
        )

    def _observed(
        self, observers: Sequence[Observer], query: Tensor, key: Tensor, value: Tensor, lse: Tensor
    ) -> list[Any]:
        """What these see: a second ring of keys, and of values where norms are needed."""
        whole = self.whole
        norms = any(isinstance(o, NormTopK) for o in observers)
        seen: list[dict[int, Any]] = [{} for _ in observers]  # by the start of the rows
        for owner, block in self.blocks(key, *([value] if norms else [])):
            self._read(owner, block, observers, query, lse, seen)
        local = whole.queries.local(whole.ranks.rank)
        return [
            self.keep(whole, o, [into[q0] for _, q0, _ in local])
            for o, into in zip(observers, seen, strict=True)
        ]

    def _read(
        self, owner: int, block: list[Tensor], observers: Sequence[Observer], query: Tensor,
        lse: Tensor, seen: list[dict[int, Any]],
    ) -> None:  # fmt: skip
        """Add to `seen` what is read of a block; nothing of it is held afterwards."""
        whole, keys = self.whole, block[0]
        values = block[1] if len(block) > 1 else keys[..., :0]
        for at, q0, q1 in whole.queries.local(whole.ranks.rank):
            asked = [of_span(o, whole, q1) for o in observers]
            for begin, k0, k1 in whole.keys.local(owner):
                # An empty answer, too, says which keys there are
                span, here = Span(q0, q1, k0, k1), slice(at, at + q1 - q0)
                there = slice(begin, begin + k1 - k0)
                call = self._call(query, keys, values, span, here, there, asked, True)
                results = read_block(call, lse[:, :, here])
                for into, result in zip(seen, results, strict=True):
                    # The log-sum-exp given is that of all keys already
                    if q0 not in into or isinstance(result, LogSumExpSeen):
                        into[q0] = result
                    else:
                        into[q0] = into[q0].beside(result)

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
        grad_out: Tensor, grad_lse: Tensor, wanted: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Gradients of query, key, value, sinks and the biases: of this rank's part."""
        whole, working = self.whole, self.whole.call.working
        ranks = whole.ranks
        grad = grad_out.to(working)
        # Once, from the out of all keys: a block's own would be another number
        delta = (grad * out.to(working)).sum(-1) - grad_lse.to(working)
        sums = Gradients(whole, wanted)
        d_query = torch.zeros_like(query, dtype=working)
        effects = BlockEffects(whole, self.effects)
        own: list[Tensor] = []
        home: Callable[[], list[Tensor]] | None = None
        for owner, (keys, values) in self.blocks(key, value):
            mine = [torch.zeros_like(t, dtype=working) for t in (keys, values)]
            for span, here, there in self.spans(owner):
                call = self._call(query, keys, values, span, here, there)
                part = Rows(*(t[:, :, here] for t in (query, lse, grad, delta)))
                more = sums.of(call, part, span)
                d_query[:, :, here] += more[0]
                mine[0][:, :, there] += more[1]
                mine[1][:, :, there] += more[2]
                effects.add(call, part, out[:, :, here], span.q0)
            if owner == ranks.rank:
                own = mine
                continue
            # What the ranks before gave to this block came while it was computed here
            _add(mine, home)
            home = ranks.passing(mine, self._before(owner, mine))
        _add(own, home)
        sinks = whole.call.sinks
        d_sinks = None if sinks is None else of_sinks(sinks, lse, delta)
        three = [g.to(key.dtype) for g in (d_query, *own)]
        return [*three, d_sinks, *sums.finished()]


def _add(sums: Sequence[Tensor], coming: Callable[[], list[Tensor]] | None) -> None:
    if coming is not None:
        for into, more in zip(sums, coming(), strict=True):
            into += more
