"""Effect by Triton: what its kernels do not measure, and `effect`, which runs them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....call.checked import Call
from ....call.observers import Effect
from ....errors import RegardError
from . import read as reading
from . import tile_grid as geometry
from .arguments import Shared, drawn, on_device, power, wide
from .forms import Buffers
from .kernel_tuples import ListArgs, TileArgs, fixed, strides
from .read import MOST_LISTED
from .tile_grid import FAN, Leaves

# Keys of a leaf. Fewer than of a list of weights, as values are read again, too: an estimate
LEAST = 4


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


class RowArgs(NamedTuple):
    """Of each row (batch, heads, q_len): D, its own sum, and its largest weight."""

    delta: Tensor
    total: Tensor
    largest: Tensor


class Edged(NamedTuple):
    """What the kernels are compiled for, beside `Form`; as in `Gathered`."""

    DROPOUT: bool
    EVEN: bool
    TOP: int
    WIDTH: int
    TILES: int
    FAN: int
    FANS: int
    TURN_ROWS: int
    DV: int  # a power of two that holds v_dim


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
    RegardError if `reading.why_not` or `refuses` has a reason. Memory beside the result: that of
    the programs that run at once, and up to k + 20 numbers a row.
    """
    reasons = [*reading.why_not(call), *refuses(Effect(k), call)]
    if call.pages is not None:
        reasons.append("keys lie in pages; it reads none")
    if reasons:
        raise RegardError(f"the Triton kernels cannot measure {call}: {'; '.join(reasons)}")
    from .effect_kernel import list_edges, weigh_edges
    from .rows_kernel import sum_rows
    from .scores_kernel import WIDEN

    assert call.value is not None
    place, value, device = call.place, call.value, call.place.device
    blocks = blocks or _blocks(call)
    shared = Shared(call, lse.to(torch.float32).contiguous())
    lead, counts = geometry.aligned(call, blocks)
    band = geometry.band_of(shared)
    listed = (shared.none, shared.none, 0, 0)
    if band is None:
        listed = geometry.listed_tiles(shared, blocks, lead)
    tiles = TileArgs(*listed, *(band or (0, 0)), *lead, *counts)
    # A leaf more than are listed, where a weight is nearly 1: see `effect_kernel`
    leaves = Leaves.of(k + 1, counts[1], blocks[1], LEAST)
    rows = (place.batch, place.heads, place.q_len)
    items = counts[0] * place.heads * place.batch
    programs, held = reading.programs_at_once(call, items), Buffers(device)
    held.ask("queue", 1, dtype=torch.int32, zero=True)
    held.ask("leaves", programs, leaves.lines, blocks[0] * leaves.width)
    held.ask("fans", programs, -(-leaves.lines // FAN), blocks[0] * leaves.width)
    held.ask("chosen", *rows, leaves.kept, dtype=torch.int32)
    for name in ("before", "delta", "total", "largest"):
        held.ask(name, *rows)
    held.make()
    names = torch.empty(*rows, k, dtype=torch.int32, device=device)
    effects, weights = torch.empty(2, *rows, k, dtype=torch.float32, device=device)
    seed, kept = drawn(call, names)
    values = ValueArgs(
        value, *strides(value), grad, *strides(grad), out, *strides(out), value.shape[-1], seed,
        kept,
    )  # fmt: skip
    top = power(leaves.kept)
    form = shared.form(*blocks, band is not None)
    edged = fixed(
        Edged(
            DROPOUT=call.dropout is not None, EVEN=not lead[1] and place.k_len % blocks[1] == 0,
            TOP=top, WIDTH=leaves.width, TILES=leaves.tiles, FAN=FAN, FANS=leaves.fans,
            TURN_ROWS=reading.rows_at_once(blocks[0], leaves.fans, top), DV=wide(value.shape[-1]),
        )
    )  # fmt: skip
    lists = ListArgs(held["leaves"], held["fans"], held["chosen"], held["total"], k, leaves.kept)
    own = RowArgs(held["delta"], held["total"], held["largest"])
    common = (shared.args, shared.mask_args(band is None), shared.biases, tiles)
    warps, depth = reading.warps_of(power(k) * leaves.size(blocks[1]), wide(call.query.shape[-1]))
    at_once = 32 if WIDEN.value else 1  # rows; the interpreter takes many
    parts = -(-place.q_len // at_once)
    with on_device(device):
        sum_rows[(items,)](*common, held["before"], form, **_options(blocks))
        weigh_edges[(programs,)](
            *common, values, held["before"], items, held["queue"], lists, own, form, edged,
            **_options(blocks),
        )  # fmt: skip
        list_edges[(parts * place.heads * place.batch,)](
            *common, values, lists, own, parts, names, effects, weights, form, edged,
            TOP=power(k), R=at_once, DEPTH=depth, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return names, effects, weights


def _blocks(call: Call) -> tuple[int, int]:
    """Queries and keys of a tile: what registers hold. Not yet measured on a GPU."""
    assert call.value is not None
    narrow = max(call.query.shape[-1], call.value.shape[-1]) <= 128
    half = call.query.element_size() == 2
    rows = 64 if narrow and half else 32 if narrow or half else 16
    while rows > 16 and rows >= 2 * call.place.q_len:
        rows //= 2
    return rows, 64 if narrow and half else 32


def _options(blocks: tuple[int, int]) -> dict[str, Any]:
    """How Triton compiles the kernels that walk tiles: a warp for each 16 queries, 4 at least."""
    return {"num_warps": max(blocks[0] // 16, 4), "num_stages": 2, "enable_fp_fusion": True}
