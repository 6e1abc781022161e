"""What test_triton_pooled.py has its workers do, in which Triton interprets its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from interpreted import case_of
from regard import Causal, Padding
from regard.call.checked import Call
from regard.engines.second_pass.pooled import Rectangle, tiles_in_torch
from regard.engines.second_pass.triton import pooled
from test_pooled import REDUCE, odd_call, truth

PLACES = [(0, 0, 20), (1, -3, 5), (3, 7, -1), (6, 0, 0), (7, -100, -9), (9, 1, 2)]
BIG = [(0, 64, 40), (2, 0, 0), (8, -5, 0)]


def compare(call: Call, lse: Tensor, tiles: list[Rectangle], near: float) -> None:
    """Both reductions, against the definition in torch."""
    for reduce in REDUCE:
        ours = pooled.pooled(call, lse, tiles, reduce == "max")
        wanted = tiles_in_torch(call.gathered(), lse, tiles, reduce == "max")
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, wanted, rtol=near, atol=near, equal_nan=True)


def check(name: str, dtype: torch.dtype, first: int) -> str:
    """Two tiles of a shared case; the refusal, if it is one."""
    case = case_of(name)
    query, key, _ = case.tensors(dtype=dtype)
    call = Call.checked(query, key, None, **case.request(dtype))
    heads, batch = call.place.heads, call.place.batch
    places = [PLACES[(first + n) % len(PLACES)] for n in (0, 2)]
    tiles = [Rectangle(n % heads, *p, (n + 1) % batch) for n, p in enumerate(places, first)]
    if pooled.why_not(call, tiles):
        return "; ".join(pooled.why_not(call, tiles))
    _, lse = truth(case, dtype)
    # Huge scores: float32 rounds them by as much
    compare(call, lse.float(), tiles, 0.02 if case.magnitude > 100 else 1e-5)
    return ""


def long_cells() -> None:
    """Cells of several blocks, of queries and of keys; a band, whose far blocks are left out."""
    query, key = torch.randn(1, 1, 300, 16), torch.randn(1, 1, 420, 16)
    for mask in (Causal(), Padding(torch.arange(420) % 7 > 0)):
        call = Call.checked(query, key, None, mask=mask)
        compare(call, torch.full((1, 1, 300), 5.0), [Rectangle(0, *p) for p in BIG], 1e-5)


def bad_numbers() -> None:
    """They surface as in torch, and a hidden pair of their row weighs 0."""
    for which in ("query", "key"):
        for value in (torch.nan, torch.inf):
            call = odd_call(torch.float32, (0, 0, 100, 3), value, which)
            lse = torch.full((1, 1, 200), 3.0)
            rows = slice(100, 101) if which == "query" else slice(100, 190)
            lse[:, :, rows] = value
            compare(call, lse, [Rectangle(0, *p) for p in BIG[:2]], 1e-5)


def same_bits() -> None:
    """Beside other tiles, and again."""
    query, key = torch.randn(1, 2, 150, 16), torch.randn(1, 1, 150, 16)
    call = Call.checked(query, key, None, mask=Causal())
    lse = torch.full((1, 2, 150), 4.0)
    tiles = [Rectangle(1, 3, 0, 0), Rectangle(0, 0, 20, 10), Rectangle(0, 3, -9, 4)]
    together = pooled.pooled(call, lse, tiles, False)
    alone = [pooled.pooled(call, lse, [t], False) for t in tiles]
    assert torch.equal(together, torch.cat(alone))
