"""A mask's program as the kernels read it: records of eight integers, and two pools of operands.

A record is an `Op` and up to seven integers: numbers as they are, tensors as an offset into a pool
and the strides of what they count (0 where one answer serves all). Ids, pairs and cells stand in
the pool of int64, bools and bits in the pool of bytes. A kernel runs the records on a tile with the
answers in the bits of one integer a pair, so a program of any form needs no kernel of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....call.mask_program import Program
from ....call.opcodes import Op
from .forms import by_form

WORDS = 8  # of a record
DEEPEST = 31  # answers on the stack: the bits of an int32
LONGEST = 2**30  # numbers and positions stay below it, so that int32 holds their sums


@by_form(16)
def _nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    """In the place of a pool that no record reads."""
    return torch.empty(1, dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class Instructions:
    """records (n, 8) int64; integers (…,) int64; octets (…,) uint8; kinds: the ops as bits."""

    records: Tensor
    integers: Tensor
    octets: Tensor
    kinds: int


def depth(program: Program) -> int:
    """How many answers the program holds at once."""
    deepest = height = 0
    for op, _ in program.instructions():
        height += {Op.AND: -1, Op.OR: -1, Op.NOT: 0}.get(op, 1)
        deepest = max(deepest, height)
    return deepest


def instructions(program: Program) -> Instructions:
    """The records and pools of a program."""
    integers, octets = _Pool(torch.int64, program.device), _Pool(torch.uint8, program.device)
    records, kinds = [], 0
    for op, args in program.instructions():
        count = len(op.form.tensors)
        tensors = [program.tensors[i] for i in args[:count]]
        record: list[int] = [int(op)]
        if op == Op.DOCUMENTS:
            for ids in tensors:
                record += integers.add(ids, 1)[:2]
        elif op == Op.PADDING:
            record += octets.add(tensors[0], 1)[:2]
        elif op == Op.EDGES:
            record += [integers.add(tensors[0])[0], len(tensors[0])]
        elif op == Op.HEADS:
            record += octets.add(tensors[0])[:1]
        elif op == Op.DENSE:
            record += octets.add(tensors[0], 4)
        elif op == Op.BLOCKS:
            record += octets.add(tensors[0], 2)[:4]
        elif op == Op.TILES:
            record += [*integers.add(tensors[0], 2)[:4], octets.add(tensors[1])[0]]
        record += [min(max(n, -LONGEST), LONGEST) for n in args[count:]]
        records.append([*record, *[0] * (WORDS - len(record))])
        kinds |= 1 << op
    table = _table(program.device, tuple(map(tuple, records)))
    return Instructions(table, integers.joined(), octets.joined(), kinds)


@by_form(256)
def _table(device: torch.device, records: tuple[tuple[int, ...], ...]) -> Tensor:
    """On the device, where a kernel reads them."""
    table = torch.tensor(records, dtype=torch.int64, device="cpu")
    return table.to(device, non_blocking=True)


class _Pool:
    """Tensors of one dtype laid end to end."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.parts: list[Tensor] = []
        self.length = 0

    def add(self, tensor: Tensor, spread: int = 0) -> list[int]:
        """[offset, stride, …], 0 where one answer serves all.

        spread: how many leading dimensions may have been expanded; those are not laid out.
        """
        for dim in range(spread):
            if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
        tensor = tensor.contiguous()
        if self.dtype == torch.uint8 and tensor.dtype == torch.bool:
            tensor = tensor.view(torch.uint8)  # no copy
        offset, self.length = self.length, self.length + tensor.numel()
        self.parts.append(tensor.to(self.dtype).flatten())
        shape = tensor.shape
        return [offset, *(0 if shape[d] == 1 else tensor.stride(d) for d in range(tensor.dim()))]

    def joined(self) -> Tensor:
        if not self.parts:
            return _nothing(self.device, self.dtype)
        if len(self.parts) == 1 and self.length:
            return self.parts[0]
        # Never without an address, though nothing may read it
        return torch.cat([*self.parts, torch.zeros(1, dtype=self.dtype, device=self.device)])
