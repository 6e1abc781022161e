"""What ranks send each other: torch.distributed's public collectives, on tensors of any shape.

Sums over ranks are an all-to-all and a sum here, in the order of the ranks: the bytes that travel
are those of a reduce-scatter, and the bits are the same in every run and on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...errors import RegardError
from .layout import Layout


class Ranks:
    """The ranks of a mesh of one dimension, and which of them is here."""

    def __init__(self, mesh: DeviceMesh) -> None:
        if not isinstance(mesh, DeviceMesh):
            raise RegardError(
                f"mesh is a {type(mesh).__name__}; give a DeviceMesh of one dimension, such as "
                'init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))["cp"]'
            )
        if mesh.ndim != 1:
            raise RegardError(
                f"mesh has {mesh.ndim} dimensions, {mesh.mesh_dim_names}; give one of them, such "
                'as mesh["cp"]'
            )
        self.group, self.size = mesh.get_group(), mesh.size()
        self.rank = mesh.get_local_rank()

    @property
    def device(self) -> torch.device:
        """Where a tensor must be that is sent for its own sake."""
        if self.size > 1 and "nccl" in dist.get_backend(self.group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def tell(self, text: str) -> list[str]:
        """What each rank says. None goes on before the last has spoken."""
        coded = list(text.encode("utf-8", "surrogateescape"))  # it may be a file's name
        said = torch.tensor(coded, dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(said)], dtype=torch.int64, device=self.device)
        held = [int(n) for n in torch.cat(self.all_gather(length)).tolist()]
        if not any(held):
            return [""] * self.size
        came = self.all_gather(padded(said, max(held), 0))
        parts = (bytes(t[:n].tolist()) for t, n in zip(came, held, strict=True))
        return [part.decode("utf-8", "surrogateescape") for part in parts]

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Each rank's tensor, all of one shape."""
        return self.gathering(tensor)()

    def gathering(self, tensor: Tensor) -> Callable[[], list[Tensor]]:
        """As `all_gather`, begun now; what is returned waits for it."""
        if self.size == 1:
            return lambda: [tensor]
        sent = _sendable(tensor)
        found = [torch.empty_like(sent, memory_format=torch.contiguous_format)
                 for _ in range(self.size)]  # fmt: skip
        work: Any = dist.all_gather(found, sent, group=self.group, async_op=True)

        def wait() -> list[Tensor]:
            work.wait()
            return [_received(each, tensor) for each in found]

        return wait

    def gather(self, tensor: Tensor, layout: Layout, dim: int) -> Tensor:
        """The whole of what is sharded along dim."""
        return self.gathering_of(tensor, layout, dim)()

    def gathering_of(self, tensor: Tensor, layout: Layout, dim: int) -> Callable[[], Tensor]:
        """As `gather`, begun now. Shorter parts are sent as long as the longest."""
        if self.size == 1:
            return lambda: tensor
        most = max(layout.sizes)
        wait = self.gathering(padded(tensor, most, dim))

        def whole() -> Tensor:
            parts = [p.narrow(dim, 0, n) for p, n in zip(wait(), layout.sizes, strict=True)]
            return layout.join(parts, dim)

        return whole

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """parts[r] goes to rank r; what comes from each has the shape in `shapes`."""
        if self.size == 1:
            return list(parts)
        like = parts[0]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        sent = torch.cat([part.reshape(-1) for part in parts])
        found = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
        dist.all_to_all_single(
            found, sent, sizes, [part.numel() for part in parts], group=self.group
        )
        return [t.view(*s) for t, s in zip(found.split(sizes), shapes, strict=True)]

    def reduce_scatter(self, whole: Tensor, layout: Layout, dim: int) -> Tensor:
        """This rank's part along dim of the sum over ranks, added in their order."""
        parts = [layout.take(whole, r, dim) for r in range(self.size)]
        shape = parts[self.rank].shape
        came = self.all_to_all(parts, [shape] * self.size)
        total = came[0].clone()
        for each in came[1:]:
            total += each
        return total

    def all_reduce(self, tensor: Tensor, largest: bool = False) -> Tensor:
        """The sum, or the largest, over ranks: in each of them, in the order of the ranks."""
        if self.size == 1:
            return tensor
        flat = tensor.reshape(-1)
        slices = Layout(len(flat), tuple((r,) for r in range(self.size)))
        if not largest:
            return self.gather(self.reduce_scatter(flat, slices, 0), slices, 0).view_as(tensor)
        parts = [slices.take(flat, r, 0) for r in range(self.size)]
        came = self.all_to_all(parts, [parts[self.rank].shape] * self.size)
        return self.gather(torch.stack(came).amax(0), slices, 0).view_as(tensor)

    def passing(
        self, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]
    ) -> Callable[[], list[Tensor]]:
        """Hand tensors on to the next rank; what is returned waits for those of the one before.

        shapes: of these, each of the dtype of the tensor in its place.
        """
        if self.size == 1:
            return lambda: list(tensors)
        sent = [t.contiguous() for t in tensors]
        found = [
            torch.empty(torch.Size(shape), dtype=t.dtype, device=t.device)
            for t, shape in zip(tensors, shapes, strict=True)
        ]
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        ops = [
            dist.P2POp(way, t, group=self.group, group_peer=peer, tag=tag)
            for way, each, peer in ((dist.isend, sent, after), (dist.irecv, found, before))
            for tag, t in enumerate(each)
            if t.numel()
        ]
        works = dist.batch_isend_irecv(ops) if ops else []

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return found

        return wait


def padded(tensor: Tensor, length: int, dim: int) -> Tensor:
    """Zeros added at the end of dim, up to `length`."""
    short = length - tensor.shape[dim]
    if not short:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = short
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _sendable(tensor: Tensor) -> Tensor:
    """gloo sends no bool."""
    return (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).contiguous()


def _received(found: Tensor, like: Tensor) -> Tensor:
    return found.bool() if like.dtype == torch.bool else found
