"""A recording: q, k, lse and the mask of each layer's calls, from which any weight follows.

On disk it is a folder: one safetensors file a layer and one JSON (`recording.json`); no pickles.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..call.brief import Brief, shortened
from ..call.checked import Call
from ..call.observers import Entropy, Observer, listed
from ..call.op_schema import pack, unpack
from ..engines.second_pass.weigh import weigh, whole_rows
from ..errors import RegardError
from .head_grid import grid, layers_box, plot
from .saved_files import Fields, checksum, whole_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
INDEX = "recording.json"
_LISTS = ("mask_tensors", "bias_tensors")
_OPTIONAL = ("sinks", "seed")
_NUMBERS = (
    "mask_code", "bias_code", "scale", "softcap", "dropout", "query_start", "key_start",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Chunk(Brief):
    """The queries of one call: query (batch, heads, n, dim) and lse (batch, heads, n).

    packed: what the call says besides q, k and v (`packed.SCHEMA`). keys: positions start, stop.
    """

    query: Tensor
    lse: Tensor
    packed: tuple[Any, ...]
    keys: tuple[int, int]


@dataclass(eq=False)
class RecordedLayer(Brief):
    """One layer's calls. Its queries count from 0 in the order in which they were computed.

    name: the module's qualified name; index: the number of its layer; kind: "self" or "cross".
    pattern: False where the layer has no softmax attention; `reason` says why.
    pieces: keys (batch, kv_heads, n, dim), each with the position of its first.
    """

    name: str
    index: int
    kind: str
    pattern: bool = True
    reason: str = ""
    chunks: list[Chunk] = field(default_factory=list)
    pieces: list[tuple[int, Tensor]] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.pattern:
            return f"RecordedLayer({self.name!r}, no pattern: {shortened(self.reason, 80)})"
        sizes = f"heads {self.heads}, q_len {self.q_len}, k_len {self.k_len}"
        return f"RecordedLayer({self.name!r}, {self.kind}, {sizes})"

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
            call = unpack(chunk.query, chunk.query, None, *chunk.packed)
            packed = pack(
                replace(
                    call,
                    program=call.program.items(rows),
                    biases=tuple(b.items(rows) for b in call.biases),
                )
            )
            self.chunks[at] = Chunk(chunk.query[rows], chunk.lse[rows], packed, chunk.keys)
        self.pieces = [(start, piece[rows]) for start, piece in self.pieces]
        self.__dict__.pop("key", None)

    @property
    def key_start(self) -> int:
        """The first key's position."""
        return min((start for start, _ in self.pieces), default=0)

    @cached_property
    def key(self) -> Tensor | None:
        """All keys (batch, kv_heads, k_len, dim)."""
        if len(self.pieces) < 2:
            return self.pieces[0][1] if self.pieces else None
        last = max(start + piece.shape[2] for start, piece in self.pieces)
        first = self.pieces[0][1]
        whole = first.new_zeros(*first.shape[:2], last - self.key_start, first.shape[3])
        for start, piece in self.pieces:
            whole[:, :, start - self.key_start :][:, :, : piece.shape[2]] = piece
        return whole

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

    def call(self, chunk: Chunk, batch: int) -> Call:
        """The call of a chunk for one batch item."""
        assert self.key is not None
        start, stop = (k - self.key_start for k in chunk.keys)
        return unpack(chunk.query, self.key[:, :, start:stop], None, *chunk.packed).item(batch)

    def observed(self, observer: Observer, batch: int = 0) -> Any:
        """What an observer sees of the weights of one batch item."""
        if not 0 <= batch < self.batch:
            raise RegardError(f"batch {batch}: layer {self.name} has {self.batch}")
        parts: list[Any] = []
        for chunk in self.chunks:
            call = replace(self.call(chunk, batch), observers=listed([observer]))
            parts += weigh(call, chunk.lse[batch : batch + 1])
        return reduce(lambda a, b: a.then(b), parts)

    def weights(self, rows: slice, batch: int = 0) -> Tensor:
        """The exact weights (heads, rows, k_len), float32, of some queries of one batch item."""
        first, last, _ = rows.indices(self.q_len)
        parts, at = [], 0
        for chunk in self.chunks:
            n = chunk.query.shape[2]
            r0, r1 = max(first - at, 0), min(last - at, n)
            if r0 < r1:
                call, lse = self.call(chunk, batch), chunk.lse[batch : batch + 1]
                left = chunk.keys[0] - self.key_start
                right = self.k_len - left - call.place.k_len
                part = whole_rows(call, lse, (r0, r1))[0]
                parts.append(torch.nn.functional.pad(part, (left, right)))
            at += n
        if not parts:
            return torch.zeros(self.heads, 0, self.k_len, dtype=torch.float32, device="cpu")
        return torch.cat(parts, 1).float()


