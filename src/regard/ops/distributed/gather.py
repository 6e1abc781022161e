"""how="gather": each rank computes its own queries on all keys, gathered some kv heads at a time.

The rows of a rank are whole, so what observers see of them is final. The backward gathers the keys
again, and sends each rank the sum of what its keys got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...call.edge_results import EffectSeen
from ...call.geometry import Span
from ...call.observers import Effect, Observer
from ...engines import run
from ...engines.second_pass.effect import measure
from ...engines.second_pass.weigh import weigh
from .effects import effects_of, waiting
from .parts import Compute, Gradients, Rows, of_sinks
from .results import Keep, collected, heads_joined, of_heads, of_span
from .whole import Whole

Block = tuple[slice, slice, Tensor, Tensor]  # kv heads, heads, and all keys and values of them


class Gather:
    """One call: forward and backward, on this rank's part of the sequence.

    most: how many bytes of gathered keys and values may lie here at a time. compute: out, lse and
    results of a part; keep: what becomes of an observer's results, one for each range of queries.
    """

    def __init__(
        self, whole: Whole, engine: str, most: int, compute: Compute = run, keep: Keep = collected
    ) -> None:
        self.whole, self.engine, self.most = whole, engine, most
        self.compute, self.keep = compute, keep
        self.effects: dict[int, list[EffectSeen]] = {}
        self.results: tuple[Any, ...] = ()

    def groups(self, key: Tensor, value: Tensor) -> list[slice]:
        """The kv heads that are gathered together; all of them, where dropout counts heads."""
        kv_heads = key.shape[1]
        one = self.whole.keys.length * key.shape[0] * (key.shape[3] + value.shape[3])
        one *= key.element_size()
        at_once = max(min(self.most // max(one, 1), kv_heads), 1)
        if self.whole.call.dropout is not None:
            at_once = kv_heads
        return [slice(h, min(h + at_once, kv_heads)) for h in range(0, kv_heads, at_once)]

    def blocks(self, key: Tensor, value: Tensor, heads: int) -> Iterator[Block]:
        """All keys, group by group; the next group travels while one is computed."""
        ranks, layout, size = self.whole.ranks, self.whole.keys, heads // key.shape[1]
        groups = self.groups(key, value)

        def begin(group: slice) -> Callable[[], Tensor]:
            # One message: keys and values side by side
            return ranks.gathering_of(torch.cat([key[:, group], value[:, group]], 3), layout, 2)

        wait = begin(groups[0])
        for i, group in enumerate(groups):
            both = wait()
            if i + 1 < len(groups):
                wait = begin(groups[i + 1])
            own = slice(group.start * size, group.stop * size)
            split = both.split([key.shape[3], value.shape[3]], 3)
            yield group, own, split[0].contiguous(), split[1].contiguous()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of this rank's rows; `results` then holds what was seen."""
        whole, rank = self.whole, self.whole.ranks.rank
        observers = whole.call.observers
        out = query.new_zeros(*query.shape[:3], value.shape[3])
        lse = torch.zeros(query.shape[:3], dtype=whole.call.working, device=query.device)
        local = whole.queries.local(rank)
        seen: list[list[list[Any]]] = [[[] for _ in local] for _ in observers]
        now = [i for i, o in enumerate(observers) if not isinstance(o, Effect)]
        for _, heads, keys, values in self.blocks(key, value, query.shape[1]):
            for n, (at, start, stop) in enumerate(local):
                rows = slice(at, at + stop - start)
                span = Span(start, stop, 0, whole.keys.length, heads=heads)
                asked = [self._asked(observers[i], heads, stop) for i in now]
                call = whole.part(query[:, heads, rows], keys, values, span, asked)
                out[:, heads, rows], mine, gathered = self.compute(call, self.engine)
                lse[:, heads, rows] = mine
                results = weigh(call, mine, seen=gathered) if asked else ()
                for i, result in zip(now, results, strict=True):
                    seen[i][n].append(result)
        self.effects = effects_of(whole)
        self.results = tuple(
            waiting(whole, o, self.effects[i]) if isinstance(o, Effect)
            else self.keep(whole, o, [heads_joined(parts) for parts in seen[i]])
            for i, o in enumerate(observers)
        )  # fmt: skip
        return out, lse

    def _asked(self, observer: Observer, heads: slice, stop: int) -> Observer:
        return of_heads(of_span(observer, self.whole, stop), heads, self.whole.call.place.heads)

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
        grad_out: Tensor, grad_lse: Tensor, wanted: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Gradients of query, key, value, sinks and the biases: of this rank's part."""
        whole, working = self.whole, self.whole.call.working
        grad = grad_out.to(working)
        delta = (grad * out.to(working)).sum(-1) - grad_lse.to(working)
        rows = Rows(query, lse, grad, delta)
        sums = Gradients(whole, wanted)
        d_query = torch.zeros_like(query, dtype=working)
        d_both = torch.zeros(
            *key.shape[:3], key.shape[3] + value.shape[3], dtype=working, device=key.device
        )
        found = {i: [list[Any]() for _ in seen] for i, seen in self.effects.items()}
        for group, heads, keys, values in self.blocks(key, value, query.shape[1]):
            d_keys, d_values = (torch.zeros_like(t, dtype=working) for t in (keys, values))
            for n, (at, start, stop) in enumerate(whole.queries.local(whole.ranks.rank)):
                here = (slice(None), heads, slice(at, at + stop - start))
                span = Span(start, stop, 0, whole.keys.length, heads=heads)
                call = whole.part(query[here], keys, values, span)
                part = Rows(query[here], lse[here], grad[here], rows.delta[here])
                d_query[here], more_keys, more_values = sums.of(call, part, span)
                d_keys += more_keys
                d_values += more_values
                for i, each in found.items():
                    effect = whole.call.observers[i]
                    assert isinstance(effect, Effect)
                    each[n].append(measure(call, lse[here], out[here], grad[here][None], effect.k))
            both = torch.cat([d_keys, d_values], 3)
            d_both[:, group] = whole.ranks.reduce_scatter(both, whole.keys, 2)
        for i, each in found.items():
            for seen, parts in zip(self.effects[i], each, strict=True):
                seen.fill(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))
        d_key, d_value = d_both.split([key.shape[3], value.shape[3]], 3)
        sinks = whole.call.sinks
        d_sinks = None if sinks is None else of_sinks(sinks, lse, delta)
        three = [g.to(key.dtype) for g in (d_query, d_key, d_value)]
        return [*three, d_sinks, *sums.finished()]
