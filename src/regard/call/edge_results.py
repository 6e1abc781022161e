"""What observers saw of single edges: the k keys of each query that have the most of something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import RegardError
from .brief import summary
from .display.frame import Start, Table, first_of
from .display.picture import Picture, edges, part_of
from .display.result import Result

_LISTS = ("batch", "heads", "q_len", "k")
_CELLS = 512  # of a picture of edges, along each side


class _Listed(Result):
    """The k keys of each row that have the most of something."""

    query_start: Start

    if TYPE_CHECKING:

        @property
        def indices(self) -> Tensor:
            """Positions of keys (batch, heads, q_len, k); −1 where fewer were visible."""
            ...

    def _columns(self) -> dict[str, Tensor]:
        """What the list says of each key besides its position; the first is what ranks it."""
        raise NotImplementedError

    def _table(self) -> Table:
        index: Any = {"batch": 0, "head": 0, "query": self.query_start, "rank": 0}
        return Table(index, {"key": self.indices} | self._columns(), self.indices >= 0)

    def _picture(self, batch: int, head: int | None) -> Picture:
        name, ranked = next(iter(self._columns().items()))
        keys, _, title = part_of(self.indices, batch, head, "plot")
        numbers, *_ = part_of(ranked, batch, head, "plot")
        start = first_of(self.query_start, batch)
        values, rows, cols = edges(keys, numbers, start, _CELLS)
        heads = f"largest of {len(keys)} heads" if len(keys) > 1 else ""
        pooled = rows.size > 1 or cols.size > 1
        unit = name if not pooled else f"{name}\nlargest of {rows.size} × {cols.size}"
        title = ", ".join(filter(None, (title, heads)))
        signed = name == "effect" and bool((values < 0).any())
        return Picture(values, rows, cols, unit, log=not signed, signed=signed, title=title)

    def _per_head(self) -> tuple[Tensor, str]:
        name, ranked = next(iter(self._columns().items()))
        if not ranked.shape[-1]:
            return ranked.new_zeros(ranked.shape[:2]), f"largest {name}"
        return ranked.abs().amax(-1).mean(-1), f"largest {name} of a query, mean"


@dataclass(frozen=True, eq=False)
class TopKSeen(_Listed):
    """The k largest weights of each row, largest first; ties go to the lower key.

    indices int32 (batch, heads, q_len, k): positions of keys, −1 where fewer were visible.
    weights (batch, heads, q_len, k). rest (batch, heads, q_len): the visible mass not listed.
    sink (batch, heads, q_len): the mass that learned sinks took (0 without).
    query_start: the first query's position; one per batch item where they differ.
    """

    indices: Tensor
    weights: Tensor
    rest: Tensor
    sink: Tensor
    query_start: Start = field(default=0, kw_only=True)

    def __repr__(self) -> str:
        listed = ("{:.1%} of the mass listed", lambda: self.weights.sum() / self._mass())
        largest = ("largest weight {:.3f}", self.weights.max)
        return summary(self, _LISTS, self.weights, largest, listed)

    def _mass(self) -> Tensor:
        return self.weights.sum() + self.rest.sum() + self.sink.sum()

    def _columns(self) -> dict[str, Tensor]:
        return {"weight": self.weights}

    def then(self, later: TopKSeen) -> TopKSeen:
        """With the rows of later queries appended."""
        return TopKSeen(*_appended(self, later, 2), query_start=self.query_start)

    def beside(self, other: TopKSeen) -> TopKSeen:
        """With another key shard's candidates, both under the global lse."""
        k = self.indices.shape[-1]
        indices, weights = _ranked(
            torch.cat([self.indices, other.indices], -1),
            torch.cat([self.weights, other.weights], -1),
        )
        dropped = weights[..., k:].sum(-1)
        return TopKSeen(
            indices[..., :k],
            weights[..., :k],
            self.rest + other.rest + dropped,
            self.sink,
            query_start=self.query_start,
        )


@dataclass(frozen=True, eq=False)
class NormTopKSeen(_Listed):
    """The k largest contributions of each row, weight · ‖W_O v‖, largest first.

    indices int32, norms, weights (batch, heads, q_len, k): positions of keys (−1 where fewer were
    visible), the length of what each adds, and its weight.
    query_start: the first query's position; one per batch item where they differ.
    """

    indices: Tensor
    norms: Tensor
    weights: Tensor
    query_start: Start = field(default=0, kw_only=True)

    def _columns(self) -> dict[str, Tensor]:
        return {"norm": self.norms, "weight": self.weights}

    def __repr__(self) -> str:
        return summary(self, _LISTS, self.norms, ("longest {:.3g}", self.norms.max))

    def then(self, later: NormTopKSeen) -> NormTopKSeen:
        """With the rows of later queries appended."""
        pairs = ((getattr(self, n), getattr(later, n)) for n in ("indices", "norms", "weights"))
        return NormTopKSeen(*(torch.cat(pair, 2) for pair in pairs), query_start=self.query_start)

    def beside(self, other: NormTopKSeen) -> NormTopKSeen:
        """With another key shard's candidates, both under the global lse."""
        pairs = ((getattr(self, n), getattr(other, n)) for n in ("indices", "norms", "weights"))
        ranked = _ranked(*(torch.cat(pair, -1) for pair in pairs))
        k = self.indices.shape[-1]
        return NormTopKSeen(*(t[..., :k] for t in ranked), query_start=self.query_start)


