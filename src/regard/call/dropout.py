"""Dropout of attention weights whose mask is a function of (seed, batch, head, query, key).

Philox 4×32-10 (Salmon et al. 2011) on the counter (key // 4, query, batch · heads + head, 0) under
the 64-bit seed; output key % 4 decides. So every engine, and every recomputed tile, agrees.
Query and key are positions in the sequence, modulo 2³².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegardError
from .brief import Brief
from .geometry import Place, Span
from .numbers import real, whole

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True, eq=False)
class Dropout(Brief):
    """Weights become 0 with probability p, else are divided by 1 − p.

    seed: an integer, or a tensor () int64; None draws one from torch's generator.
    """

    p: float
    seed: int | Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.p, float):
            object.__setattr__(self, "p", real(self.p, "dropout"))
        if not 0 <= self.p < 1:
            raise RegardError(f"dropout is {self.p}; give 0 ≤ p < 1")

    @classmethod
    def given(cls, dropout: Dropout | float | None) -> Dropout | None:
        """What a caller gave, with its seed drawn; None where nothing is dropped."""
        if dropout is None:
            return None
        if not isinstance(dropout, Dropout):
            dropout = Dropout(real(dropout, "dropout"))
        if dropout.p == 0:
            return None
        seed = dropout.seed
        if seed is None:
            seed = torch.randint(2**62, (), dtype=torch.int64, device="cpu")
        elif not isinstance(seed, Tensor):
            seed = whole(seed, "seed")
            if not -(2**63) <= seed < 2**63:
                raise RegardError(f"seed is {seed}; give a number of 64 bits")
            seed = torch.tensor(seed, dtype=torch.int64, device="cpu")
        return Dropout(dropout.p, seed)

    def factor(self, span: Span, place: Place, dtype: torch.dtype) -> Tensor:
        """0 or 1 / (1 − p) for each weight of a span: (batch, heads, q1 − q0, k1 − k0)."""
        batch = torch.arange(place.batch, device=place.device, dtype=torch.int64)[span.batch]
        head = torch.arange(place.heads, device=place.device, dtype=torch.int64)[span.heads]
        query = (
            torch.arange(span.q0, span.q1, device=place.device, dtype=torch.int64)
            + place.query_start
        )
        first = (span.k0 + place.key_start) // 4
        last = (span.k1 - 1 + place.key_start) // 4
        group = torch.arange(first, last + 1, device=place.device, dtype=torch.int64)
        seed = int(self.seed) if self.seed is not None else 0
        rows = batch[:, None, None, None] * place.heads + head[None, :, None, None]
        counter = (group & _LOW, (query & _LOW)[:, None], rows, torch.zeros_like(group))
        words = torch.stack(philox(counter, (seed & _LOW, seed >> 32 & _LOW)), -1)
        skip = span.k0 + place.key_start - first * 4
        words = words.flatten(-2)[..., skip : skip + span.k1 - span.k0]
        return (words >= round(self.p * 2**32)).to(dtype) / (1 - self.p)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> list[Tensor]:
    """Philox 4×32-10 of four broadcastable int64 tensors that hold 32 bits: four such tensors."""
    words = list(torch.broadcast_tensors(*counter))
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, so both halves of the unsigned product are right
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            (second >> 32 & _LOW) ^ words[1] ^ k0,
            second & _LOW,
            (first >> 32 & _LOW) ^ words[3] ^ k1,
            first & _LOW,
        ]
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return words
