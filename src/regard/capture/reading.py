"""Reading a recorded layer: tiles of its map at every zoom, and what its rows and columns hold.

What was written beside the recording is read from there; what was not, by the second pass, from q,
k and lse. Rows are recorded queries and columns recorded keys, both from 0, as in `weights`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..call.brief import Brief
from ..call.checked import Call
from ..call.observers import Distances, Entropy, Received, TopK
from ..engines.second_pass.pooled import SIDE, Rectangle, Reduce
from ..engines.second_pass.readers import READERS, Accumulator
from ..engines.second_pass.strips import Strips, StripWeights
from ..errors import RegardError
from ..ops.pooled import pooled_tiles
from .by_effect import EdgeEffects
from .by_value import by_norm
from .pyramid import BINS
from .recorded_layer import Chunk, Part, RecordedLayer
from .stored import read

By = Literal["weight", "value", "effect"]


class Tile(NamedTuple):
    """A tile of a head's map: `SIDE` × `SIDE` cells, a cell being 2**zoom queries × 2**zoom keys.

    Its first cell is the one of row row · SIDE and column col · SIDE.
    """

    head: int
    zoom: int
    row: int
    col: int


@dataclass(frozen=True, eq=False)
class Top(Brief):
    """The k largest weights of each row, largest first: weights, indices (heads, rows, k).

    indices int64: recorded keys, −1 where fewer are visible. rest (heads, rows): the visible mass
    that is not listed. sink (heads, rows): the mass of learned sinks. Of one head, without heads.
    """

    weights: Tensor
    indices: Tensor
    rest: Tensor
    sink: Tensor


@dataclass(frozen=True, eq=False)
class Columns(Brief):
    """What each key receives: sum (heads, k_len), count int32: the queries that see it.

    Of one head, without heads.
    """

    sum: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """Per visible query; 0 where no query sees the key."""
        return self.sum / self.count.clamp(min=1)


@dataclass(frozen=True, eq=False)
class ByDistance(Brief):
    """Mass by |query − key| (heads, bins): bin b is edges[b] ≤ distance < edges[b + 1].

    past: keys at or before the query, itself included; future: after it. Of one head, without
    heads.
    """

    past: Tensor
    future: Tensor
    edges: tuple[int, ...]


def zooms(layer: RecordedLayer) -> int:
    """How many zooms there are: at the last, the smallest such, one tile holds the whole map."""
    longest = max(layer.q_len, layer.k_len, 1)
    return max((longest - 1) // SIDE, 0).bit_length() + 1


def tiles(
    layer: RecordedLayer, wanted: Sequence[Sequence[int]], reduce: Reduce, batch: int,
    by: By = "weight",
) -> Tensor:  # fmt: skip
    """The tiles (n, SIDE, SIDE), float32, of one batch item."""
    if reduce not in ("sum", "max"):
        raise RegardError(f"reduce is {reduce!r}; give 'sum' or 'max'")
    asked = [_checked(layer, one) for one in wanted]
    if by == "effect":
        edges = effects_of(layer)
        parts = [edges.tile(batch, one, reduce) for one in asked]
        return torch.stack(parts) if parts else _no_tiles(0)
    by_value = by != "weight"
    if by_value:
        norm_of(layer, by)  # whether there is one
    out = _no_tiles(len(asked))
    starts = (layer.query_start, layer.key_start)
    held = [layer.results.tile(starts, one, reduce, batch, by_value) for one in asked]
    for n, found in enumerate(held):
        if found is not None:
            out[n] = found
    if all(found is not None for found in held):
        return out
    norm = read(norm_of(layer, by)[batch : batch + 1]) if by_value else None
    at = 0
    for chunk in layer.chunks:
        first_key, (q_len, k_len) = chunk.keys[0] - layer.key_start, _lengths(chunk)
        rectangles = [
            Rectangle(
                t.head, t.zoom, (t.row * SIDE << t.zoom) - at,
                (t.col * SIDE << t.zoom) - first_key,
            )
            for t in asked
        ]  # fmt: skip
        at += q_len
        inside = [
            n for n, r in enumerate(rectangles) if held[n] is None and _meets(r, q_len, k_len)
        ]
        if inside:
            mine = [rectangles[n] for n in inside]
            found = _computed(layer, chunk, batch, mine, reduce, norm).to(out)
            both = torch.add if reduce == "sum" else torch.maximum
            out[inside] = both(out[inside], found)
    return out


def _computed(
    layer: RecordedLayer, chunk: Chunk, batch: int, rectangles: list[Rectangle], reduce: Reduce,
    norm: Tensor | None,
) -> Tensor:  # fmt: skip
    """Tiles in one call, of which no more is read than they need."""
    q_len, k_len = _lengths(chunk)
    parts = [
        Part(r.head, _spanned(r.row, r.zoom, q_len), _spanned(r.col, r.zoom, k_len))
        for r in rectangles
    ]
    call, lse = layer.call(chunk, batch, parts), layer.lse(chunk, batch, parts)
    if norm is not None:
        first = chunk.keys[0] - layer.key_start
        call = by_norm(call, norm[:, :, first : first + k_len])
    return pooled_tiles(call, lse, rectangles, reduce)


def _spanned(first: int, zoom: int, length: int) -> slice:
    """What a tile's side spans of a call's queries or keys."""
    return slice(max(first, 0), min(first + (SIDE << zoom), length))


def _lengths(chunk: Chunk) -> tuple[int, int]:
    """How many queries and keys a chunk's call has."""
    return chunk.query.shape[2], chunk.keys[1] - chunk.keys[0]


