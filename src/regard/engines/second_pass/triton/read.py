"""The observers' results by Triton: `why_not`, and `read`, which fills what their `shapes` name.

Plain torch around the kernels of `weighing`: which tiles the mask leaves, what each launch gathers,
and how the buffers of its programs become results.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....call.biases import Kind
from ....call.checked import Call
from ....call.observers import (
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
from ....errors import RegardError
from . import few_queries as few
from .arguments import MOST_DENSE, Launch, Shared, ends, launches, on_device, power, wide
from .forms import Buffers
from .kernel_tuples import BinArgs, CellArgs, ColumnArgs, Gathered, ListArgs, TileArgs, fixed
from .mask_records import DEEPEST, LONGEST, depth
from .tile_grid import (
    FAN,
    Grid,
    Leaves,
    Listed,
    aligned,
    band_of,
    counts_of,
    listed_tiles,
)

READS = (TopK, Received, Entropy, MaxScore, LogSumExp, Map, Distances, Rows)
MOST_LISTED = 64  # a row's list stands in registers
MOST_DIM = 256
PROGRAMS = 512  # of all heads together, where columns are gathered: each has a buffer of its own
MOST_SUMS = 2**26  # numbers in those buffers, where more programs than that fill the GPU better
PROGRAMS_AT_ONCE = 3  # on a multiprocessor, where each keeps leaves
CHOSEN_AT_ONCE = 4096  # maxima in registers, of a few rows
PRODUCTS_AT_ONCE = 2048  # in a warp's registers


# Once, as no compiler can trace the question
_FOUND = importlib.util.find_spec("triton") is not None


def installed() -> bool:
    """Whether triton can be imported."""
    return _FOUND


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
    outer = (place.query_start, place.key_start, place.query_start + place.q_len)
    if any(abs(n) > LONGEST for n in (*outer, place.key_start + place.k_len)):
        reasons.append("positions are beyond 2³⁰; it counts them in int32")
    return reasons


def values_why_not(call: Call) -> list[str]:
    """The reasons why kernels that mix cannot hold a call's values in registers."""
    if call.value is None or 0 < call.value.shape[-1] <= MOST_DIM:
        return []
    return [f"v_dim is {call.value.shape[-1]}; it takes 1 to {MOST_DIM}"]


def refuses(observer: Observer) -> list[str]:
    """The reasons why the kernels cannot gather an observer; empty if they can."""
    if not isinstance(observer, READS):
        return [f"{type(observer).__name__} is not among what it gathers"]
    if isinstance(observer, TopK) and observer.k > MOST_LISTED:
        return [f"{observer} is longer than the {MOST_LISTED} that registers hold"]
    return []


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
    shared = Shared(call, lse)
    plans = launches(observers, call)
    for plan in plans:
        if call.place.q_len <= few.MOST_QUERIES:
            few.gather(plan, shared, shard, None if blocks is None else blocks[1])
        else:
            _gather(plan, shared, shard, blocks or _blocks(call, plan))
    results: list[list[Tensor]] = []
    for n, observer in enumerate(observers):
        if observer in observers[:n]:  # asked for twice: a copy
            results.append([t.clone() for t in results[observers.index(observer)]])
        else:
            results.append(_result(observer, plans, shared, shard))
    return results


def _result(observer: Observer, plans: list[Launch], shared: Shared, shard: bool) -> list[Tensor]:
    call, place = shared.call, shared.call.place
    if isinstance(observer, LogSumExp):
        return [shared.lse.clone()]
    if isinstance(observer, Rows):
        return [_rows(observer, shared, shard)]
    if isinstance(observer, TopK):
        found, k = plans[0].found, observer.k
        if k == plans[0].listed and "rest" in found:
            return [found[name] for name in ("names", "listed", "rest", "sink")]
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
        total, count = observer.pool(found["columns"], found["counts"], place)
        if total is found.get("handed"):  # to another observer of these rows
            total = total.clone()
        found["handed"] = total
        return [total, count.clone(memory_format=torch.contiguous_format)]  # those may be kept
    if isinstance(observer, Map):
        return [next(p.found for p in plans if p.map == observer)["cells"]]
    assert isinstance(observer, Distances)
    found = next(p.found for p in plans if p.distances == observer.edges)
    return [found["past"].clone(), found["future"].clone()]


