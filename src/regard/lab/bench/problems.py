"""Problems: the calls that are timed, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...call.masks import Full, Mask
from ...call.observers import Observer

TYPES = {
    "fp32": (torch.float32, "highest"),
    "fp32-high": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
}
"""A dtype, and the `torch.set_float32_matmul_precision` that it is run under."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call: query (batch, heads, q_len, dim), key and value (batch, kv_heads, k_len, dim).

    backward: time the backward pass alone. observe: what is kept of the weights. threads: torch's
    number of threads; None leaves it. form: linear attention of that form (`forms`), causal.
    Every query must see a key.
    """

    q_len: int
    k_len: int
    dim: int
    type: str = "fp32"
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    mask: Mask = Full()
    backward: bool = False
    observe: tuple[Observer, ...] = ()
    threads: int | None = None
    form: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of query, key and value."""
        return TYPES[self.type][0]

    @property
    def precision(self) -> str:
        """What torch.set_float32_matmul_precision is given."""
        return TYPES[self.type][1]

    @property
    def rounding(self) -> float:
        """The relative error of one number: under "high", of two bfloat16 that make a float32."""
        return 2.0**-15 if self.precision == "high" else torch.finfo(self.dtype).eps

    @property
    def group(self) -> int:
        """The query heads of one kv head."""
        return self.heads // self.kv_heads

    def described(self) -> dict[str, object]:
        """Fit for JSON."""
        sizes = ("batch", "heads", "kv_heads", "q_len", "k_len", "dim")
        return {name: getattr(self, name) for name in sizes} | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "precision": self.precision,
            "mask": str(self.mask),
            "backward": self.backward,
            "observe": [str(o) for o in self.observe],
            "threads": self.threads,
            "form": self.form,
        }
