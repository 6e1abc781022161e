"""The buffers of caches: large ones on the CPU ask Linux for huge pages."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...engines.functorch import CPU, unwatched

LEAST = 4 << 20
"""From so many bytes on: half of a smaller buffer may lie beside whole huge pages."""

_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux alone


def empty(like: Tensor, *shape: int) -> Tensor:
    """A buffer with like's dtype and device, not yet written to.

    Decoding reads a cache from end to end, and with pages of 4 KB looks up where each lies. A large
    buffer therefore asks for pages of 2 MB (transparent huge pages), wherever they fit into it
    whole. Where there are none, or the system refuses, it is a buffer as any other.
    """
    with torch.inference_mode(False):  # what is made under it may only be written to there
        buffer = like.new_empty(shape)
    if like.device == CPU and _ADVICE is not None and buffer.nbytes >= LEAST and unwatched(like):
        first, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        _madvise()(first, end // mmap.PAGESIZE * mmap.PAGESIZE - first, _ADVICE)
    return buffer


def zeros(like: Tensor, *shape: int) -> Tensor:
    """The same, of zeros."""
    return empty(like, *shape).zero_()


def picked(buffer: Tensor, rows: Tensor) -> Tensor:
    """These items of a buffer's batch, as a buffer of its own."""
    return torch.index_select(buffer, 0, rows, out=empty(buffer, len(rows), *buffer.shape[1:]))


@cache
def _madvise() -> Callable[[int, int, int], int]:
    """That of the C library. What it answers is not looked at: it is advice."""
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
