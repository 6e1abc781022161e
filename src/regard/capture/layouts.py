"""Whose scores a softmax takes: the rows, heads and keys of an attention module's own layout.

Most modules hold (batch, heads, q_len, k_len), or fold the heads into the batch. Local attention
holds blocks or windows of keys; where those stand is found in the module's own variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 256  # of a local layout that are spread over all keys at a time
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_attn_heads", "heads")
Local = Mapping[str, Any]  # a module's variables, by their names in its code
Held = dict[int, Tensor]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores (batch, heads, rows, k_len) of one call, or of the next rows of one.

    floor: what lies there or below is hidden. start: the first row's position, where it is known.
    follows: these rows go on where the last ones ended. shape: of the softmax's own tensor, where
    it holds the same numbers in the same order.
    """

    scores: Tensor
    floor: float
    start: int | None = None
    follows: bool = False
    shape: torch.Size | None = None


def laid_out(
    module: nn.Module, scores: Tensor, local: Callable[[], list[Local]], held: Held
) -> list[Scores]:
    """The scores of a module's softmax over its last dimension; empty where they are not known.

    local: the variables of the module's functions that run now, the innermost first, then those of
    the modules around it. held: what a module of several softmaxes keeps from one to the next.
    """
    kind = type(module).__name__
    for name, spread in _LOCAL.items():
        if name in kind:
            return list(spread(scores, local(), held))
    heads = _heads(module)
    floor = float(torch.finfo(scores.dtype).min) / 2
    if scores.dim() == 4 and heads in (None, scores.shape[1]):
        return [Scores(scores, floor, shape=scores.shape)]
    if scores.dim() == 3 and scores.shape[0] % (heads or 1) == 0:
        return [Scores(scores.unflatten(0, (-1, heads or 1)), floor, shape=scores.shape)]
    return []


def _heads(module: nn.Module) -> int | None:
    """The number of heads that a module says it has."""
    found = (getattr(module, name, None) for name in _HEADS)
    return next((n for n in found if isinstance(n, int)), None)


def _windows(scores: Tensor, local: list[Local], held: Held) -> Iterator[Scores]:
    """Hiera: (batch, heads, windows, q, k); each window is an item of the batch."""
    if scores.dim() == 5:
        yield Scores(scores.transpose(1, 2).flatten(0, 1), -torch.inf)


def _streams(scores: Tensor, local: list[Local], held: Held) -> Iterator[Scores]:
    """ProphetNet: the main stream, then (batch, streams, heads, q, k) that predict further tokens.

    The keys of a predicting stream are those of the main stream, then its own.
    """
    floor = float(torch.finfo(scores.dtype).min) / 2
    if scores.dim() == 4:
        yield Scores(scores, floor, shape=scores.shape)
    elif scores.dim() == 5:
        start = scores.shape[-1] - 2 * scores.shape[-2]
        for stream in scores.unbind(1):
            yield Scores(stream, floor, start)


def _longformer(scores: Tensor, local: list[Local], held: Held) -> Iterator[Scores]:
    """Longformer, LED: (batch, length, heads, global keys and a window); then the global rows.

    The rows of tokens with global attention are replaced by those of a second softmax over all
    keys, (batch · heads, most global tokens, length).
    """
    outer = _with(local, "is_index_global_attn")
    if outer["is_global_attn"] and scores.dim() == 4:
        held[id(outer["self"])] = scores
        return
    instead = None
    if scores.dim() == 3:
        instead = scores.unflatten(0, (-1, outer["self"].num_heads))
        scores = held.pop(id(outer["self"]))
    yield from _sliding(scores, instead, outer, _padding(local))


