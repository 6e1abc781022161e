"""A call as the compiled kernels read it: numbers, strides and addresses (csrc/abi.h)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...call.biases import Kind
from ...call.checked import Call
from ...call.observers import (
    Distances,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    Observer,
    Received,
    Rows,
    TopK,
)
from ...call.opcodes import Op
from ...errors import RegardError
from . import native
from .structs import CALL, DISTANCES, MAP, OBSERVE, PAGES, RECEIVED

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARTS = {"highest": 3, "high": 2, "medium": 1}
FUSED = (TopK, Received, Entropy, MaxScore, LogSumExp, Map, Distances, Rows)


class Buffers:
    """Numbers as the kernels read them; keeps what they point to alive."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def view(self, tensor: Tensor, kind: int) -> tuple[int, ...]:
        """A RegardView of a tensor of up to 4 dimensions; a dimension of size 1 has stride 0."""
        self.kept.append(tensor)
        strides = [0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        address = tensor.data_ptr()
        if not address and tensor.numel():
            raise RegardError(f"a {type(tensor).__name__} {tuple(tensor.shape)} holds no elements")
        return (address, kind, *strides, *(0,) * (4 - len(strides)))

    def integers(self, numbers: Sequence[int]) -> int:
        """The address of int64s; 0 if there are none."""
        if not numbers:
            return 0
        kept = array("q", numbers)
        self.kept.append(kept)
        return kept.buffer_info()[0]

    def tensor(self, tensor: Tensor | None) -> int:
        """The address of a contiguous tensor; 0 for None."""
        if tensor is None:
            return 0
        self.kept.append(tensor)
        return tensor.data_ptr()


_IN_ORDER = (0,) * PAGES.words


def words_of(
    call: Call, out: Tensor, lse: Tensor, stats: Tensor | None, kept: Buffers, observe: int = 0
) -> bytes:
    """The call as a RegardCall (csrc/abi.h)."""
    place, value = call.place, call.value
    assert value is not None
    kind = TYPES[call.query.dtype]
    floats = [_float(b.tensor) for b in call.biases if b.kind == Kind.DENSE]
    dense = [kept.view(t, TYPES[t.dtype]) for t in floats]
    mask = [kept.view(t, 0) for t in _mask_tensors(call)] if call.program.tensors else []
    sizes = [t.shape[0] for t in call.program.tensors]
    dropout = call.dropout
    seed = int(dropout.seed) if dropout is not None and dropout.seed is not None else 0
    sinks = None if call.sinks is None else call.sinks.detach().float().contiguous()
    # Every call passes here: in the order of the table, as names would cost 5 µs
    return CALL.pack(
        place.batch, place.heads, place.kv_heads, place.q_len, place.k_len,
        call.query.shape[-1], value.shape[-1], place.query_start, place.key_start,
        call.scale, call.softcap or 0.0, 0.0 if dropout is None else dropout.p,
        seed, torch.get_num_threads(), native.level(), parts_of(call.query.dtype),
        call.query.data_ptr(), kind, *call.query.stride(),
        call.key.data_ptr(), kind, *call.key.stride(),
        value.data_ptr(), kind, *value.stride(),
        out.data_ptr(), kind, *out.stride(),
        lse.data_ptr(), 0 if stats is None else stats.data_ptr(),
        kept.tensor(sinks), kept.tensor(by_offset(call)),
        len(dense), len(call.program.code),
        kept.integers([n for v in dense for n in v]),
        kept.integers(call.program.code),
        kept.integers([n for v in mask for n in v]),
        kept.integers(sizes),
        *_pages(call, kept),
        observe,
    )  # fmt: skip


def _pages(call: Call, kept: Buffers) -> Sequence[int]:
    """A RegardPages; all 0 where keys and values lie in order."""
    if call.pages is None:
        return _IN_ORDER
    pages = (call.pages.table, call.pages.lengths)
    table, lengths = (t.to(torch.int32).contiguous() for t in pages)
    size = call.key.shape[2]
    return PAGES.flat(
        table=kept.tensor(table), row=table.shape[1], size=size, lengths=kept.tensor(lengths)
    )


def parts_of(dtype: torch.dtype) -> int:
    """How many bf16 numbers stand for one in products (csrc/parts.h); 0: none do.

    float32: as `torch.set_float32_matmul_precision` asks; "highest" keeps all 24 bits. Without AMX
    only one part is faster than float32's own product (csrc/pairs.h).
    """
    if dtype == torch.float32:
        parts = PARTS[torch.get_float32_matmul_precision()]
    else:
        parts = 1 if dtype == torch.bfloat16 else 2
    return parts if parts == 1 or native.LEVELS[native.level()] == "amx" else 0


def by_offset(call: Call) -> Tensor | None:
    """The sum of the biases that depend on query − key alone: (heads, q_len + k_len − 1) float32.

    Entry x is that of query index − key index = x − (k_len − 1).
    """
    total: Tensor | None = None
    for bias in call.biases:
        if bias.kind == Kind.DENSE:
            continue
        mine = replace(bias, tensor=bias.tensor.detach().float()).along(offsets(call))
        total = mine if total is None else total + mine
    return None if total is None else total.contiguous()


def offsets(call: Call) -> Tensor:
    """key − query at each entry of `by_offset`: (q_len + k_len − 1,) int64."""
    place = call.place
    count = max(place.q_len + place.k_len - 1, 0)
    first = place.key_start - place.query_start + place.k_len - 1
    return first - torch.arange(count, dtype=torch.int64, device="cpu")


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.dtype in TYPES else tensor.detach().float()


def _mask_tensors(call: Call) -> list[Tensor]:
    """The mask's tensors as the kernels read them: ids as int32, pairs and the rest contiguous."""
    tensors = list(call.program.tensors)
    for op, args in call.program.instructions():
        for i in args[: len(op.form.tensors)]:
            if op not in (Op.DENSE, Op.DOCUMENTS):
                tensors[i] = tensors[i].contiguous()
        if op == Op.DOCUMENTS:
            mine, theirs = args
            tensors[mine], tensors[theirs] = _in_int32(tensors[mine], tensors[theirs])
    return tensors


def _in_int32(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of queries and of keys as int32; numbered anew where they do not fit."""
    most = torch.iinfo(torch.int32).max
    wide = [t for t in (mine, theirs) if t.dtype == torch.int64 and t.numel()]
    if any(int(t.max()) > most or int(t.min()) < -most for t in wide):
        both = torch.cat([mine.long().flatten(), theirs.long().flatten()])
        # Those below 0, of no document, stay there
        numbers = both.unique(return_inverse=True)[1].where(both >= 0, -1)
        mine, theirs = (
            n.view(t.shape)
            for n, t in zip(
                numbers.split([mine.numel(), theirs.numel()]), (mine, theirs), strict=True
            )
        )
    return mine.to(torch.int32).contiguous(), theirs.to(torch.int32).contiguous()


def received_alone(kept: Buffers, total: Tensor) -> int:
    """A RegardObserve of what each key receives from calls of one query, which fill `total` anew.

    total float32 (batch, heads, k_len), contiguous.
    """
    received = RECEIVED.flat(first=0, last=1, sum=kept.tensor(total), count=0)
    nothing = dict.fromkeys(OBSERVE.at, 0)
    return kept.integers(
        OBSERVE.flat(**nothing | {"received_count": 1, "received": kept.integers(received)})
    )


class Watching:
    """The tensors that the forward fills for observers, and what each observer asked for of them.

    Of several TopK the kernel keeps the largest k, of several Rows all of them.
    """

    def __init__(self, call: Call, observers: tuple[Observer, ...], lse: Tensor) -> None:
        self.call, self.observers, self.lse = call, observers, lse
        place = call.place
        self.row = (place.batch, place.heads, place.q_len)
        self.k = max((o.k for o in observers if isinstance(o, TopK)), default=0)
        self.wanted = sorted(
            {r for o in observers if isinstance(o, Rows) for _, r in o.local(place)}
        )
        self.top = None if not self.k else self._top()
        self.filled = [self._tensors(o) for o in observers]
        shape = (*self.row[:2], len(self.wanted), place.k_len)
        rows = any(isinstance(o, Rows) for o in observers)
        self.rows = (
            torch.full(shape, -torch.inf, dtype=torch.float32, device="cpu") if rows else None
        )

    def _top(self) -> list[Tensor]:
        row = self.row
        listed = torch.zeros(*row, self.k, dtype=torch.float32, device="cpu")
        return [
            torch.full((*row, self.k), -1, dtype=torch.int32, device="cpu"),
            listed,
            *torch.zeros(2, *row, dtype=torch.float32, device="cpu"),
        ]

    def _tensors(self, observer: Observer) -> list[Tensor]:
        if isinstance(observer, TopK | Rows | LogSumExp):
            return []
        place = self.call.place
        if isinstance(observer, Received):  # pooled over heads in the end
            shape = (place.batch, place.heads, place.k_len)
            return [
                torch.zeros(shape, dtype=torch.float32, device="cpu"),
                torch.zeros(shape, dtype=torch.int32, device="cpu"),
            ]
        shapes = observer.shapes(place, torch.float32)
        return [torch.zeros(shape, dtype=dtype, device="cpu") for shape, dtype in shapes]

    def packed(self, kept: Buffers) -> int:
        """A RegardObserve (csrc/abi.h)."""
        place = self.call.place
        one: dict[type, int] = {}
        received: list[int] = []
        maps: list[int] = []
        distances: list[int] = []
        for observer, tensors in zip(self.observers, self.filled, strict=True):
            where = [kept.tensor(t) for t in tensors]
            if isinstance(observer, Received):
                first, last = observer.span(place)
                total, count = where
                received += RECEIVED.flat(first=first, last=last, sum=total, count=count)
            elif isinstance(observer, Map):
                rows, cols = observer.cells(place)
                maps += MAP.flat(
                    row_first=rows.first, row_size=rows.size, rows=rows.count,
                    col_first=cols.first, col_size=cols.size, cols=cols.count,
                    is_max=observer.reduce == "max", out=where[0],
                )  # fmt: skip
            elif isinstance(observer, Distances):
                edges = observer.edges
                past, future = where
                distances += DISTANCES.flat(
                    bins=len(edges), edges=kept.integers(edges), past=past, future=future
                )
            elif isinstance(observer, Entropy | MaxScore):
                # Several ask for the same: the first is filled, the others take it
                one.setdefault(type(observer), where[0])
        index, top, rest, sink = [kept.tensor(t) for t in self.top] if self.top else [0] * 4
        return kept.integers(
            OBSERVE.flat(
                k=self.k,
                index=index,
                top=top,
                rest=rest,
                sink=sink,
                entropy=one.get(Entropy, 0),
                max_score=one.get(MaxScore, 0),
                received_count=len(received) // RECEIVED.words,
                map_count=len(maps) // MAP.words,
                distances_count=len(distances) // DISTANCES.words,
                row_count=len(self.wanted),
                received=kept.integers(received),
                map=kept.integers(maps),
                distances=kept.integers(distances),
                row=kept.integers(self.wanted),
                rows=kept.tensor(self.rows),
            )
        )

    def tensors(self) -> list[Tensor]:
        """The tensors of each observer's `shapes`, one after another."""
        place = self.call.place
        answers: list[Tensor] = []
        first: dict[type, Tensor] = {}
        for observer, filled in zip(self.observers, self.filled, strict=True):
            if isinstance(observer, TopK):
                answers += self._largest(observer.k)
            elif isinstance(observer, Rows):
                mine = [self.wanted.index(r) for _, r in observer.local(place)]
                assert self.rows is not None
                answers.append(self.rows[:, :, mine])
            elif isinstance(observer, LogSumExp):
                answers.append(self.lse.clone())
            elif isinstance(observer, Received):
                total, count = filled
                answers += observer.pool(total, count, place)
            elif isinstance(observer, Entropy | MaxScore):
                answers.append(first.setdefault(type(observer), filled[0]).clone())
            else:
                answers += filled
        return answers

    def _largest(self, k: int) -> list[Tensor]:
        assert self.top is not None
        index, listed, rest, sink = self.top
        rest = rest + listed[..., k:].sum(-1)
        return [index[..., :k].contiguous(), listed[..., :k].contiguous(), rest, sink]