def _no_tiles(count: int) -> Tensor:
    return torch.zeros(count, SIDE, SIDE, dtype=torch.float32, device="cpu")


def norm_of(layer: RecordedLayer, by: str) -> Tensor:
    """‖W_O v‖ of each key (batch, heads, k_len). RegardError where no values were kept."""
    if by != "value":
        raise RegardError(f"by is {by!r}; give 'weight', 'value' or 'effect'")
    if layer.norm is None:
        raise RegardError(f"layer {layer.name} keeps no values; record with values=True")
    return layer.norm


def effects_of(layer: RecordedLayer) -> EdgeEffects:
    """A layer's effects. RegardError where there are none, or not whole."""
    if layer.effects_damage:
        raise RegardError(layer.effects_damage)
    if layer.effects is None:
        raise RegardError(f"layer {layer.name} keeps no effects; record with effect=True")
    return layer.effects


def _checked(layer: RecordedLayer, wanted: Sequence[int]) -> Tile:
    """RegardError for a tile that no such layer has."""
    tile = Tile(*wanted)
    if not 0 <= tile.head < layer.heads:
        raise RegardError(f"head {tile.head} of layer {layer.name}: it has {layer.heads}")
    if not 0 <= tile.zoom < zooms(layer):
        raise RegardError(f"zoom {tile.zoom} of layer {layer.name}: it has 0 … {zooms(layer) - 1}")
    if tile.row < 0 or tile.col < 0:
        raise RegardError(f"tile ({tile.row}, {tile.col}): rows and columns count from 0")
    return tile


def _meets(tile: Rectangle, q_len: int, k_len: int) -> bool:
    """Whether a tile has cells in a call of so many queries and keys."""
    side = SIDE << tile.zoom
    return -side < tile.row < q_len and -side < tile.col < k_len


def _calls(layer: RecordedLayer, batch: int) -> Iterator[tuple[int, Call, Tensor, int]]:
    """(first row, call, lse, first column) of each of a layer's calls, for one batch item."""
    at = 0
    for chunk in layer.chunks:
        yield (
            at, layer.call(chunk, batch), layer.lse(chunk, batch),
            chunk.keys[0] - layer.key_start,
        )  # fmt: skip
        at += chunk.query.shape[2]


def span_of(layer: RecordedLayer, rows: slice | Sequence[int] | None) -> tuple[int, int, list[int]]:
    """(first, last + 1, the places of the wanted rows from the first on)."""
    n = layer.q_len
    if rows is None or isinstance(rows, slice):
        wanted = list(range(n)[rows or slice(None)])
    else:
        if any(not -n <= r < n for r in rows):
            raise RegardError(f"rows {list(rows)}: layer {layer.name} has {n} queries")
        wanted = [r % n for r in rows]
    first, last = (min(wanted), max(wanted) + 1) if wanted else (0, 0)
    return first, last, [r - first for r in wanted]


def top(layer: RecordedLayer, k: int, rows: slice | Sequence[int] | None, batch: int) -> Top:
    """The k largest weights of each row of all heads."""
    first, last, places = span_of(layer, rows)
    held = layer.results.top
    if held is not None and k <= held.indices.shape[-1]:
        indices, weights, rest, sink = (
            read(t[batch][:, first:last])[:, places]
            for t in (held.indices, held.weights, held.rest, held.sink)
        )
        rest = rest + weights[..., k:].sum(-1)  # of those listed, what is asked for no more
        return Top(weights[..., :k], _own_keys(layer, indices[..., :k]), rest, sink)
    parts = []
    for at, call, lse, _ in _calls(layer, batch):
        r0, r1 = max(first - at, 0), min(last - at, call.place.q_len)
        if r0 < r1:
            (reader,) = _read(call, lse, [TopK(k)], (r0, r1))
            parts.append([t[0, :, r0:r1] for t in reader.finish(lse.to(call.working))])
    if not parts:
        nothing = torch.zeros(layer.heads, 0, k, dtype=torch.float32, device="cpu")
        parts = [[nothing.int(), nothing, nothing.sum(-1), nothing.sum(-1)]]
    indices, weights, rest, sink = (torch.cat(p, 1)[:, places] for p in zip(*parts, strict=True))
    return Top(weights.float(), _own_keys(layer, indices), rest.float(), sink.float())


