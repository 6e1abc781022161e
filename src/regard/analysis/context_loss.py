"""What a context window can no longer see, in numbers; and a long document read chunk by chunk.

Rolling windows, chunks and truncation are masks: `Causal() & (Window(w) | First(4))` (StreamingLLM,
Xiao et al. 2024), `Causal() & Chunks(n, overlap)`, `First(n)` and `~First(length - n)`. So what
each of them loses is one question, asked of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..call.brief import Brief
from ..call.checked import Call
from ..call.display.frame import Table
from ..call.display.picture import Picture, Side, part_of
from ..call.display.result import Result
from ..call.edge_results import TopKSeen
from ..call.geometry import Place
from ..call.mask_program import Program
from ..call.masks import Causal, Lowering, Mask
from ..call.results import ReceivedSeen
from ..capture.recorded_layer import RecordedLayer
from ..engines import tiled
from ..errors import RegardError

TILE = 128  # queries and keys that are decided at once where their tile is not mixed


@dataclass(frozen=True, eq=False)
class Unseen(Brief, Result):
    """What a mask hides of the pairs that another shows.

    pairs, hidden (batch, heads, q_len) int64: how many keys each query would see, and how many of
    them are hidden; batch and heads are 1 where all share one answer.
    low, high (batch, heads): between them lies the share of the attention mass that fell on hidden
    pairs; they are equal where it is known exactly, and None where no weights were given.
    mass (batch, heads, q_len): the weights on hidden keys, summed for each query; None where only
    bounds are known.
    """

    pairs: Tensor
    hidden: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    mass: Tensor | None = None

    @property
    def share(self) -> float:
        """Hidden pairs / pairs, over all queries."""
        return float(self.hidden.sum()) / max(float(self.pairs.sum()), 1.0)

    @property
    def queries(self) -> Tensor:
        """How many queries miss at least one key: (batch, heads) int64."""
        return (self.hidden > 0).sum(-1)

    def _table(self) -> Table:
        columns = {"pairs": self.pairs, "hidden": self.hidden}
        columns |= {} if self.mass is None else {"mass": self.mass}
        shape = torch.broadcast_shapes(*(c.shape for c in columns.values()))
        wide = {name: column.expand(shape) for name, column in columns.items()}
        return Table({"batch": 0, "head": 0, "query": 0}, wide)

    def _picture(self, batch: int, head: int | None) -> Picture:
        shares = self.hidden / self.pairs.clamp(min=1)
        values, heads, title = part_of(shares, batch, head, "plot")
        return Picture(values, heads, Side("query"), "share of the pairs hidden", title=title)

    def __str__(self) -> str:
        pairs, hidden = int(self.pairs.sum()), int(self.hidden.sum())
        said = [f"{hidden:,} of {pairs:,} pairs hidden ({self.share:.1%})"]
        if self.pairs.numel():
            missing, length = int(self.queries.sum()), self.pairs.numel()
            said.append(f"{missing:,} of {length:,} rows miss keys")
            last, most = self.hidden[..., -1].max(), self.pairs[..., -1].max()
            said.append(f"the last one {int(last):,} of {int(most):,}")
        if self.low is not None and self.high is not None and self.low.numel():
            low, high = float(self.low.mean()), float(self.high.mean())
            between = (
                f"{low:.1%}" if torch.equal(self.low, self.high) else f"{low:.1%} … {high:.1%}"
            )
            said.append(f"{between} of the attention mass lay there")
            if self.low.numel() > 1:
                said[-1] += f" ({float(self.low.min()):.1%} … {float(self.high.max()):.1%} by head)"
        return "; ".join(said)


def unseen(
    mask: Mask,
    q_len: int,
    k_len: int | None = None,
    *,
    of: Mask = Causal(),
    seen: TopKSeen | ReceivedSeen | None = None,
    batch: int = 1,
    heads: int = 1,
    query_start: int | None = None,
    key_start: int = 0,
) -> Unseen:
    """How many of the query–key pairs that `of` shows are hidden by `mask`; O(N) memory.

        print(regard.context.unseen(Window(1024) | First(4), 8192))

    k_len: default q_len. query_start, key_start: as in `attention`.
    seen: what an observer saw of the weights under `of`; it bounds the mass that fell on hidden
    pairs. A `TopK` result knows what it lists, and leaves the rest open where that is hidden in
    part; a `Received` result (over all queries) knows keys that are hidden from all queries or from
    none. `unseen_mass` and `unseen_recorded` know it exactly.
    """
    k_len = q_len if k_len is None else k_len
    device = torch.device("cpu")
    if seen is not None:
        given = seen.weights if isinstance(seen, TopKSeen) else seen.sum
        _check_seen(seen, q_len, k_len, key_start)
        (batch, heads), device = given.shape[:2], given.device
    start = key_start + k_len - q_len if query_start is None else query_start
    place = Place(batch, heads, heads, q_len, k_len, start, key_start, device)
    whole, hidden = of.lower(place), (of & ~mask).lower(place)
    pairs, by_key = _counts(whole)
    missed, missed_by_key = _counts(hidden)
    pairs, missed = torch.broadcast_tensors(pairs, missed)
    low: Any = None
    high: Any = None
    if isinstance(seen, TopKSeen):
        low, high = _bounds_by_row(seen, hidden, pairs, missed)
    elif seen is not None:
        gone, touched = (missed_by_key == by_key) & (by_key > 0), missed_by_key > 0
        total = seen.sum.sum(-1)
        low, high = (_ratio((seen.sum * f).sum(-1), total) for f in (gone, touched))
    return Unseen(pairs, missed, low, high)


def _check_seen(seen: TopKSeen | ReceivedSeen, q_len: int, k_len: int, key_start: int) -> None:
    if isinstance(seen, TopKSeen) and seen.weights.shape[2] != q_len:
        raise RegardError(
            f"unseen: TopK saw {seen.weights.shape[2]} queries, not {q_len}; give the length that "
            "it saw"
        )
    if isinstance(seen, ReceivedSeen):
        found = (seen.q_len, seen.sum.shape[-1], seen.key_start)
        if found != (q_len, k_len, key_start):
            raise RegardError(
                f"unseen: Received saw {found[0]} queries and {found[1]} keys from position "
                f"{found[2]}, not {q_len}, {k_len} and {key_start}; give one over all queries"
            )


def unseen_mass(
    mask: Mask, query: Tensor, key: Tensor, *, of: Mask = Causal(), **request: Any
) -> Unseen:
    """`unseen`, with the attention mass that fell on hidden pairs: exact, O(N) memory.

    query (batch, heads, q_len, dim), key (batch, kv_heads, k_len, dim); request: bias, scale,
    softcap, sinks, query_start and key_start, as in `attention`. The weights are those under `of`;
    what fell on hidden pairs is exp(lse of the hidden pairs − lse of all).
    """
    call = Call.checked(query.detach(), key.detach(), None, mask=of, **request)
    return _weighed(mask, [(call, tiled.log_sum_exp(call))])


def unseen_recorded(mask: Mask, layer: RecordedLayer, batch: int = 0) -> Unseen:
    """`unseen`, of a recorded layer: what it saw in one batch item, and the weights that it gave.

    layer: such as `recording.layer(3)`. Its own mask takes the place of `of`. Exact.
    """
    if not layer.chunks:
        raise RegardError(f"layer {layer.name} has no attention recorded; {layer.reason}")
    calls = [(layer.call(chunk, batch), layer.lse(chunk, batch)) for chunk in layer.chunks]
    return _weighed(mask, calls)


@dataclass(frozen=True, eq=False)
class _Lowered(Mask):
    """What a call's mask has become."""

    program: Program

    def _write(self, to: Lowering) -> None:
        for op, args in self.program.instructions():
            count = len(op.form.tensors)
            to.write(op, *(self.program.tensors[i] for i in args[:count]), *args[count:])