def _sliding(
    scores: Tensor, instead: Tensor | None, outer: Local, padding: int
) -> Iterator[Scores]:
    batch, length = scores.shape[:2]
    floor = float(torch.finfo(scores.dtype).min) / 2
    scores = scores.transpose(1, 2)
    wide = outer["self"].one_sided_attn_window_size
    everywhere, hidden = outer["is_index_global_attn"], outer["is_index_masked"]
    first = scores.shape[-1] - (2 * wide + 1)  # columns of global keys
    which = torch.full((batch, first), -1, dtype=torch.int64, device=scores.device)
    for item in range(batch if first else 0):
        at = everywhere[item].nonzero()[:, 0]
        which[item, : len(at)] = at
    for r0, r1 in _blocks(length - padding):
        rows = torch.arange(r0, r1, dtype=torch.int64, device=scores.device)[:, None]
        near = rows + torch.arange(-wide, wide + 1, dtype=torch.int64, device=scores.device)
        near = near.masked_fill((near < 0) | (near >= length), -1)
        keys = torch.cat([which[:, None].expand(-1, r1 - r0, -1), near.expand(batch, -1, -1)], -1)[
            :, None
        ]
        part = _spread(scores[:, :, r0:r1], keys, length - padding, floor)
        if instead is not None:
            for item, row in everywhere[:, r0:r1].nonzero().tolist():
                at = (which[item] == r0 + row).nonzero()[0, 0]
                part[item, :, row] = instead[item, :, at, : length - padding]
        part = part.masked_fill(hidden[:, None, r0:r1, None], -torch.inf)
        yield Scores(part, floor, r0, r0 > 0)


def _block_local(scores: Tensor, local: list[Local], held: Held) -> Iterator[Scores]:
    """LongT5: (batch, blocks, heads, block, three blocks, then summaries).

    Keys: those of the block, and of the ones before and after it; then, in transient global
    attention, the summaries of all blocks, which count as keys after the tokens'.
    """
    length = _with(local, "seq_length")["seq_length"]
    blocks, size, width = scores.shape[1], *scores.shape[3:]
    extra = width - 3 * size
    for n in range(blocks):
        r0, r1 = n * size, min((n + 1) * size, length)
        if r0 >= r1:
            return
        near = torch.arange(r0 - size, r0 + 2 * size, dtype=torch.int64, device=scores.device)
        near = near.masked_fill((near < 0) | (near >= length), -1)
        far = torch.arange(length, length + extra, dtype=torch.int64, device=scores.device)
        keys = torch.cat([near, far]).expand(1, 1, r1 - r0, -1)
        # Masked by −1e10, which float16 would not hold: T5's is not run in it
        part = _spread(scores[:, n, :, : r1 - r0], keys, length + extra, -5e9)
        yield Scores(part, -torch.inf, r0, n > 0)


def _pegasus_x(scores: Tensor, local: list[Local], held: Held) -> Iterator[Scores]:
    """PEGASUS-X: (batch, heads, blocks, block, global tokens and a block); before, their own rows.

    Global tokens are learned: as keys they count after the text's. Every other layer shifts its
    blocks by half of one. The rows of the global tokens are a call of their own.
    """
    inner, layer = _with(local, "dim"), _with(local[1:], "residual")["self"]
    length, size = _with(local, "embed_pos")["seq_len"], layer.block_size
    if scores.dim() == 4:
        held[id(inner["self"])] = scores
        return
    shift = size // 2 if layer.stagger_blocks_this_layer else 0
    extra = scores.shape[-1] - size
    floor = float(torch.finfo(scores.dtype).min) / 2
    learned = torch.arange(length, length + extra, dtype=torch.int64, device=scores.device)

    def positions(start: int, stop: int) -> Tensor:
        near = torch.arange(start - shift, stop - shift, dtype=torch.int64, device=scores.device)
        return torch.cat([learned, near.masked_fill(near >= length, -1)])

    for n in range(scores.shape[2]):
        r0, r1 = (min(max(r * size - shift, 0), length) for r in (n, n + 1))
        if r0 < r1:
            first = r0 + shift - n * size
            part = scores[:, :, n, first : first + r1 - r0]
            spread = _spread(part, positions(n * size, (n + 1) * size), length + extra, floor)
            yield Scores(spread, -torch.inf, r0, r0 > 0)
    own = held.pop(id(inner["self"]))
    keys = positions(0, own.shape[-1] - extra)
    yield Scores(_spread(own, keys, length + extra, floor), -torch.inf, 0)


