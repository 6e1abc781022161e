"""One layer of a recording on disk: written call by call while the model runs, opened again.

The first call goes to `layer-000.safetensors` at once; what follows (chunks of a prefill, steps of
`generate()`) to `layer-000.00001.safetensors` and so on, many small steps to one file. At the end
each layer becomes one file; what a killed run leaves opens as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..call.checked import Call
from ..call.observers import NormTopK
from ..call.op_schema import pack
from ..call.opcodes import Op
from ..errors import RegardError
from ..ops import beside
from .by_value import pooled_maps
from .chunk_json import from_json, to_json
from .pyramid import Results
from .recorded_layer import Chunk, RecordedLayer, joined
from .saved_files import Fields
from .stored import StoredTensors, read, write

STEPS = 64  # queries that gather in memory before they go to a file
NAME = re.compile(r"layer-(\d{3,6})(?:\.(\d{5}))?\.safetensors")
_MANY = {"key": "pieces", "value": "values", "norm": "norms"}


class StoredLayer(RecordedLayer):
    """A layer whose calls go to files as they come; it holds no more than the last few."""

    def __init__(
        self, name: str, index: int, kind: str, path: Path, rounding: beside.Rounding,
        observers: Sequence[Any], projection: Callable[[str, int], Tensor] | None,
    ) -> None:  # fmt: skip
        """path: of the first file. projection: W_O of a module, where values are kept."""
        super().__init__(name, index, kind)
        self.path, self._rounding, self._observers = path, rounding, observers
        self._projection = projection
        self.parts, self._rows, self._seen = 0, 0, Results()
        self._picked: list[int] | None = None  # since the last file was written
        self._known: list[tuple[int, Tensor]] = []  # the norms of all keys so far

    def take(self, call: Call, lse: Tensor, results: list[Any]) -> list[Any]:
        """Write a call, or keep it for the next file; nothing is left for the watch to hold."""
        call = replace(call.gathered(), dropout=None, observers=())
        rounded = self._rounding.rounded(call)
        seen = results[-1]
        if not self._rounding.made(lse):  # it came with the model's own numbers
            lse, found = beside.gathered(replace(rounded, observers=tuple(self._observers)))
            seen = tuple(found.values())
        self._append(rounded, lse)
        self._seen = self._seen.then(self._with_values(Results(*seen), rounded, lse))
        rows = sum(chunk.query.shape[2] for chunk in self.chunks)
        if not self.parts or rows >= STEPS:
            self.flush()
        return []

    def _with_values(self, seen: Results, call: Call, lse: Tensor) -> Results:
        """What was seen of a call, with maps of weight · ‖W_O v‖ where values are kept."""
        if seen.sums is None or (norm := joined(self._known)) is None:
            return seen
        first = call.place.key_start - min(start for start, _ in self._known)
        self._known = [(call.place.key_start - first, norm)]
        mine = norm[:, :, first : first + call.place.k_len]
        sums, maxima = pooled_maps(call, lse, mine, seen.sums)
        return replace(seen, value_sums=sums, value_maxima=maxima)

    def _append(self, call: Call, lse: Tensor) -> None:
        """Keep a call's queries, and the keys that it brought."""
        place = call.place
        start, stop = place.key_start, place.key_start + place.k_len
        begun = self.parts or self.chunks
        if not begun:
            first, new = start, slice(None)
        else:
            first = place.query_start
            new = slice(first - start, first - start + place.q_len)
        if not begun or self.kind == "self":
            self.pieces.append((first, call.key[:, :, new].clone()))
            if self._projection is not None and call.value is not None:
                value = call.value[:, :, new].clone()
                width = place.heads * value.shape[-1]
                weights = NormTopK(1, self._projection(self.name, width))
                self.values.append((first, value))
                norm = weights.norms(value.float(), place.heads)
                self.norms.append((first, norm))
                self._known.append((first, norm))
        packed = tuple(_copied(a) for a in pack(call))
        self.chunks.append(Chunk(call.query.clone(), lse.clone(), packed, (start, stop)))

    def pick(self, rows: list[int]) -> None:
        """Beam search: the rows so far follow their beams.

        What is written stays as it is, and the next file says whose its rows go on from.
        """
        super().pick(rows)
        self._seen = self._seen.pick(rows)
        self._known = [(start, norm[rows]) for start, norm in self._known]
        if self.parts:
            before = self._picked
            self._picked = rows if before is None else [before[row] for row in rows]

    def flush(self) -> None:
        """Write what has gathered as the next file."""
        if not self.chunks:
            return
        path = self.path if not self.parts else part_of(self.path, self.parts)
        self.chunks = merged(self.chunks)
        write_layer(path, self, self._seen, self._rows, self._picked)
        self._rows += sum(chunk.query.shape[2] for chunk in self.chunks)
        self.parts += 1
        self.chunks, self.pieces, self.values, self.norms = [], [], [], []
        self._seen, self._picked = Results(), None

    def close(self) -> None:
        """Write what is left, and make one file of several."""
        self.flush()
        if self.parts < 2:
            return
        files = [self.path, *(part_of(self.path, n) for n in range(1, self.parts))]
        write_whole(self.path, open_layer(files))
        for file in files[1:]:
            file.unlink()
        self.parts = 1


