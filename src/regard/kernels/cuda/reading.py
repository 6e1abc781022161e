"""The observers' results by Triton: `why_not`, and `read`, which fills what their `shapes` name.

Plain torch around the kernels of `weighing`: which tiles the mask leaves, what each launch gathers,
and how the buffers of its programs become results.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...biases import Kind
from ...call import Call
from ...errors import RegardError
from ...observers import (
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
from .instructions import DEEPEST, LONGEST, Instructions, depth, instructions

READS = (TopK, Received, Entropy, MaxScore, LogSumExp, Map, Distances, Rows)
MOST_LISTED = 64  # a row's list stands in registers
MOST_DIM = 256
MOST_DENSE = 2
PROGRAMS = 512  # of all heads together, where columns are gathered: each has a buffer of its own
_MOST_INT = 2**31 - 1


def installed() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def why_not(call: Call) -> list[str]:
    """The reasons why the kernels cannot read this call; empty if they can."""
    reasons, place = [], call.place
    if not installed():
        reasons.append('triton is not installed; pip install "regard[cuda]"')
    if call.query.dtype == torch.float64:
        reasons.append("query is float64; it computes in float32")
    dim = call.query.shape[-1]
    if dim > MOST_DIM:
        reasons.append(f"dim is {dim}; it takes at most {MOST_DIM}")
    if not dim or not place.q_len or not place.k_len or not place.batch:
        reasons.append("the call is empty; it needs at least one of everything")
    dense = sum(b.kind == Kind.DENSE for b in call.biases)
    if dense > MOST_DENSE:
        reasons.append(f"{dense} biases are tensors; it takes {MOST_DENSE}, so add some up before")
    if depth(call.program) > DEEPEST:
        reasons.append(f"the mask holds {depth(call.program)} answers at once; it takes {DEEPEST}")
    ends = (place.query_start, place.key_start, place.query_start + place.q_len)
    if any(abs(n) > LONGEST for n in (*ends, place.key_start + place.k_len)):
        reasons.append("positions are beyond 2³⁰; it counts them in int32")
    if call.pages is not None:
        reasons.append("keys lie in pages; it reads none")
    return reasons


def refuses(observer: Observer) -> list[str]:
    """The reasons why the kernels cannot gather an observer; empty if they can."""
    if not isinstance(observer, READS):
        return [f"{type(observer).__name__} is not among what it gathers"]
    if isinstance(observer, TopK) and observer.k > MOST_LISTED:
        return [f"{observer} is longer than the {MOST_LISTED} that registers hold"]
    return []


@dataclass
class Launch:
    """What one launch of the kernel gathers: of each kind of observer one, or none."""

    listed: int = 0  # the largest k of a TopK
    entropy: bool = False
    score: bool = False
    received: tuple[int, int] | None = None  # the rows that count
    map: Map | None = None
    distances: tuple[int, ...] | None = None  # edges
    found: dict[str, Tensor] = field(default_factory=dict)

    @property
    def columns(self) -> bool:
        """Whether it adds up over rows."""
        return (self.received, self.map, self.distances) != (None, None, None)


def launches(observers: Sequence[Observer], call: Call) -> list[Launch]:
    """The launches that gather the observers: one, unless two of a kind differ."""
    place, plans = call.place, [Launch()]

    def add(name: str, value: Any) -> None:
        for plan in plans:
            if getattr(plan, name) in (None, value):
                setattr(plan, name, value)
                return
        plans.append(Launch(**{name: value}))

    for observer in observers:
        if isinstance(observer, TopK):
            plans[0].listed = max(plans[0].listed, observer.k)
        elif isinstance(observer, Entropy):
            plans[0].entropy = True
        elif isinstance(observer, MaxScore):
            plans[0].score = True
        elif isinstance(observer, Received):
            add("received", observer.span(place))
        elif isinstance(observer, Map):
            add("map", observer)
        elif isinstance(observer, Distances):
            add("distances", observer.edges)
    return [p for p in plans if p.listed or p.entropy or p.score or p.columns]


def read(
    call: Call, observers: Sequence[Observer], lse: Tensor, shard: bool,
    blocks: tuple[int, int] | None = None,
) -> list[list[Tensor]]:  # fmt: skip
    """The tensors of each observer, as its `shapes` names them.

    lse (batch, heads, q_len) float32. shard: the call may hold only some of the keys, and its
    weights are exp(score − lse) as they are. blocks: queries and keys of a tile, powers of two from
    16; by default chosen for the call. RegardError if `why_not` or `refuses` has a reason.
    """
    reasons = [*why_not(call), *(reason for o in observers for reason in refuses(o))]
    if reasons:
        raise RegardError(f"the Triton kernels cannot read {call}: {'; '.join(reasons)}")
    lse = lse.to(torch.float32).contiguous()
    shared = _Shared(call, lse)
    plans = launches(observers, call)
    for plan in plans:
        _gather(plan, shared, shard, blocks or _blocks(call, plan))
    results: list[list[Tensor]] = []
    for n, observer in enumerate(observers):
        if observer in observers[:n]:  # asked for twice: a copy
            results.append([t.clone() for t in results[observers.index(observer)]])
        else:
            results.append(_result(observer, plans, shared, shard))
    return results


def _result(observer: Observer, plans: list[Launch], shared: _Shared, shard: bool) -> list[Tensor]:
    call, place = shared.call, shared.call.place
    if isinstance(observer, LogSumExp):
        return [shared.lse.clone()]
    if isinstance(observer, Rows):
        return [_rows(observer, shared, shard)]
    if isinstance(observer, TopK):
        found, k = plans[0].found, observer.k
        listed = found["listed"][..., :k].contiguous()
        rest = (found["mass"] - listed.sum(-1)).clamp(min=0)
        sink = torch.zeros_like(rest)
        if call.sinks is not None:
            sink = (call.sinks.to(rest.dtype)[:, None] - shared.lse).exp()
        return [found["names"][..., :k].contiguous(), listed, rest, sink]
    if isinstance(observer, Entropy):
        return [plans[0].found["entropy"]]
    if isinstance(observer, MaxScore):
        return [plans[0].found["score"]]
    if isinstance(observer, Received):
        span = observer.span(place)
        found = next(p.found for p in plans if p.received == span)
        return [t.clone() for t in observer.pool(found["columns"], found["counts"], place)]
    if isinstance(observer, Map):
        return [next(p.found for p in plans if p.map == observer)["cells"]]
    assert isinstance(observer, Distances)
    found = next(p.found for p in plans if p.distances == observer.edges)
    return [found["past"].clone(), found["future"].clone()]


class _Shared:
    """What all launches of a call have in common, in the form that the kernels take."""

    def __init__(self, call: Call, lse: Tensor) -> None:
        self.call, self.lse = call, lse
        place = call.place
        self.masked = not call.program.full
        self.mask: Instructions = instructions(call.program)
        device = place.device
        nothing = torch.zeros(1, dtype=torch.float32, device=device)
        self.sinks = nothing if call.sinks is None else call.sinks.to(torch.float32)
        self.slopes = self.relative = nothing
        self.alibi = self.has_relative = False
        least = place.key_start - (place.query_start + place.q_len - 1)
        self.width = place.q_len + place.k_len - 1
        dense: list[Tensor] = []
        for bias in call.biases:
            if bias.kind == Kind.DENSE:
                dense.append(bias.tensor)
            elif bias.kind == Kind.ALIBI:
                slopes = bias.tensor.to(torch.float32)
                self.slopes = self.slopes + slopes if self.alibi else slopes.contiguous()
                self.alibi = True
            else:
                offsets = torch.arange(self.width, device=device) + least
                along = bias.along(offsets).to(torch.float32).contiguous()
                self.relative = self.relative + along if self.has_relative else along
                self.has_relative = True
        self.dense = len(dense)
        self.biases: list[Any] = []
        for n in range(MOST_DENSE):
            tensor = dense[n] if n < len(dense) else nothing.view(1, 1, 1, 1)
            strides = (0 if tensor.shape[d] == 1 else tensor.stride(d) for d in range(4))
            self.biases += [tensor, *strides]
        self.relative_zero = -least

    def front(self) -> list[Any]:
        """Strides and sizes, after the tensors."""
        call, place = self.call, self.call.place
        return [
            *call.query.stride(), *call.key.stride(), call.query.shape[-1], place.heads,
            place.heads // place.kv_heads, place.q_len, place.k_len, call.scale,
            call.softcap or 1.0, place.query_start, place.key_start, self.slopes, self.relative,
            self.width, self.relative_zero, *self.biases, self.mask.records,
            len(self.mask.records), self.mask.integers, self.mask.octets,
        ]  # fmt: skip

    def flags(self, block_q: int, block_k: int) -> dict[str, Any]:
        """What the kernels are compiled for."""
        dim = 1 << max(self.call.query.shape[-1] - 1, 15).bit_length()
        return {
            "SOFTCAP": self.call.softcap is not None, "ALIBI": self.alibi,
            "RELATIVE": self.has_relative, "DENSE": self.dense, "MASKED": self.masked,
            "KINDS": self.mask.kinds, "M": block_q, "N": block_k, "D": dim,
        }  # fmt: skip


def _blocks(call: Call, plan: Launch) -> tuple[int, int]:
    """Queries and keys of a tile: what registers hold. Not yet measured on a GPU."""
    rows = 128 if call.query.shape[-1] <= 128 and call.query.element_size() == 2 else 64
    if plan.listed > 8:
        rows //= 2
    if plan.listed > 32:
        rows //= 2
    while rows > 16 and rows >= 2 * call.place.q_len:
        rows //= 2
    return rows, 64 if call.query.element_size() == 2 else 32


def _gather(plan: Launch, shared: _Shared, shard: bool, blocks: tuple[int, int]) -> None:
    """Launch the kernel once and put what it gathered into plan.found."""
    from .weighing import weigh  # triton

    call, place = shared.call, shared.call.place
    block_q, block_k = blocks
    device = place.device
    # Tiles begin at multiples of their size in the sequence, so that cells of a map cut none
    lead = (place.query_start % block_q, place.key_start % block_k)
    q_blocks, k_blocks = (
        -(-(n + ahead) // size)
        for n, ahead, size in zip((place.q_len, place.k_len), lead, blocks, strict=True)
    )
    splits = q_blocks
    if plan.columns:
        splits = min(q_blocks, -(-PROGRAMS // place.heads))
    tiles = counts = shared.mask.records
    tiles_b = tiles_h = 0
    if shared.masked:
        tiles, counts, tiles_b, tiles_h = _tiles(call, blocks, lead)

    def new(*shape: int, dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
        made = torch.zeros if zero else torch.empty
        return made(shape, dtype=dtype, device=device)

    rows = (place.batch, place.heads, place.q_len)
    found = plan.found
    unused = new(1)
    found["mass"] = new(*rows)
    found["entropy"] = new(*rows) if plan.entropy else unused
    found["score"] = new(*rows) if plan.score else unused
    found["names"] = new(*rows, plan.listed, dtype=torch.int32) if plan.listed else unused
    found["listed"] = new(*rows, plan.listed) if plan.listed else unused
    columns, seen, spread = unused, unused, (0, 0)
    if plan.received is not None:
        lines = (place.batch, place.heads, splits, place.k_len)
        columns = new(*lines, zero=True)
        spread = call.program.spread()
        seen = new(*spread, *lines[2:], dtype=torch.int32, zero=True)
    cells, grid = unused, _Grid(1, 1, 1, 0, 1)
    if plan.map is not None:
        grid = _Grid.of(plan.map, call, blocks)
        lines = (place.batch, place.heads, q_blocks * grid.rows, grid.width)
        cells = new(*lines, zero=True)
    past, future, edges, bins = unused, unused, unused, 0
    if plan.distances is not None:
        bins = _power(len(plan.distances))
        past, future = (new(place.batch, place.heads, splits, bins) for _ in range(2))
        ends = [min(e, _MOST_INT) for e in (*plan.distances, _MOST_INT)]
        edges = torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True)
    first, last = plan.received or (0, 0)
    with _device(device):
        weigh[(splits * place.heads * place.batch,)](
            call.query, call.key, shared.lse, shared.sinks, *shared.front(),
            tiles, counts, tiles_b, tiles_h, *lead, q_blocks, k_blocks, splits,
            found["mass"], found["entropy"], found["score"], found["names"], found["listed"],
            plan.listed, columns, seen, *spread, first, last,
            cells, grid.size, grid.first, grid.width, past, future, edges,
            len(plan.distances or ()),
            SHARD=shard, SINKS=call.sinks is not None, ENTROPY=plan.entropy, SCORE=plan.score,
            TOP=_power(plan.listed) if plan.listed else 0, RECEIVED=plan.received is not None,
            MAP=plan.map is not None, MAX=plan.map is not None and plan.map.reduce == "max",
            NR=grid.rows, NC=grid.cols, BINS=bins,
            **shared.flags(block_q, block_k), num_warps=4 if block_q < 128 else 8,
            enable_fp_fusion=True,
        )  # fmt: skip
    if plan.received is not None:
        found["columns"] = columns.sum(2)
        found["counts"] = seen.sum(2, dtype=torch.int32).expand(found["columns"].shape)
    if plan.map is not None:
        found["cells"] = grid.whole(cells, plan.map, call, block_q)
    if plan.distances is not None:
        found["past"], found["future"] = (
            t.sum(2)[..., : len(plan.distances)].contiguous() for t in (past, future)
        )


@dataclass(frozen=True)
class _Grid:
    """The cells of a map in a tile: rows × cols of them, of `size` keys; `width` in all."""

    rows: int
    cols: int
    size: int
    first: int
    width: int

    @classmethod
    def of(cls, wanted: Map, call: Call, blocks: tuple[int, int]) -> _Grid:
        rows, cols = wanted.cells(call.place)
        per_tile = max(blocks[1] // cols.size, 1)
        # The kernel numbers a tile's cells from that of its first key
        return cls(max(blocks[0] // rows.size, 1), per_tile, cols.size, cols.first, cols.count)

    def whole(self, cells: Tensor, wanted: Map, call: Call, block_q: int) -> Tensor:
        """The map, of cells (batch, heads, blocks · rows, cols) no higher than a block."""
        place = call.place
        rows, _ = wanted.cells(place)
        height = block_q // self.rows
        begin = (place.query_start - place.query_start % block_q) // height
        per = rows.size // height  # of them in a cell
        ahead = begin % per
        cells = torch.nn.functional.pad(cells, (0, 0, ahead, -(cells.shape[2] + ahead) % per))
        cells = cells.unflatten(2, (-1, per))
        pooled = cells.amax(3) if wanted.reduce == "max" else cells.sum(3)
        skip = rows.first - (begin - ahead) // per
        return pooled[:, :, skip : skip + rows.count].contiguous()


def _tiles(
    call: Call, blocks: tuple[int, int], lead: tuple[int, int]
) -> tuple[Tensor, Tensor, int, int]:
    """Each block's tiles that are not empty, ascending, and how many: (…, q blocks, k blocks).

    An entry is 2 · the tile's number, + 1 where the mask shows it whole. Then how many blocks of
    queries lie between two batch items and two heads (0 where all share theirs).
    """
    table = call.program.tiles(*blocks, lead)
    number = torch.arange(table.some.shape[-1], dtype=torch.int32, device=table.some.device)
    entry = torch.where(table.some, 2 * number + table.every.to(torch.int32), _MOST_INT)
    batch, heads, q_blocks, _ = entry.shape
    by_head = q_blocks if heads > 1 else 0
    by_item = heads * q_blocks if batch > 1 else 0
    counts = table.some.sum(-1, dtype=torch.int32).contiguous()
    return entry.sort(-1).values.contiguous(), counts, by_item, by_head


def _rows(observer: Rows, shared: _Shared, shard: bool) -> Tensor:
    """(batch, heads, n, k_len): the whole rows, normalised like all others."""
    from .weighing import weigh_rows  # triton

    call, place = shared.call, shared.call.place
    local = [row for _, row in observer.local(place)]
    out = torch.empty(
        place.batch, place.heads, len(local), place.k_len, dtype=torch.float32, device=place.device
    )
    if not local:
        return out
    wanted = torch.tensor(local, dtype=torch.int32).to(place.device, non_blocking=True)
    block_q, block_k = 16, 64
    row_blocks, k_blocks = -(-len(local) // block_q), -(-place.k_len // block_k)
    with _device(place.device):
        weigh_rows[(place.batch * place.heads * row_blocks * k_blocks,)](
            call.query, call.key, shared.lse, wanted, len(local), *shared.front(), out,
            row_blocks, k_blocks, **shared.flags(block_q, block_k), enable_fp_fusion=True,
        )  # fmt: skip
    if shard:
        return out
    lse = shared.lse[:, :, wanted.long()]
    total = out.sum(-1)
    if call.sinks is not None:
        total += (shared.sinks[:, None] - lse).exp()
    return out.div_(total.masked_fill(lse == -torch.inf, 1)[..., None])


def _power(n: int) -> int:
    """The smallest power of two that holds n, 2 at least."""
    return 1 << max(n - 1, 1).bit_length()


def _device(device: torch.device) -> Any:
    """Triton launches on the current device: make it the call's."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
