from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A rectangle of one call: queries q0 ≤ i < q1, keys k0 ≤ j < k1, of some batches and heads."""

    q0: int
    q1: int
    k0: int
    k1: int
    batch: slice = field(default_factory=lambda: slice(None))
    heads: slice = field(default_factory=lambda: slice(None))

    def cut(self, tensor: Tensor) -> Tensor:
        """The part of a tensor broadcastable to (batch, heads, q_len, k_len) inside this span."""
        dims = (self.batch, self.heads, slice(self.q0, self.q1), slice(self.k0, self.k1))
        wanted = (slice(None) if tensor.shape[d] == 1 else dims[d] for d in range(4))
        return tensor[tuple(wanted)]


@dataclass(frozen=True)
class Place:
    """The call that a mask is lowered for: its sizes, where it stands, and its device."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    query_start: int
    key_start: int
    device: torch.device

    def __str__(self) -> str:
        return f"batch {self.batch}, heads {self.heads}, q_len {self.q_len}, k_len {self.k_len}"
