"""A mask as a small picture of its tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..geometry import Place, Span
from .html import box, svg
from .picture import Picture, Side

CELLS = 32  # along each side
ELEMENTS = 2**20  # that are asked one by one; above, what tiles say
LONGEST = 2**16  # tokens, where the mask's own tensors do not say how many


class Lowered(Protocol):
    """What is drawn: `masks.Mask`, which stands above this module."""

    def lower(self, place: Place) -> Any:
        """The mask as a program."""
        ...


def mask_box(mask: Lowered) -> str:
    """The mask in words, and its cells, each the stronger the more of it is seen."""
    try:
        drawn = _drawn(mask)
    except Exception as error:  # of a predicate's own function, or of what is chosen by content
        drawn = box(f"no picture: {' '.join(str(error).split())[:160]}")
    return box(repr(mask), drawn)


def _drawn(mask: Lowered) -> str:
    sizes = Sizes.of(mask)
    place = sizes.place()
    if not place.q_len or not place.k_len:
        return ""
    rows, cols = (-(-n // CELLS) for n in (place.q_len, place.k_len))
    program = mask.lower(place)
    some, every = program.classes(rows, cols)
    b, h = _shown(some)
    if place.q_len * place.k_len <= ELEMENTS:
        whole = Span(0, place.q_len, 0, place.k_len, slice(b, b + 1), slice(h, h + 1))
        shares = _shares(program.visible(whole)[0, 0], rows, cols)
    else:
        b_, h_ = (min(n, size - 1) for n, size in zip((b, h), some.shape, strict=False))
        shares = torch.where(every[b_, h_], 1.0, 0.4) * some[b_, h_]
    values = shares.masked_fill(shares == 0, torch.nan)
    parts = [f"{name} {at} of {n}" for name, at, n in
             (("batch", b, place.batch), ("head", h, place.heads)) if n > 1]  # fmt: skip
    said = "; ".join([*parts, "strong: seen, faint: in part, blank: hidden"])
    queries = Side("query", place.query_start, rows, sequence=True)
    keys = Side("key", 0, cols, sequence=True)
    return svg(Picture(values.cpu(), queries, keys, "visible"), caption=said, most=1.0)


def _shown(some: Tensor) -> tuple[int, int]:
    """The first batch item and head in which anything is seen."""
    seen = some.flatten(2).any(-1).nonzero()
    return (int(seen[0, 0]), int(seen[0, 1])) if len(seen) else (0, 0)


def _shares(visible: Tensor, rows: int, cols: int) -> Tensor:
    """Which share of each cell of rows × cols pairs is seen."""
    down, across = (-n % size for n, size in zip(visible.shape, (rows, cols), strict=True))
    padded = torch.nn.functional.pad(visible.float(), (0, across, 0, down))
    there = torch.nn.functional.pad(torch.ones_like(visible.float()), (0, across, 0, down))
    seen, all_ = (
        t.unflatten(0, (-1, rows)).unflatten(2, (-1, cols)).sum((1, 3)) for t in (padded, there)
    )
    return seen / all_


@dataclass
class Sizes:
    """How large a call a mask is drawn for: what its tensors need, else what shows its numbers."""

    batch: int = 1
    heads: int = 1
    q_len: int = 0
    k_len: int = 0
    number: int = 4
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, mask: Any) -> Sizes:
        """Of all that stands in the mask."""
        sizes = cls()
        for part, name, value in _fields(mask):
            sizes._see(part, name, value)
        return sizes

    def place(self) -> Place:
        """A call as large, its last query at its last key."""
        longest = min(2 * self.number, LONGEST)
        k_len = self.k_len or self.q_len or longest
        q_len = self.q_len or k_len
        start = k_len - q_len
        return Place(self.batch, self.heads, self.heads, q_len, k_len, start, 0, self.device)

    def _see(self, part: Any, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(part, name, value)
        elif name == "heads":
            self.heads = max(self.heads, 1 + max(value, default=0))
        elif name == "ranges":
            self.number = max([self.number, *(stop for _, stop in value)])
        elif isinstance(value, int) and not isinstance(value, bool) and name != "seed":
            # Several of the pattern's own units are to be seen
            self.number = max(self.number, 8 * value if name == "block" else 2 * value)

    def _tensor(self, part: Any, name: str, tensor: Tensor) -> None:
        self.device = tensor.device
        shape = (1, 1, 1, 1, *tensor.shape)
        if name == "pairs":
            self.number = max(self.number, 1 + int(tensor.max()) if tensor.numel() else 0)
        elif name in ("query_ids", "key_ids", "keep"):
            if name == "query_ids":
                self.q_len = shape[-1]
            if name != "query_ids" or getattr(part, "key_ids", None) is None:
                self.k_len = shape[-1]
            self.batch = max(self.batch, shape[-2])
        else:
            block = getattr(part, "block", 1)
            self.batch, self.heads = max(self.batch, shape[-4]), max(self.heads, shape[-3])
            self.q_len = shape[-2] * block if shape[-2] > 1 else self.q_len
            self.k_len = shape[-1] * block if shape[-1] > 1 else self.k_len


def _fields(mask: Any) -> Iterator[tuple[Any, str, Any]]:
    """The mask's own fields, and those of the masks within it."""
    for f in fields(mask) if is_dataclass(mask) else ():
        value = getattr(mask, f.name)
        if hasattr(value, "lower") and is_dataclass(value):
            yield from _fields(value)
        else:
            yield mask, f.name, value
