"""What observers see of the implied weights: strip by strip, in O(N·k) memory.

Weights that are normalised are above 0 and mean what they do in softmax attention: a row is the
softmax of ln(φ(q_i) · φ(k_j) · decay). Others have either sign, and the mass that observers speak
of is their absolute value; single weights keep their sign.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.observers import (
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
    from_json,
    to_json,
)
from ...call.op_schema import SCHEMA, pack, unpack
from ...engines.second_pass.readers import (
    Accumulator,
    DistancesAccumulator,
    MapAccumulator,
    ReceivedAccumulator,
    RowsAccumulator,
)
from ...engines.second_pass.strips import Strip, StripWeights
from ...engines.second_pass.top_k import largest
from ...errors import RegardError
from . import implied_weights as implied
from .implied_weights import ImpliedRows
from .recurrence import Flow, Prepared, full_precision
from .request import Request


class ImpliedStripWeights(StripWeights):
    """A strip's weights as the readers of softmax attention take them.

    weights, column_sum: their absolute values. signed: as they are. visible bool. total (…, rows):
    ln of the sum that they were divided by; top: ln of the largest before the division.
    """

    def __init__(
        self, rows: ImpliedRows, call: Call, normaliser: Tensor | None, taken: Tensor | None,
        normalise: bool,
    ) -> None:  # fmt: skip
        part = self.part = rows.part
        self.visible = call.program.visible(part).expand(rows.weights.shape)
        hidden = ~self.visible
        signed = rows.weights.masked_fill(hidden, 0)
        if normalise:
            divisor = signed.sum(-1)
            if normaliser is not None:
                group = call.place.heads // normaliser.shape[1]
                given = normaliser[part.batch, rows.kv].repeat_interleave(group, 1)
                divisor = divisor + (rows.arrived @ given[..., None])[..., 0]
            shift = 0 if taken is None else taken[part.batch, part.heads, part.q0 : part.q1]
            most = signed.amax(-1) if signed.shape[-1] else torch.zeros_like(divisor)
            self.top, self.log_total = most.log() + shift, divisor.log() + shift
            signed = signed / divisor.masked_fill(divisor == 0, 1)[..., None]
        self.signed = signed
        self.weights = signed.abs()
        self.column_sum = self.weights.sum(-2)
        nothing = signed.new_zeros(0)
        self.strip = Strip(part, rows.kv, [(0, part.k1)], nothing, nothing, signed, [(0, hidden)])

    def ranked(self, sizes: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of sizes ≥ 0 (batch, heads, rows, keys), the k largest visible: (sizes, keys, shown)."""
        found, keys = largest(sizes.masked_fill(~self.visible, -1), min(k, sizes.shape[-1]))
        return found, keys, ~(found < 0)


class SignedTopKAccumulator(Accumulator):
    """By absolute value; `rest` is the sum of those not listed."""

    def start(self) -> None:
        self.tensors[0].fill_(-1)

    def read(self, seen: Any) -> None:
        indices, weights, rest, _ = self.tensors
        sizes, keys, shown = seen.ranked(seen.weights, self.observer.k)
        at, k = seen.strip.here, keys.shape[-1]
        indices[at][..., :k] = (keys + self.place.key_start).where(shown, -1).to(torch.int32)
        weights[at][..., :k] = seen.signed.gather(-1, keys).where(shown, 0)
        listed = sizes.where(shown, 0).sum(-1)
        rest[at] = (seen.weights.sum(-1) - listed).clamp(min=0)


class SignedNormTopKAccumulator(Accumulator):
    """By |weight| · ‖W_O v‖."""

    norms: Tensor  # (batch, heads, k_len), given before the first strip

    def start(self) -> None:
        self.tensors[0].fill_(-1)

    def read(self, seen: Any) -> None:
        indices, norms, weights = self.tensors
        part = seen.part
        own = self.norms[part.batch, part.heads, None, : part.k1]
        sizes, keys, shown = seen.ranked(seen.weights * own, self.observer.k)
        at, k = seen.strip.here, keys.shape[-1]
        indices[at][..., :k] = (keys + self.place.key_start).where(shown, -1).to(torch.int32)
        norms[at][..., :k] = sizes.where(shown, 0)
        weights[at][..., :k] = seen.signed.gather(-1, keys).where(shown, 0)


class SignedRowsAccumulator(RowsAccumulator):
    """Rows keep their signs."""

    def read(self, seen: Any) -> None:
        part = seen.part
        for n, row in enumerate(self.wanted):
            if part.q0 <= row < part.q1:
                mine = self.tensors[0][part.batch, part.heads, n]
                seen.strip.add(mine, seen.signed[:, :, row - part.q0], 2)


