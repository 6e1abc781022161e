"""Blocks of keys chosen by content: the k of highest pooled score for each block of queries.

Causal() & TopBlocks(2, 2) at 8 tokens, were the first and third blocks the best for the last
    q\\k 0 1 2 3 4 5 6 7
    6   ■ ■ · · · · ■ ·      its own block always belongs, and counts
    7   ■ ■ · · · · ■ ■
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegardError
from .geometry import Place
from .mask_program import Program
from .masks import Full, Lowering, Mask
from .numbers import FARTHEST, whole_fields
from .opcodes import Op
from .sparse_masks import BlockSparse, cells


@dataclass(frozen=True)
class TopBlocks(Mask):
    """Each block of queries sees the k blocks of keys whose pooled score is highest, by head.

    The pooled score is the mean of the block's queries · the mean of the block's keys, as in MoBA
    (Lu et al. 2025, section 2.2, there for single queries) and, with bounds for means, Quest (Tang
    et al. 2024). Blocks are those of the sequence, position // block.

    Only blocks where the choice matters compete: under `Causal() & TopBlocks(k, block)` those that
    hold a key which the block's queries may see; under `… & (TopBlocks(k, block) | Window(w))` not
    those that the window shows whole. The means are over the queries and keys that it matters to,
    so padding does not enter them. A block of queries always has its own block, if that competes,
    as one of the k. Ties go to the earlier block; NaN counts as highest, so that it surfaces.

    The choice is made once a call, from its query and key in float64, and carries no gradient; the
    attention inside the chosen blocks is differentiable as ever. Biases take no part in it. It is
    one for all queries of a block: an early one's keys are chosen by the later ones too. Where only
    a shard of the keys is at hand, `choose` first.
    """

    k: int
    block: int

    def __post_init__(self) -> None:
        whole_fields(self, "k", "block")
        if self.k < 1 or self.block < 1:
            raise RegardError(f"{self}: give k ≥ 1 and block ≥ 1")

    def _write(self, to: Lowering) -> None:
        if to.granted is not None:
            to.write(Op.FULL)
            if to.granted == to.odd:
                to.write(Op.NOT)
            return
        if to.query is None or to.key is None:
            raise RegardError(f"{self} chooses by query and key; here there is only their place")
        layout = self._chosen(_undecided(to), to.query, to.key)
        starts, block = (to.place.query_start, to.place.key_start), self._block(to.place)
        to.write(Op.BLOCKS, layout, block, *(s // block for s in starts))

    def choose(
        self,
        query: Tensor,
        key: Tensor,
        among: Mask = Full(),
        *,
        query_start: int | None = None,
        key_start: int = 0,
    ) -> BlockSparse:
        """The blocks that are chosen under `among & self`: to look at, or to use again.

        query (batch, heads, q_len, dim), key (batch, kv_heads, k_len, dim); the starts are those of
        `attention`. The layout stands where the call does, so it also fits shards of the keys.
        """
        fits = query.dim() == key.dim() == 4 and query.shape[::3] == key.shape[::3]
        if not fits or not key.shape[1] or query.shape[1] % key.shape[1]:
            raise RegardError(
                f"{self}: query {tuple(query.shape)}, key {tuple(key.shape)}: give (batch, heads, "
                "length, dim), of one batch and one dim; the key's heads divide the query's"
            )
        (batch, heads, q_len, _), (_, kv_heads, k_len, _) = query.shape, key.shape
        start = key_start + k_len - q_len if query_start is None else query_start
        place = Place(batch, heads, kv_heads, q_len, k_len, start, key_start, query.device)
        layout = self._chosen(_undecided(Lowering(among & self, place)), query, key)
        block = self._block(place)
        return BlockSparse(layout, block, (start // block, key_start // block))

    def _block(self, place: Place | Program) -> int:
        """The block's size; of one that all positions stand in, as little as holds them."""
        ends = place.query_start + place.q_len, place.key_start + place.k_len
        return min(self.block, max(*ends, -place.query_start, 1))

    def _chosen(self, where: Program, query: Tensor, key: Tensor) -> Tensor:
        """The layout (batch, heads, rows, cols), where pairs hang on the choice."""
        layout: Tensor = torch.ops.regard.top_blocks(
            query.detach(), key.detach(), list(where.tensors), list(where.code),
            min(self.k, FARTHEST), self._block(where), where.query_start,
            where.key_start,
        )  # fmt: skip
        return layout

    def __str__(self) -> str:
        return f"TopBlocks({self.k}, {self.block})"


def by_content(mask: Mask) -> bool:
    """Whether anything in a mask is chosen by looking at query and key."""
    parts = (getattr(mask, name, None) for name in ("left", "right", "mask"))
    return isinstance(mask, TopBlocks) or any(isinstance(p, Mask) and by_content(p) for p in parts)


