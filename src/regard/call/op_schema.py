"""A call as the flat arguments of a registered op, and back. `SCHEMA` is their common part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor

from .biases import Added, Kind
from .checked import Call, Crossing
from .dropout import Dropout
from .geometry import Place
from .mask_program import Program
from .masks import Full

# A field of `Call` that crosses as it is says so itself (`Crossing`): a new one needs no line here
PLAIN: dict[str, Crossing] = {
    f.name: f.metadata["crosses"] for f in fields(Call) if "crosses" in f.metadata
}
DEFAULTS = {f.name: f.default for f in fields(Call) if f.default is not MISSING and f.name in PLAIN}
# All numbers after the code of mask and biases, in their order
NUMBERS = {name: crossing.kind for name, crossing in PLAIN.items()} | {
    "dropout": "float", "query_start": "int", "key_start": "int",
}  # fmt: skip
SCHEMA = (
    "Tensor[] mask_tensors, Tensor[] bias_tensors, Tensor? sinks, Tensor? seed, int[] mask_code, "
    "int[] bias_code, " + ", ".join(f"{kind} {name}" for name, kind in NUMBERS.items())
)
BIAS_WORDS = 3  # kind and two arguments


def pack(call: Call) -> tuple[Any, ...]:
    """The arguments that `SCHEMA` names; query, key and value stand before them."""
    bias_code: list[int] = []
    for bias in call.biases:
        bias_code += [bias.kind, *(*bias.args, 0, 0)[:2]]
    return (
        list(call.program.tensors),
        [b.tensor for b in call.biases],
        call.sinks,
        call.dropout.seed if call.dropout else None,
        list(call.program.code),
        [int(c) for c in bias_code],
        *(_crossed(getattr(call, name), crossing) for name, crossing in PLAIN.items()),
        call.dropout.p if call.dropout else 0.0,
        call.place.query_start,
        call.place.key_start,
    )


def _crossed(value: Any, crossing: Crossing) -> Any:
    return crossing.none if value is None else value


def unpack(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask_tensors: Sequence[Tensor],
    bias_tensors: Sequence[Tensor],
    sinks: Tensor | None,
    seed: Tensor | None,
    mask_code: Sequence[int],
    bias_code: Sequence[int],
    *numbers: Any,
) -> Call:
    """The call that `pack` packed; it was checked then."""
    said = dict(zip(NUMBERS, numbers, strict=True))
    query_start, key_start, dropout = (said[n] for n in ("query_start", "key_start", "dropout"))
    batch, heads, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1:3]
    place = Place(batch, heads, kv_heads, q_len, k_len, query_start, key_start, query.device)
    codes = [bias_code[i : i + BIAS_WORDS] for i in range(0, len(bias_code), BIAS_WORDS)]
    biases = tuple(
        Added(Kind(code[0]), tensor, tuple(code[1:]), query_start, key_start)
        for code, tensor in zip(codes, bias_tensors, strict=True)
    )
    program = Program(
        tuple(mask_code),
        tuple(mask_tensors),
        q_len,
        k_len,
        query_start,
        key_start,
        query.device,
    )
    plain: dict[str, Any] = {
        n: None if c.none is not None and said[n] == c.none else said[n] for n, c in PLAIN.items()
    }
    return Call(
        query,
        key,
        value,
        program,
        biases,
        sinks=sinks,
        dropout=Dropout(dropout, seed) if dropout else None,
        place=place,
        mask=Full(),
        **plain,
    )