class ImpliedEntropyAccumulator(Accumulator):
    """−Σ w ln w of normalised weights."""

    def read(self, seen: Any) -> None:
        self.tensors[0][seen.strip.here] = torch.special.entr(seen.weights).sum(-1)


class ImpliedMaxScoreAccumulator(Accumulator):
    """ln of the row's largest φ(q) · φ(k), decayed."""

    def start(self) -> None:
        self.tensors[0].fill_(-torch.inf)

    def read(self, seen: Any) -> None:
        self.tensors[0][seen.strip.here] = seen.top


class ImpliedLogSumExpAccumulator(Accumulator):
    """ln of what the row's weights were divided by."""

    def start(self) -> None:
        self.tensors[0].fill_(-torch.inf)

    def read(self, seen: Any) -> None:
        self.tensors[0][seen.strip.here] = seen.log_total


READERS: dict[type[Observer], type[Accumulator]] = {
    TopK: SignedTopKAccumulator,
    NormTopK: SignedNormTopKAccumulator,
    Received: ReceivedAccumulator,
    Entropy: ImpliedEntropyAccumulator,
    MaxScore: ImpliedMaxScoreAccumulator,
    LogSumExp: ImpliedLogSumExpAccumulator,
    Rows: SignedRowsAccumulator,
    Map: MapAccumulator,
    Distances: DistancesAccumulator,
}


def check(request: Request) -> None:
    """RegardError for an observer that these weights do not suit."""
    for observer in request.call.observers:
        if isinstance(observer, Effect):
            raise RegardError(f"{observer} is defined for softmax; linear attention has none")
        if type(observer) not in READERS:
            raise RegardError(f"{observer} does not read the weights of linear attention")
        if isinstance(observer, Entropy | MaxScore | LogSumExp) and not request.normalise:
            raise RegardError(
                f"{observer} needs weights that are normalised; these are not (normalise=False)"
            )


def weigh(ready: Prepared) -> tuple[Any, ...]:
    """What the request's observers see, in their order."""
    request, flow = ready.request, ready.flow
    call = request.call
    norms = [
        o.norms(_detached(call.value).to(call.working), call.place.heads)
        for o in call.observers
        if isinstance(o, NormTopK)
    ]
    normaliser = flow.memory[..., -1] if request.normalise and request.state is not None else None
    tensors = torch.ops.regard.linear_weigh(
        flow.query.detach(), flow.key.detach(), *pack(call), _detached(flow.decay),
        _detached(flow.beta), _detached(normaliser), ready.log_factor, norms, request.causal,
        request.normalise, call.place.kv_heads, to_json(call.observers),
    )  # fmt: skip
    results, at = [], 0
    for observer in call.observers:
        count = len(observer.shapes(call.place, call.working))
        results.append(observer.result(list(tensors[at : at + count]), call.place))
        at += count
    return tuple(results)


def _detached(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach()


def _call(query: Tensor, key: Tensor, packed: Any, kv_heads: int) -> Call:
    """The call that was packed; the key here may stand for each query head."""
    call = unpack(query, key, None, *packed)
    return replace(call, place=replace(call.place, kv_heads=kv_heads))


@torch.library.custom_op(
    "regard::linear_weigh",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, {SCHEMA}, Tensor? decay, Tensor? beta, Tensor? normaliser, "
    "Tensor? taken, Tensor[] norms, bool causal, bool normalise, int kv_heads, str observers) "
    "-> Tensor[]",
)
def _weigh(query: Tensor, key: Tensor, *rest: Any) -> list[Tensor]:
    *packed, decay, beta, normaliser, taken, norms, causal, normalise, kv_heads, observers = rest
    call = _call(query, key, packed, kv_heads)
    readers = [READERS[type(o)](o, call) for o in from_json(observers)]
    by_norm = (r for r in readers if isinstance(r, SignedNormTopKAccumulator))
    for weighted, own in zip(by_norm, norms, strict=True):
        weighted.norms = own
    flow = Flow(query, key, key, decay, beta, key)  # neither value nor memory are read
    with full_precision(query):
        for rows in implied.causal(flow) if causal else implied.everywhere(flow):
            seen = ImpliedStripWeights(rows, call, normaliser, taken, normalise)
            for reader in readers:
                reader.read(seen)
    return [tensor for reader in readers for tensor in reader.finish(query)]


@_weigh.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> list[Tensor]:
    *packed, _, _, _, _, _, _, _, kv_heads, observers = rest
    call = _call(query, key, packed, kv_heads)
    shapes = [s for o in from_json(observers) for s in o.shapes(call.place, call.working)]
    return [query.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
