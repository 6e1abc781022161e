"""One layer of a recording: the queries, keys and lse of its calls, and the calls again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.brief import Brief, shortened
from ..call.checked import Call
from ..call.observers import Observer, listed
from ..call.op_schema import pack, unpack
from ..engines.second_pass.scattered import scattered_rows
from ..engines.second_pass.weigh import weigh, whole_rows
from ..errors import RegardError
from .by_effect import EdgeEffects
from .pyramid import Results
from .stored import StoredTensors, loaded, read


@dataclass(frozen=True, eq=False)
class Chunk(Brief):
    """The queries of one call: query (batch, heads, n, dim) and lse (batch, heads, n).

    packed: what the call says besides q, k and v (`packed.SCHEMA`). keys: positions start, stop.
    """

    query: Tensor
    lse: Tensor
    packed: tuple[Any, ...]
    keys: tuple[int, int]


WHOLE = slice(None)
_OPEN = threading.local()


class Part(NamedTuple):
    """Some queries and keys of a call, of one head or of all."""

    head: int | None = None
    rows: slice = WHOLE
    cols: slice = WHOLE


ALL = (Part(),)


@contextmanager
def kept_by(make: Callable[[str, int, str], RecordedLayer]) -> Iterator[None]:
    """While inside, this thread's watches keep queries and keys in the layers that `make` makes."""
    before, _OPEN.make = getattr(_OPEN, "make", None), make
    try:
        yield
    finally:
        _OPEN.make = before


def streaming() -> bool:
    """Whether a recording is written as it comes, in this thread."""
    return getattr(_OPEN, "make", None) is not None


def recorded(name: str, index: int, kind: str) -> RecordedLayer:
    """What keeps the calls of a watched layer."""
    return (getattr(_OPEN, "make", None) or RecordedLayer)(name, index, kind)


