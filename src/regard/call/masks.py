"""Masks: who may see whom. Small frozen values that combine with `&`, `|` and `~`.

    Causal() & Window(4) at 6 tokens       Causal() & (Window(2) | First(1))
        q\\k 0 1 2 3 4 5                        q\\k 0 1 2 3 4 5
        0   ■ · · · · ·                        0   ■ · · · · ·
        1   ■ ■ · · · ·                        1   ■ ■ · · · ·
        2   ■ ■ ■ · · ·                        2   ■ ■ ■ · · ·
        3   ■ ■ ■ ■ · ·                        3   ■ · ■ ■ · ·
        4   · ■ ■ ■ ■ ·                        4   ■ · · ■ ■ ·
        5   · · ■ ■ ■ ■                        5   ■ · · · ■ ■

Positions are those of the sequence (`query_start`, `key_start` of the call place it): by default
the last query stands at the last key, so causal is aligned bottom-right. A mask is lowered to a
`lowered.Program` before an engine sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .brief import Brief, listed
from .display.mask_picture import mask_box
from .geometry import Place
from .mask_program import Program, cells_of
from .numbers import FARTHEST, whole_fields, wholes
from .opcodes import Op


@dataclass(eq=False)
class Lowering:
    """A mask on its way into a program: the call that it is for, and what has been written.

    query, key: the call's; a mask that chooses by content looks at them. granted: instead of
    choosing, it is taken to show what lets the whole show the most (True) or the least (False).
    odd: whether an odd number of `~` stands before what is written now.
    """

    mask: Mask
    place: Place
    query: Tensor | None = None
    key: Tensor | None = None
    granted: bool | None = None
    odd: bool = False
    code: list[int] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def write(self, op: Op, *operands: Tensor | int) -> None:
        """Append an instruction: first its tensors, then its numbers."""
        self.code.append(int(op))
        for operand in operands:
            if isinstance(operand, Tensor):
                self.code.append(len(self.tensors))
                self.tensors.append(operand)
            else:
                # No position is as far: beyond, a number says no more, and might overflow
                self.code.append(min(max(operand, -2 * FARTHEST), 2 * FARTHEST))

    def program(self) -> Program:
        """What has been written, for the call."""
        place = self.place
        return Program(
            tuple(self.code),
            tuple(self.tensors),
            place.q_len,
            place.k_len,
            place.query_start,
            place.key_start,
            place.device,
        )


class Mask(Brief):
    """Who may see whom. Combine with `&` (both), `|` (either) and `~` (the opposite)."""

    def _repr_html_(self) -> str:
        return mask_box(self)

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise RegardError(
            f"{self} is neither true nor false: join masks with & | ~, not with and, or, not"
        )

    def lower(
        self, place: Place, query: Tensor | None = None, key: Tensor | None = None
    ) -> Program:
        """The mask as one program for a call at `place`. RegardError if it does not fit there.

        query (batch, heads, q_len, dim) and key (batch, kv_heads, k_len, dim) are needed only where
        something in the mask is chosen by content.
        """
        lowering = Lowering(self, place, query, key)
        self._write(lowering)
        return lowering.program()

    def _write(self, to: Lowering) -> None:
        """Write the instructions that push this mask's answer."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Joined(Mask):
    left: Mask
    right: Mask

    def _write(self, to: Lowering) -> None:
        self.left._write(to)
        self.right._write(to)
        to.write(Op.AND if isinstance(self, And) else Op.OR)

    def __str__(self) -> str:
        return f"({self.left} {'&' if isinstance(self, And) else '|'} {self.right})"


class And(_Joined):
    """Visible where both masks show it."""


class Or(_Joined):
    """Visible where either mask shows it."""


