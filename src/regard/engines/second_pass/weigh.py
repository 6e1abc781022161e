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

from ...call.checked import Call
from ...call.geometry import Span
from ...call.observers import (
    Effect,
    NormTopK,
    Observer,
    from_json,
    to_json,
)
from ...call.op_schema import SCHEMA, pack, unpack
from ...errors import RegardError
from .. import functorch as transforms
from .effect import Measure, attach
from .readers import READERS, LogSumExpAccumulator, NormTopKAccumulator
from .strips import Strips, StripWeights
from .triton import effect as measuring
from .triton import read as reading


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
    if call.pages is not None or _at_once(call, observers, lse):
        return _by_kernel(call, observers, lse, shard)
    norms = [_norms(o, call) for o in observers if isinstance(o, NormTopK)]
    packed = tuple(_detached(argument) for argument in pack(call))
    tensors = torch.ops.regard.weigh(
        call.query.detach(), call.key.detach(), *packed, lse.detach().to(call.working), norms,
        shard, to_json(observers),
    )  # fmt: skip
    results, at = [], 0
    for observer in observers:
        count = len(observer.shapes(call.place, call.working))
        results.append(observer.result(list(tensors[at : at + count]), call.place))
        at += count
    return results


def _at_once(call: Call, observers: list[Observer], lse: Tensor) -> bool:
    """Whether the kernel gathers some, and nobody looks on who would have to see an op of torch."""
    return (
        transforms.unwatched(call.query, call.key, lse)
        and not kernel_refuses(call)
        and any(not reading.refuses(o) for o in observers)
    )


@torch.no_grad()
def _by_kernel(call: Call, observers: list[Observer], lse: Tensor, shard: bool) -> list[Any]:
    """The results of one pass by the kernel, which reads keys in pages where they lie.

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
    asked = from_json(observers)
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
    by_norm = (r for r in readers if isinstance(r, NormTopKAccumulator))
    for weighted, own in zip(by_norm, norms, strict=True):
        weighted.norms = own
    if any(not isinstance(r, LogSumExpAccumulator) for r in readers):
        for strip in Strips(call):
            seen = StripWeights(strip, lse, call, shard)
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
    shapes = [s for o in from_json(observers) for s in o.shapes(call.place, call.working)]
    return [query.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


@_weigh.register_vmap
def _(info: Any, in_dims: Any, query: Tensor, key: Tensor, *rest: Any) -> Any:
    *packed, lse, norms, shard, observers = rest
    packed[3] = None  # dropout's seed: weights are observed before it
    dims = in_dims[2:]
    laid, kinds = transforms.FlatArguments.of(packed), ["all", "all"]
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
        strip.add(mine, StripWeights(strip, lse, call).weights, 3)
    return out