@dataclass(eq=False)
class Recording(Brief):
    """The layers of a model on one input, in the model's order, and what is known of the input.

    about: JSON-able: "model", "text", "tokens" (strings), "offsets" (start and end character of
    each token), "special" (whether a token is one) and whatever else the recorder wrote.
    """

    layers: list[RecordedLayer]
    about: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        heads = sorted({layer.heads for layer in self.layers if layer.pattern})
        said = [f"{len(self.layers)} layers"]
        said += [f"heads {heads[0]}" + (f" … {heads[-1]}" if heads[1:] else "")] if heads else []
        tokens, text = self.about.get("tokens"), self.about.get("text")
        said += [] if tokens is None else [f"{len(tokens)} tokens"]
        said += [] if text is None else [repr(shortened(str(text), 40))]
        return f"Recording({', '.join([str(self.about.get('model', 'no model named')), *said])})"

    def layer(self, which: int | str) -> RecordedLayer:
        """A layer by its place in `layers` or its name. RegardError where there is no pattern."""
        if isinstance(which, str):
            found = [layer for layer in self.layers if layer.name == which]
        else:
            found = self.layers[which : which + 1] if which >= 0 else []
        if not found:
            names = ", ".join(layer.name for layer in self.layers)
            raise RegardError(f"no layer {which!r} in the recording; it has {names}")
        if not found[0].pattern:
            raise RegardError(f"layer {found[0].name} has no pattern: {found[0].reason}")
        return found[0]

    def weights(
        self,
        layer: int | str,
        head: int | None = None,
        rows: slice | Sequence[int] | None = None,
        cols: slice | Sequence[int] | None = None,
        batch: int = 0,
    ) -> Tensor:
        """The exact weights of one layer: (rows, cols), or (heads, rows, cols) where head is None.

        float32. rows and cols are slices or lists of indices into the recorded queries and keys;
        None means all. Only those rows are computed, so memory is O(rows · k_len).
        """
        found = self.layer(layer)
        if head is not None and not 0 <= head < found.heads:
            raise RegardError(f"head {head} of layer {found.name}: it has {found.heads}")
        if not 0 <= batch < found.batch:
            raise RegardError(f"batch {batch}: the recording has {found.batch}")
        if rows is None or isinstance(rows, slice):
            out = found.weights(rows or slice(None), batch)
            if rows is not None and rows.step not in (None, 1):
                raise RegardError(f"rows {rows}: give a slice of step 1, or a list")
        else:
            n = found.q_len
            if any(not -n <= r < n for r in rows):
                raise RegardError(f"rows {list(rows)}: layer {found.name} has {n} queries")
            ones = [found.weights(slice(r % n, r % n + 1), batch) for r in rows]
            out = (
                torch.cat(ones, 1)
                if ones
                else torch.zeros(found.heads, 0, found.k_len, dtype=torch.float32, device="cpu")
            )
        if cols is not None:
            n = found.k_len
            if not isinstance(cols, slice) and any(not -n <= c < n for c in cols):
                raise RegardError(f"cols {list(cols)}: layer {found.name} has {n} keys")
            out = out[:, :, cols if isinstance(cols, slice) else list(cols)]
        return out if head is None else out[head]

    def plot(
        self, observer: Observer = Entropy(), ax: Axes | None = None, *, batch: int = 0
    ) -> Axes:
        """Layers × heads, as `plot` of a watched model, by one observer of the weights; the Axes.

        They are read again from q, k and lse. RegardError where matplotlib is missing.
        """
        observed = [x.observed(observer, batch) if x.pattern else None for x in self.layers]
        return plot(grid(self.layers, observed, 0), ax)

    def _repr_html_(self) -> str:
        return layers_box(repr(self), self.layers)

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the recording as a new folder, which is there once it is whole.

        RegardError if something is there already; overwrite: unless that is a recording.
        """
        with whole_folder(Path(folder), INDEX, overwrite) as part:
            entries = [
                _written(x, f"layer-{n:03}.safetensors", part) for n, x in enumerate(self.layers)
            ]
            index = {"format": FORMAT, "about": self.about, "layers": entries}
            (part / INDEX).write_text(json.dumps(index, ensure_ascii=False, indent=1), "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Recording:
        """Read what `save` wrote. RegardError if it is not there, not whole, or damaged."""
        folder = Path(folder)
        try:
            index = Fields(json.loads((folder / INDEX).read_text("utf-8")), INDEX)
            if index["format"] != FORMAT:
                raise RegardError(
                    f"{folder}: format {index['format']}; this version reads {FORMAT}"
                )
            layers = index.of(list, "layers")
            heard = [_heard(Fields(x, f"layer {n}"), folder) for n, x in enumerate(layers)]
            return cls(heard, index.of(dict, "about"))
        except RegardError:
            raise
        except RecursionError:
            raise RegardError(f"{folder} is not a whole recording: JSON too deep") from None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise RegardError(f"{folder} is not a whole recording: {error}") from error


def _written(layer: RecordedLayer, file: str, folder: Path) -> dict[str, Any]:
    """A layer as JSON, its tensors in a file; with a checksum of each, and of what JSON says."""
    entry: dict[str, Any] = {"name": layer.name, "index": layer.index, "kind": layer.kind}
    entry |= {"pattern": layer.pattern, "reason": layer.reason}
    entry |= {"key_start": layer.key_start, "file": None, "chunks": []}
    if layer.key is None:
        return entry
    tensors = {"key": layer.key}
    entry["chunks"] = [_said(c, n, tensors) for n, c in enumerate(layer.chunks)]
    # Each tensor on its own: shared or strided storage has no place in the file
    own = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    save_file(own, folder / file)
    sums = {n: checksum(t) for n, t in own.items()} | {"chunks": checksum(entry["chunks"])}
    return entry | {"file": file, "sums": sums}


def _kept(argument: Any) -> Any:
    """A copy that later steps do not overwrite (static caches are filled in place)."""
    if isinstance(argument, Tensor):
        return argument.detach().clone()
    if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
        # A learned one changes in place; the others are shared by all layers
        return [t.detach().clone() if t.requires_grad else t for t in argument]
    return argument


def _said(chunk: Chunk, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A chunk as JSON; its tensors go into `tensors` under names that begin with its number."""
    tensors[f"{number}.query"], tensors[f"{number}.lse"] = chunk.query, chunk.lse
    said: dict[str, Any] = {"keys": chunk.keys}
    masks, biases, sinks, seed, *numbers = chunk.packed
    for name, held in zip(_LISTS, (masks, biases), strict=True):
        said[name] = len(held)
        tensors.update({f"{number}.{name}.{i}": t for i, t in enumerate(held)})
    for name, tensor in zip(_OPTIONAL, (sinks, seed), strict=True):
        if tensor is not None:
            tensors[f"{number}.{name}"] = tensor
    return said | dict(zip(_NUMBERS, numbers, strict=True))


