"""The call over the whole sequence that the ranks' calls are parts of."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...call.checked import Call
from ...call.dropout import Dropout
from ...call.geometry import Place, Span
from ...call.masks import And, Documents, Full, Mask, Not, Or, Padding, given_tensor
from ...call.observers import Observer, to_json
from ...call.top_blocks import by_content
from ...errors import RegardError
from .collectives import Ranks
from .layout import Layout, Order

NUMBERS = ("batch", "heads", "kv_heads", "dim", "v_dim", "query_start", "key_start")
WORDS = ("dtype", "mask", "bias", "scale", "softcap", "sinks", "dropout", "observe", "return_lse",
         "engine", "how", "order", "gradients")  # fmt: skip
HEADER = 3 + len(NUMBERS) + len(WORDS)  # integers of 8 bytes that each rank tells the others
_NONE = -(2**62)


@dataclass(frozen=True, eq=False)
class Whole:
    """A call over the whole sequence: `call` is checked and lowered for it, its tensors are empty.

    queries, keys: which rank holds which of them.
    """

    call: Call
    queries: Layout
    keys: Layout
    ranks: Ranks

    def part(
        self, query: Tensor, key: Tensor, value: Tensor | None, span: Span,
        observers: Sequence[Observer] = (), sinks: bool = True,
    ) -> Call:  # fmt: skip
        """The call of some queries on some keys, in some heads; they are given.

        sinks: whether learned sinks stand in it.
        """
        call, heads = self.call, span.heads
        place = Place(
            query.shape[0], query.shape[1], key.shape[1], span.q1 - span.q0, span.k1 - span.k0,
            call.place.query_start + span.q0, call.place.key_start + span.k0, query.device,
        )  # fmt: skip
        return replace(
            call,
            query=query,
            key=key,
            value=value,
            program=call.program.part(span),
            biases=tuple(b.part(span) for b in call.biases),
            sinks=None if call.sinks is None or not sinks else call.sinks[heads],
            place=place,
            observers=tuple(observers),
            return_lse=True,
        )


def agreed(
    ranks: Ranks, order: Order, how: str, query: Tensor, key: Tensor, value: Tensor,
    request: dict[str, Any], engine: str,
) -> Whole:  # fmt: skip
    """The whole call, from what each rank gives; RegardError in all of them where they differ.

    The mask's numbers for each token (of Padding and Documents) are those of the whole sequence, or
    of the rank's own tokens, which are gathered then. One seed of dropout serves all: rank 0's.
    """
    _shapes(query, key, value)
    dropout = Dropout.given(request.get("dropout"))
    mask = request.get("mask")
    mask = Full() if mask is None else mask
    headers = _exchanged(
        ranks, _header(ranks, order, how, query, key, value, request, dropout, engine)
    )
    lengths = [[int(h[i]) for h in headers] for i in (0, 1)]
    layouts = [Layout(sum(each), order) for each in lengths]
    for name, mine, layout in zip(("query", "key"), lengths, layouts, strict=True):
        if mine != layout.sizes:
            raise RegardError(
                f"the ranks hold {mine} of {sum(mine)} positions of {name}; in this order they "
                f"must hold {layout.sizes}: cut the sequence by regard.distributed.shard"
            )
    queries, keys = layouts
    if isinstance(mask, Mask):
        mask = _globalised(mask, ranks, queries, keys)
    batch, heads, _, dim = query.shape
    shapes = (batch, heads, queries.length, dim), (batch, key.shape[1], keys.length, dim)
    formal = [hollow(query, s) for s in (*shapes, (*shapes[1][:3], value.shape[3]))]
    given = list(formal)
    if isinstance(mask, Mask) and by_content(mask):  # it looks at them all
        given[0] = ranks.gather(query.detach(), queries, 2)
        given[1] = ranks.gather(key.detach(), keys, 2)
    if dropout is not None:
        seed = torch.tensor(int(headers[0][2]), dtype=torch.int64, device="cpu")
        dropout = Dropout(dropout.p, seed)
    call = Call.checked(*given, **request | {"mask": mask, "dropout": dropout})
    # What was looked at is not kept
    return Whole(replace(call, query=formal[0], key=formal[1]), queries, keys, ranks)


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """RegardError for what is not even of the right form; the rest is checked of the whole."""
    for name, given in (("query", query), ("key", key), ("value", value)):
        given_tensor(given, name)
        if given.dim() != 4:
            raise RegardError(f"{name} needs 4 dimensions, (batch, heads, length, dim)")
    if key.shape[:3] != value.shape[:3] or key.dtype != query.dtype or value.dtype != query.dtype:
        raise RegardError(
            f"key {tuple(key.shape)} {key.dtype} and value {tuple(value.shape)} {value.dtype} must "
            f"agree in batch, kv_heads and length, and in dtype with query {query.dtype}"
        )


def hollow(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape that holds one number: only its form is looked at."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(*shape)


def _header(
    ranks: Ranks, order: Order, how: str, query: Tensor, key: Tensor, value: Tensor,
    request: dict[str, Any], dropout: Dropout | None, engine: str,
) -> list[int]:  # fmt: skip
    """What a rank tells of its call: lengths, the seed, then what must be the same in all."""
    seed = 0 if dropout is None or dropout.seed is None else int(dropout.seed)
    starts = (request.get("query_start"), request.get("key_start") or 0)
    numbers = (query.shape[0], query.shape[1], key.shape[1], query.shape[3], value.shape[3],
               *(_NONE if s is None else int(s) for s in starts))  # fmt: skip
    bias, observe = request.get("bias"), request.get("observe")
    biases = bias if isinstance(bias, list | tuple) else [bias]
    tensors = [query, key, value, request.get("sinks"), *biases]
    wants = torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors)
    words = (
        query.dtype, _form(request.get("mask")), [type(b).__name__ for b in biases],
        request.get("scale"), request.get("softcap"), request.get("sinks") is None,
        None if dropout is None else dropout.p,
        None if observe is None else to_json(list(observe)), request.get("return_lse"), engine,
        how, order, wants,
    )  # fmt: skip
    sums = [zlib.crc32(str(word).encode()) for word in words]
    return [query.shape[2], key.shape[2], seed, *numbers, *sums]


def _form(mask: Any) -> str:
    """What a mask says that is the same in every rank: the lengths of its tensors may differ."""
    if isinstance(mask, Padding | Documents):
        return type(mask).__name__
    if isinstance(mask, And | Or):
        return f"{type(mask).__name__}({_form(mask.left)}, {_form(mask.right)})"
    return f"Not({_form(mask.mask)})" if isinstance(mask, Not) else str(mask)


def _exchanged(ranks: Ranks, mine: list[int]) -> list[list[int]]:
    """The headers of all ranks; RegardError, in each of them, where they do not go together."""
    told = torch.tensor(mine, dtype=torch.int64, device=ranks.device)
    headers: list[list[int]] = torch.stack(ranks.all_gather(told)).tolist()
    for i, name in enumerate((*NUMBERS, *WORDS), 3):
        values = [h[i] for h in headers]
        if len(set(values)) > 1:
            said = "" if name in WORDS else f": {values}"
            raise RegardError(
                f"the ranks' calls of attention differ in {name}{said}; each must ask for the same"
            )
    return headers


def _globalised(mask: Mask, ranks: Ranks, queries: Layout, keys: Layout) -> Mask:
    """The mask with the numbers of the ranks' own tokens gathered, where it holds those."""
    if isinstance(mask, And | Or):
        sides = (_globalised(m, ranks, queries, keys) for m in (mask.left, mask.right))
        return type(mask)(*sides)
    if isinstance(mask, Not):
        return Not(_globalised(mask.mask, ranks, queries, keys))

    def whole(tensor: Tensor, layout: Layout) -> Tensor:
        # Every rank decides alike: by the sizes that all of them know
        local = tensor.shape[-1] == layout.size(ranks.rank) != layout.length
        return ranks.gather(tensor, layout, tensor.dim() - 1) if local else tensor

    if isinstance(mask, Padding):
        return Padding(whole(mask.keep, keys))
    if isinstance(mask, Documents):
        theirs = mask.query_ids if mask.key_ids is None else mask.key_ids
        own = whole(mask.query_ids, queries)
        return Documents(own, own if theirs is mask.query_ids else whole(theirs, keys))
    return mask
