"""Effect by Triton: what the kernel of `removing` does not measure, and `effect`, which runs it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....call.checked import Call
from ....call.observers import Effect
from ....errors import RegardError
from . import read as reading
from . import tile_grid as geometry
from .arguments import Shared, drawn, on_device, power, wide
from .kernel_tuples import TileArgs, strides
from .read import MOST_LISTED


class ValueArgs(NamedTuple):
    """The values, the scalar's gradient and what came out, with their strides as in `CallArgs`."""

    value: Tensor
    v_b: int
    v_h: int
    v_n: int
    v_d: int
    grad: Tensor
    g_b: int
    g_h: int
    g_n: int
    g_d: int
    out: Tensor
    o_b: int
    o_h: int
    o_n: int
    o_d: int
    dim: int  # of values
    seed: Tensor  # dropout's, and below what a word drops
    keep: float  # the factor of a kept weight


def refuses(observer: Effect, call: Call) -> list[str]:
    """The reasons why the kernel cannot measure an Effect on a call; empty if it can."""
    reasons = []
    if observer.norm:
        reasons.append(f"{observer} is of several scalars; it measures one")
    if observer.k > MOST_LISTED:
        reasons.append(f"{observer} is longer than the {MOST_LISTED} that registers hold")
    return reasons + reading.values_why_not(call)


@torch.no_grad()
def effect(
    call: Call, lse: Tensor, out: Tensor, k: int, grad: Tensor,
    blocks: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(indices int32, effect, weights), each (batch, heads, q_len, k), largest |effect| first.

    out, and the scalar's gradient of it: (batch, heads, q_len, v_dim); lse (batch, heads, q_len).
    blocks: queries and keys of a tile, powers of two from 16; by default chosen for the call.
    RegardError if `reading.why_not` or `refuses` has a reason. Memory beside the result: none that
    grows with the call, but the list of its tiles.
    """
    reasons = [*reading.why_not(call), *refuses(Effect(k), call)]
    if call.pages is not None:
        reasons.append("keys lie in pages; it reads none")
    if reasons:
        raise RegardError(f"the Triton kernels cannot measure {call}: {'; '.join(reasons)}")
    from .effect_kernel import remove

    assert call.value is not None
    place, value, device = call.place, call.value, call.place.device
    blocks = blocks or _blocks(call, k)
    shared = Shared(call, lse.to(torch.float32).contiguous())
    lead, counts = geometry.aligned(call, blocks)
    tiles = geometry.listed_tiles(shared, blocks, lead)
    rows = (place.batch, place.heads, place.q_len, k)
    names = torch.empty(rows, dtype=torch.int32, device=device)
    effects, weights = torch.empty(2, *rows, dtype=torch.float32, device=device)
    seed, kept = drawn(call, names)
    values = ValueArgs(
        value, *strides(value), grad, *strides(grad), out, *strides(out), value.shape[-1], seed,
        kept,
    )  # fmt: skip
    args = TileArgs(*tiles, 0, 0, *lead, *counts)
    with on_device(device):
        remove[(place.batch * place.heads * counts[0],)](
            shared.args, shared.mask_args(), shared.biases, args, values, names, effects, weights,
            k, shared.form(*blocks), DROPOUT=call.dropout is not None, TOP=power(k),
            DV=wide(value.shape[-1]), num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return names, effects, weights


def _blocks(call: Call, k: int) -> tuple[int, int]:
    """Queries and keys of a tile: what registers hold. Not yet measured on a GPU."""
    assert call.value is not None
    narrow = max(call.query.shape[-1], call.value.shape[-1]) <= 128
    half = call.query.element_size() == 2
    rows = 64 if narrow and half else 32 if narrow or half else 16
    if k > 16:
        rows //= 2
    while rows > 16 and rows >= 2 * call.place.q_len:
        rows //= 2
    return rows, 64 if narrow and half else 32
