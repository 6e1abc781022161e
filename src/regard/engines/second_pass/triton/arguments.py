"""What a launch of the kernels gathers, and what all launches of a call have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ....call.biases import Kind
from ....call.checked import Call
from ....call.observers import Distances, Entropy, Map, MaxScore, Observer, Received, TopK
from .forms import by_form, unread
from .kernel_tuples import BiasArgs, CallArgs, Form, MaskArgs, fixed, strides
from .mask_records import Instructions, instructions

MOST_DENSE = 2


@dataclass
class Launch:
    """What one launch of the kernel gathers: of each kind of observer one, or none."""

    listed: int = 0  # the largest k of a TopK
    entropy: bool = False
    score: bool = False
    received: tuple[int, int] | None = None  # the rows that count
    map: Map | None = None
    distances: tuple[int, ...] | None = None  # edges
    found: dict[str, Tensor] = field(default_factory=dict)

    @property
    def columns(self) -> bool:
        """Whether it adds up over rows."""
        return (self.received, self.map, self.distances) != (None, None, None)


def launches(observers: Sequence[Observer], call: Call) -> list[Launch]:
    """The launches that gather the observers: one, unless two of a kind differ."""
    place, plans = call.place, [Launch()]

    def add(name: str, value: Any) -> None:
        for plan in plans:
            if getattr(plan, name) in (None, value):
                setattr(plan, name, value)
                return
        plans.append(Launch(**{name: value}))

    for observer in observers:
        if isinstance(observer, TopK):
            plans[0].listed = max(plans[0].listed, observer.k)
        elif isinstance(observer, Entropy):
            plans[0].entropy = True
        elif isinstance(observer, MaxScore):
            plans[0].score = True
        elif isinstance(observer, Received):
            add("received", observer.span(place))
        elif isinstance(observer, Map):
            add("map", observer)
        elif isinstance(observer, Distances):
            add("distances", observer.edges)
    return [p for p in plans if p.listed or p.entropy or p.score or p.columns]


class Shared:
    """What all launches of a call have in common, in the form that the kernels take."""

    def __init__(self, call: Call, lse: Tensor) -> None:
        self.call, self.lse = call, lse
        place = call.place
        self.masked = not call.program.full
        device = place.device
        nothing, self.none, self.table, no_bias = unread(device)
        self.sinks = nothing if call.sinks is None else call.sinks.to(torch.float32)
        self.slopes = self.relative = nothing
        self.alibi = self.has_relative = False
        least = place.key_start - (place.query_start + place.q_len - 1)
        self.width = place.q_len + place.k_len - 1
        dense: list[Tensor] = []
        for bias in call.biases:
            if bias.kind == Kind.DENSE:
                dense.append(bias.tensor)
            elif bias.kind == Kind.ALIBI:
                slopes = bias.tensor.to(torch.float32)
                self.slopes = self.slopes + slopes if self.alibi else slopes.contiguous()
                self.alibi = True
            else:
                offsets = torch.arange(self.width, device=device, dtype=torch.int64) + least
                along = bias.along(offsets).to(torch.float32).contiguous()
                self.relative = self.relative + along if self.has_relative else along
                self.has_relative = True
        self.dense = len(dense)
        added: list[Any] = []
        for n in range(MOST_DENSE):
            tensor = dense[n] if n < len(dense) else no_bias
            steps = (0 if tensor.shape[d] == 1 else tensor.stride(d) for d in range(4))
            added += [tensor, *steps]
        self.biases = BiasArgs(self.slopes, self.relative, self.width, -least, *added)
        self.lengths = self.table
        self.paged, self.page_size = call.pages is not None, 1
        if call.pages is not None:
            self.table = call.pages.table.to(torch.int32).contiguous()
            self.lengths = call.pages.lengths.to(torch.int32).contiguous()
            self.page_size = call.key.shape[2]

    @cached_property
    def mask(self) -> Instructions:
        """The mask's program: its records are copied to the device, where a kernel reads them."""
        return instructions(self.call.program)

    @cached_property
    def args(self) -> CallArgs:
        """The call, for every kernel: made once, as each attribute of a tensor takes its time."""
        call, place = self.call, self.call.place
        return CallArgs(
            call.query, call.key, self.lse, self.sinks, *strides(call.query), *strides(call.key),
            call.query.shape[-1], place.heads, place.heads // place.kv_heads, place.q_len,
            place.k_len, call.scale, call.softcap or 1.0, place.query_start, place.key_start,
            self.table, self.table.stride(0), self.page_size, self.lengths,
        )  # fmt: skip

    def mask_args(self, by_program: bool = True) -> MaskArgs:
        """by_program: the kernel asks the mask's program, which not every mask needs."""
        if self.masked and by_program:
            mask = self.mask
            return MaskArgs(mask.records, len(mask.records), mask.integers, mask.octets)
        return MaskArgs(self.none, 0, self.none, self.none)

    def form(self, block_q: int, block_k: int, band: bool = False) -> Form:
        """What the kernels are compiled for. band: the mask is two numbers, and no program."""
        kinds = self.mask.kinds if self.masked and not band else 0
        dim = wide(self.call.query.shape[-1])
        return fixed(
            Form(
                SOFTCAP=self.call.softcap is not None, ALIBI=self.alibi,
                RELATIVE=self.has_relative, DENSE=self.dense, MASKED=self.masked, KINDS=kinds,
                BAND=band, PAGED=self.paged, SINKS=self.call.sinks is not None,
                M=block_q, N=block_k, D=dim,
            )
        )  # fmt: skip


@by_form(64)
def ends(device: torch.device, edges: tuple[int, ...]) -> Tensor:
    """Where each bin of distances begins, and the last one ends: int32."""
    most = 2**31 - 1
    given = [min(e, most) for e in (*edges, most)]
    return torch.tensor(given, dtype=torch.int32, device="cpu").to(device, non_blocking=True)


def wide(dim: int) -> int:
    """The smallest power of two that holds dim, 16 at least, as matrix instructions take it."""
    return 1 << max(dim - 1, 15).bit_length()


def power(n: int) -> int:
    """The smallest power of two that holds n, 2 at least."""
    return 1 << max(n - 1, 1).bit_length()


def on_device(device: torch.device) -> Any:
    """Triton launches on the current device: make it the call's."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


def drawn(call: Call, none: Tensor) -> tuple[Tensor, float]:
    """Of a call's dropout: its seed and below what a word drops, and the factor of a kept weight.

    none: what stands for the tensor where there is no dropout.
    """
    if call.dropout is None:
        return none, 1.0
    seed = 0 if call.dropout.seed is None else int(call.dropout.seed)
    words = torch.tensor([seed, round(call.dropout.p * 2**32)], dtype=torch.int64, device="cpu")
    return words.to(call.place.device, non_blocking=True), 1 / (1 - call.dropout.p)