def _weighed(mask: Mask, calls: Sequence[tuple[Call, Tensor]]) -> Unseen:
    """Counts and mass of the queries of some calls, appended."""
    parts: list[tuple[Tensor, ...]] = []
    for call, lse in calls:
        left = _Lowered(call.program) & ~mask
        hidden = left.lower(call.place, call.query, call.key)
        lost = tiled.log_sum_exp(replace(call, program=hidden, sinks=None))
        blind = lse == -torch.inf
        mass = (lost - lse.masked_fill(blind, 0)).exp()
        total = torch.ones_like(mass).masked_fill(blind, 0)
        if call.sinks is not None:
            total -= (call.sinks.detach()[:, None] - lse).exp()
        shape = (call.place.batch, call.place.heads, -1)
        counts = (_counts(program)[0].expand(shape) for program in (call.program, hidden))
        parts.append((*counts, mass, total))
    pairs, missed, mass, total = (torch.cat(p, -1) for p in zip(*parts, strict=True))
    share = _ratio(mass.sum(-1), total.sum(-1))
    return Unseen(pairs, missed, share, share, mass)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.masked_fill(whole == 0, 1)


def _counts(program: Program) -> tuple[Tensor, Tensor]:
    """Visible pairs by query and by key: int64 (batch or 1, heads or 1, q_len), (…, k_len)."""
    tiles = program.tiles(TILE, TILE)
    whole = (tiles.every & ~tiles.undecided).long()
    heights, widths = (s.last - s.first + 1 for s in (tiles.query, tiles.key))
    by_query = (whole * widths).sum(-1).repeat_interleave(heights, -1)
    by_key = (whole * heights[:, None]).sum(-2).repeat_interleave(widths, -1)
    for *_, span in tiles.mixed():
        visible = program.visible(span).expand(*whole.shape[:2], -1, -1)
        by_query[..., span.q0 : span.q1] += visible.sum(-1)
        by_key[..., span.k0 : span.k1] += visible.sum(-2)
    return by_query, by_key


