"""The second pass: reads the weights from q, k and lse, strip by strip, and keeps what was asked.

Each observer has a reader here that is fed every strip and fills the tensors that the observer's
`shapes` names. Shared by all engines that do not observe inside their forward. On a GPU the Triton
kernel of `kernels.cuda` reads what it can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import transforms
from .call.checked import Call
from .call.geometry import Span
from .call.observers import (
    Distances,
    Effect,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    NormTopK,
    Observer,
    Received,
    Rows,
    TopK,
    parse,
    written,
)
from .call.op_schema import SCHEMA, pack, unpack
from .errors import RegardError
from .hidden import plus
from .impact import Measure, attach
from .kernels.cuda import measuring, reading
from .strips import Strips, take
from .topk import largest
from .weighed import Weighed


class Reader:
    """Feeds strips into the tensors of one observer."""

    def __init__(self, observer: Any, call: Call) -> None:
        self.observer, self.call, self.place = observer, call, call.place
        shapes = observer.shapes(call.place, call.working)
        self.tensors = [torch.zeros(s, dtype=d, device=call.place.device) for s, d in shapes]
        self.start()

    def start(self) -> None:
        """Set what an untouched row holds, where that is not 0."""

    def read(self, seen: Weighed) -> None:
        """Take what the observer keeps from one strip."""
        raise NotImplementedError

    def finish(self, lse: Tensor) -> list[Tensor]:
        """The filled tensors, after the last strip."""
        return self.tensors


class TopKReader(Reader):
    def start(self) -> None:
        self.tensors[0].fill_(-1)

    def read(self, seen: Weighed) -> None:
        indices, weights, rest, _ = self.tensors
        k = min(self.observer.k, seen.log.shape[-1])
        logs, cols = largest(seen.log, k)
        listed = logs.exp() / seen.total[..., None]
        at = seen.strip.here
        # NaN, and +inf under a NaN lse, are kept: they surface
        shown = logs != -torch.inf
        keys = seen.strip.keys()[cols] + self.place.key_start
        indices[at][..., :k] = keys.where(shown, -1).to(torch.int32)
        weights[at][..., :k] = listed
        rest[at] = (seen.mass - listed.sum(-1)).clamp(min=0)

    def finish(self, lse: Tensor) -> list[Tensor]:
        if self.call.sinks is not None:
            self.tensors[3] = (self.call.sinks.to(lse.dtype)[:, None] - lse).exp()
        return self.tensors


class NormTopKReader(Reader):
    norms: Tensor  # (batch, heads, k_len), given before the first strip

    def start(self) -> None:
        self.tensors[0].fill_(-1)

    def read(self, seen: Weighed) -> None:
        indices, norms, weights = self.tensors
        k = min(self.observer.k, seen.log.shape[-1])
        own = take(seen.strip.runs, self.norms[seen.part.batch, seen.part.heads], 2)
        logs, cols = largest(plus(seen.log, own.log()[:, :, None]), k)
        at, shown = seen.strip.here, logs != -torch.inf
        keys = seen.strip.keys()[cols] + self.place.key_start
        total = seen.total[..., None]
        indices[at][..., :k] = keys.where(shown, -1).to(torch.int32)
        norms[at][..., :k] = logs.exp() / total
        weights[at][..., :k] = (seen.log.gather(-1, cols).exp() / total).where(shown, 0)


class ReceivedReader(Reader):
    def start(self) -> None:
        self.rows = self.observer.span(self.place)
        self.pooled = self.observer.pooled(self.place)
        shape = (self.place.batch, self.place.heads, self.place.k_len)
        self.count = torch.zeros(shape, dtype=torch.int32, device=self.place.device)

    def read(self, seen: Weighed) -> None:
        part = seen.part
        r0, r1 = (min(max(r - part.q0, 0), part.q1 - part.q0) for r in self.rows)
        if r0 == r1:
            return
        everything = r1 - r0 == part.q1 - part.q0
        given = seen.column_sum if everything else seen.weights[:, :, r0:r1].sum(-2)
        counted = torch.full_like(given, r1 - r0, dtype=torch.int32)
        for col, hidden in seen.strip.hidden:
            width = hidden.shape[-1]
            counted[..., col : col + width] -= hidden[:, :, r0:r1].sum(-2, dtype=torch.int32)
        here = (part.batch, part.heads)
        seen.strip.add(self.count[here], counted, 2)
        total = self.tensors[0]
        if self.pooled == self.place.heads and self.observer.heads == "each":
            seen.strip.add(total[here], given, 2)
            return
        size = self.place.heads // self.pooled
        owner = (
            torch.arange(self.place.heads, device=given.device, dtype=torch.int64)[part.heads]
            // size
        )
        summed = given.new_zeros(given.shape[0], self.pooled, given.shape[-1])
        summed.index_add_(1, owner, given)
        seen.strip.add(total[part.batch], summed, 2)

    def finish(self, lse: Tensor) -> list[Tensor]:
        size = self.place.heads // self.pooled
        total = self.tensors[0]
        if self.observer.heads.endswith("mean"):
            total = total / size
        # A pooled column counts the queries that see it in any of its heads
        return [total, self.count.unflatten(1, (self.pooled, size)).amax(2)]


class EntropyReader(Reader):
    def read(self, seen: Weighed) -> None:
        terms = seen.exp * seen.log
        # A hidden pair is 0 · −inf there
        for col, hidden in seen.strip.hidden:
            terms[..., col : col + hidden.shape[-1]].masked_fill_(hidden, 0)
        if self.call.biases:
            terms.masked_fill_(seen.log == -torch.inf, 0)
        # ln(weight) is log − ln(total)
        entropy = seen.mass * seen.total.log() - terms.sum(-1) / seen.total
        self.tensors[0][seen.strip.here] = entropy


class MaxScoreReader(Reader):
    def start(self) -> None:
        self.tensors[0].fill_(-torch.inf)

    def read(self, seen: Weighed) -> None:
        self.tensors[0][seen.strip.here] = seen.top


class LogSumExpReader(Reader):
    def read(self, seen: Weighed) -> None:
        """Nothing: the pass was given it."""

    def finish(self, lse: Tensor) -> list[Tensor]:
        return [lse.to(self.tensors[0].dtype, copy=True)]


class RowsReader(Reader):
    def start(self) -> None:
        self.wanted = [row for _, row in self.observer.local(self.place)]

    def read(self, seen: Weighed) -> None:
        part = seen.part
        for n, row in enumerate(self.wanted):
            if part.q0 <= row < part.q1:
                mine = self.tensors[0][part.batch, part.heads, n]
                seen.strip.add(mine, seen.weights[:, :, row - part.q0], 2)


class MapReader(Reader):
    def start(self) -> None:
        self.rows, self.cols = self.observer.cells(self.place)
        self.max = self.observer.reduce == "max"

    def read(self, seen: Weighed) -> None:
        part, place = seen.part, self.place
        first = (place.query_start + part.q0) // self.rows.size
        last = (place.query_start + part.q1 - 1) // self.rows.size
        if first == last and not self.max:
            pooled = seen.column_sum[:, :, None]
        else:
            pooled = self._pool(seen.weights, -2, place.query_start + part.q0, self.rows.size)
        keys = (seen.strip.keys() + place.key_start) // self.cols.size - self.cols.first
        target = self.tensors[0][part.batch, part.heads, first - self.rows.first :]
        target = target[:, :, : last - first + 1]
        if self.max:
            target.scatter_reduce_(-1, keys.expand_as(pooled), pooled, "amax")
        else:
            target.index_add_(-1, keys, pooled)

    def _pool(self, weights: Tensor, dim: int, start: int, size: int) -> Tensor:
        """Rows into cells of `size`: aligned ones by a view, the ragged ends apart."""
        length = weights.shape[dim]
        head = min(-start % size, length)
        body = (length - head) // size * size
        parts = []
        if head:
            parts.append(self._reduce(weights.narrow(dim, 0, head), dim, keepdim=True))
        if body:
            parts.append(
                self._reduce(weights.narrow(dim, head, body).unflatten(dim, (-1, size)), dim)
            )
        if head + body < length:
            tail = weights.narrow(dim, head + body, length - head - body)
            parts.append(self._reduce(tail, dim, keepdim=True))
        return torch.cat(parts, dim)

    def _reduce(self, part: Tensor, dim: int, keepdim: bool = False) -> Tensor:
        return part.amax(dim, keepdim) if self.max else part.sum(dim, keepdim)


class DistancesReader(Reader):
    """Shears each run of a strip so that every distance stands in one column, then adds up."""

    def start(self) -> None:
        self.edges = torch.tensor(self.observer.edges, device=self.place.device, dtype=torch.int64)

    def read(self, seen: Weighed) -> None:
        for at, span in seen.strip.spans():
            p = seen.weights[..., at : at + span.k1 - span.k0]
            items, heads, rows, cols = p.shape
            length = rows + cols - 1
            sheared = p.new_zeros(items, heads, rows * length)
            stride = sheared.stride()
            # (i, j) goes to column rows − 1 − i + j, so a column is one value of query − key
            sheared.as_strided(p.shape, (stride[0], stride[1], length - 1, 1), rows - 1).copy_(p)
            by_distance = sheared.view(items, heads, rows, length).sum(2)
            most = self.place.query_start - self.place.key_start + span.q0 - span.k0 + rows - 1
            distance = most - torch.arange(length, device=p.device, dtype=torch.int64)
            bins = torch.bucketize(distance.abs(), self.edges, right=True) - 1
            behind = distance >= 0
            for tensor, side in zip(self.tensors, (behind, ~behind), strict=True):
                mine = tensor[seen.part.batch, seen.part.heads]
                mine.index_add_(-1, bins[side], by_distance[..., side])


READERS: dict[type[Observer], type[Reader]] = {
    TopK: TopKReader,
    NormTopK: NormTopKReader,
    Received: ReceivedReader,
    Entropy: EntropyReader,
    MaxScore: MaxScoreReader,
    LogSumExp: LogSumExpReader,
    Rows: RowsReader,
    Map: MapReader,
    Distances: DistancesReader,
}


def weigh(
    call: Call,
    lse: Tensor,
    out: Tensor | None = None,
    shard: bool = False,
    seen: Mapping[int, Any] = MappingProxyType({}),
) -> tuple[Any, ...]:
    """What the call's observers see of the weights exp(score − lse), in their order.

    lse (batch, heads, q_len): that of all keys. shard: the call may hold only some of them.
    out (batch, heads, q_len, v_dim): the output; an Effect waits for its gradient.
    seen: results that the forward gathered already, by the number of their observer.
    Keys in pages are read there where the Triton kernel can, else copied out.
    """
    left = [o for i, o in enumerate(call.observers) if i not in seen]
    if left and call.pages is not None and not (eager() and not kernel_refuses(call)):
        call = call.gathered()
    now = [o for o in left if not isinstance(o, Effect)]
    read = iter(_read(call, now, lse, shard) if now else ())
    results = []
    for i, observer in enumerate(call.observers):
        if i in seen:
            results.append(seen[i])
        elif not isinstance(observer, Effect):
            results.append(next(read))
        elif out is None:
            raise RegardError("Effect is read in a backward pass; a second pass alone has none")
        else:
            whole = call.gathered()
            by = _measure(whole, lse, out, observer)
            results.append(attach(whole, lse, out, observer, by))
    return tuple(results)


def eager() -> bool:
    """Whether neither a compiler nor a transform looks on."""
    return not torch.compiler.is_compiling() and not transforms.active()


def _measure(call: Call, lse: Tensor, out: Tensor, effect: Effect) -> Measure | None:
    """How the Triton kernel measures an effect; None where torch does."""
    if not eager() or kernel_refuses(call) or measuring.refuses(effect, call):
        return None
    assert call.value is not None
    still = replace(
        call, query=call.query.detach(), key=call.key.detach(), value=call.value.detach()
    )
    return partial(measuring.effect, still, lse.detach(), out.detach(), effect.k)


def _read(call: Call, observers: list[Observer], lse: Tensor, shard: bool) -> list[Any]:
    """The results of one pass."""
    if call.pages is not None:
        return _read_pages(call, observers, lse, shard)
    norms = [_norms(o, call) for o in observers if isinstance(o, NormTopK)]
    packed = tuple(_detached(argument) for argument in pack(call))
    tensors = torch.ops.regard.weigh(
        call.query.detach(), call.key.detach(), *packed, lse.detach().to(call.working), norms,
        shard, written(observers),
    )  # fmt: skip
    results, at = [], 0
    for observer in observers:
        count = len(observer.shapes(call.place, call.working))
        results.append(observer.result(list(tensors[at : at + count]), call.place))
        at += count
    return results


def _read_pages(call: Call, observers: list[Observer], lse: Tensor, shard: bool) -> list[Any]:
    """The results of one pass by the kernel, which reads keys in their pages.

    What it does not gather is read in torch, from a copy of the keys in order.
    """
    mine = [o for o in observers if not reading.refuses(o)]
    others = [o for o in observers if reading.refuses(o)]
    found = iter(reading.read(call, mine, lse.detach(), shard) if mine else ())
    read = iter(_read(call.gathered(), others, lse, shard) if others else ())
    return [
        next(read) if reading.refuses(o) else o.result(next(found), call.place) for o in observers
    ]


def _norms(observer: NormTopK, call: Call) -> Tensor:
    if call.value is None:
        raise RegardError("NormTopK needs the values; the second pass alone has none")
    return observer.norms(call.value.detach().to(call.working), call.place.heads)


def _detached(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.detach()
    if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
        return [t.detach() for t in argument]
    return argument


@torch.library.custom_op(
    "regard::weigh",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, {SCHEMA}, Tensor lse, Tensor[] norms, bool shard, "
    "str observers) -> Tensor[]",
)
def _weigh(query: Tensor, key: Tensor, *rest: Any) -> list[Tensor]:
    *packed, lse, norms, shard, observers = rest
    call = unpack(query, key, None, *packed)
    asked = parse(observers)
    by_kernel = [] if kernel_refuses(call) else [o for o in asked if not reading.refuses(o)]
    found = iter(reading.read(call, by_kernel, lse, shard) if by_kernel else ())
    left = [o for o in asked if o not in by_kernel]
    filled = iter(_fill(call, left, lse, norms, shard))
    return [t for o in asked for t in next(found if o in by_kernel else filled)]


def _fill(
    call: Call, observers: Sequence[Observer], lse: Tensor, norms: Sequence[Tensor], shard: bool
) -> list[list[Tensor]]:
    """The tensors of each observer, by the readers in torch."""
    readers = [READERS[type(o)](o, call) for o in observers]
    by_norm = (r for r in readers if isinstance(r, NormTopKReader))
    for weighted, own in zip(by_norm, norms, strict=True):
        weighted.norms = own
    if any(not isinstance(r, LogSumExpReader) for r in readers):
        for strip in Strips(call):
            seen = Weighed(strip, lse, call, shard)
            for reader in readers:
                reader.read(seen)
    return [reader.finish(lse) for reader in readers]


def kernel_refuses(call: Call) -> list[str]:
    """The reasons why the second pass is not by the Triton kernel; empty if it is.

    An observer that the kernel does not gather is read in torch beside it: `reading.refuses`.
    """
    if call.place.device.type != "cuda":
        return [f"query is on {call.place.device}; the kernel runs on cuda"]
    return reading.why_not(call)


def explained(call: Call) -> list[str]:
    """Why what the call observes is not read by the Triton kernel; empty if all of it is."""
    reasons = kernel_refuses(call)
    for observer in call.observers:
        if isinstance(observer, Effect):
            reasons += measuring.refuses(observer, call)
        else:
            reasons += reading.refuses(observer)
    return reasons


@_weigh.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> list[Tensor]:
    *packed, _, _, _, observers = rest
    call = unpack(query, key, None, *packed)
    shapes = [s for o in parse(observers) for s in o.shapes(call.place, call.working)]
    return [query.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


@_weigh.register_vmap
def _(info: Any, in_dims: Any, query: Tensor, key: Tensor, *rest: Any) -> Any:
    *packed, lse, norms, shard, observers = rest
    packed[3] = None  # dropout's seed: weights are observed before it
    dims = in_dims[2:]
    laid, kinds = transforms.Laid.of(packed), ["all", "all"]
    flat = transforms.tensors_of(packed)
    end = 2 + len(flat)

    def once(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.ops.regard.weigh(
            *tensors[:2], *laid.packed(tensors[2:end]), tensors[end], tensors[end + 1 :], shard,
            observers,
        )  # fmt: skip

    answers = transforms.mapped(
        once,
        [query, key, *flat, lse, *norms],
        [*in_dims[:2], *transforms.tensors_of(packed, dims), dims[-4], *dims[-3]],
        [*kinds, *laid.kinds, "all", *["all"] * len(norms)],
        info.batch_size,
    )
    return list(answers), [0] * len(answers)


def whole_rows(call: Call, lse: Tensor, rows: tuple[int, int]) -> Tensor:
    """The weights of the queries start … stop − 1: (batch, heads, stop − start, k_len)."""
    place = call.place
    out = torch.zeros(
        place.batch, place.heads, rows[1] - rows[0], place.k_len, dtype=call.working,
        device=place.device,
    )  # fmt: skip
    for strip in Strips(call, rows=rows):
        part: Span = strip.part
        mine = out[part.batch, part.heads, part.q0 - rows[0] : part.q1 - rows[0]]
        strip.add(mine, Weighed(strip, lse, call).weights, 3)
    return out
