"""Where PyTorch's kernel for the CPU is measured to be faster than ours, by instruction set.

`auto` asks it (engines/__init__.py); nothing is measured at import. A row is what saved runs of
`regard bench` showed on a processor of that kind (docs/benchmarks.md): where SDPA's time over ours
is below 1 beyond the spread of its rounds. What is not in the table is ours: at levels avx2,
avx512, avx512bf16 and amx that is every shape that was timed, both sides with the same
instructions. A level that has run on no processor stands as the one below it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...call.checked import Call
from . import native

LONG = 1 << 62  # no limit


class Faster(NamedTuple):
    """Calls for which PyTorch's kernel is faster, and by how much it is.

    levels: the instruction sets that ours use. dtypes: none for all of them. queries, keys: from,
    and up to. backward: whether it is faster for calls that need gradients, too, all in all.
    without_amx: only on a processor with AMX that ours may not use. ratio: SDPA's time over ours.
    """

    levels: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    queries: tuple[int, int]
    keys: tuple[int, int]
    backward: bool
    without_amx: bool
    ratio: str
    where: str


LESSER = ("portable", "avx2", "avx512", "avx512bf16")
BF16 = (torch.bfloat16,)

TABLE: tuple[Faster, ...] = (
    Faster(
        ("portable",), (), (17, LONG), (1, LONG), True, False,
        "0.5–0.9", "an AMD EPYC held to that level",
    ),
    Faster(
        ("neonbf16",), (), (17, LONG), (1, LONG), True, False,
        "unknown", "no processor yet; taken to be as at level portable",
    ),
    Faster(
        LESSER, BF16, (17, LONG), (1, LONG), True, True,
        "0.3–0.5", "an Intel Xeon, whose AMX PyTorch uses and ours, at this level, do not",
    ),
)  # fmt: skip


def faster(call: Call) -> Faster | None:
    """The row that says why PyTorch's kernel is faster for a call; None where ours is.

    A call with observers is always ours: no other engine gathers them in its forward.
    """
    if not native.AVAILABLE or call.observers:
        return None
    level, dtype, place = native.LEVELS[native.LEVEL], call.query.dtype, call.place
    for row in TABLE:
        if (
            level in row.levels
            and (not row.dtypes or dtype in row.dtypes)
            and row.queries[0] <= place.q_len <= row.queries[1]
            and row.keys[0] <= place.k_len <= row.keys[1]
            and (row.backward or not call.needs_grad)
            and (native.WITHOUT_AMX or not row.without_amx)
        ):
            return row
    return None


def explained(row: Faster, dtype: torch.dtype) -> str:
    """Why `auto` tries PyTorch's kernel first: a sentence."""
    return (
        f"sdpa is tried before cpu: for {_span(row.queries, 'queries')} and "
        f"{_span(row.keys, 'keys')} in {str(dtype).removeprefix('torch.')} its time over that of "
        f"level {native.LEVELS[native.LEVEL]} is {row.ratio}, measured on {row.where}"
    )


def _span(ends: tuple[int, int], what: str) -> str:
    low, high = ends
    if high == LONG:
        return f"any {what}" if low == 1 else f"{low} {what} or more"
    return f"up to {high} {what}" if low == 1 else f"{low} to {high} {what}"
