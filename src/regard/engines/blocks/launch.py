"""Attention by the Triton kernels of blocks: all of it (`attend`), or what must be mended."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.opcodes import Op
from .. import functorch as transforms
from .. import hidden
from ..second_pass.triton import read as reading
from ..second_pass.triton.arguments import Shared, on_device, wide
from ..second_pass.triton.kernel_tuples import TileArgs, fixed, strides
from ..second_pass.triton.tile_grid import band_of, listed_tiles


class ValueArgs(NamedTuple):
    """Values. Strides: v_b of a batch item, or a page; _h of a head, _n of a token, _d of a dim."""

    value: Tensor
    v_b: int
    v_h: int
    v_n: int
    v_d: int
    dim: int


class WrittenArgs(NamedTuple):
    """The output and the log-sum-exp, with their strides."""

    out: Tensor
    o_b: int
    o_h: int
    o_n: int
    o_d: int
    lse: Tensor
    l_b: int
    l_h: int
    l_n: int


class SlopeArgs(NamedTuple):
    """The output and its gradient, and the gradients that are mended, with their strides."""

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
    d_query: Tensor
    dq_b: int
    dq_h: int
    dq_n: int
    dq_d: int
    d_key: Tensor
    dk_b: int
    dk_h: int
    dk_n: int
    dk_d: int
    d_value: Tensor
    dv_b: int
    dv_h: int
    dv_n: int
    dv_d: int


class Asked(NamedTuple):
    """What the kernels of blocks are compiled for."""

    MEND: bool  # only blocks that hold a number that is not finite
    TELLS: bool  # one row tells of all others: see `tells`
    LISTED: bool  # there is a list of the tiles that the mask does not empty
    DV: int  # a power of two that holds v_dim


def refusals(call: Call) -> list[str]:
    """The reasons why the kernels cannot compute this call, wherever it is."""
    return reading.why_not(call) + reading.values_why_not(call)


def mendable(call: Call) -> bool:
    """Whether a mask may hide something, and the kernels can compute the call."""
    return hidden.hides(call) and not sees_all(call) and not refusals(call)


def launchable(call: Call) -> bool:
    """Whether its tensors have memory of their own, and nobody looks on: no compiler, no vmap."""
    return (
        not torch.compiler.is_compiling()
        and not transforms.active()
        and all(type(t) in transforms.PLAIN for t in (call.query, call.key, call.value))
    )


def sees_all(call: Call) -> bool:
    """Whether a mask that is a band shows every key to every query, as that of a last query."""
    place = call.place
    if call.biases or call.pages is not None:
        return False
    if call.program.full:
        return True
    if call.program.code != (Op.CAUSAL,):
        return False
    return place.query_start >= place.key_start + place.k_len - 1


def tells(call: Call) -> bool:
    """Whether the last row sees all keys and the first key is seen by all, of a kernel's own mask.

    Such a kernel sets the score of what it hides to −∞, whatever it was: a NaN reaches a row by a
    value alone, and then the last row, too. Where −∞ is added, NaN + −∞ stays.
    """
    place = call.place
    square = place.q_len == place.k_len and place.query_start == place.key_start
    return square and call.program.code == (Op.CAUSAL,) and not call.biases


def attend(call: Call, blocks: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """out (batch, heads, q_len, v_dim) in the query's type, lse (batch, heads, q_len) float32.

    blocks: queries and keys of a tile, powers of two from 16; by default chosen for the call.
    """
    assert call.value is not None
    rows = (call.place.batch, call.place.heads, call.place.q_len)
    device = call.place.device
    out = torch.empty(*rows, call.value.shape[-1], dtype=call.query.dtype, device=device)
    lse = torch.empty(rows, dtype=torch.float32, device=device)
    _attend(call, out, lse, blocks or forward_blocks(call), mend=False)
    return out, lse


def mend(call: Call, out: Tensor, lse: Tensor, blocks: tuple[int, int] | None = None) -> None:
    """In place, compute anew what a kernel that multiplies what is hidden by 0 has spoiled.

    Nothing waits for the GPU: each program looks at its block of `out`, or at the one row that
    tells, and returns at once where all is finite.
    """
    _attend(call, out, lse, blocks or forward_blocks(call), mend=True)


def _attend(
    call: Call, out: Tensor, lse: Tensor, blocks: tuple[int, int], mend: bool
) -> None:  # fmt: skip
    from .forward_kernel import attend_rows

    assert call.value is not None
    shared = Shared(call, lse)
    band = band_of(shared)
    tiles = _tiles(shared, blocks, band, listed=not mend)
    v_dim = call.value.shape[-1]
    asked = Asked(
        MEND=mend, TELLS=mend and tells(call), LISTED=not mend and shared.masked and band is None,
        DV=wide(v_dim),
    )  # fmt: skip
    with on_device(call.place.device):
        attend_rows[(tiles.q_blocks * call.place.heads * call.place.batch,)](
            shared.args, shared.mask_args(band is None), shared.biases, tiles,
            ValueArgs(call.value, *strides(call.value), v_dim),
            WrittenArgs(out, *strides(out), lse, *lse.stride()),
            shared.form(*blocks, band is not None), fixed(asked), num_warps=_warps(call),
            num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip


def mend_gradients(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grads: tuple[Tensor, Tensor, Tensor],
    blocks: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """As `mend`, of the gradients of query, key and value; lse contiguous, float32."""
    from .backward_kernel import mend_keys, mend_queries

    assert call.value is not None
    place, blocks = call.place, blocks or backward_blocks(call)
    shared = Shared(call, lse)
    band = band_of(shared)
    tiles = _tiles(shared, blocks, band, listed=False)
    v_dim = call.value.shape[-1]
    d_query, d_key, d_value = grads
    slopes = SlopeArgs(
        grad_out, *strides(grad_out), out, *strides(out), d_query, *strides(d_query), d_key,
        *strides(d_key), d_value, *strides(d_value),
    )  # fmt: skip
    asked = Asked(MEND=True, TELLS=tells(call), LISTED=False, DV=wide(v_dim))
    common = (
        shared.args, shared.mask_args(band is None), shared.biases, tiles,
        ValueArgs(call.value, *strides(call.value), v_dim), slopes,
        shared.form(*blocks, band is not None), fixed(asked),
    )  # fmt: skip
    options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    with on_device(place.device):
        mend_queries[(tiles.q_blocks * place.heads * place.batch,)](*common, **options)
        mend_keys[(tiles.k_blocks * place.kv_heads * place.batch,)](*common, **options)


def _tiles(
    shared: Shared, blocks: tuple[int, int], band: tuple[int, int] | None, listed: bool
) -> TileArgs:
    """What is walked. listed: of a mask that is no band a list, which takes some ops to make."""
    place, none = shared.call.place, shared.none
    given = (none, none, 0, 0)
    if listed and band is None:
        given = listed_tiles(shared, blocks, (0, 0))
    counts = (-(-place.q_len // blocks[0]), -(-place.k_len // blocks[1]))
    return TileArgs(*given, *(band or (0, 0)), 0, 0, *counts)


def forward_blocks(call: Call) -> tuple[int, int]:
    """Queries and keys of a tile: what registers hold, at most 64 keys, as `mix` counts them."""
    dim, half = _dim(call), call.query.element_size() == 2
    rows = 128 if dim <= 64 and half else 64 if dim <= 128 and half else 32
    while rows > 16 and rows >= 2 * call.place.q_len:
        rows //= 2
    return rows, 64 if dim <= 128 and half else 32


def backward_blocks(call: Call) -> tuple[int, int]:
    """Queries and keys of a tile: at most 64 queries, as `mix` counts them."""
    return (64, 64) if _dim(call) <= 64 and call.query.element_size() == 2 else (32, 32)


def _dim(call: Call) -> int:
    assert call.value is not None
    return max(call.query.shape[-1], call.value.shape[-1])


def _warps(call: Call) -> int:
    return 4 if forward_blocks(call)[0] <= 32 else 8
