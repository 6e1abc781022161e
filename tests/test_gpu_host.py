"""What an observed call on CUDA asks of the host beside its kernels: operations, allocations.

Counted without a GPU, the kernels left out; a call is a form that was seen before.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from regard import Causal, Entropy, First, Full, Map, Padding, Received, TopK, Window
from regard.call.checked import Call
from regard.engines.second_pass.triton import read as reading
from regard.engines.second_pass.triton.forms import Buffers, by_form

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
        # Tests fill what is made (conftest.py)
        made = ("empty", "empty_like", "new_empty", "empty_strided", "fill_")
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


MOST = {  # (kernels, operations, allocations) of all four, as docs/cuda.md says
    (2048, Full()): (3, 4, 9),
    (2048, Causal()): (3, 4, 9),
    (2048, Causal() & (Window(64) | First(4))): (3, 5, 10),
    (1, Causal()): (4, 7, 10),
}


@pytest.mark.triton
@pytest.mark.parametrize("q_len, mask", MOST, ids=str)
def test_an_observed_call_asks_little_of_the_host(q_len, mask):
    found = counted(call_of(q_len, mask), ALL_FOUR)
    asked = (len(found.launches), len(found.operations), len(found.allocations))
    assert all(a <= b for a, b in zip(asked, MOST[q_len, mask], strict=True)), found.names


@pytest.mark.triton
@pytest.mark.parametrize("name", ["causal", "padding"])
def test_to_mend_asks_nothing_of_the_host_but_its_launches(name):
    """What a hidden number spoils on CUDA: one kernel for the output, two for gradients."""
    from regard.engines.blocks import backward_kernel, forward_kernel
    from regard.engines.blocks import launch as blocks

    query = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    keep = torch.ones(1, 256, dtype=torch.bool)
    mask = Causal() if name == "causal" else Padding(keep)
    call, lse = Call.checked(query, query, query, mask=mask), torch.zeros(1, 2, 256)

    def run() -> None:
        blocks.mend(call, query, lse)
        blocks.mend_gradients(call, query, lse, query, (query, query, query))

    count = Counted()
    with ExitStack() as stack:
        for module, names in (
            (forward_kernel, ["attend_rows"]), (backward_kernel, ["mend_queries", "mend_keys"])
        ):  # fmt: skip
            for kernel in names:
                stack.enter_context(patch.object(module, kernel, Left(kernel, count.launches)))
        run()
        with count:
            run()
    assert count.launches[3:] == ["attend_rows", "mend_queries", "mend_keys"]
    assert not count.operations
    assert not count.allocations


def test_what_is_remembered_is_bounded_and_small():
    made: list[int] = []

    @by_form(2, lambda numbers: len(numbers) * 2**20)
    def numbers(device: torch.device, n: int) -> list[int]:
        made.append(n)
        return [n] * n

    here = torch.device("cpu")
    assert numbers(here, 1) is numbers(here, 1)
    assert [numbers(here, n) for n in (2, 1, 3, 2)] == [[2, 2], [1], [3, 3, 3], [2, 2]]
    assert made == [1, 2, 3, 2]  # of three the one asked for longest ago went
    numbers(here, 5)
    numbers(here, 5)
    assert made[4:] == [5, 5]  # too large to be kept


def test_buffers_lie_apart_and_zeros_are_zeros():
    held = Buffers(torch.device("cpu"))
    held.ask("a", 3, 5)
    held.ask("queue", 1, dtype=torch.int32, zero=True)
    held.ask("b", 2, 40, zero=True)
    held.ask("names", 7, dtype=torch.int32)
    held.make()
    assert held["b"].eq(0).all()
    assert held["queue"].item() == 0
    for n, (name, tensor) in enumerate(held.made.items()):
        assert tensor.data_ptr() % 64 == 0, name
        tensor.fill_(n)
    for n, tensor in enumerate(held.made.values()):
        assert tensor.eq(n).all()
        assert tensor.is_contiguous()
    assert held["b"].shape == (2, 40)
    assert held["names"].dtype == torch.int32
    assert held["other"] is held.unread


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