@dataclass(frozen=True)
class Not(Mask):
    """Visible where the mask hides it."""

    mask: Mask

    def _write(self, to: Lowering) -> None:
        # What TopBlocks may show at most, or at least (`granted`), turns round under each ~
        to.odd = not to.odd
        self.mask._write(to)
        to.odd = not to.odd
        to.write(Op.NOT)

    def __str__(self) -> str:
        return f"~{self.mask}"


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def _write(self, to: Lowering) -> None:
        to.write(Op.FULL)

    def __str__(self) -> str:
        return "Full()"


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees the keys at its own position and before."""

    def _write(self, to: Lowering) -> None:
        to.write(Op.CAUSAL)

    def __str__(self) -> str:
        return "Causal()"


@dataclass(frozen=True)
class Window(Mask):
    """Query at i sees the keys at i − n + 1 … i + ahead: the last n, itself included."""

    n: int
    ahead: int = 0

    def __post_init__(self) -> None:
        whole_fields(self, "n", "ahead")
        if self.n < 1 or self.ahead < 0:
            raise RegardError(f"{self}: give n ≥ 1 and ahead ≥ 0")

    def _write(self, to: Lowering) -> None:
        to.write(Op.WINDOW, self.n, self.ahead)

    def __str__(self) -> str:
        return f"Window({self.n}, ahead={self.ahead})" if self.ahead else f"Window({self.n})"


@dataclass(frozen=True)
class First(Mask):
    """Every query sees the keys at positions < n (sinks, a prefix)."""

    n: int

    def __post_init__(self) -> None:
        whole_fields(self, "n")
        if self.n < 0:
            raise RegardError(f"{self}: give n ≥ 0")

    def _write(self, to: Lowering) -> None:
        to.write(Op.FIRST, self.n)

    def __str__(self) -> str:
        return f"First({self.n})"


def given_tensor(given: Any, what: str) -> None:
    """RegardError for what is no tensor: an array, a list."""
    if not isinstance(given, Tensor):
        raise RegardError(f"{what} is a {type(given).__name__}; give a torch tensor")


def _fits(tensor: Tensor, shape: Sequence[int], place: Place, mask: Mask, name: str) -> Tensor:
    """The tensor, if each of its sizes is the call's; all but the last may be 1."""
    if tensor.dim() != len(shape) or any(
        s not in (1, w) if d < len(shape) - 1 else s != w
        for d, (s, w) in enumerate(zip(tensor.shape, shape, strict=False))
    ):
        raise RegardError(
            f"{mask}: {name} is {tuple(tensor.shape)}, this call needs {tuple(shape)} ({place})"
        )
    return on_device(tensor, place, mask, name)


def on_device(tensor: Tensor, place: Place, mask: Mask, name: str) -> Tensor:
    """The tensor, if it stands on the call's device."""
    if tensor.device != place.device:
        raise RegardError(
            f"{mask}: {name} is on {tensor.device}, the query on {place.device}; move one of them"
        )
    return tensor


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Packed sequences: a query sees the keys of its own document; a negative id is in none.

    query_ids (q_len,) or (batch, q_len), key_ids the same over k_len; default: query_ids. Integers.
    """

    query_ids: Tensor
    key_ids: Tensor | None = None

    def __post_init__(self) -> None:
        given_tensor(self.query_ids, "Documents: query_ids")
        if self.key_ids is not None:
            given_tensor(self.key_ids, "Documents: key_ids")

    @classmethod
    def from_cu_seqlens(cls, query: Tensor, key: Tensor | None = None) -> Documents:
        """From cumulative lengths (documents + 1,), 0 first: flash-attention's varlen form."""

        def ids(cu: Tensor) -> Tensor:
            lengths = cu.diff()
            if cu.dim() != 1 or len(cu) < 1 or int(cu[0]) != 0 or bool((lengths < 0).any()):
                raise RegardError(
                    f"cu_seqlens {cu.tolist()} must be one row that starts at 0 and does not fall"
                )
            return torch.repeat_interleave(
                torch.arange(len(lengths), device=cu.device, dtype=torch.int64), lengths
            )

        return cls(ids(query), None if key is None else ids(key))

    def _write(self, to: Lowering) -> None:
        place, tensors = to.place, []
        given = (self.query_ids, self.query_ids if self.key_ids is None else self.key_ids)
        for ids, n, name in zip(
            given, (place.q_len, place.k_len), ("query_ids", "key_ids"), strict=True
        ):
            rows = ids[None] if ids.dim() == 1 else ids
            tensors.append(_fits(rows, (place.batch, n), place, self, name))
            if ids.is_floating_point():
                raise RegardError(f"{self}: {name} is {ids.dtype}; give integers")
        to.write(Op.DOCUMENTS, *tensors)

    def __str__(self) -> str:
        return f"Documents(query_ids {tuple(self.query_ids.shape)})"


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Keys where keep is True are visible. keep bool (batch, k_len) or (k_len,)."""

    keep: Tensor

    def __post_init__(self) -> None:
        given_tensor(self.keep, "Padding: keep")

    def _write(self, to: Lowering) -> None:
        keep = self.keep[None] if self.keep.dim() == 1 else self.keep
        keep = _fits(keep, (to.place.batch, to.place.k_len), to.place, self, "keep")
        if keep.is_floating_point():
            raise RegardError(
                f"{self}: keep is {keep.dtype}; give bool (True: visible), or pass it as bias"
            )
        to.write(Op.PADDING, keep.bool())

    def __str__(self) -> str:
        return f"Padding(keep {tuple(self.keep.shape)})"


@dataclass(frozen=True, eq=False)
class Edges(Mask):
    """Only these query–key pairs, as positions in the sequence; `~Edges(pairs)` cuts them.

    `~(Edges(pairs) & Heads([1]))` cuts them in one head alone.
    """

    pairs: Tensor

    def __init__(self, pairs: Iterable[tuple[int, int]] | Tensor) -> None:
        given = pairs if isinstance(pairs, Tensor) else list(pairs)
        device = pairs.device if isinstance(pairs, Tensor) else "cpu"
        held = torch.as_tensor(given, dtype=torch.int64, device=device)
        if held.numel() and (held.dim() != 2 or held.shape[1] != 2):
            raise RegardError(f"Edges: pairs are {tuple(held.shape)}; give (query, key) pairs")
        object.__setattr__(self, "pairs", torch.unique(held.reshape(-1, 2), dim=0))

    def _write(self, to: Lowering) -> None:
        to.write(Op.EDGES, self.pairs.to(to.place.device))

    def __str__(self) -> str:
        return f"Edges({len(self.pairs)} pairs)"


@dataclass(frozen=True)
class Heads(Mask):
    """Everything in these heads, nothing in the others; `~Heads([1])` removes head 1 whole."""

    heads: tuple[int, ...]

    def __init__(self, heads: Iterable[int]) -> None:
        object.__setattr__(self, "heads", wholes(heads, "Heads: heads"))

    def _write(self, to: Lowering) -> None:
        place = to.place
        if any(not 0 <= h < place.heads for h in self.heads):
            raise RegardError(f"{self}: the call has heads 0 … {place.heads - 1} ({place})")
        mine = torch.zeros(place.heads, dtype=torch.bool, device=place.device)
        mine[list(self.heads)] = True
        to.write(Op.HEADS, mine)

    def __str__(self) -> str:
        return f"Heads({listed(self.heads)})"


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A bool tensor broadcastable to (batch, heads, q_len, k_len); True: visible."""

    visible: Tensor

    def __post_init__(self) -> None:
        given_tensor(self.visible, "Dense: visible")

    def _write(self, to: Lowering) -> None:
        visible, place = self.visible, to.place
        if visible.dtype != torch.bool:
            raise RegardError(
                f"{self}: it is {visible.dtype}; give bool (True: visible), or pass it as bias"
            )
        shape = (place.batch, place.heads, place.q_len, place.k_len)
        aligned = visible[(None,) * (4 - visible.dim())] if visible.dim() < 4 else visible
        fits = aligned.dim() == 4 and all(
            s in (1, w) for s, w in zip(aligned.shape, shape, strict=True)
        )
        if not fits:
            raise RegardError(
                f"{self}: {tuple(visible.shape)} does not broadcast to {shape} ({place})"
            )
        to.write(Op.DENSE, on_device(aligned, place, self, "visible"))

    def __str__(self) -> str:
        return f"Dense({tuple(self.visible.shape)})"


