"""The pass for few queries: what `reading.read` gathers where a GPU would stand idle otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ....call.mask_program import Program
from ....call.observers import Map
from .arguments import Launch, Shared, ends, on_device, power
from .forms import Buffers, by_form, unread
from .kernel_tuples import BinArgs, ColumnArgs, fixed

MOST_QUERIES = 16
CHUNK = 512  # keys of a program, whatever the call: an item's bits do not hang on its neighbours'
LEAST_ROWS, MOST_ROWS = 16, 64  # of a tile: those of the heads that share their keys


class ChunkArgs(NamedTuple):
    """How keys are cut: `Chunks._classes` says what a class is."""

    classes: Tensor
    classes_b: int
    classes_h: int
    k_lead: int
    k_blocks: int
    chunks: int
    parts: int  # tiles that hold the heads of one key head


class ChunkSums(NamedTuple):
    """What rows gather, once a chunk: (batch, heads, q_len, chunks), and `listed` of the best."""

    mass: Tensor
    spread: Tensor
    highest: Tensor
    best: Tensor
    names: Tensor
    listed: int


class RowResults(NamedTuple):
    """What rows gather in all: (batch, heads, q_len), and `listed` of the names and weights."""

    mass: Tensor
    entropy: Tensor
    score: Tensor
    names: Tensor
    weights: Tensor
    listed: int


class GatheredByFew(NamedTuple):
    """What `weigh_few` is compiled to gather; a flag of 0 leaves an observer out."""

    SUMS: bool  # only what the rows with a large lse sum to
    ENTROPY: bool
    SCORE: bool
    TOP: int
    RECEIVED: bool
    MAP: bool
    MAX: bool
    NC: int  # cells of the map in a tile
    BINS: int
    CHUNK: int  # tiles of a chunk
    Q: int  # the power of two that holds q_len


def gather(plan: Launch, shared: Shared, shard: bool, block_k: int | None) -> None:
    """Put what a plan asks for into plan.found, of a call of at most `MOST_QUERIES` queries.

    Memory beside the results: what rows gather, once a chunk of 512 keys.
    """
    call, place, device = shared.call, shared.call.place, shared.call.place.device
    few, held, found = _Few(shared, block_k), Buffers(device), plan.found
    rows = (place.batch, place.heads, place.q_len)
    each = (*rows, few.chunks)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # What the observers keep has memory of its own; all else goes together
    held.ask("sum", *rows)
    held.ask("mass", *each)
    if plan.columns:
        held.ask("before", *rows)
        held.ask("sums", *each)
    if plan.entropy:
        held.ask("spread", *each)
        found["entropy"] = new(*rows)
    if plan.score:
        held.ask("highest", *each, dtype=torch.int32)
        found["score"] = new(*rows)
    if plan.listed:
        for name in ("best", "names"):
            held.ask(name, *each, plan.listed, dtype=torch.int32)
        found["names"] = new(*rows, plan.listed, dtype=torch.int32)
        found["listed"] = new(*rows, plan.listed)
    if plan.received is not None:
        spread = call.program.spread()
        if shared.paged:  # an item sees its own keys
            spread = (place.batch, spread[1])
        held.ask("counts", *spread, place.k_len, dtype=torch.int32, zero=True)
        found["columns"] = torch.zeros(*rows[:2], place.k_len, dtype=torch.float32, device=device)
    if plan.map is not None:
        held.ask("cells", *rows, few.k_blocks * few.cells_of_a_tile(plan.map), zero=True)
    if plan.distances is not None:
        bins = power(len(plan.distances))
        for name in ("past", "future"):
            held.ask(name, *rows[:2], few.chunks, bins)
            found[name] = new(*rows[:2], bins)
    held.make()
    found["mass"], given = held["sum"], dict(held.made)
    if plan.received is not None:
        given["columns"] = found["columns"]
        found["counts"] = given["counts"].expand(found["columns"].shape)
    before = held["before"]
    if plan.columns and shard:
        before.fill_(1)
    elif plan.columns:
        sums = {"mass": held["sums"]}
        few.weigh(sums, before, Launch(), SUMS=True)
        few.join(sums, {"mass": before}, Launch(), shard, SUMS=True)
    few.weigh(given, before, plan)
    few.join(given, found, plan, shard)
    if plan.map is not None:
        found["cells"] = few.pooled(given["cells"], plan.map)
    if plan.distances is not None:
        for name in ("past", "future"):
            found[name] = found[name][..., : len(plan.distances)].contiguous()


class Chunks:
    """How the queries and keys of a call with few queries are cut. block_k: keys of a tile."""

    def __init__(self, shared: Shared, block_k: int | None) -> None:
        self.shared, self.call = shared, shared.call
        place = self.call.place
        group = place.heads // place.kv_heads
        self.padded = 1 << (place.q_len - 1).bit_length()
        wanted = 1 << (group * self.padded - 1).bit_length()
        self.block_q = min(max(wanted, LEAST_ROWS), MOST_ROWS)
        self.block_k = block_k or (64 if self.call.query.element_size() == 2 else 32)
        self.parts = -(-group // (self.block_q // self.padded))
        # Tiles begin at multiples of their size in the sequence, so that cells of a map cut none
        self.lead = place.key_start % self.block_k
        self.k_blocks = -(-(place.k_len + self.lead) // self.block_k)
        self.per_chunk = max(CHUNK // self.block_k, 1)
        self.chunks = -(-self.k_blocks // self.per_chunk)
        self.programs = place.batch * place.kv_heads * self.parts * self.chunks
        self.args = ChunkArgs(*self._classes(), self.lead, self.k_blocks, self.chunks, self.parts)

    def _classes(self) -> tuple[Tensor, int, int]:
        """uint8 (batch or 1, kv heads or 1, k blocks): 0 empty, 1 mixed, 3 whole; its strides."""
        shared, place = self.shared, self.call.place
        if not shared.masked:
            return shared.none, 0, 0
        program = self.call.program
        cut = (place.kv_heads, self.block_k, self.lead)
        if program.tensors:
            classes = _classes(program, *cut)
        else:
            at = (place.q_len, place.k_len, place.query_start, place.key_start)
            classes = _classes_by_code(place.device, program.code, at, cut)
        batch, heads, _ = classes.shape
        return classes, classes.stride(0) * (batch > 1), classes.stride(1) * (heads > 1)


@by_form(64, lambda made: made.nbytes)
def _classes_by_code(
    device: torch.device, code: tuple[int, ...], place: tuple[int, int, int, int],
    cut: tuple[int, int, int],
) -> Tensor:  # fmt: skip
    """Of a program that holds no tensor."""
    return _classes(Program(code, (), *place, device), *cut)


def _classes(program: Program, kv_heads: int, block_k: int, lead: int) -> Tensor:
    table = program.tiles(MOST_QUERIES, block_k, (0, lead))
    some, every = table.some[:, :, 0], table.every[:, :, 0]
    if some.shape[1] > 1:
        some = some.unflatten(1, (kv_heads, -1)).any(2)
        every = every.unflatten(1, (kv_heads, -1)).all(2)
    return (some.to(torch.uint8) + 2 * every.to(torch.uint8)).contiguous()


class _Few(Chunks):
    """The two kernels on a call's chunks."""

    def __init__(self, shared: Shared, block_k: int | None) -> None:
        super().__init__(shared, block_k)
        self.unused = unread(self.call.place.device)[0]

    def cells_of_a_tile(self, wanted: Map) -> int:
        return max(self.block_k // wanted.cells(self.call.place)[1].size, 1)

    def weigh(
        self, given: dict[str, Tensor], before: Tensor, plan: Launch, SUMS: bool = False
    ) -> None:
        """Launch `weigh_few`, which fills `given`."""
        from .few_queries_kernel import weigh_few

        place, shared = self.call.place, self.shared
        edges = self.unused
        if plan.distances is not None:
            edges = ends(place.device, plan.distances)
        items, heads = given["counts"].shape[:2] if "counts" in given else (0, 0)
        at = self.named(given)
        first, last = plan.received or (0, 0)
        columns = ColumnArgs(at("columns"), at("counts"), items, heads, first, last)
        bins = BinArgs(at("past"), at("future"), edges, len(plan.distances or ()))
        gathered = fixed(
            GatheredByFew(
                SUMS=SUMS, ENTROPY=plan.entropy, SCORE=plan.score, TOP=self.top(plan),
                RECEIVED=plan.received is not None, MAP=plan.map is not None,
                MAX=plan.map is not None and plan.map.reduce == "max",
                NC=1 if plan.map is None else self.cells_of_a_tile(plan.map),
                BINS=self.bins(plan), CHUNK=self.per_chunk, Q=self.padded,
            )
        )  # fmt: skip
        with on_device(place.device):
            weigh_few[(self.programs,)](
                shared.args, shared.mask_args(), shared.biases, self.args, before,
                self.sums(given, plan), columns, at("cells"), bins,
                shared.form(self.block_q, self.block_k), gathered,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip

    def named(self, tensors: dict[str, Tensor]) -> Callable[[str], Tensor]:
        """The tensor of a name, or what is not read in its place."""
        return lambda name: tensors.get(name, self.unused)

    def sums(self, given: dict[str, Tensor], plan: Launch) -> ChunkSums:
        at = self.named(given)
        each = (at("mass"), at("spread"), at("highest"), at("best"), at("names"))
        return ChunkSums(*each, plan.listed)

    @staticmethod
    def top(plan: Launch) -> int:
        return power(plan.listed) if plan.listed else 0

    @staticmethod
    def bins(plan: Launch) -> int:
        return power(len(plan.distances)) if plan.distances is not None else 0

    def join(
        self, given: dict[str, Tensor], found: dict[str, Tensor], plan: Launch, shard: bool,
        SUMS: bool = False,
    ) -> None:  # fmt: skip
        """Launch `join_few`, which makes `found` of `given`."""
        from .few_queries_kernel import join_few

        place, shared = self.call.place, self.shared
        at, to = self.named(given), self.named(found)
        rows = (to("mass"), to("entropy"), to("score"), to("names"), to("listed"))
        with on_device(place.device):
            join_few[(place.batch * place.heads * place.q_len,)](
                shared.lse, shared.sinks, self.sums(given, plan), at("past"), at("future"),
                place.heads, place.q_len, place.key_start, self.chunks,
                RowResults(*rows, plan.listed), to("past"), to("future"),
                SUMS=SUMS, SHARD=shard, SINKS=self.call.sinks is not None, ENTROPY=plan.entropy,
                SCORE=plan.score, TOP=self.top(plan), BINS=self.bins(plan),
                num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip

    def pooled(self, cells: Tensor, wanted: Map) -> Tensor:
        """The map, of each query's cells no wider than a tile: (batch, heads, q_len, …)."""
        place = self.call.place
        rows, cols = wanted.cells(place)
        unit = self.block_k // self.cells_of_a_tile(wanted)
        begin = (place.key_start - self.lead) // unit
        cells = _pool(cells, 3, begin, cols.size // unit, cols.first, cols.count, wanted)
        return _pool(cells, 2, place.query_start, rows.size, rows.first, rows.count, wanted)


def _pool(
    cells: Tensor, dim: int, begin: int, size: int, first: int, count: int, wanted: Map
) -> Tensor:
    """Cells along dim, the first of them number `begin`, pooled by `size`: `first` and so on."""
    if size == 1:
        return cells.narrow(dim, first - begin, count).contiguous()
    ahead = begin % size
    back = -(cells.shape[dim] + ahead) % size
    pad = [0, 0] * (cells.dim() - 1 - dim) + [ahead, back]
    parts = torch.nn.functional.pad(cells, pad).unflatten(dim, (-1, size))
    pooled = parts.amax(dim + 1) if wanted.reduce == "max" else parts.sum(dim + 1)
    return pooled.narrow(dim, first - begin // size, count).contiguous()