def _heard(entry: Fields, folder: Path) -> RecordedLayer:
    """A layer from its JSON and its file."""
    layer = RecordedLayer(
        entry.of(str, "name"), entry.of(int, "index"), entry.of(str, "kind"),
        entry.of(bool, "pattern"), entry.of(str, "reason"),
    )  # fmt: skip
    file = entry.of((str, type(None)), "file")
    if file is None:
        return layer
    if Path(file).name != file:
        raise RegardError(f"{folder}: file {file!r} lies outside the recording")
    tensors, chunks = load_file(folder / file), entry.of(list, "chunks")
    if "sums" in entry:  # earlier versions wrote none
        _check_sums(entry.of(dict, "sums"), tensors | {"chunks": chunks}, file)
    layer.pieces = [(entry.count("key_start"), tensors["key"])]
    for number, said in enumerate(chunks):
        layer.chunks.append(_chunk(Fields(said, f"{layer.name}, chunk {number}"), number, tensors))
    return layer


def _check_sums(sums: dict[str, Any], given: dict[str, Any], file: str) -> None:
    """ValueError that names what is not as it was written."""
    for name, value in given.items():
        if sums.get(name) != checksum(value):
            where = INDEX if name == "chunks" else file
            raise ValueError(f"{where}: {name} is damaged; it is not what was written")


def _chunk(said: Fields, number: int, tensors: dict[str, Tensor]) -> Chunk:
    """A chunk from its JSON and the layer's tensors."""
    lists = [[tensors[f"{number}.{n}.{i}"] for i in range(said.count(n))] for n in _LISTS]
    optional = [tensors.get(f"{number}.{n}") for n in _OPTIONAL]
    numbers = [said.integers(n) for n in _NUMBERS[:2]]
    numbers += [said.of((float, int), n) for n in _NUMBERS[2:5]]
    numbers += [said.of(int, n) for n in _NUMBERS[5:]]
    first, last = said.integers("keys", 2)
    query, lse = tensors[f"{number}.query"], tensors[f"{number}.lse"]
    fits = query.dim() == tensors["key"].dim() == 4 and lse.shape == query.shape[:3]
    if not fits or not 0 <= first <= last:
        raise ValueError(f"chunk {number} has tensors, or keys, that do not fit together")
    return Chunk(query, lse, (*lists, *optional, *numbers), (first, last))