def _blocks(call: Call, plan: Launch) -> tuple[int, int]:
    """Queries and keys of a tile; beyond half precision by estimate."""
    half = call.query.element_size() == 2
    rows = 128 if call.query.shape[-1] <= 128 and half else 64
    while rows > 16 and rows >= 2 * call.place.q_len:
        rows //= 2
    return rows, 64 if half else 32


def _options(call: Call, plan: Launch) -> dict[str, Any]:
    """How Triton compiles the kernels for a call."""
    options: dict[str, Any] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    if call.query.shape[-1] <= 128 and call.query.element_size() == 2:
        options["maxnreg"] = 168  # of 65536, for three programs of 128 threads
    return options


def warps_of(scores: int, dim: int) -> tuple[int, int]:
    """Warps of a program that computes the scores of a row again, and dims at a time."""
    count = min(max(scores * 32 // PRODUCTS_AT_ONCE, 1), 8)
    return count, max(min(count * PRODUCTS_AT_ONCE // scores, 32, dim), 8)


def rows_at_once(block_q: int, fans: int, top: int) -> int:
    """Of how many rows at a time leaves are chosen."""
    return min(block_q, max(CHOSEN_AT_ONCE // max(fans, top * FAN), 1))


def programs_at_once(call: Call, items: int) -> int:
    """How many programs share the items where each needs memory of its own."""
    if call.place.device.type != "cuda":  # interpreted
        return min(items, 3)
    held = torch.cuda.get_device_properties(call.place.device).multi_processor_count
    return min(items, PROGRAMS_AT_ONCE * held)


def _gather(plan: Launch, shared: Shared, shard: bool, blocks: tuple[int, int]) -> None:
    """Launch the kernels once and put what they gathered into plan.found."""
    from .read_kernel import weigh
    from .rows_kernel import sum_rows
    from .scores_kernel import WIDEN
    from .top_k_kernel import list_keys

    call, place = shared.call, shared.call.place
    block_q, block_k = blocks
    device = place.device
    lead, (q_blocks, k_blocks) = aligned(call, blocks)
    band = band_of(shared)
    programs = max(PROGRAMS, MOST_SUMS // place.k_len) if plan.columns else q_blocks * place.heads
    splits = min(q_blocks, -(-programs // place.heads))

    rows = (place.batch, place.heads, place.q_len)
    found, held = plan.found, Buffers(device)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # What the observers keep has memory of its own; all else goes together
    held.ask("queue", 1, dtype=torch.int32, zero=True)
    held.ask("mass", *rows)
    found["entropy"] = new(*rows) if plan.entropy else held.unread
    found["score"] = new(*rows) if plan.score else held.unread
    spread, counts = (0, 0), None
    if plan.columns and not shard:
        held.ask("before", *rows)
    if plan.received is not None:
        lines = (splits, place.k_len)
        held.ask("columns", *rows[:2], *lines, zero=True)
        counts = counts_of(shared, plan.received, band)
        if counts is None:
            spread = call.program.spread()
            if shared.paged:  # an item sees its own keys
                spread = (place.batch, spread[1])
            held.ask("seen", *spread, *lines, dtype=torch.int32, zero=True)
    cells, grid = held.unread, Grid(1, 1, 1, 0, 1)
    if plan.map is not None:
        grid = Grid.of(plan.map, call, blocks)
        lines = (q_blocks * grid.rows, grid.width)
        cells = torch.zeros(*rows[:2], *lines, dtype=torch.float32, device=device)
    edges, bins = held.unread, 0
    if plan.distances is not None:
        bins = power(len(plan.distances))
        for name in ("past", "future"):
            held.ask(name, *rows[:2], splits, bins)
        edges = ends(device, plan.distances)
    items = splits * place.heads * place.batch
    grid_size, kept, top = items, 0, 0
    leaves = Leaves(4, 1, 1, 4, 0)
    if plan.listed:
        grid_size = programs_at_once(call, items)
        leaves = Leaves.of(plan.listed, k_blocks, block_k)
        kept, top = leaves.kept, power(leaves.kept)
        line = block_q * leaves.width
        held.ask("maxima", grid_size, leaves.lines, line)
        held.ask("fans", grid_size, -(-leaves.lines // FAN), line)
        held.ask("chosen", *rows, kept, dtype=torch.int32)
        held.ask("totals", *rows)
    held.make()
    found["mass"] = held["mass"]
    first, last = plan.received or (0, 0)
    even = not shared.paged and not lead[1] and place.k_len % block_k == 0
    options = _options(call, plan)
    form = shared.form(block_q, block_k, band is not None)
    listed: Listed = (shared.none, shared.none, 0, 0)
    if band is None:
        listed = listed_tiles(shared, blocks, lead)
    tiles = TileArgs(*listed, *(band or (0, 0)), *lead, q_blocks, k_blocks)
    common = (shared.args, shared.mask_args(band is None), shared.biases, tiles)
    gathered = fixed(
        Gathered(
            SHARD=shard, ENTROPY=plan.entropy, SCORE=plan.score, TOP=top, WIDTH=leaves.width,
            TILES=leaves.tiles, FAN=FAN, FANS=leaves.fans,
            TURN_ROWS=rows_at_once(block_q, leaves.fans, top),
            RECEIVED=plan.received is not None, COUNTED=spread != (0, 0),
            ALL_ROWS=first <= 0 and last >= place.q_len, EVEN=even, MAP=plan.map is not None,
            MAX=plan.map is not None and plan.map.reduce == "max", NR=grid.rows, NC=grid.cols,
            BINS=bins,
        )
    )  # fmt: skip
    before = held["before"]
    with on_device(device):
        if plan.columns and not shard:
            sum_rows[(q_blocks * place.heads * place.batch,)](*common, before, form, **options)
        weigh[(grid_size,)](
            *common, before, splits, items, held["queue"],
            held["mass"], found["entropy"], found["score"],
            ListArgs(
                held["maxima"], held["fans"], held["chosen"], held["totals"], plan.listed, kept
            ),
            ColumnArgs(held["columns"], held["seen"], *spread, first, last),
            CellArgs(cells, grid.size, grid.first, grid.width),
            BinArgs(held["past"], held["future"], edges, len(plan.distances or ())),
            form, gathered, **options,
        )  # fmt: skip
        if plan.listed:
            found["names"] = new(*rows, plan.listed, dtype=torch.int32)
            found["listed"] = new(*rows, plan.listed)
            found["rest"], found["sink"] = new(*rows), new(*rows)
            at_once = power(plan.listed)  # leaves
            warps, depth = warps_of(at_once * leaves.size(block_k), wide(call.query.shape[-1]))
            turn_rows = 32 if WIDEN.value else 1  # the interpreter takes many at once
            parts = -(-place.q_len // turn_rows)
            list_keys[(parts * place.heads * place.batch,)](
                *common, held["totals"], held["mass"], held["chosen"], kept, parts,
                found["names"], found["listed"], found["rest"], found["sink"], plan.listed, form,
                TOP=at_once, WIDTH=leaves.width, TILES=leaves.tiles, R=turn_rows,
                DEPTH=depth, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    if plan.received is not None:
        found["columns"] = held["columns"].sum(2)
        if counts is None:
            counts = held["seen"].sum(2, dtype=torch.int32)
        found["counts"] = counts.expand(found["columns"].shape)
    if plan.map is not None:
        found["cells"] = grid.whole(cells, plan.map, call, block_q)
    if plan.distances is not None:
        found["past"], found["future"] = (
            held[name].sum(2)[..., : len(plan.distances)].contiguous()
            for name in ("past", "future")
        )


def _rows(observer: Rows, shared: Shared, shard: bool) -> Tensor:
    """(batch, heads, n, k_len): the whole rows, normalised like all others."""
    from .rows_kernel import weigh_rows

    call, place = shared.call, shared.call.place
    local = [row for _, row in observer.local(place)]
    out = torch.empty(
        place.batch, place.heads, len(local), place.k_len, dtype=torch.float32, device=place.device
    )
    if not local:
        return out
    wanted = torch.tensor(local, dtype=torch.int32, device="cpu").to(
        place.device, non_blocking=True
    )
    block_q, block_k = 16, 64
    row_blocks, k_blocks = -(-len(local) // block_q), -(-place.k_len // block_k)
    with on_device(place.device):
        weigh_rows[(place.batch * place.heads * row_blocks * k_blocks,)](
            shared.args, shared.mask_args(), shared.biases, wanted, len(local), out, row_blocks,
            k_blocks, shared.form(block_q, block_k), enable_fp_fusion=True,
        )  # fmt: skip
    if shard:
        return out
    lse = shared.lse[:, :, wanted.long()]
    total = out.sum(-1)
    if call.sinks is not None:
        total += (shared.sinks[:, None] - lse).exp()
    return out.div_(total.masked_fill(lse == -torch.inf, 1)[..., None])
