"""What an observed call on CUDA asks of the host beside its kernels: operations, allocations.

Counted without a GPU, the kernels left out; a call is a form that was seen before.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from regard import Causal, Entropy, First, Full, Map, Received, TopK, Window
from regard.call.checked import Call
from regard.engines.second_pass.triton import read as reading

ALL_FOUR = [TopK(8), Received(), Entropy(), Map(256, 256)]
ASKED = {
    "all four": ALL_FOUR, "top": [TopK(8)], "received": [Received()], "entropy": [Entropy()],
    "map": [Map(256, 256)],
}  # fmt: skip
VIEWS = {
    "view", "as_strided", "expand", "slice", "unbind", "select", "detach", "alias", "unsqueeze",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """operations: those that compute something; allocations: those that make a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.launches: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))

    @property
    def operations(self) -> list[str]:
        made = ("empty", "empty_like", "new_empty", "empty_strided")
        return [n for n in self.names if n not in VIEWS and n not in made]

    @property
    def allocations(self) -> list[str]:
        return [n for n in self.names if n not in VIEWS and not n.endswith("_")]


class Left:
    """Stands in a kernel's place: its launch is noted."""

    def __init__(self, name: str, launches: list[str]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: self.launches.append(self.name)


def counted(call: Call, observers: list) -> Counted:
    """What reading the observers' results takes, the second time."""
    from regard.engines.second_pass.triton import (
        few_queries_kernel,
        read_kernel,
        rows_kernel,
        top_k_kernel,
    )

    count = Counted()
    kernels = {
        read_kernel: ("weigh",), rows_kernel: ("sum_rows",), top_k_kernel: ("list_keys",),
        few_queries_kernel: ("weigh_few", "join_few"),
    }  # fmt: skip
    lse = torch.zeros(call.query.shape[:3])
    with ExitStack() as stack:
        for module, names in kernels.items():
            for name in names:
                stack.enter_context(patch.object(module, name, Left(name, count.launches)))
        reading.read(call, observers, lse, False)
        count.launches.clear()
        with count:
            reading.read(call, observers, lse, False)
    return count


def call_of(q_len: int, mask: Any, heads: int = 2) -> Call:
    query = torch.zeros(1, heads, q_len, 64, dtype=torch.bfloat16)
    key = torch.zeros(1, heads, 2048, 64, dtype=torch.bfloat16)
    return Call.checked(query, key, None, mask=mask)


def report() -> None:
    """python -c "import test_gpu_host as t; t.report()": what docs/cuda.md says."""
    for q_len in (2048, 1):
        for mask in (Full(), Causal(), Causal() & (Window(64) | First(4))):
            for name, asked in ASKED.items():
                found = counted(call_of(q_len, mask), asked)
                print(
                    f"{q_len} {mask} {name}: {len(found.launches)} launches, "
                    f"{len(found.operations)} operations, {len(found.allocations)} allocations, "
                    f"{len(found.names)} calls of torch"
                )
                if name == "all four":
                    print("   ", " ".join(found.names))