class EffectSeen(_Listed):
    """The k edges of each row whose removal would change the differentiated scalar most.

    Empty until `backward()` has run: `ready` says so. Then indices int32, effects and weights, each
    (batch, heads, q_len, k), largest |effect| first: positions of keys (−1 where fewer were
    visible), the signed change of the scalar to first order, and the edge's weight. Of a norm the
    batch is 1, and the effect has no sign. query_start: the first query's position. taker: takes
    the three as soon as they are measured, instead of this result, so that no more than one layer's
    stand in memory.
    """

    def __init__(self, query_start: Start = 0) -> None:
        self.query_start = query_start
        self.taker: Callable[[Tensor, Tensor, Tensor], object] | None = None
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = None
        self._measure: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None

    def __repr__(self) -> str:
        if self._tensors is None:  # measuring may take long: not for a repr
            said = (
                "measured when first asked for" if self.ready else "not measured: no backward() yet"
            )
            return f"EffectSeen({said})"
        return summary(
            self, _LISTS, self.effects, ("largest effect {:.3g}", self.effects.abs().max)
        )

    def fill(self, indices: Tensor, effect: Tensor, weights: Tensor) -> None:
        """Take what a backward pass measured; a later pass replaces it."""
        if self.taker is not None:
            self.taker(indices, effect, weights)
        else:
            self._tensors = indices, effect, weights

    def fill_by(self, measure: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
        """Take what is to be measured when it is first asked for: more passes may come."""
        self._tensors, self._measure = None, measure

    @property
    def ready(self) -> bool:
        """Whether a backward pass has reached this attention."""
        return self._tensors is not None or self._measure is not None

    def _columns(self) -> dict[str, Tensor]:
        return {"effect": self.effects, "weight": self.weights}

    def _shown(self) -> Picture | None:
        return None if self._tensors is None else super()._shown()

    def _field(self, at: int) -> Tensor:
        if self._tensors is None and self._measure is not None:
            self._tensors = self._measure()
        if self._tensors is None:
            raise RegardError("no effect yet: call backward() on the scalar that it is measured on")
        return self._tensors[at]

    @property
    def indices(self) -> Tensor:
        """Positions of keys, int32 (batch, heads, q_len, k); −1 where fewer were visible."""
        return self._field(0)

    @property
    def effects(self) -> Tensor:
        """What removal would add to the scalar, to first order: (batch, heads, q_len, k)."""
        return self._field(1)

    @property
    def weights(self) -> Tensor:
        """The edges' weights (batch, heads, q_len, k)."""
        return self._field(2)

    def beside(self, other: EffectSeen) -> EffectSeen:
        """With another key shard's candidates, of the same backward pass."""
        pairs = [torch.cat(pair, -1) for pair in zip(self.tensors(), other.tensors(), strict=True)]
        indices, effects, weights = pairs
        order = _ranked(indices, effects.abs(), effects, weights)
        k = self.indices.shape[-1]
        joined = EffectSeen(self.query_start)
        joined.fill(order[0][..., :k], order[2][..., :k], order[3][..., :k])
        return joined

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """indices, effects, weights."""
        return self.indices, self.effects, self.weights

    def then(self, later: EffectSeen) -> EffectSeen:
        """Effects of one backward pass do not add up with another's."""
        raise RegardError("Effect watches one forward pass and its backward, not decode steps")


def _ranked(indices: Tensor, worth: Tensor, *others: Tensor) -> list[Tensor]:
    """Lists of keys (…, n) by their worth, the largest first; ties go to the lower key."""
    lists = [indices, worth, *others]
    # Absent entries (−1) last; else by key first, so that a stable sort keeps ties in order
    order = indices.long().where(indices >= 0, torch.iinfo(torch.int64).max).argsort(-1)
    lists = [t.gather(-1, order) for t in lists]
    known = lists[1].where(lists[0] >= 0, -1.0)
    order = known.sort(dim=-1, descending=True, stable=True).indices
    return [t.gather(-1, order) for t in lists]


def _appended(before: TopKSeen, later: TopKSeen, dim: int) -> list[Tensor]:
    pairs = (
        (getattr(before, n), getattr(later, n)) for n in ("indices", "weights", "rest", "sink")
    )
    return [torch.cat(pair, dim) for pair in pairs]
