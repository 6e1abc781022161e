"""A chunk of a recorded layer as JSON and tensors, and back; what is read is checked first.

A mask's program comes from a file that anybody may have written: whatever reads it indexes tensors
by it, so its operands, and the tensors' shapes, must be such as a mask of ours has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..call.biases import Kind
from ..call.op_schema import BIAS_WORDS, DEFAULTS, NUMBERS
from ..call.opcodes import TILE_SIDE, Op
from .recorded_layer import Chunk
from .saved_files import Fields
from .stored import read

_LISTS = ("mask_tensors", "bias_tensors")
_OPTIONAL = ("sinks", "seed")
_CODES = ("mask_code", "bias_code")
_KINDS: dict[str, type | tuple[type, ...]] = {"float": (float, int), "int": int, "bool": bool}


def to_json(chunk: Chunk, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
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
    return said | dict(zip((*_CODES, *NUMBERS), numbers, strict=True))


def from_json(said: Fields, number: int, tensors: Mapping[str, Tensor]) -> Chunk:
    """A chunk from its JSON and the layer's tensors."""
    lists = [[tensors[f"{number}.{n}.{i}"] for i in range(said.count(n))] for n in _LISTS]
    optional = [tensors.get(f"{number}.{n}") for n in _OPTIONAL]
    numbers: list[Any] = [said.integers(n) for n in _CODES]
    numbers += [_number(said, name, kind) for name, kind in NUMBERS.items()]
    first, last = said.integers("keys", 2)
    query, lse = tensors[f"{number}.query"], tensors[f"{number}.lse"]
    fits = query.dim() == tensors["key"].dim() == 4 and lse.shape == query.shape[:3]
    if not fits or not 0 <= first <= last:
        raise ValueError(f"chunk {number} has tensors, or keys, that do not fit together")
    if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
        raise ValueError(f"chunk {number} says a number that is not finite")
    sizes = {"b": query.shape[0], "h": query.shape[1], "q": query.shape[2], "k": last - first}
    starts = (said.of(int, "query_start"), said.of(int, "key_start"))
    check_program(numbers[0], lists[0], sizes, starts)
    _check_added(numbers[1], lists[1], optional, sizes)
    return Chunk(query, lse, (*lists, *optional, *numbers), (first, last))


def _number(said: Fields, name: str, kind: str) -> Any:
    """What a file does not say, as it is older than the argument, was not given."""
    if name not in said and name in DEFAULTS:
        return DEFAULTS[name]
    return said.of(_KINDS[kind], name)


def check_program(
    code: Sequence[int], tensors: Sequence[Tensor], sizes: Mapping[str, int],
    starts: tuple[int, int],
) -> None:  # fmt: skip
    """ValueError unless it is a mask's program for a call of these sizes: b, h, q, k."""
    at, depth = 0, 0
    while at < len(code):
        op = Op(code[at])
        args = code[at + 1 : at + 1 + op.form.operands]
        at += 1 + op.form.operands
        if len(args) < op.form.operands:
            raise ValueError(f"a mask's {op.name} lacks operands")
        depth -= {Op.AND: 2, Op.OR: 2, Op.NOT: 1}.get(op, 0)
        if depth < 0:
            raise ValueError(f"a mask's {op.name} has nothing to combine")
        depth += 1
        count = len(op.form.tensors)
        if any(not 0 <= n < len(tensors) for n in args[:count]):
            raise ValueError(f"a mask's {op.name} names a tensor that is not there")
        _check_leaf(op, [tensors[n] for n in args[:count]], args[count:], sizes, starts)
    if depth != 1:
        raise ValueError(f"a mask's program leaves {depth} answers")


def _check_leaf(
    op: Op, tensors: Sequence[Tensor], numbers: Sequence[int], sizes: Mapping[str, int],
    starts: tuple[int, int],
) -> None:  # fmt: skip
    """ValueError unless an instruction's tensors have its shapes, and its numbers make sense."""
    b, h, q, k = (sizes[n] for n in "bhqk")
    shapes: dict[Op, list[tuple[tuple[Any, ...], torch.dtype | None]]] = {
        Op.DOCUMENTS: [(((1, b), q), torch.int64), (((1, b), k), torch.int64)],
        Op.PADDING: [(((1, b), k), torch.bool)],
        Op.EDGES: [((None, 2), torch.int64)],
        Op.DENSE: [(((1, b), (1, h), (1, q), (1, k)), torch.bool)],
        Op.HEADS: [((h,), torch.bool)],
        Op.TILES: [
            (((1, b), (1, h), -(-q // TILE_SIDE), -(-k // TILE_SIDE)), torch.int32),
            ((None, TILE_SIDE, TILE_SIDE // 8), torch.uint8),
        ],
        Op.BLOCKS: [(((1, b), (1, h), None, None), torch.bool)],
    }
    for tensor, (shape, dtype) in zip(tensors, shapes.get(op, []), strict=True):
        if tensor.dtype != dtype or not _fits(tensor.shape, shape):
            raise ValueError(f"a mask's {op.name} has {tuple(tensor.shape)} {tensor.dtype}")
    if op == Op.TILES and tensors[0].numel() and int(read(tensors[0]).max()) >= len(tensors[1]):
        raise ValueError("a mask's TILES names bits that are not there")
    if op in (Op.STEP, Op.CHUNK, Op.PHASE, Op.BLOCKS) and numbers[0] < 1:
        raise ValueError(f"a mask's {op.name} has a size of {numbers[0]}")
    if op == Op.BLOCKS and q and k:
        for dim, (start, length) in enumerate(((starts[0], q), (starts[1], k)), 2):
            first = start // numbers[0] - numbers[dim - 1]
            last = (start + length - 1) // numbers[0] - numbers[dim - 1]
            if first < 0 or last >= tensors[0].shape[dim]:
                raise ValueError("a mask's BLOCKS does not cover its call")


def _fits(shape: Sequence[int], wanted: Sequence[Any]) -> bool:
    """Whether a shape is as wanted: a number, one of several, or (None) any."""
    return len(shape) == len(wanted) and all(
        w is None or n == w or (isinstance(w, tuple) and n in w)
        for n, w in zip(shape, wanted, strict=True)
    )


def _check_added(
    code: Sequence[int], tensors: Sequence[Tensor], optional: Sequence[Tensor | None],
    sizes: Mapping[str, int],
) -> None:  # fmt: skip
    """ValueError unless biases and sinks fit a call of these sizes."""
    b, h, q, k = (sizes[n] for n in "bhqk")
    if len(code) != BIAS_WORDS * len(tensors):
        raise ValueError("biases have no tensor of their own")
    shapes = {
        Kind.ALIBI: (h,), Kind.RELATIVE: (h, None), Kind.DENSE: ((1, b), (1, h), (1, q), (1, k))
    }  # fmt: skip
    for n, tensor in enumerate(tensors):
        kind, *args = code[n * BIAS_WORDS : (n + 1) * BIAS_WORDS]
        if not _fits(tensor.shape, shapes[Kind(kind)]) or not tensor.is_floating_point():
            raise ValueError(f"a bias has a tensor {tuple(tensor.shape)}")
        if kind == Kind.RELATIVE and not 4 <= tensor.shape[1] < 2 * args[1]:
            raise ValueError("a relative bias has too few buckets")
    sinks = optional[0]
    if sinks is not None and sinks.shape != (h,):
        raise ValueError(f"sinks are {tuple(sinks.shape)}; there are {h} heads")
