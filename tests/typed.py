"""What a type checker makes of the front door: checked by mypy, never run."""

from __future__ import annotations

from typing import Any, assert_type

from torch import Tensor

import regard
from regard import Causal, TopK


def plain(q: Tensor) -> Tensor:
    return regard.attention(q, q, q, mask=Causal(), scale=0.5)


def several(q: Tensor, asked: bool) -> None:
    assert_type(regard.attention(q, q, q), Tensor)
    assert_type(regard.attention(q, q, q, return_lse=True), tuple[Tensor, Tensor])
    assert_type(regard.attention(q, q, q, observe=[TopK(8)]), tuple[Tensor, tuple[Any, ...]])
    assert_type(
        regard.attention(q, q, q, observe=[TopK(8)], return_lse=True),
        tuple[Tensor, Tensor, tuple[Any, ...]],
    )
    assert_type(regard.attention(q, q, q, return_lse=asked), Any)


def misspelt(q: Tensor) -> None:
    regard.attention(q, q, q, masks=Causal())  # type: ignore[call-overload]
    regard.attention(q, q, q, mask=3)  # type: ignore[call-overload]
