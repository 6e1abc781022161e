"""The structs of csrc/abi.h, field by field: the one table by which Python packs them.

The library says how large it was built to read each (`sizes`), which is compared when it is loaded;
a test compares the fields with the header.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any


class Struct:
    """A struct whose fields are 8 bytes wide each, or structs of such, or arrays.

    fields: their names in order; `name:d` is a double, `name:4` four integers, `name:View` the
    struct RegardView; any other is an integer or an address. `at` is where each begins, in words.
    """

    known: dict[str, Struct] = {}  # noqa: RUF012 (the table itself)

    def __init__(self, name: str, fields: str) -> None:
        self.name, self.at = name, dict[str, int]()
        self.fields: list[tuple[str, bool]] = []  # name, whether it is given as several words
        self.words = 0
        form: str = ""
        for field in fields.split():
            label, _, kind = field.partition(":")
            inner = self.known.get(kind)
            wide = inner.words if inner else int(kind) if kind.isdigit() else 1
            self.at[label] = self.words
            self.fields.append((label, wide > 1))
            form += inner.form if inner else "d" if kind == "d" else "q" * wide
            self.words += wide
        self.form: str = form
        # Of its words, in order: bytes as the kernels read them
        self.pack: Callable[..., bytes] = struct.Struct(form).pack
        self.known[name] = self

    @property
    def size(self) -> int:
        """In bytes."""
        return 8 * self.words

    def flat(self, **given: Any) -> list[Any]:
        """The words of a struct whose fields are given by their names, all of them."""
        words: list[Any] = []
        for name, several in self.fields:
            if several:
                words += given[name]
            else:
                words.append(given[name])
        return words


VIEW = Struct("View", "data type stride:4")
PAGES = Struct("Pages", "table row size lengths")
MAP = Struct("Map", "row_first row_size rows col_first col_size cols is_max out")
RECEIVED = Struct("Received", "first last sum count")
DISTANCES = Struct("Distances", "bins edges past future")
OBSERVE = Struct(
    "Observe",
    "k index top rest sink entropy max_score received_count map_count distances_count row_count "
    "received map distances row rows",
)
CALL = Struct(
    "Call",
    "batch heads kv_heads q_len k_len dim v_dim query_start key_start "
    "scale:d softcap:d dropout:d seed threads level parts query:View key:View value:View out:View "
    "lse stats sinks by_offset bias_count code_count bias code mask mask_sizes pages:Pages observe",
)
BACKWARD = Struct(
    "Backward",
    "grad_out:View stats delta type d_query d_key d_value d_by_offset d_bias bias_floats",
)
EFFECT = Struct("Effect", "grad_out:View stats delta k index effect weight")
TILE = Struct("Tile", "batch head zoom row col")
POOLED = Struct("Pooled", "count is_max tile lse out")
COLUMNS = Struct("Columns", "lse received:Received")
ROWS = Struct("Rows", "data stride:3 bytes")
EVICT = Struct(
    "Evict",
    "keep_below keep_from next batch kv_heads heads slots key:Rows value:Rows positions total "
    "query_heads by_layer seen",
)
EVERY = tuple(Struct.known.values())
