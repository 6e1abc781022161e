"""A few queries, the same in every rank, over keys that lie on several: a decode step of a model.

Each rank computes them on the keys it holds; only rows and their log-sum-exp travel, and are merged
in the working dtype, in the order of the ranks, so that all have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.geometry import Span
from ...call.observers import Distances, Effect, Map, Observer, Received
from ...call.results import LogSumExpSeen, ReceivedSeen
from ...call.top_blocks import by_content
from ...engines import run
from ...errors import RegardError
from ..merging import merge
from .block_observers import read_block
from .collectives import Ranks
from .layout import Layout, named
from .results import collected, of_span, rows_merged
from .whole import Whole, hollow

UNLIKE = 0.05  # of the largest: queries that differ by more are not the same but for rounding


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive keys and values (batch, kv_heads, n, dim) of a sequence, from a position on."""

    start: int
    key: Tensor
    value: Tensor

    @property
    def stop(self) -> int:
        """Behind its last position."""
        return self.start + self.key.shape[2]


@dataclass(frozen=True, eq=False)
class Held:
    """What a rank holds of `length` keys: at least one run, which may be empty."""

    runs: Sequence[Run]
    length: int


Step = tuple[Tensor, Call, tuple[Any, ...]]  # out, the whole call without its keys, results


@torch.no_grad()
def step(
    ranks: Ranks, query: Tensor, held: Held, asking: Callable[[Call], Call] | None = None,
    **request: Any,
) -> Step:  # fmt: skip
    """out (batch, heads, q_len, v_dim), whole in every rank, and so are the results."""
    whole = _whole(ranks, query, held, asking, request)
    call = whole.call
    parts = [_on(whole, query, each) for each in held.runs]
    found = [run(part)[:2] for part in parts if part.place.k_len]
    if not found:
        nothing = torch.zeros(*query.shape[:3], held.runs[0].value.shape[3], dtype=call.working,
                              device=query.device)  # fmt: skip
        found = [(nothing, torch.full_like(nothing[..., 0], -torch.inf))]
    out, lse = _merged_parts(call, found)
    told = torch.cat([out, lse[..., None], query.to(call.working).sum(-1, keepdim=True)], -1)
    came = ranks.all_gather(told)
    _alike([t[..., -1] for t in came])
    rows = [(t[..., :-2], t[..., -2]) for t in came]
    if call.sinks is not None:  # they belong to no rank
        none = torch.zeros_like(out)
        rows.append((none, call.sinks.to(call.working)[:, None].expand_as(lse)))
    out, lse = _merged_parts(call, rows)
    return out.to(query.dtype), call, _seen(whole, query, held, lse)


def _whole(
    ranks: Ranks, query: Tensor, held: Held, asking: Callable[[Call], Call] | None,
    request: dict[str, Any],
) -> Whole:  # fmt: skip
    """The call on all keys."""
    like = held.runs[0]
    sizes = (*like.key.shape[:2], held.length)
    key, value = (hollow(query, (*sizes, t.shape[3])) for t in (like.key, like.value))
    call = Call.checked(query, key, value, **request, return_lse=True)
    if by_content(call.mask) or call.dropout is not None:
        raise RegardError(
            "a step over keys on several ranks: a rank's keys alone choose no blocks, and nothing "
            "is dropped"
        )
    call = call if asking is None else asking(call)
    if any(isinstance(o, Effect) for o in call.observers):
        raise RegardError("Effect is read in a backward pass; a step over ranks has none")
    order = named("plain", ranks.size)
    return Whole(call, Layout(query.shape[2], order), Layout(held.length, order), ranks)


def _on(
    whole: Whole, query: Tensor, keys: Run, observers: Sequence[Observer] = (), sinks: bool = False
) -> Call:
    span = Span(0, query.shape[2], keys.start, keys.stop)
    return whole.part(query, keys.key, keys.value, span, observers, sinks)


def _merged_parts(call: Call, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return merge([out.to(call.working) for out, _ in parts], [lse for _, lse in parts])


def _alike(sums: Sequence[Tensor]) -> None:
    """RegardError where the ranks' queries, of which these are sums, are not the same."""
    bound = UNLIKE * sums[0].abs().amax() if sums[0].numel() else 0
    if any(bool(((other - sums[0]).abs() > bound).any()) for other in sums[1:]):
        raise RegardError(
            "the ranks go on from different tokens; give all the same prompt, and where tokens are "
            "drawn the same seed, torch.manual_seed"
        )


def _seen(whole: Whole, query: Tensor, held: Held, lse: Tensor) -> tuple[Any, ...]:
    """What the observers see under the log-sum-exp of all keys, whole in every rank."""
    observers = whole.call.observers
    if not observers:
        return ()
    asked = [of_span(o, whole, query.shape[2]) for o in observers]
    runs = [each for each in held.runs if each.stop > each.start] or held.runs[:1]
    each_run = [read_block(_on(whole, query, r, asked, True), lse) for r in runs]
    return tuple(
        _of_all(whole, observer, parts)
        for observer, parts in zip(observers, zip(*each_run, strict=True), strict=True)
    )


def _of_all(whole: Whole, observer: Observer, parts: Sequence[Any]) -> Any:
    """One result, from those of this rank's runs."""
    if isinstance(parts[0], LogSumExpSeen):  # that of all keys already
        return parts[0]
    mine = reduce(lambda a, b: a.beside(b), parts)
    if isinstance(observer, Received):
        return _received(whole, observer, parts)
    if isinstance(observer, Map | Distances):
        return collected(whole, observer, [mine]).local[0]
    return rows_merged(whole.ranks, mine)


def _received(whole: Whole, observer: Received, parts: Sequence[ReceivedSeen]) -> ReceivedSeen:
    """Each key lies on one rank: the others add 0."""
    place, like = whole.call.place, parts[0]
    total, count = (
        t.new_zeros(*t.shape[:2], place.k_len) for t in (like.sum, like.count)
    )  # fmt: skip
    for part in parts:
        at = part.key_start - place.key_start
        total[:, :, at : at + part.sum.shape[2]] = part.sum
        count[:, :, at : at + part.sum.shape[2]] = part.count
    both = [whole.ranks.all_reduce(t) for t in (total, count)]
    return observer.result(observer.pool(both[0], both[1], place), place)
