"""Gradients of a part of a call by Triton: `why_not`, and `part_backward`, which runs kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....call.checked import Call
from ....errors import RegardError
from . import read as reading
from . import tile_grid as geometry
from .arguments import Shared, drawn, on_device, wide
from .kernel_tuples import TileArgs, strides

name = "triton"


class SlopeArgs(NamedTuple):
    """The values and the gradient of out, with their strides as in `CallArgs`, and D."""

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
    delta: Tensor  # (batch, heads, q_len)
    dim: int  # of values
    seed: Tensor  # dropout's, and below what a word drops
    keep: float  # the factor of a kept weight


def why_not(call: Call) -> list[str]:
    """The reasons why the kernels cannot compute a call's gradients; empty if they can."""
    reasons = reading.why_not(call)
    if call.pages is not None:
        reasons.append("keys lie in pages; it reads none")
    if any(b.tensor.requires_grad for b in call.biases):
        reasons.append("a bias needs gradients; it gives none")
    return reasons + reading.values_why_not(call)


@torch.no_grad()
def part_backward(
    call: Call, lse: Tensor, grad_out: Tensor, delta: Tensor, wanted: Sequence[bool],
    blocks: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """Gradients of query, key and value, float32, where the call's keys are some of many.

    lse is that of all keys, delta = grad_out · out − grad_lse with the out of all keys. Of biases
    there are none. blocks: queries and keys of a tile, powers of two from 16; by default chosen for
    the call. RegardError if `why_not` has a reason. Memory beside the result: a byte a tile.
    """
    if reasons := why_not(call):
        raise RegardError(f"the Triton kernels give no gradients of {call}: {'; '.join(reasons)}")
    from .gradients_kernel import of_keys, of_queries

    assert call.value is not None
    place, value, device = call.place, call.value, call.place.device
    blocks = blocks or _blocks(call)
    shared = Shared(call, lse.to(torch.float32).contiguous())
    lead, counts = geometry.aligned(call, blocks)
    grad, delta = grad_out.to(value.dtype), delta.to(torch.float32).contiguous()
    made = [
        torch.empty(t.shape, dtype=torch.float32, device=device)
        for t in (call.query, call.key, value)
    ]
    seed, kept = drawn(call, shared.none)
    values = SlopeArgs(
        value, *strides(value), grad, *strides(grad), delta, value.shape[-1], seed, kept
    )
    tiles = TileArgs(*_states(shared, blocks, lead), 0, 0, *lead, *counts)
    given = (shared.args, shared.mask_args(), shared.biases, tiles, values)
    more = {"DROPOUT": call.dropout is not None, "DV": wide(value.shape[-1])}
    form = shared.form(*blocks)
    with on_device(device):
        of_queries[(place.batch * place.heads * counts[0],)](
            *given, made[0], form, **more, num_warps=8, enable_fp_fusion=True
        )
        of_keys[(place.batch * place.kv_heads * counts[1],)](
            *given, made[1], made[2], form, **more, num_warps=8, enable_fp_fusion=True
        )
    return made[0], made[1], made[2], [None] * len(wanted)


def _states(
    shared: Shared, blocks: tuple[int, int], lead: tuple[int, int]
) -> tuple[Tensor, Tensor, int, int]:  # fmt: skip
    """Of each tile 0: nothing of it is shown; 1: some; 2: all. The rest as `listed_tiles`."""
    if not shared.masked:
        return shared.none, shared.none, 0, 0
    table = shared.call.program.tiles(*blocks, lead)
    states = table.some.to(torch.uint8) + (table.some & table.every).to(torch.uint8)
    batch, heads, q_blocks, _ = states.shape
    by_head = q_blocks if heads > 1 else 0
    return states.contiguous(), shared.none, heads * q_blocks if batch > 1 else 0, by_head


def _blocks(call: Call) -> tuple[int, int]:
    """Queries and keys of a tile: what registers hold. Not yet measured on a GPU."""
    assert call.value is not None
    narrow = max(call.query.shape[-1], call.value.shape[-1]) <= 128
    half = call.query.element_size() == 2
    side = 64 if narrow and half else 32 if narrow or half else 16
    return side, side