@dataclass(frozen=True, eq=False)
class Predicate(Mask):
    """Any function of indices: fn(batch, head, query, key) → bool, on broadcastable index tensors.

    Query and key are positions in the sequence. It is evaluated once into cells of 64 × 64, kept as
    empty, full, or bits; the result is kept for further calls of the same shape (other layers).
    Memory: one integer a cell, and 512 bytes a mixed cell.
    """

    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    _kept: dict[Place, list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def _write(self, to: Lowering) -> None:
        if to.place not in self._kept:
            self._kept[to.place] = self._evaluate(to.place)
        to.write(Op.TILES, *self._kept[to.place])

    def _evaluate(self, place: Place) -> list[Tensor]:
        """Row by row of cells, so that only O(k_len) elements exist at a time."""
        device = place.device
        batch = torch.arange(place.batch, device=device, dtype=torch.int64).view(-1, 1, 1, 1)
        head = torch.arange(place.heads, device=device, dtype=torch.int64).view(1, -1, 1, 1)
        key = torch.arange(place.k_len, device=device, dtype=torch.int64) + place.key_start

        def shown(q0: int, q1: int) -> Tensor:
            query = torch.arange(q0, q1, device=device, dtype=torch.int64)
            query = (query + place.query_start).view(1, 1, -1, 1)
            shown = self.fn(batch, head, query, key.view(1, 1, 1, -1))
            shown = torch.as_tensor(shown, dtype=torch.bool, device=device)
            try:
                return shown.expand(
                    *(shown.shape[:-2] if shown.dim() == 4 else (1, 1)), query.shape[2], len(key)
                )
            except RuntimeError as error:
                raise RegardError(
                    f"{self}: it returned {tuple(shown.shape)} for indices that broadcast to "
                    f"({place.batch}, {place.heads}, {query.shape[2]}, {len(key)})"
                ) from error

        return cells_of(shown, place.q_len, place.k_len, device)

    def __str__(self) -> str:
        return f"Predicate({getattr(self.fn, '__name__', self.fn)})"
