"""`shard` and `unshard`: a batch cut along its sequence for the ranks, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...errors import RegardError
from .collectives import Ranks, padded
from .layout import Layout, Order, named

IGNORED = -100  # of a label that counts for nothing


@overload
def shard(
    inputs: Tensor, mesh: DeviceMesh, *, order: str | Order = "zigzag", dim: int = 1
) -> Tensor: ...
@overload
def shard(
    inputs: Mapping[str, Any], mesh: DeviceMesh, *, order: str | Order = "zigzag", dim: int = 1
) -> dict[str, Any]: ...
def shard(
    inputs: Tensor | Mapping[str, Any],
    mesh: DeviceMesh,
    *,
    order: str | Order = "zigzag",
    dim: int = 1,
) -> Any:
    """This rank's part of a batch that every rank holds whole; it sends nothing.

    inputs: a tensor, cut along dim; or a model's arguments by name. Of those every tensor is cut
    that counts the sequence along dim; its length is that of input_ids, or of inputs_embeds. Added
    are position_ids, as a rank's tokens are not the first ones, an attention_mask of ones, without
    which transformers takes a jump in the positions for a new document, and shift_labels, as a
    label of the next token may lie on another rank. Any length will do.

    order: "zigzag" (rank r holds chunks r and 2P − 1 − r of 2P, which balances causal masks),
    "plain" (consecutive parts), or what `balanced` returns.
    """
    ranks = Ranks(mesh)
    return cut(inputs, ranks, named(order, ranks.size), dim)


def cut(inputs: Tensor | Mapping[str, Any], ranks: Ranks, chunks: Order, dim: int = 1) -> Any:
    """As `shard`, for ranks and an order that are known."""
    if isinstance(inputs, Tensor):
        if not -inputs.dim() <= dim < inputs.dim():
            raise RegardError(f"shard: inputs is {tuple(inputs.shape)}; it has no dim {dim}")
        return _own(inputs, Layout(inputs.shape[dim], chunks), ranks.rank, dim)
    given = dict(inputs)
    main = next((given[n] for n in ("input_ids", "inputs_embeds") if n in given), None)
    if not isinstance(main, Tensor):
        raise RegardError(
            f"shard: inputs has {', '.join(given)}; give input_ids or inputs_embeds, or one tensor"
        )
    batch, length = main.shape[0], main.shape[1]
    ones = torch.ones(batch, length, dtype=torch.int64, device=main.device)
    given.setdefault("position_ids", ones.cumsum(1) - 1)
    given.setdefault("attention_mask", ones)
    if isinstance(labels := given.get("labels"), Tensor) and "shift_labels" not in given:
        given["shift_labels"] = torch.cat(
            [labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1
        )
    layout = Layout(length, chunks)
    return {
        name: _own(t, layout, ranks.rank, dim)
        if isinstance(t, Tensor) and t.dim() > dim and t.shape[dim] == length
        else t
        for name, t in given.items()
    }


def _own(tensor: Tensor, layout: Layout, rank: int, dim: int) -> Tensor:
    return layout.take(tensor, rank, dim).contiguous()


def unshard(
    tensor: Tensor, mesh: DeviceMesh, *, order: str | Order = "zigzag", dim: int = 1
) -> Tensor:
    """The whole, in every rank, of what lies on each as `shard` cuts it. Carries no gradient."""
    ranks = Ranks(mesh)
    length = torch.tensor([tensor.shape[dim]], dtype=torch.int64, device=tensor.device)
    held = [int(n) for n in torch.cat(ranks.all_gather(length)).tolist()]
    layout = Layout(sum(held), named(order, ranks.size))
    if held != layout.sizes:
        raise RegardError(
            f"unshard: the ranks hold {held} along dim {dim}; in this order they would hold "
            f"{layout.sizes}"
        )
    sent = padded(tensor.detach(), max(held), dim)
    parts = ranks.all_gather(sent)
    return layout.join([p.narrow(dim, 0, n) for p, n in zip(parts, held, strict=True)], dim)
