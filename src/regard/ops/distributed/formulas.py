"""What travels: bytes that a rank sends for one call, by how it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from .whole import HEADER


@dataclass(frozen=True)
class Sizes:
    """A call over the whole sequence on `ranks` ranks; element: bytes a number."""

    ranks: int
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    v_dim: int
    element: int

    @property
    def own_queries(self) -> int:
        """The positions of a rank, rounded up."""
        return -(-self.q_len // self.ranks)

    @property
    def own_keys(self) -> int:
        """Likewise of keys."""
        return -(-self.k_len // self.ranks)

    @property
    def working(self) -> int:
        """Bytes a number of scores, sums and gradients that are added: float32, or float64."""
        return max(self.element, 4)


def header(sizes: Sizes) -> int:
    """What the ranks tell each other before each call."""
    return (sizes.ranks - 1) * HEADER * 8


def forward(how: str, sizes: Sizes, lse: bool = False) -> int:
    """Bytes that a rank sends in the forward, without observers; of ranks with equal parts.

    heads: (P − 1)/P of its own q, k, v, then of its own out (and lse, where that is returned).
    gather, ring: its own k and v, P − 1 times.
    """
    s = sizes
    if how == "heads":
        rows = s.heads * (s.dim + s.v_dim) * s.element + (s.heads * s.working if lse else 0)
        keys = s.kv_heads * (s.dim + s.v_dim) * s.element
        own = s.own_queries * rows + s.own_keys * keys
        return s.batch * own * (s.ranks - 1) // s.ranks
    return (s.ranks - 1) * s.batch * s.own_keys * s.kv_heads * (s.dim + s.v_dim) * s.element


def backward(how: str, sizes: Sizes, lse: bool = False) -> int:
    """Bytes that a rank sends in the backward.

    heads: as much as in the forward. gather, ring: k and v again, and their gradients in the
    working dtype, P − 1 times.
    """
    if how == "heads":
        return forward(how, sizes, lse)
    s = sizes
    again = forward(how, sizes)
    return again + again // s.element * s.working


def received(sizes: Sizes) -> int:
    """Bytes that a rank sends for `Received`, by heads not at all: sums and counts of all keys."""
    s = sizes
    return (s.ranks - 1) * s.batch * s.own_keys * s.heads * (s.working + 4)


def second_ring(sizes: Sizes) -> int:
    """Bytes of the ring's second round, in which observers read the keys."""
    s = sizes
    return (s.ranks - 1) * s.batch * s.own_keys * s.kv_heads * s.dim * s.element
