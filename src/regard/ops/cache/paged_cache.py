"""PagedCache: keys and values in pages of one pool, a table of pages for each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from ...call.pages import Pages
from ...errors import RegardError
from ..attend import attention
from .base import Cache
from .buffers import zeros
from .slots import Layout

NO_PAGE = -1  # in a table, beyond a sequence's last page


class Tables(NamedTuple):
    """What an engine reads in place.

    pages int32 (batch, max_pages): the page that holds tokens page_size · i … of a sequence, −1
    beyond its last. lengths int32 (batch,): tokens of each sequence. key (num_pages, kv_heads,
    page_size, dim), value (num_pages, kv_heads, page_size, v_dim): the pools.
    """

    pages: Tensor
    lengths: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class _Own(Pages):
    """A cache's own, which need no check; `longest` is their k_len."""

    longest: int

    @property
    def k_len(self) -> int:
        return self.longest

    def misfit(self, query: Tensor, key: Tensor) -> str:
        return ""


class PagedCache(Cache):
    """Keys and values in pages of `page_size` tokens, which sequences may share. Kwon et al. 2023.

        cache = regard.cache.PagedCache(page_size=16)
        cache.attend(query, key, value)       # one prompt
        cache.select([0, 0, 0, 0])            # four answers to it: the prompt is held once
        cache.attend(queries, keys, values)   # each goes on by itself

    A page is shared by all whose prefix it holds, with a count of them, and copied when one of
    them writes into it. Sequences have any lengths, are added (`add`, `fork`) and dropped
    (`select`) at any time; a freed page is used again. pages: the size of the pool; default: it
    grows by half as needed.
    """

    page_size: int

    def __init__(self, page_size: int = 16, *, pages: int | None = None) -> None:
        super().__init__()
        if page_size < 1 or (pages is not None and pages < 1):
            raise RegardError(
                f"PagedCache({page_size}, pages={pages}): give page_size ≥ 1 and pages ≥ 1"
            )
        self.page_size, self._most = page_size, pages
        self._tables: list[list[int]] = []
        self._shares: list[int] = []  # of each page of the pool: the tables that name it
        self._free: list[int] = []
        self._written: Tensor | None = None  # the tables as a tensor, until a page comes or goes

    def __repr__(self) -> str:
        return f"PagedCache({self.page_size}, pages={self._most})"

    @property
    def pages(self) -> int:
        """Pages in use; one that is shared counts once."""
        return len(self._shares) - len(self._free)

    @property
    def nbytes(self) -> int:
        pools = (self._key, self._value)
        return sum(t.numel() * t.element_size() for t in pools if t is not None)

    def tables(self) -> Tables:
        """The tables, lengths and pools, for an engine that reads the pages in place."""
        key, value = self._buffers()
        if self._written is None:
            most = max(map(len, self._tables), default=0)
            rows = [t + [NO_PAGE] * (most - len(t)) for t in self._tables]
            self._written = torch.tensor(rows, dtype=torch.int32, device=key.device)
            self._written = self._written.reshape(len(rows), most)
        lengths = torch.tensor(self._lengths, dtype=torch.int32, device=key.device)
        return Tables(self._written, lengths, key, value)

    def read(self) -> tuple[Tensor, Tensor]:
        """Key and value, gathered: (batch, kv_heads, slots, dim), 0 beyond a sequence's end."""
        tables = self.tables()
        pages = Pages(tables.pages, tables.lengths)
        return pages.gather(tables.key), pages.gather(tables.value)

    def _attention(self, query: Tensor, **request: Any) -> Any:
        # An engine that can reads the pages in place; who watches has no use for a table
        named = request.get("engine", "auto")
        if named not in ("auto", "cpu") or has_torch_function_unary(query):
            return super()._attention(query, **request)
        tables = self.tables()
        pages = _Own(tables.pages, tables.lengths, self.length)
        return attention(query, tables.key, tables.value, pages=pages, **request)

    # Sequences

    def add(self, count: int = 1) -> None:
        """Add empty sequences at the end of the batch."""
        self._tables += [[] for _ in range(count)]
        self._lengths += [0] * count
        self._written = self._layout = None

    def fork(self, row: int, length: int | None = None) -> int:
        """Add a sequence that shares the first `length` tokens of another, default all: its row."""
        if not 0 <= row < len(self._tables):
            raise RegardError(f"fork: row {row}; the batch has items 0 … {len(self._tables) - 1}")
        length = self._lengths[row] if length is None else length
        if not 0 <= length <= self._lengths[row]:
            raise RegardError(f"fork: length {length}; item {row} has {self._lengths[row]} tokens")
        self._tables.append(self._shared(self._tables[row][: self._count(length)]))
        self._lengths.append(length)
        self._written = self._layout = None
        return len(self._tables) - 1

    def _pick(self, rows: Tensor) -> None:
        picked = [self._shared(self._tables[row]) for row in rows.tolist()]
        for table in self._tables:
            self._release(table)
        self._tables, self._written = picked, None

    def _drop(self, counts: list[int]) -> None:
        for row, (held, count) in enumerate(zip(self._lengths, counts, strict=True)):
            keep = self._count(held - count)
            self._release(self._tables[row][keep:])
            del self._tables[row][keep:]
        self._written = None

    def _clear(self) -> None:
        self._key = self._value = self._written = None
        self._tables, self._shares, self._free = [[] for _ in self._lengths], [], []

    # Writing

    def _write(self, key: Tensor, value: Tensor, new: list[int]) -> Layout:
        starts = list(self._lengths)
        self._tables = self._tables or [[] for _ in new]
        self._make_room(key, value, starts, new)
        slots = max((s + n for s, n in zip(starts, new, strict=True)), default=0)
        layout = Layout(key.shape[1], key.shape[2], slots, starts, starts, new)
        pools = self._buffers()
        if key.shape[2] == 1:
            self._write_one(key, value, starts, new)
            return layout
        at = torch.arange(key.shape[2], device=key.device, dtype=torch.int64)
        position = torch.tensor(starts, device=key.device, dtype=torch.int64)[:, None] + at
        real = at < torch.tensor(new, device=key.device, dtype=torch.int64)[:, None]
        table = self.tables().pages.long()
        number = (position // self.page_size).clamp(max=max(table.shape[1] - 1, 0))
        page, offset = table.gather(1, number)[real], (position % self.page_size)[real]
        for pool, tensor in zip(pools, (key, value), strict=True):
            pool[page, :, offset] = tensor.transpose(1, 2)[real]
        return layout

    def _write_one(self, key: Tensor, value: Tensor, starts: list[int], new: list[int]) -> None:
        """A decode step's keys and values: at most one token of each sequence."""
        rows = [row for row, n in enumerate(new) if n]
        pages = [self._tables[row][starts[row] // self.page_size] for row in rows]
        offsets = [starts[row] % self.page_size for row in rows]
        page, offset = torch.tensor([pages, offsets], device=key.device, dtype=torch.int64).long()
        for pool, tensor in zip(self._buffers(), (key, value), strict=True):
            token = tensor[:, :, 0]
            pool[page, :, offset] = token if len(rows) == len(new) else token[rows]

    def _make_room(self, key: Tensor, value: Tensor, starts: list[int], new: list[int]) -> None:
        """Give every sequence the pages that it is about to write, its own. All or nothing."""
        shares, copied, needed = dict[int, int](), [], 0
        for row, (start, n) in enumerate(zip(starts, new, strict=True)):
            table = self._tables[row]
            needed += self._count(start + n) - len(table)
            if n and start % self.page_size:
                last = table[-1]
                left = shares.get(last, self._shares[last])
                if left > 1:
                    copied.append(row)
                    shares[last] = left - 1
        self._provide(key, value, needed + len(copied))
        if needed or copied:
            self._written = None
        for row in copied:
            old, mine = self._tables[row][-1], self._taken()
            for pool in self._buffers():
                pool[mine] = pool[old]
            self._release([old])
            self._tables[row][-1] = mine
        for row, (start, n) in enumerate(zip(starts, new, strict=True)):
            missing = self._count(start + n) - len(self._tables[row])
            self._tables[row] += [self._taken() for _ in range(missing)]

    def _provide(self, key: Tensor, value: Tensor, needed: int) -> None:
        """At least that many free pages. RegardError if the pool may not have them."""
        have = len(self._shares)
        total = have + needed - len(self._free)
        if self._most is not None and total > self._most:
            raise RegardError(
                f"{self!r}: the new tokens need {needed} more pages of {self.page_size}, "
                f"{len(self._free) + self._most - have} are free; drop sequences with select, or "
                "give a larger pool"
            )
        if self._key is not None and self._value is not None and total <= have:
            return
        size = max(total, have + have // 2) if self._most is None else self._most
        pools = []
        for pool, like in ((self._key, key), (self._value, value)):
            larger = zeros(like, size, like.shape[1], self.page_size, like.shape[3])
            if pool is not None:
                larger[:have] = pool
            pools.append(larger)
        self._key, self._value = pools
        self._shares += [0] * (size - have)
        self._free += range(size - 1, have - 1, -1)

    # Pages

    def _count(self, length: int) -> int:
        """How many pages hold that many tokens."""
        return -(-length // self.page_size)

    def _shared(self, table: Sequence[int]) -> list[int]:
        for page in table:
            self._shares[page] += 1
        return list(table)

    def _release(self, table: Sequence[int]) -> None:
        for page in table:
            self._shares[page] -= 1
            if not self._shares[page]:
                self._free.append(page)

    def _taken(self) -> int:
        """A free page, now in one table."""
        page = self._free.pop()
        self._shares[page] = 1
        return page