@dataclass(eq=False)
class RecordedLayer(Brief):
    """One layer's calls. Its queries count from 0 in the order in which they were computed.

    name: the module's qualified name; index: the number of its layer; kind: "self" or "cross".
    pattern: False where the layer has no softmax attention; `reason` says why.
    pieces: keys (batch, kv_heads, n, dim), each with the position of its first. values (batch,
    kv_heads, n, v_dim) and norms ‖W_O v‖ (batch, heads, n): likewise, where they were kept.
    results: what was read beside them. effects: what its edges do to a target, where that was
    measured. files: what all these are read from. damage: what is wrong with the file that held
    them; effects_damage: with the effects'.
    """

    name: str
    index: int
    kind: str
    pattern: bool = True
    reason: str = ""
    chunks: list[Chunk] = field(default_factory=list)
    pieces: list[tuple[int, Tensor]] = field(default_factory=list)
    values: list[tuple[int, Tensor]] = field(default_factory=list)
    norms: list[tuple[int, Tensor]] = field(default_factory=list)
    results: Results = field(default_factory=Results)
    effects: EdgeEffects | None = None
    files: list[StoredTensors] = field(default_factory=list, repr=False)
    damage: str = ""
    effects_damage: str = ""
    _read: dict[Chunk, tuple[Any, ...]] = field(default_factory=dict, init=False, repr=False)

    def __str__(self) -> str:
        if not self.pattern:
            return f"RecordedLayer({self.name!r}, no pattern: {shortened(self.reason, 80)})"
        sizes = f"heads {self.heads}, q_len {self.q_len}, k_len {self.k_len}"
        return f"RecordedLayer({self.name!r}, {self.kind}, {sizes})"

    def take(self, call: Call, lse: Tensor, results: list[Any]) -> list[Any]:
        """Append a call; of its observers' results, and those before, return what is left here."""
        self.add(call, lse)
        return results

    def add(self, call: Call, lse: Tensor) -> None:
        """Append a call's queries, and the keys that it brought."""
        place = call.place
        start, stop = place.key_start, place.key_start + place.k_len
        packed = tuple(_kept(a) for a in pack(call))
        if not self.chunks:
            self.pieces.append((start, _kept(call.key)))
        elif self.kind == "self":
            # A cache repeats what is known; new are only the keys at the call's own positions
            new = call.key[:, :, place.query_start - start :][:, :, : place.q_len]
            self.pieces.append((place.query_start, _kept(new)))
        self.chunks.append(Chunk(_kept(call.query), _kept(lse), packed, (start, stop)))
        self.__dict__.pop("key", None)

    def pick(self, rows: list[int]) -> None:
        """Make the batch of these of its items; one may come twice, or be left out."""
        for at, chunk in enumerate(self.chunks):
            query = read(chunk.query)
            call = unpack(query, query, None, *self._packed(chunk))
            packed = pack(
                replace(
                    call,
                    program=call.program.items(rows),
                    biases=tuple(b.items(rows) for b in call.biases),
                )
            )
            self.chunks[at] = Chunk(query[rows], read(chunk.lse)[rows], packed, chunk.keys)
        self.pieces, self.values, self.norms = (
            [(start, read(piece)[rows]) for start, piece in pieces]
            for pieces in (self.pieces, self.values, self.norms)
        )
        self.results = self.results.pick(rows)
        self._read.clear()
        for known in ("key", "value", "norm"):
            self.__dict__.pop(known, None)

    @property
    def key_start(self) -> int:
        """The first key's position."""
        return min((start for start, _ in self.pieces), default=0)

    @property
    def query_start(self) -> int:
        """The first query's position."""
        return int(self.chunks[0].packed[-2]) if self.chunks else 0

    @cached_property
    def key(self) -> Tensor | None:
        """All keys (batch, kv_heads, k_len, dim)."""
        return joined(self.pieces)

    @cached_property
    def value(self) -> Tensor | None:
        """All values (batch, kv_heads, k_len, v_dim), where they were kept."""
        return joined(self.values)

    @cached_property
    def norm(self) -> Tensor | None:
        """‖W_O v‖ of each key (batch, heads, k_len), where values were kept."""
        return joined(self.norms)

    @property
    def batch(self) -> int:
        """Batch size."""
        return self.chunks[0].query.shape[0] if self.chunks else 0

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.chunks[0].query.shape[1] if self.chunks else 0

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.key.shape[1] if self.key is not None else 0

    @property
    def q_len(self) -> int:
        """Recorded queries."""
        return sum(c.query.shape[2] for c in self.chunks)

    @property
    def k_len(self) -> int:
        """Recorded keys."""
        return self.key.shape[2] if self.key is not None else 0

    def call(self, chunk: Chunk, batch: int, parts: Sequence[Part] = ALL) -> Call:
        """The call of a chunk for one batch item.

        parts: no more than these is to be read of it; of a layer that is in a file, the rest of
        its queries and keys are no numbers.
        """
        assert self.key is not None
        start, stop = (k - self.key_start for k in chunk.keys)
        packed = self._packed(chunk)
        call = unpack(chunk.query, self.key[:, :, start:stop], None, *packed).item(batch)
        of = self.heads // max(self.kv_heads, 1)
        query = loaded(call.query, [(WHOLE, _heads(p.head, 1), p.rows) for p in parts])
        keys = [(WHOLE, _heads(p.head, of), p.cols) for p in parts]
        # Rows that lie apart read the same keys: once
        key = loaded(call.key, [part for n, part in enumerate(keys) if part not in keys[:n]])
        return replace(call, query=query, key=key)

    def lse(self, chunk: Chunk, batch: int, parts: Sequence[Part] = ALL) -> Tensor:
        """The log-sum-exp (1, heads, n) of a chunk's call for one batch item; parts: as `call`."""
        mine = chunk.lse[batch : batch + 1]
        return loaded(mine, [(WHOLE, _heads(p.head, 1), p.rows) for p in parts])

    def _packed(self, chunk: Chunk) -> tuple[Any, ...]:
        """What a chunk's call says besides q, k and v, read once."""
        if chunk not in self._read:
            self._read[chunk] = tuple(
                read(a) if isinstance(a, Tensor)
                else [read(t) if isinstance(t, Tensor) else t for t in a] if isinstance(a, list)
                else a
                for a in chunk.packed
            )  # fmt: skip
        return self._read[chunk]

    def observed(self, observer: Observer, batch: int = 0) -> Any:
        """What an observer sees of the weights of one batch item."""
        if not 0 <= batch < self.batch:
            raise RegardError(f"batch {batch}: layer {self.name} has {self.batch}")
        parts: list[Any] = []
        for chunk in self.chunks:
            call = replace(self.call(chunk, batch), observers=listed([observer]))
            parts += weigh(call, self.lse(chunk, batch))
        return reduce(lambda a, b: a.then(b), parts)

    def weights(self, rows: slice, batch: int = 0) -> Tensor:
        """The exact weights (heads, rows, k_len), float32, of some queries of one batch item."""
        first, last, _ = rows.indices(self.q_len)
        parts, at = [], 0
        for chunk in self.chunks:
            n = chunk.query.shape[2]
            r0, r1 = max(first - at, 0), min(last - at, n)
            if r0 < r1:
                shown = [Part(rows=slice(r0, r1))]
                call, lse = self.call(chunk, batch, shown), self.lse(chunk, batch, shown)
                left = chunk.keys[0] - self.key_start
                right = self.k_len - left - call.place.k_len
                part = whole_rows(call, lse, (r0, r1))[0]
                parts.append(torch.nn.functional.pad(part, (left, right)))
            at += n
        if not parts:
            return torch.zeros(self.heads, 0, self.k_len, dtype=torch.float32, device="cpu")
        return torch.cat(parts, 1).float()

    def weights_of(self, rows: Sequence[int], batch: int = 0) -> Tensor:
        """The same of queries that lie anywhere, each from 0 on: (heads, rows, k_len), float32."""
        if len(rows) == 1:
            return self.weights(slice(rows[0], rows[0] + 1), batch)
        out = torch.zeros(self.heads, len(rows), self.k_len, dtype=torch.float32, device="cpu")
        at = 0
        for chunk in self.chunks:
            n = chunk.query.shape[2]
            mine = [place for place, row in enumerate(rows) if at <= row < at + n]
            if mine:
                own = [rows[place] - at for place in mine]
                shown = [Part(rows=slice(row, row + 1)) for row in own]
                call, lse = self.call(chunk, batch, shown), self.lse(chunk, batch, shown)
                left = chunk.keys[0] - self.key_start
                part = scattered_rows(call, lse, own)[0].float()
                out[:, mine, left : left + call.place.k_len] = part.to(out)
            at += n
        return out


def _heads(head: int | None, of: int) -> slice:
    """The place of a head's numbers, where so many heads share one."""
    return WHOLE if head is None else slice(head // of, head // of + 1)


def joined(pieces: list[tuple[int, Tensor]]) -> Tensor | None:
    """Pieces along dimension 2 as one; each stands where its first key does."""
    if len(pieces) < 2:
        return pieces[0][1] if pieces else None
    first = min(start for start, _ in pieces)
    last = max(start + piece.shape[2] for start, piece in pieces)
    shape = list(pieces[0][1].shape)
    whole = pieces[0][1].new_zeros([*shape[:2], last - first, *shape[3:]])
    for start, piece in pieces:
        whole[:, :, start - first :][:, :, : piece.shape[2]] = read(piece)
    return whole


def _kept(argument: Any) -> Any:
    """A copy that later steps do not overwrite (static caches are filled in place)."""
    if isinstance(argument, Tensor):
        return argument.detach().clone()
    if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
        # A learned one changes in place; the others are shared by all layers
        return [t.detach().clone() if t.requires_grad else t for t in argument]
    return argument
