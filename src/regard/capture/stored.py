"""Tensors in safetensors files: written without a copy in memory, read piece by piece.

Opening reads the header alone. What a header says is checked before it is believed: sizes, dtypes
and the room that each tensor has in the file; the numbers are checked when `verify` is asked to.

An opened tensor is mapped into memory, which costs nothing and lets it be sliced; its numbers are
then read by `read` or `loaded`. To touch the mapping itself would end the process (SIGBUS) where
somebody cuts the file off meanwhile; a read that comes back short is an error that names the file.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor

from ..errors import RegardError
from .saved_files import Fields

MOST_HEADER = 2**26  # bytes of a header that are read
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


_OPEN: WeakValueDictionary[int, StoredTensors] = WeakValueDictionary()  # by where they are mapped


def read(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, or of a part of one, that may be in a file.

    RegardError that names the file where it was cut off since it was opened.
    """
    return loaded(tensor, [()])


def loaded(tensor: Tensor, parts: Sequence[tuple[slice, ...]]) -> Tensor:
    """A tensor like this one that holds the numbers of `tensor[part]`; the others are none.

    Memory that is never touched is never taken, so that the cost is the parts'. What is in memory
    already is returned as it is. RegardError as of `read`.
    """
    file = _OPEN.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
    # Windows refuses to cut off a file that is mapped
    if file is None or not hasattr(os, "preadv"):
        return tensor
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    for part in parts:
        file.fill(out[part], tensor[part])
    return out


def write(path: Path, tensors: Mapping[str, Tensor], said: dict[str, Any]) -> None:
    """Write a file, which is there once it is whole: what is said goes into its header."""
    own = {n: read(t).detach().cpu().contiguous() for n, t in tensors.items()}
    # Wide numbers first, so that each tensor begins at a multiple of its numbers' size
    names = sorted(own, key=lambda n: (-own[n].element_size(), n))
    header: dict[str, Any] = {}
    at = 0
    for name in names:
        size = own[name].numel() * own[name].element_size()
        header[name] = {
            "dtype": _NAMES[own[name].dtype], "shape": list(own[name].shape),
            "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size
    text = json.dumps(said | {"sums": {n: _sum(own[n]) for n in names}}, sort_keys=True)
    header["__metadata__"] = {"regard": text, "sum": f"{zlib.crc32(text.encode()):08x}"}
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for name in names:
            if own[name].numel():
                file.write(_bytes(own[name]))
    os.replace(part, path)


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, where they stand."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _sum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's dtype, shape and bytes, in hexadecimal."""
    said = f"{_NAMES[tensor.dtype]}{list(tensor.shape)}".encode()
    return f"{zlib.crc32(_bytes(tensor) if tensor.numel() else b'', zlib.crc32(said)):08x}"


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file, mapped into memory, and what its header says.

    ValueError, OSError where the file is not whole, or no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Kept open, so that it is this file that is read, whatever comes to stand in its place
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        with open(self._file, "rb", closefd=False) as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MOST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = Fields(json.loads(file.read(length)), "its header")
        self._begin, self._size = 8 + length, size
        meta = Fields(header["__metadata__"], "its header's metadata")
        text = meta.of(str, "regard")
        if meta["sum"] != f"{zlib.crc32(text.encode()):08x}":
            raise ValueError("its header is damaged; it is not what was written")
        self.said = Fields(json.loads(text), "its header")
        self._places = {
            name: self._place(name, Fields(header[name], name))
            for name in header if name != "__metadata__"
        }  # fmt: skip

    def _place(self, name: str, entry: Fields) -> tuple[torch.dtype, list[int], int]:
        """(dtype, shape, first byte) of a tensor that lies whole in the file."""
        dtype, shape = _DTYPES.get(entry.of(str, "dtype")), entry.integers("shape")
        first, last = entry.integers("data_offsets", 2)
        if dtype is None or any(n < 0 for n in shape) or len(shape) > 8:
            raise ValueError(f"{name} is {entry['dtype']} {shape}")
        room = self._size - self._begin
        if last - first != math.prod(shape) * dtype.itemsize or not 0 <= first <= last <= room:
            raise ValueError(
                f"{name} should be bytes {first} … {last} of {room}: it is cut off, or damaged"
            )
        if (self._begin + first) % dtype.itemsize:
            raise ValueError(f"{name} begins in the middle of a number")
        return dtype, shape, self._begin + first

    @cached_property
    def _mapped(self) -> Any:
        storage = torch.UntypedStorage.from_file(str(self.path), False, self._size)
        _OPEN[storage.data_ptr()] = self
        return storage

    def fill(self, out: Tensor, tensor: Tensor) -> None:
        """Read a tensor of this file, or a part of one, into `out`, of the same shape."""
        runs = _contiguous_dims(out, tensor)
        for place in product(*map(range, tensor.shape[: tensor.dim() - runs])):
            self._fill_run(out[place], tensor[place])

    def _fill_run(self, out: Tensor, tensor: Tensor) -> None:
        """The same where both are contiguous."""
        room = _bytes(out)
        at = int(tensor.storage_offset()) * tensor.element_size()
        while room:
            got = os.preadv(self._file, [room], at)
            if not got:
                now = os.fstat(self._file).st_size
                raise RegardError(
                    f"{self.path} is cut off since it was opened: it has {now:,} of {self._size:,} "
                    "bytes; put it back and open the recording again"
                )
            room, at = room[got:], at + got

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._places:
            raise KeyError(f"it has no tensor {name}")
        dtype, shape, first = self._places[name]
        made = torch.empty(0, dtype=dtype, device="cpu")
        if not math.prod(shape):
            return made.new_empty(shape)
        strides = torch.empty(shape, dtype=dtype, device="meta").stride()
        return made.set_(self._mapped, first // dtype.itemsize, shape, strides)

    def __iter__(self) -> Any:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def damaged(self) -> list[str]:
        """The tensors that are not as they were written."""
        sums = self.said.of(dict, "sums")
        return [name for name in self if sums.get(name) != _sum(read(self[name]))]


def _contiguous_dims(*tensors: Tensor) -> int:
    """How many of the last dimensions stand without gaps in all of these, of one shape."""
    dims, stride = 0, 1
    for dim in reversed(range(tensors[0].dim())):
        size = tensors[0].shape[dim]
        if size > 1 and any(t.stride(dim) != stride for t in tensors):
            break
        dims, stride = dims + 1, stride * size
    return dims