def _own_keys(layer: RecordedLayer, positions: Tensor) -> Tensor:
    """Positions of keys as recorded keys from 0; −1 stays."""
    return (positions.long() - layer.key_start).where(positions >= 0, -1)


def received(layer: RecordedLayer, batch: int) -> Columns:
    """What each key receives, of all heads."""
    if (held := layer.results.received) is not None:
        return Columns(read(held.sum[batch]), read(held.count[batch]))
    shape = (layer.heads, layer.k_len)
    total = torch.zeros(shape, dtype=torch.float32, device="cpu")
    count = torch.zeros(shape, dtype=torch.int32, device="cpu")
    for _, call, lse, first in _calls(layer, batch):
        (reader,) = _read(call, lse, [Received()])
        for mine, part in zip((total, count), reader.finish(lse), strict=True):
            mine[:, first : first + call.place.k_len] += part[0].to(mine.dtype)
    return Columns(total, count)


def entropy(layer: RecordedLayer, batch: int) -> Tensor:
    """The entropy of each row in nats (heads, q_len), float32."""
    if (held := layer.results.entropy) is not None:
        return read(held.values[batch])
    parts = [
        _read(call, lse, [Entropy()])[0].finish(lse)[0][0].float()
        for _, call, lse, _ in _calls(layer, batch)
    ]
    return torch.cat(parts, 1)


def distances(
    layer: RecordedLayer, batch: int, bins: int | tuple[int, ...] | None = None
) -> ByDistance:
    """Mass by distance, of all heads."""
    observer = Distances(BINS if bins is None else bins)
    held = layer.results.distances
    if held is not None and held.edges == observer.edges:
        return ByDistance(read(held.past[batch]), read(held.future[batch]), held.edges)
    past, future = torch.zeros(
        2, layer.heads, len(observer.edges), dtype=torch.float32, device="cpu"
    )
    for _, call, lse, _ in _calls(layer, batch):
        (reader,) = _read(call, lse, [observer])
        for mine, part in zip((past, future), reader.finish(lse), strict=True):
            mine += part[0]
    return ByDistance(past, future, observer.edges)


def _read(
    call: Call, lse: Tensor, observers: Sequence[TopK | Received | Entropy | Distances],
    rows: tuple[int, int] | None = None,
) -> list[Accumulator]:  # fmt: skip
    """The readers of these observers, fed the strips of these rows."""
    readers = [READERS[type(o)](o, call) for o in observers]
    for strip in Strips(call, rows=rows):
        seen = StripWeights(strip, lse.to(call.working), call)
        for reader in readers:
            reader.read(seen)
    return readers


def head_metrics(layer: RecordedLayer, batch: int) -> dict[str, Tensor]:
    """Of each head (heads,) float64, means over all queries: those that were read while recording.

    "sink": weight on the first key; "largest": the largest weight; "entropy": in nats; and of
    self-attention "itself", "before": weight on the query's own token, and on the one before;
    "distance": sum of weight · tokens back, where no head reads ahead. {} of a bare recording.
    """
    seen, rows = layer.results, layer.q_len
    if seen.top is None or seen.received is None or seen.entropy is None or not rows:
        return {}
    received = read(seen.received.sum[batch]).double()
    found = {
        "sink": received[:, 0] / rows,
        "largest": read(seen.top.weights[batch])[..., 0].double().mean(1),
        "entropy": read(seen.entropy.values[batch]).double().mean(1),
    }
    if layer.kind != "self" or seen.distances is None:
        return found
    past = read(seen.distances.past[batch]).double()
    future = read(seen.distances.future[batch])
    if seen.distances.edges[:3] == (0, 1, 2):
        found |= {"itself": past[:, 0] / rows, "before": past[:, 1] / rows}
    if not future.any():
        found["distance"] = _mean_distance(layer, received, batch)
    return found


def _mean_distance(layer: RecordedLayer, received: Tensor, batch: int) -> Tensor:
    """Σ weight · (query − key) / queries = (Σ query · mass − Σ key · received) / queries."""
    top = layer.results.top
    assert top is not None
    mass = read(top.weights[batch]).double().sum(-1) + read(top.rest[batch]).double()
    # Both add up to all that is read; as they are rounded apart, the sums are made equal first
    mass = mass * (received.sum(1) / mass.sum(1).clamp(min=1e-300))[:, None]
    queries, keys = (
        torch.arange(start, start + n, dtype=torch.float64, device="cpu")
        for start, n in ((layer.query_start, layer.q_len), (layer.key_start, layer.k_len))
    )
    return (mass @ queries - received @ keys) / layer.q_len