def _big_bird(scores: Tensor, local: list[Local], held: Held) -> Iterator[Scores]:
    """BigBird: five softmaxes, over the first, second, middle, last but one and last blocks.

    A key block may stand twice in a row of scores (a random block that is near, or the first):
    its weights add up.
    """
    inner = _with(local, "rand_attn")
    size, length, chosen = inner["from_block_size"], inner["from_seq_len"], inner["rand_attn"]
    last, shown = length // size - 1, length - _padding(local)
    batch, heads = scores.shape[:2]

    def keys(near: list[int], random: int) -> Tensor:
        fixed = torch.tensor(near, dtype=torch.int64, device=scores.device)
        blocks = torch.cat([fixed.expand(batch, heads, -1), chosen[:, :, random]], -1)
        inside = torch.arange(size, dtype=torch.int64, device=scores.device)
        return (blocks[..., None] * size + inside).flatten(2)[:, :, None]

    parts: list[tuple[int, Tensor, Tensor | None]]
    if scores is inner.get("first_product") or scores is inner.get("last_product"):
        begin = 0 if scores is inner.get("first_product") else last
        parts = [(begin, scores, None)]
    elif scores is inner.get("second_product"):
        parts = [(1, scores, keys([0, 1, 2, last], 0))]
    elif scores is inner.get("second_last_product"):
        parts = [(last - 1, scores, keys([0, last - 2, last - 1, last], -1))]
    else:
        # The last block's columns stand after the random ones: they are put behind the first's
        first, between, end = scores.split([size, scores.shape[-1] - 2 * size, size], -1)
        scores = torch.cat([first, end, between], -1)
        parts = [
            (n, scores[:, :, n - 2], keys([0, last, n - 1, n, n + 1], n - 1))
            for n in range(2, last - 1)
        ]
    for n, part, which in parts:
        rows = min((n + 1) * size, shown) - n * size
        if rows > 0:
            part = part[:, :, :rows]
            part = part[..., :shown] if which is None else _spread(part, which, shown, -torch.inf)
            yield Scores(part, -torch.inf, n * size, n > 0)


_LOCAL: dict[str, Callable[[Tensor, list[Local], Held], Iterator[Scores]]] = {
    "HieraMaskUnit": _windows,
    "ProphetNetNgram": _streams,
    "LongformerSelf": _longformer,
    "LEDEncoderSelf": _longformer,
    "LongT5Local": _block_local,
    "LongT5TransientGlobal": _block_local,
    "PegasusXGlobalLocal": _pegasus_x,
    "BlockSparseAttention": _big_bird,
}


def _spread(scores: Tensor, keys: Tensor, k_len: int, floor: float) -> Tensor:
    """Scores (batch, heads, rows, n) of some keys, over all k_len: −inf where a row has none.

    keys: the position of each, broadcastable to the scores; −1 or beyond for no key. Of one that
    stands twice the weights add up.
    """
    keys = keys.expand(scores.shape)
    shown = (keys >= 0) & (keys < k_len) & (scores > floor)
    scores = scores.float() if scores.dtype != torch.float64 else scores
    scores = scores.masked_fill(~shown, -torch.inf)
    top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    whole = scores.new_zeros(*scores.shape[:3], k_len)
    whole.scatter_add_(-1, keys.clamp(0, k_len - 1), (scores - top).exp())
    return whole.log() + top


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for r0 in range(0, length, ROWS):
        yield r0, min(r0 + ROWS, length)


def _with(local: list[Local], name: str) -> Local:
    """The innermost function that has this variable."""
    return next(found for found in local if name in found)


def _padding(local: list[Local]) -> int:
    """How many tokens a model has added to fill its last block."""
    return next((int(found["padding_len"]) for found in local if "padding_len" in found), 0)
