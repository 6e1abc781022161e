"""PyTorch's FlexAttention, compiled, with its log-sum-exp: the masks and biases SDPA cannot do.

The mask's program becomes a function of indices, its tiles become the block mask: tiles that it
empties are skipped, tiles that it shows whole are not masked. Dong et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..call.biases import Added, Kind
from ..call.checked import Call
from ..call.mask_program import Program
from ..call.opcodes import FULL_CELL, TILE_SIDE, Op

name = "flex"

BLOCK = 128  # of the block mask, in queries and in keys
SHARED = 166912  # bytes of shared memory a block may take, where no device says so (A100)
MOST_FORMS = 256  # of masks, biases and shapes that one process compiles
DECODING = 128  # fewer queries go to another kernel, which chooses by itself
PAIRWISE = (Op.TILES, Op.BLOCKS, Op.DENSE)  # leaves that read a tensor at each pair
Shown = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch, head, query, key


def why_not(call: Call) -> list[str]:
    """It takes any mask that is pointwise, any bias without a gradient, and a cap."""
    reasons, place = [], call.place
    if place.device.type != "cuda":
        reasons.append(f"query is on {place.device}; this engine runs on cuda")
    return reasons + refuses(call)


def refuses(call: Call) -> list[str]:
    """Its reasons against a call, whatever the device."""
    reasons, place = [], call.place
    if call.query.dtype == torch.float64:
        reasons.append("query is float64; its kernel computes in float32")
    if not place.q_len or not place.k_len or not place.batch:
        reasons.append("the call is empty; its kernel needs at least one of everything")
    dims = [call.query.shape[-1], *([] if call.value is None else [call.value.shape[-1]])]
    if min(dims) < 16 or max(dims) > 256:
        reasons.append(f"dim, v_dim are {dims}; its kernel takes 16 to 256")
    for what in ("sinks", "dropout"):
        if getattr(call, what) is not None:
            reasons.append(f"{what} is given; its kernel takes none")
    if call.pages is not None:
        reasons.append("keys lie in pages; this engine reads none")
    if any(op == Op.EDGES for op, _ in call.program.instructions()):
        reasons.append("the mask lists edges; its kernel takes only functions of a single pair")
    if place.device.type != "cpu" and options(call, _limit(call)) is None:
        reasons.append("its functions read more tensors at each pair than shared memory holds")
    if call.return_lse and call.needs_grad:
        reasons.append("return_lse needs gradients; this engine gives none through lse")
    if call.needs_grad and any(b.tensor.requires_grad for b in call.biases):
        reasons.append("a bias needs gradients; this engine gives none")
    return reasons


def _limit(call: Call) -> int:
    """The shared memory of a block on the call's device, in bytes."""
    if call.place.device.type != "cuda":
        return SHARED
    properties = torch.cuda.get_device_properties(call.place.device)
    return int(getattr(properties, "shared_memory_per_block_optin", SHARED))


def options(call: Call, limit: int) -> dict[str, int] | None:
    """`kernel_options` whose tiles fit into `limit` bytes; {} leaves them to PyTorch, None: none.

    PyTorch chooses blocks by dim alone. What functions read at each pair is loaded ahead, too, a
    tile in 4 bytes a pair for each stage but one, and then they do not fit: at dim 64, 128 × 128,
    3 stages, 16 + 96 + 128 KiB.
    """
    pairwise = sum(
        len(op.form.tensors) for op, _ in call.program.instructions() if op in PAIRWISE
    ) + len(call.biases)
    if not pairwise or call.place.q_len < DECODING:
        return {}
    dim, size = call.query.shape[-1], call.query.element_size()
    v_dim = dim if call.value is None else call.value.shape[-1]
    dim, v_dim = (max(16, 1 << (d - 1).bit_length()) for d in (dim, v_dim))
    for rows, cols, stages in ((128, 64, 2), (64, 64, 2), (64, 32, 2), (32, 32, 2), (32, 16, 2)):
        tiles = rows * dim + stages * cols * (dim + v_dim)
        if tiles * size + (stages - 1) * pairwise * rows * cols * 4 <= limit - 2**14:
            return {"BLOCK_M": rows, "BLOCK_N": cols, "num_stages": stages}
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse); out is differentiable, lse is not."""
    return attend(call, _compiled())


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: where it cannot be compiled it says so, rather than materialise the scores
    compiled = torch.compile(flex_attention, fullgraph=True)

    def run(*arguments: Any, **named: Any) -> Any:
        # torch's own limit, 8 forms of one function, is 8 masks or head sizes of a whole process
        with torch._dynamo.config.patch(recompile_limit=MOST_FORMS):
            return compiled(*arguments, **named)

    return run


def attend(call: Call, by: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) by FlexAttention as given: compiled, or not, on small tensors."""
    from torch.nn.attention.flex_attention import AuxRequest

    out, more = by(
        call.query,
        call.key,
        call.value,
        score_mod=_scores(call),
        block_mask=None if call.program.full else _blocks(call.program),
        scale=call.scale,
        enable_gqa=call.place.heads != call.place.kv_heads,
        return_aux=AuxRequest(lse=True),
        kernel_options=options(call, _limit(call)),
    )
    return out, more.lse.detach()