def part_of(path: Path, number: int) -> Path:
    """The file of a layer's later calls."""
    return path.with_name(f"{path.stem}.{number:05}.safetensors")


def _copied(argument: Any) -> Any:
    """A copy of what the model may overwrite before it is written."""
    if isinstance(argument, Tensor):
        return argument.detach().clone()
    if isinstance(argument, list):
        return [_copied(each) for each in argument]
    return argument


def write_layer(
    path: Path, layer: RecordedLayer, seen: Results, first_row: int,
    picked: list[int] | None = None,
) -> None:  # fmt: skip
    """A layer's calls, and what was seen of them, as one file. first_row: of the recording.

    picked: the batch items of the files before that this one's go on from; None: their own.
    """
    tensors, starts = {}, {}
    for name, field in _MANY.items():
        pieces = getattr(layer, field)
        if (whole := joined(pieces)) is not None:
            tensors[name], starts[name] = whole, min(start for start, _ in pieces)
    said: dict[str, Any] = {"name": layer.name, "index": layer.index, "kind": layer.kind}
    said |= {"first_row": first_row, "starts": starts, "results": seen.said()}
    said |= {} if picked is None else {"picked": picked}
    said["chunks"] = [to_json(chunk, n, tensors) for n, chunk in enumerate(layer.chunks)]
    write(path, tensors | seen.tensors(), said)


def write_whole(path: Path, layer: RecordedLayer) -> None:
    """A layer that holds all its calls, in memory or opened, as one file."""
    write_layer(path, replace(layer, chunks=merged(layer.chunks)), layer.results, 0)


def open_layer(files: Sequence[Path]) -> RecordedLayer:
    """A layer from its files, mapped into memory. RegardError that names the one that is damaged.

    The first has the first calls; those after it that it holds too are passed over.
    """
    layer: RecordedLayer | None = None
    rows = 0
    for path in files:
        with named(path):
            file = StoredTensors(path)
            first = file.said.count("first_row")
            if layer is None:
                layer = RecordedLayer(
                    file.said.of(str, "name"), file.said.of(int, "index"), file.said.of(str, "kind")
                )
            if first < rows:  # left from before the files were made one
                continue
            if first > rows:
                raise ValueError(f"it begins at row {first}; the rows from {rows} on are missing")
            if "picked" in file.said:
                layer.pick(_rows_of(file.said, layer.batch))
            _extend(layer, file)
            rows = sum(chunk.query.shape[2] for chunk in layer.chunks)
    if layer is None:
        raise RegardError("a layer without files")
    with named(files[0]):
        check_joined(layer)
    return layer


def _rows_of(said: Fields, batch: int) -> list[int]:
    """Which batch items of the files before a file's go on from."""
    rows = said.integers("picked")
    if not rows or not all(0 <= row < batch for row in rows):
        raise ValueError(f"picked is {rows[:20]}; the files before have {batch} items")
    return rows


class named:
    """While inside, what is wrong with a file becomes one RegardError that names it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        known = (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError)
        if isinstance(error, known) and not isinstance(error, RegardError):
            said = " ".join(str(error).split())[:300]
            raise RegardError(f"{self._path} is not whole: {said}") from error


def _extend(layer: RecordedLayer, file: StoredTensors) -> None:
    """Append a file's calls to a layer."""
    layer.files.append(file)
    starts = Fields(file.said["starts"], "starts")
    for name, field in _MANY.items():
        if name in file:
            getattr(layer, field).append((starts.count(name), file[name]))
    chunks = [
        from_json(Fields(said, f"chunk {n}"), n, _Under(file, layer))
        for n, said in enumerate(file.said.of(list, "chunks"))
    ]
    if not chunks:
        raise ValueError("it has no calls")
    layer.chunks += chunks
    batch, heads = chunks[0].query.shape[:2]
    rows = sum(chunk.query.shape[2] for chunk in chunks)
    said = Fields(file.said["results"], "results")
    seen = Results.heard(said, file, (batch, heads, rows))
    layer.results = layer.results.then(seen) if len(layer.chunks) > len(chunks) else seen


class _Under(Mapping[str, Tensor]):
    """A file's tensors; the key, where it brings none, is that of the files before it."""

    def __init__(self, file: StoredTensors, layer: RecordedLayer) -> None:
        self._file, self._layer = file, layer

    def __getitem__(self, name: str) -> Tensor:
        if name == "key" and name not in self._file and self._layer.pieces:
            return self._layer.pieces[0][1]
        return self._file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __len__(self) -> int:
        return len(self._file)


