"""Attention on CUDA, forward alone, with keys and values read in place.

Of one or a few queries, or of any number where keys lie in pages. There `auto` takes it: PyTorch's
kernels would have them copied out first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...call.checked import Call
from .. import functorch as transforms
from ..blocks import launch as blocks
from ..blocks.launch import ValueArgs
from ..second_pass.triton.arguments import Shared, on_device, wide
from ..second_pass.triton.few_queries import MOST_QUERIES, Chunks
from ..second_pass.triton.forms import Buffers
from ..second_pass.triton.kernel_tuples import fixed, strides

name = "decode"
# Numbers that a tile mixes, beyond which four warps would spill some of theirs: of heads that share
# keys, and of others, of which eight warps would (see the table of docs/benchmarks-gpu.md)
WIDE_SHARED, WIDE = 1024, 8192


class PartArgs(NamedTuple):
    """What is left of each chunk: (batch, heads, q_len, chunks), and v_dim of what rows mix."""

    top: Tensor
    total: Tensor
    mixed: Tensor


class Decoded(NamedTuple):
    """What `attend_chunk` is compiled for."""

    CHUNK: int  # tiles of a chunk
    Q: int  # the power of two that holds q_len
    DV: int  # that which holds v_dim


def why_not(call: Call) -> list[str]:
    """It takes what the second pass takes, and gives no gradients."""
    place, reasons = call.place, []
    if place.device.type != "cuda":
        reasons.append(f"query is on {place.device}; this engine runs on cuda")
    return reasons + refusals(call)


def refusals(call: Call) -> list[str]:
    """The reasons why its kernels cannot compute this call, wherever it is."""
    reasons = blocks.refusals(call)
    if call.place.q_len > MOST_QUERIES and call.pages is None:
        reasons.append(
            f"q_len is {call.place.q_len}; beyond {MOST_QUERIES} it takes keys in pages alone"
        )
    if call.dropout is not None:
        reasons.append("dropout is given; this engine has none")
    if call.needs_grad:
        reasons.append("gradients are needed; this engine has no backward")
    if torch.compiler.is_compiling() or transforms.active():
        reasons.append("a compiler or a transform looks on; this engine runs eagerly")
    return reasons


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call that it can run."""
    return blocks.attend(call) if call.place.q_len > MOST_QUERIES else attend(call)


def attend(call: Call, block_k: int | None = None) -> tuple[Tensor, Tensor]:
    """Of few queries: out (batch, heads, q_len, v_dim) in the query's type, lse float32.

    block_k: keys of a tile, a power of two from 16; by default chosen for the call.
    Memory beside them: v_dim + 2 numbers for each row and chunk of 512 keys.
    """
    from .attend_kernel import attend_chunk, join_chunks

    assert call.value is not None
    place, value = call.place, call.value
    v_dim = value.shape[-1]
    rows = (place.batch, place.heads, place.q_len)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=place.device)

    lse, out = new(*rows), new(*rows, v_dim, dtype=call.query.dtype)
    shared = Shared(call, lse)
    cut = Chunks(shared, block_k)
    held, lines = Buffers(place.device), (*rows, cut.chunks)
    held.ask("top", *lines)
    held.ask("total", *lines)
    held.ask("mixed", *lines, v_dim)
    held.make()
    parts = PartArgs(held["top"], held["total"], held["mixed"])
    decoded = fixed(Decoded(CHUNK=cut.per_chunk, Q=cut.padded, DV=wide(v_dim)))
    most = WIDE_SHARED if place.heads > place.kv_heads else WIDE
    warps = 4 if cut.block_q * wide(v_dim) <= most else 8
    with on_device(place.device):
        attend_chunk[(cut.programs,)](
            shared.args, shared.mask_args(), shared.biases, cut.args,
            ValueArgs(value, *strides(value), v_dim), parts,
            shared.form(cut.block_q, cut.block_k), decoded, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        join_chunks[(place.batch * place.heads * place.q_len,)](
            parts, shared.sinks, out, lse, place.heads, place.q_len, cut.chunks, v_dim,
            SINKS=call.sinks is not None, DV=wide(v_dim), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