def _bounds_by_row(
    seen: TopKSeen, hidden: Program, pairs: Tensor, missed: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of the mass on hidden pairs, as far as a TopK tells."""
    listed = _listed(seen, hidden)
    known = (seen.weights * listed).sum(-1)
    # Of what is not listed, all, some or none is hidden
    open_, all_open = missed - listed.sum(-1), pairs - (seen.indices >= 0).sum(-1)
    total = (seen.weights.sum(-1) + seen.rest).sum(-1)
    least = known + seen.rest * ((open_ > 0) & (open_ == all_open))
    most = known + seen.rest * (open_ > 0)
    return _ratio(least.sum(-1), total), _ratio(most.sum(-1), total)


def _listed(seen: TopKSeen, hidden: Program) -> Tensor:
    """Which of the listed keys are hidden from their query: bool, as seen.indices."""
    at = seen.indices.long() - hidden.key_start
    out = torch.zeros_like(at, dtype=torch.bool)
    if not out.numel():
        return out
    tiles = hidden.tiles(TILE, TILE)
    whole = (tiles.every & ~tiles.undecided).expand(*at.shape[:2], -1, -1)
    for row, (first, last) in enumerate(zip(tiles.query.first, tiles.query.last, strict=True)):
        here = at[:, :, int(first) : int(last) + 1]
        cols = (here // TILE).clamp(min=0)
        out[:, :, int(first) : int(last) + 1] = (
            whole[:, :, row, None].expand(-1, -1, here.shape[2], -1).gather(-1, cols)
        )
    for *_, span in tiles.mixed():
        here, mine = at[:, :, span.q0 : span.q1], out[:, :, span.q0 : span.q1]
        visible = hidden.visible(span).expand(*at.shape[:2], -1, -1)
        inside = (here >= span.k0) & (here < span.k1)
        cols = (here - span.k0).clamp(0, span.k1 - span.k0 - 1)
        mine |= inside & visible.gather(-1, cols)
    return out & (seen.indices >= 0)