def _blocks(program: Program) -> Any:
    """The block mask: for each block of queries, its mixed tiles and its whole ones."""
    from torch.nn.attention.flex_attention import BlockMask

    some, every = program.classes(BLOCK, BLOCK)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=shown(program),
        seq_lengths=(program.q_len, program.k_len),
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are set, and the numbers of all, the set ones first."""
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def shown(program: Program) -> Shown:
    """The program as a function of one pair's indices in the call."""
    stack: list[Shown] = []
    for op, args in program.instructions():
        if op == Op.NOT:
            stack.append(_not(stack.pop()))
        elif op in (Op.AND, Op.OR):
            right, left = stack.pop(), stack.pop()
            stack.append(_both(left, right) if op == Op.AND else _either(left, right))
        else:
            tensors = [program.tensors[i] for i in args[: len(op.form.tensors)]]
            numbers = args[len(op.form.tensors) :]
            stack.append(_leaf(op, tensors, numbers, program.query_start, program.key_start))
    return stack.pop()


def _not(one: Shown) -> Shown:
    return lambda b, h, q, k: ~one(b, h, q, k)


def _both(left: Shown, right: Shown) -> Shown:
    return lambda b, h, q, k: left(b, h, q, k) & right(b, h, q, k)


def _either(left: Shown, right: Shown) -> Shown:
    return lambda b, h, q, k: left(b, h, q, k) | right(b, h, q, k)


def _leaf(
    op: Op, tensors: list[Tensor], numbers: tuple[int, ...], query_start: int, key_start: int
) -> Shown:
    """One leaf; places of queries and keys are those of the sequence."""
    if op == Op.FULL:
        return lambda b, h, q, k: q >= 0
    if op == Op.CAUSAL:
        return lambda b, h, q, k: k + key_start <= q + query_start
    if op == Op.WINDOW:
        behind, ahead = numbers
        apart = query_start - key_start
        return lambda b, h, q, k: (q - k + apart < behind) & (q - k + apart >= -ahead)
    if op == Op.FIRST:
        return lambda b, h, q, k: k + key_start < numbers[0]
    if op == Op.STEP:
        return lambda b, h, q, k: (q + query_start - k - key_start) % numbers[0] == 0
    if op == Op.CHUNK:
        (n,) = numbers
        return lambda b, h, q, k: (q + query_start) // n == (k + key_start) // n
    if op == Op.PHASE:
        n, low, high = numbers
        return lambda b, h, q, k: ((k + key_start) % n >= low) & ((k + key_start) % n < high)
    if op == Op.QUERIES:
        low, high = numbers
        return lambda b, h, q, k: (q + query_start >= low) & (q + query_start < high)
    if op == Op.HEADS:
        return lambda b, h, q, k: tensors[0][h] & (q >= 0)
    if op == Op.DOCUMENTS:
        mine, theirs = tensors
        i, j = int(mine.shape[0] > 1), int(theirs.shape[0] > 1)
        return lambda b, h, q, k: (mine[b * i, q] == theirs[b * j, k]) & (mine[b * i, q] >= 0)
    table = tensors[0]
    i, j = int(table.shape[0] > 1), int(table.dim() > 1 and table.shape[1] > 1)
    if op == Op.PADDING:
        return lambda b, h, q, k: table[b * i, k]
    if op == Op.DENSE:
        rows, cols = int(table.shape[2] > 1), int(table.shape[3] > 1)
        return lambda b, h, q, k: table[b * i, h * j, q * rows, k * cols]
    if op == Op.BLOCKS:
        block, row, col = numbers
        return lambda b, h, q, k: table[
            b * i, h * j, (q + query_start) // block - row, (k + key_start) // block - col
        ]
    assert op == Op.TILES
    return _cells(table, tensors[1], i, j)


def _cells(cells: Tensor, bits: Tensor, i: int, j: int) -> Shown:
    """The cells of a predicate: whole, empty, or the number of their bits."""
    if not len(bits):
        bits = bits.new_zeros(1, TILE_SIDE, TILE_SIDE // 8)

    def one(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        cell = cells[b * i, h * j, q // TILE_SIDE, k // TILE_SIDE]
        octet = bits[cell.clamp(min=0), q % TILE_SIDE, k % TILE_SIDE // 8]
        bit = (octet.to(torch.int32) >> (k % 8).to(torch.int32)) & 1
        return (cell == FULL_CELL) | ((cell >= 0) & (bit == 1))

    return one


def _scores(call: Call) -> Callable[..., Tensor] | None:
    """What becomes of a score, scale · q · k, before the softmax."""
    if call.softcap is None and not call.biases:
        return None
    softcap, added = call.softcap, [_bias(b, call) for b in call.biases]

    def change(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        for bias in added:
            more = bias(b, h, q, k)
            score = torch.where(more == -torch.inf, more, score + more)  # NaN − ∞ is NaN
        return score

    return change


def _bias(bias: Added, call: Call) -> Shown:
    if bias.kind == Kind.DENSE:
        dense = bias.tensor.detach()
        by = [int(size > 1) for size in dense.shape]
        return lambda b, h, q, k: dense[b * by[0], h * by[1], q * by[2], k * by[3]].float()
    least = bias.key_start - bias.query_start - call.place.q_len + 1
    offsets = torch.arange(
        call.place.q_len + call.place.k_len - 1, device=call.place.device, dtype=torch.int64
    )
    along = bias.along(offsets + least).detach().float()  # a number a head and distance
    back = call.place.q_len - 1
    return lambda b, h, q, k: along[h, k - q + back]