def _undecided(to: Lowering) -> Program:
    """The pairs that the whole mask shows or hides according to what is chosen in it."""
    both = Lowering(to.mask, to.place, granted=True)
    to.mask._write(both)
    both.granted = False
    to.mask._write(both)
    both.write(Op.NOT)
    both.write(Op.AND)
    return both.program()


@torch.library.custom_op(
    "regard::top_blocks",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor[] mask_tensors, int[] mask_code, int k, int block, "
    "int query_start, int key_start) -> Tensor",
)
def _top_blocks(
    query: Tensor,
    key: Tensor,
    mask_tensors: Sequence[Tensor],
    mask_code: Sequence[int],
    k: int,
    block: int,
    query_start: int,
    key_start: int,
) -> Tensor:
    """The chosen blocks: bool (batch, heads, blocks of queries, blocks of keys)."""
    program = Program(
        tuple(mask_code), tuple(mask_tensors), query.shape[2], key.shape[2], query_start, key_start,
        query.device,
    )  # fmt: skip
    competes, asking, asked = concerned(program, block)
    rows = _means(query, asking, query_start, block)
    cols = _means(key, asked, key_start, block)
    own = (
        torch.arange(rows.shape[2], device=query.device, dtype=torch.int64)[:, None]
        + query_start // block
    )
    own = (
        own
        == torch.arange(cols.shape[2], device=query.device, dtype=torch.int64) + key_start // block
    )
    scores = (rows.unflatten(1, (cols.shape[1], -1)) @ cols[:, :, None].mT).flatten(1, 2)
    competes, own = competes.expand_as(scores), own.expand_as(scores)
    # Two stable sorts: by score, then those that compete before the others, the own block first
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    first = (competes.to(torch.int8) * (1 + own.to(torch.int8))).gather(-1, order)
    order = order.gather(-1, first.sort(dim=-1, descending=True, stable=True).indices)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :k], True)
    return chosen & competes


@_top_blocks.register_fake
def _(
    query: Tensor,
    key: Tensor,
    mask_tensors: Sequence[Tensor],
    mask_code: Sequence[int],
    k: int,
    block: int,
    query_start: int,
    key_start: int,
) -> Tensor:
    rows = len(cells(query_start, query.shape[2], block))
    cols = len(cells(key_start, key.shape[2], block))
    return query.new_empty(query.shape[0], query.shape[1], rows, cols, dtype=torch.bool)


def concerned(program: Program, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which blocks, queries and keys hold a visible pair, exactly.

    bool (batch or 1, heads or 1, blocks of queries, blocks of keys), (…, q_len) and (…, k_len);
    blocks are those of the sequence. Elements are looked at only where their tile is mixed.
    """
    tiles = program.tiles(block, block, (program.query_start % block, program.key_start % block))
    found = tiles.every.clone(memory_format=torch.contiguous_format)

    def spread(flags: Tensor, length: int, lead: int) -> Tensor:
        return flags.repeat_interleave(block, -1)[..., lead : lead + length].contiguous()

    queries = spread(found.any(-1), program.q_len, tiles.query.lead)
    keys = spread(found.any(-2), program.k_len, tiles.key.lead)
    for row, start, stop, span in tiles.mixed():
        visible = program.visible(span).expand(*found.shape[:2], -1, -1)
        queries[..., span.q0 : span.q1] |= visible.any(-1)
        seen = visible.any(-2)
        keys[..., span.k0 : span.k1] |= seen
        front = tiles.key.lead if start == 0 else 0
        back = (stop - start) * block - front - seen.shape[-1]
        seen = torch.nn.functional.pad(seen, (front, back)).unflatten(-1, (-1, block)).any(-1)
        found[..., row, start:stop] |= seen
    return found, queries, keys


def _means(tensor: Tensor, counted: Tensor, start: int, block: int) -> Tensor:
    """The mean of each block: (batch, n, length, dim) → float64 (batch, n or heads, blocks, dim).

    counted bool (batch or 1, heads or 1, length): what enters; where the heads differ in it, kv
    heads are repeated for them.
    """
    if counted.shape[1] > 1:
        tensor = tensor.repeat_interleave(counted.shape[1] // tensor.shape[1], 1)
    length, lead = tensor.shape[2], start % block if tensor.shape[2] else 0
    count = len(cells(start, length, block))
    pad = (lead, count * block - lead - length)
    tensor = tensor.masked_fill(~counted[..., None], 0)
    blocks = torch.nn.functional.pad(tensor, (0, 0, *pad)).unflatten(2, (count, block))
    number = torch.nn.functional.pad(counted, pad).unflatten(2, (count, block)).sum(-1)
    total = blocks.sum(3, dtype=torch.float64)
    return total / number.clamp(min=1)[..., None]