def check_joined(layer: RecordedLayer) -> None:
    """ValueError unless a layer's queries, keys and calls fit together."""
    shapes = {(c.query.shape[0], c.query.shape[1], c.query.shape[3]) for c in layer.chunks}
    keys = {(k.shape[0], k.shape[1], k.shape[3]) for _, k in layer.pieces if k.dim() == 4}
    if len(shapes) != 1 or len(keys) != 1 or any(k.dim() != 4 for _, k in layer.pieces):
        raise ValueError("its queries, or its keys, differ in shape")
    (batch, heads, dim), (k_batch, kv_heads, k_dim) = *shapes, *keys
    if (batch, dim) != (k_batch, k_dim) or not kv_heads or heads % kv_heads:
        raise ValueError(f"queries of shape {(batch, heads, dim)} and keys {(k_batch, kv_heads)}")
    floats = {c.query.dtype for c in layer.chunks} | {k.dtype for _, k in layer.pieces}
    if len(floats) != 1 or not all(dtype.is_floating_point for dtype in floats):
        raise ValueError("queries and keys are of different dtypes")
    ends = sorted((start, start + key.shape[2]) for start, key in layer.pieces)
    if any(a[1] < b[0] for a, b in pairwise(ends)):
        raise ValueError("keys are missing between its calls")
    if any(c.keys[0] < ends[0][0] or c.keys[1] > ends[-1][1] for c in layer.chunks):
        raise ValueError("a call reads keys that are not there")
    if any(c.packed[-1] != c.keys[0] for c in layer.chunks):
        raise ValueError("a call places its keys elsewhere than the file")
    received = layer.results.received
    if received is not None and (received.key_start, received.sum.shape[-1]) != (
        ends[0][0], ends[-1][1] - ends[0][0],
    ):  # fmt: skip
        raise ValueError("received counts other keys than the file has")


def merged(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The same calls, those that follow each other under one causal mask as one."""
    runs: list[list[Chunk]] = []
    for chunk in map(_as_causal, chunks):
        if runs and _continues(runs[-1][-1], chunk):
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return [_joined(run) if len(run) > 1 else run[0] for run in runs]


def _as_causal(chunk: Chunk) -> Chunk:
    """A decode step that sees every key, its own the last, as the causal mask says it."""
    masks, biases, sinks, seed, code, *rest = chunk.packed
    start = rest[-2]
    if tuple(code) == (Op.FULL,) and chunk.query.shape[2] == 1 and chunk.keys[1] == start + 1:
        return replace(chunk, packed=(masks, biases, sinks, seed, [int(Op.CAUSAL)], *rest))
    return chunk


def _continues(one: Chunk, other: Chunk) -> bool:
    """Whether two calls are parts of one: under its mask no row sees keys that were not there."""
    masks, biases, sinks, _, code, *rest = one.packed
    masks2, biases2, sinks2, _, code2, *rest2 = other.packed
    *numbers, start, _ = rest
    *numbers2, start2, _ = rest2
    if masks or masks2 or start + one.query.shape[2] != start2:
        return False
    if list(code) != list(code2) or [*numbers] != [*numbers2] or len(biases) != len(biases2):
        return False
    tensors = [(sinks, sinks2), *zip(biases, biases2, strict=True)]
    if any((a is None) != (b is None) for a, b in tensors):
        return False
    # A dense bias (four dimensions) belongs to its call's own rows
    if any(a is not None and (a.dim() > 2 or not _equal(a, b)) for a, b in tensors):
        return False
    back = _reach(list(code))
    if back is None:
        return False
    least = min(one.keys[0], other.keys[0])
    return all(c.keys[0] in (least, 0) or c.keys[0] <= s - back + 1
               for c, s in ((one, start), (other, start2)))  # fmt: skip


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(read(one), read(other))


def _reach(code: list[int]) -> int | None:
    """How many keys back a causal mask, alone or with windows, lets a row see; None for others."""
    at, causal, back = 0, False, 2**31
    while at < len(code):
        op = Op(code[at])
        if op not in (Op.CAUSAL, Op.WINDOW, Op.AND):
            return None
        causal |= op == Op.CAUSAL
        if op == Op.WINDOW:
            back = min(back, code[at + 1])
        at += 1 + op.form.operands
    return back if causal else None


def _joined(run: Sequence[Chunk]) -> Chunk:
    """Calls that follow each other as one."""
    first = run[0]
    keys = (min(c.keys[0] for c in run), max(c.keys[1] for c in run))
    packed = (*first.packed[:-1], keys[0])
    query = torch.cat([read(c.query) for c in run], 2)
    lse = torch.cat([read(c.lse) for c in run], 2)
    return Chunk(query, lse, packed, keys)
