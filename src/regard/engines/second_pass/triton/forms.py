"""What calls of one form have in common, made once: tiles, records, counts; and buffers at once."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
LINE = 32  # numbers: a part of a buffer begins at a multiple of 128 bytes
MOST_KEPT = 2**22  # bytes of one form


def by_form(
    most: int, size: Callable[[Any], int] = lambda made: 0
) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Remember the last `most` answers of a function of a device and of what says a call's form.

    By stream, as another one would not wait for what fills them. A CUDA graph's capture adds none:
    its tensors are filled at each replay. size: bytes of an answer; large ones are not kept.
    """

    def remembering(make: Callable[..., Made]) -> Callable[..., Made]:
        kept: OrderedDict[Hashable, Made] = OrderedDict()
        lock = threading.Lock()

        @wraps(make)
        def of(device: torch.device, *form: Any) -> Made:
            stream, capturing = None, False
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device).cuda_stream
                capturing = torch.cuda.is_current_stream_capturing()
            name = (device, stream, form)
            with lock:
                if name in kept:
                    kept.move_to_end(name)
                    return kept[name]
            made = make(device, *form)
            if not capturing and size(made) <= MOST_KEPT:
                with lock:
                    kept[name] = made
                    while len(kept) > most:
                        kept.popitem(last=False)
            return made

        return of

    return remembering


@by_form(16)
def unread(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In the place of what a kernel is compiled not to read: float32, int64, int32, and a bias."""
    numbers = torch.empty(1, dtype=torch.float32, device=device)
    return (
        numbers,
        torch.empty(1, dtype=torch.int64, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
        numbers.view(1, 1, 1, 1),
    )


class Buffers:
    """Tensors of float32 and int32 in one allocation, which goes when the kernels have run.

    Ask for all of them, then `make` them; those that must be 0 are filled at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.asked: dict[str, tuple[Sequence[int], torch.dtype, bool]] = {}
        self.unread = unread(device)[0]
        self.made: dict[str, Tensor] = {}

    def ask(
        self, name: str, *shape: int, dtype: torch.dtype = torch.float32, zero: bool = False
    ) -> None:
        """Ask for a tensor of that name."""
        self.asked[name] = (shape, dtype, zero)

    def make(self) -> None:
        """Make what was asked for."""
        wanted = sorted(self.asked.items(), key=lambda one: not one[1][2])  # zeros in front
        begins, end, zeros = [], 0, 0
        for _, (shape, _, zero) in wanted:
            begins.append(end)
            end += -(-math.prod(shape) // LINE) * LINE
            zeros = end if zero else zeros
        whole = torch.empty(end, dtype=torch.float32, device=self.device)
        if zeros:
            whole[:zeros].zero_()
        bits = whole.view(torch.int32)
        for (name, (shape, dtype, _)), begin in zip(wanted, begins, strict=True):
            base = bits if dtype == torch.int32 else whole
            self.made[name] = base.as_strided(shape, _strides(shape), begin)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a name, or what is not read in its place."""
        return self.made.get(name, self.unread)


def _strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]
