"""The attention calls on which every engine, observer and gradient is tested, and their bar.

Numbers are drawn in float32 and rounded to the dtype asked for: one case, one call in all dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from regard import (
    ALiBi,
    Causal,
    Dense,
    Documents,
    Dropout,
    Edges,
    First,
    Full,
    Heads,
    Padding,
    Predicate,
    RelativeBias,
    Window,
)  # fmt: skip
from regard.call.checked import Call
from regard.call.geometry import Span
from regard.engines import ENGINES
from regard.sparse import (
    BigBird,
    BlockSparse,
    Chunks,
    Dilated,
    Fixed,
    Longformer,
    Strided,
    TopBlocks,
)

ON_CUDA = ("flex", "decode")
ON_THE_CPU = [name for name in ENGINES if name not in ON_CUDA]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    v_dim: int


@dataclass(frozen=True)
class Case:
    """One call: sizes, and `build`, which draws the keyword arguments from a generator."""

    name: str
    sizes: Sizes
    build: Callable[[Sizes, Generator], dict[str, Any]] = lambda sizes, rng: {}
    magnitude: float = 1.0  # of the queries, and so of the scores
    layout: Callable[[Tensor], Tensor] = lambda tensor: tensor  # other strides

    def __str__(self) -> str:
        return self.name

    def tensors(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """query, key, value."""
        s, rng = self.sizes, torch.Generator().manual_seed(seed)
        query = floats(rng, s.batch, s.heads, s.q_len, s.dim) * self.magnitude
        key = floats(rng, s.batch, s.kv_heads, s.k_len, s.dim)
        value = floats(rng, s.batch, s.kv_heads, s.k_len, s.v_dim)
        return tuple(self.layout(t.to(dtype)) for t in (query, key, value))

    def request(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """What the case sets of mask, bias, softcap, sinks, dropout, scale and the starts."""
        built = self.build(self.sizes, torch.Generator().manual_seed(1))
        return mapped(built, lambda t: t.to(dtype))

    def exactly(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Tensors and request as rounded to dtype, in float64: what the truth is computed from."""
        tensors = tuple(t.double() for t in self.tensors(dtype=dtype))
        return tensors, mapped(self.request(dtype), lambda t: t.double())


def mapped(request: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The request with every tensor of floats in it changed: biases, slopes, tables, sinks."""

    def inside(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, list):
            return [inside(v) for v in value]
        if isinstance(value, ALiBi) and value.slopes is not None:
            return replace(value, slopes=change(value.slopes))
        if isinstance(value, RelativeBias):
            return replace(value, table=change(value.table))
        return value

    return {name: inside(value) for name, value in request.items()}


def floats(rng: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng)


def bools(rng: Generator, *shape: int, share: float = 0.6) -> Tensor:
    return torch.rand(shape, generator=rng) < share


def ids(rng: Generator, *shape: int) -> Tensor:
    """Documents −1 (none) … 2."""
    return torch.randint(-1, 3, shape, generator=rng)


def at(
    q_len: int = 70,
    k_len: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    v_dim: int | None = None,
) -> Sizes:
    k_len = q_len if k_len is None else k_len
    return Sizes(batch, heads, kv_heads, q_len, k_len, dim, dim if v_dim is None else v_dim)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(tensor: Tensor) -> Tensor:
    wide = torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)
    return wide.flatten(-2)[..., ::2]


def shared_by_the_batch(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def left_padding(s: Sizes, lengths: tuple[int, ...]) -> Padding:
    return Padding(torch.arange(s.k_len) >= s.k_len - torch.tensor(lengths)[:, None])


def packed(s: Sizes, *ends: int) -> Documents:
    return Documents.from_cu_seqlens(torch.tensor([0, *ends, s.k_len]))


WIDE = at(70, 150)  # more keys than queries, and no tile filled
SMALL = at(19, 33)
SINKS = Causal() & (Window(20) | First(4))
PLACED = {"query_start": 101, "key_start": 37}

MASKS = {
    "full": lambda s, g: Full(),
    "causal": lambda s, g: Causal(),
    "window": lambda s, g: Window(20),
    "window ahead": lambda s, g: Window(3, ahead=5),
    "causal window": lambda s, g: Causal() & Window(20),
    "first": lambda s, g: First(40),
    "sinks and window": lambda s, g: SINKS,
    "prefix": lambda s, g: Causal() | First(100),
    "future": lambda s, g: ~Causal(),
    "nothing": lambda s, g: ~Full(),
    "documents": lambda s, g: Documents(ids(g, s.batch, s.q_len), ids(g, s.batch, s.k_len)),
    "documents shared": lambda s, g: Documents(ids(g, s.q_len), ids(g, s.k_len)) & Causal(),
    "padding": lambda s, g: Padding(bools(g, s.batch, s.k_len)),
    "padding shared": lambda s, g: Padding(bools(g, s.k_len)) & ~Window(9),
    "left padding": lambda s, g: left_padding(s, (150, 60)) & Causal(),
    "an item of padding": lambda s, g: left_padding(s, (150, 0)),
    "one key of padding": lambda s, g: left_padding(s, (1, 129)),
    "heads": lambda s, g: Heads([0, 2]) & Causal() | Heads([3]),
    "edges": lambda s, g: Edges([(100, 3), (149, 149), (80, 0), (100, 140)]),
    "no edges": lambda s, g: Edges([]),
    "cut edges": lambda s, g: Causal() & ~(Edges([(100, 3), (120, 5), (80, 80)]) & Heads([1, 3])),
    "dense": lambda s, g: Dense(bools(g, s.batch, s.heads, s.q_len, s.k_len)),
    "dense rows": lambda s, g: Dense(bools(g, s.heads, s.q_len, 1)),
    "dense keys": lambda s, g: Dense(bools(g, s.batch, 1, 1, s.k_len)) | Window(2),
    "dense shared": lambda s, g: ~Dense(bools(g, s.q_len, s.k_len)),
    "predicate": lambda s, g: Predicate(lambda b, h, q, k: (q * 3 + k) % 5 < 2),
    "predicate by head": lambda s, g: Predicate(lambda b, h, q, k: (q - k) < 10 * (h + 1)),
    "predicate by item": lambda s, g: Predicate(lambda b, h, q, k: k < 64 * (b + 1)) & Causal(),
    # Queries stand at 80 … 149
    "block sparse": lambda s, g: BlockSparse(bools(g, s.batch, s.heads, 5, 10), 16),
    "block sparse shared": lambda s, g: BlockSparse(bools(g, 3, 5), 32) & Causal(),
    "block sparse by head": lambda s, g: ~BlockSparse(bools(g, s.heads, 1, 3), 64) | Window(9),
    "block sparse by item": lambda s, g: BlockSparse(bools(g, s.batch, 1, 22, 22), 7, (0, 0)),
    "dilated": lambda s, g: Dilated(6, 11),
    "strided": lambda s, g: Strided(12) & Causal(),
    "fixed": lambda s, g: Fixed(24, 5),
    "fixed and causal": lambda s, g: Fixed(16, 2) & Causal() & Padding(bools(g, s.batch, s.k_len)),
    "longformer": lambda s, g: Longformer(20, [0, 1, 90, 120]),
    "big bird": lambda s, g: BigBird(16, 3, 1, 2, seed=4),
    "chunks": lambda s, g: Chunks(50) & Causal(),
    "chunks that overlap": lambda s, g: Chunks(50, 20),
    "top blocks": lambda s, g: TopBlocks(3, 16),
    "top blocks and causal": lambda s, g: Causal() & TopBlocks(2, 32),
    "top blocks and others": lambda s, g: Causal() & (TopBlocks(2, 16) | Window(9) | First(3)),
    "all but the top blocks": lambda s, g: left_padding(s, (150, 60)) & ~TopBlocks(3, 20),
    "nested": lambda s, g: ~(Causal() & ~Window(9)) & (Padding(bools(g, s.k_len)) | ~First(30)),
}


def _mask(name: str) -> Callable[[Sizes, Generator], dict[str, Any]]:
    return lambda s, g: {"mask": MASKS[name](s, g)}


def _no_row_for_some(s: Sizes, g: Generator) -> dict[str, Any]:
    bias = floats(g, s.batch, 1, s.q_len, s.k_len)
    bias[bools(g, *bias.shape, share=0.5)] = -torch.inf
    bias[:, :, 3] = -torch.inf
    return {"bias": bias}


REQUESTS: dict[str, Callable[[Sizes, Generator], dict[str, Any]]] = {
    "scale": lambda s, g: {"scale": 0.3},
    "alibi": lambda s, g: {"bias": ALiBi(), "mask": Causal()},
    "alibi slopes": lambda s, g: {"bias": ALiBi(floats(g, s.heads).abs())},
    "relative": lambda s, g: {"bias": RelativeBias(floats(g, 32, s.heads))},
    "relative past": lambda s, g: {
        "bias": RelativeBias(floats(g, 16, s.heads), bidirectional=False, max_distance=60),
        "mask": Causal(),
    },
    "bias": lambda s, g: {"bias": floats(g, s.batch, s.heads, s.q_len, s.k_len)},
    "bias of pairs": lambda s, g: {"bias": floats(g, s.q_len, s.k_len), "mask": Causal()},
    "bias of keys": lambda s, g: {"bias": floats(g, s.heads, 1, s.k_len)},
    "bias of queries": lambda s, g: {"bias": floats(g, s.batch, 1, s.q_len, 1)},
    "bias of one key row": lambda s, g: {"bias": floats(g, s.k_len), "mask": Window(20)},
    "bias that hides": _no_row_for_some,
    "two biases": lambda s, g: {"bias": [ALiBi(), floats(g, 1, s.heads, s.q_len, s.k_len)]},
    "three biases": lambda s, g: {
        "bias": [floats(g, s.k_len), RelativeBias(floats(g, 8, s.heads)), floats(g, s.q_len, 1)],
        "mask": SINKS,
    },
    "softcap": lambda s, g: {"softcap": 2.0},
    "softcap and bias": lambda s, g: {"softcap": 0.7, "bias": floats(g, s.q_len, s.k_len)},
    "sinks": lambda s, g: {"sinks": floats(g, s.heads), "mask": Causal()},
    "sinks alone": lambda s, g: {"sinks": floats(g, s.heads), "mask": left_padding(s, (3, 0))},
    "dropout": lambda s, g: {"dropout": Dropout(0.3, 7)},
    "dropout of a window": lambda s, g: {"dropout": Dropout(0.5, 2**40 + 3), "mask": SINKS},
    "all at once": lambda s, g: {
        "mask": SINKS & Padding(bools(g, s.batch, s.k_len, share=0.9)),
        "bias": [ALiBi(), floats(g, s.batch, 1, s.q_len, s.k_len)],
        "softcap": 3.0,
        "sinks": floats(g, s.heads),
        "dropout": Dropout(0.2, -5),
        "scale": 0.5,
        "query_start": 90,
        "key_start": 13,
    },
    "placed": lambda s, g: {"mask": Causal() & Window(40), "query_start": 101, "key_start": 37},
    "placed before its keys": lambda s, g: {"mask": Causal(), "query_start": 5, "key_start": 30},
    "placed edges": lambda s, g: {
        "mask": Edges([(101, 40), (120, 90), (3, 3)]) | First(45),
        "query_start": 101,
        "key_start": 37,
    },
    "placed blocks": lambda s, g: {"mask": BlockSparse(bools(g, s.heads, 5, 10), 16), **PLACED},
    "placed patterns": lambda s, g: {
        "mask": (Strided(13) | Dilated(3, 40)) & ~Fixed(9, 2) & Longformer(160, [100, 104]),
        **PLACED,
    },
    "placed before 0": lambda s, g: {
        "mask": BigBird(16, 1, 1, 2) | Chunks(30, 9) & ~Fixed(7, 1),
        "query_start": -33,
    },
    "placed top blocks": lambda s, g: {"mask": Causal() & TopBlocks(2, 16), **PLACED},
    "placed predicate": lambda s, g: {
        "mask": Predicate(lambda b, h, q, k: (q + k) % 3 > h % 2),
        "query_start": 7,
        "key_start": 3,
    },
    "placed relative": lambda s, g: {
        "bias": [RelativeBias(floats(g, 32, s.heads)), ALiBi()],
        "query_start": 11,
        "key_start": 70,
    },
    "placed dropout": lambda s, g: {"dropout": Dropout(0.4, 1), "query_start": 9, "key_start": 6},
}

CAUSAL, WINDOW = _mask("causal"), _mask("sinks and window")
CASES = [
    *(Case(name, WIDE, _mask(name)) for name in MASKS),
    *(Case(name, WIDE, build) for name, build in REQUESTS.items()),
    *(
        Case(f"{n} square", at(n, batch=1, heads=2, kv_heads=1, dim=8), CAUSAL)
        for n in (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257)
    ),
    *(
        Case(f"{q} × {k}", at(q, k, batch=1, heads=2, kv_heads=2), WINDOW)
        for q, k in ((1, 1), (1, 257), (3, 129), (16, 128), (64, 65), (129, 64), (257, 1), (40, 3))
    ),
    *(
        Case(f"dim {d}, v_dim {v}", at(21, 40, dim=d, v_dim=v), CAUSAL)
        for d, v in ((1, 1), (8, 8), (24, 1), (32, 40), (80, 80), (128, 128), (256, 256))
    ),
    *(
        Case(f"{h} heads of {kv}", at(9, 12, heads=h, kv_heads=kv), CAUSAL)
        for h, kv in ((1, 1), (3, 3), (6, 1), (6, 2), (12, 4))
    ),
    Case("heads apart", SMALL, lambda s, g: {"bias": ALiBi(), "sinks": floats(g, s.heads)}),
    Case("alibi of 6 heads", at(19, heads=6, kv_heads=3), REQUESTS["alibi"]),
    *(
        Case(f"{name}, v_dim 24", replace(WIDE, v_dim=24), _mask(name))
        for name in ("full", "nested")
    ),
    Case("all at once, v_dim 5", replace(WIDE, v_dim=5), REQUESTS["all at once"]),
    Case("one item", at(33, 50, batch=1), WINDOW),
    Case("strips and parts", at(270, 530, dim=8), WINDOW),
    Case("long predicate", at(257, 300, dim=8), _mask("predicate by head")),
    Case("long documents", at(300, dim=8), lambda s, g: {"mask": packed(s, 30, 200) & Causal()}),
    Case("huge scores", SMALL, CAUSAL, magnitude=1000),
    Case("tiny scores", SMALL, magnitude=1e-4),
    Case("huge scores, softcap", SMALL, REQUESTS["softcap"], magnitude=1000),
    Case("transposed", SMALL, CAUSAL, layout=transposed),
    Case("sliced", SMALL, CAUSAL, layout=sliced),
    Case("expanded", SMALL, _mask("window"), layout=shared_by_the_batch),
    Case("no batch", at(5, 7, batch=0), CAUSAL),
    Case("no query", at(0, 7), CAUSAL),
    Case("no key", at(5, 0)),
    Case("no key but sinks", at(5, 0), lambda s, g: {"sinks": floats(g, s.heads)}),
    Case("neither query nor key", at(0, 0), WINDOW),
    Case("no dim", at(5, 7, dim=0, v_dim=3), CAUSAL),
]
# Without the sweep of sizes, for tests that take long or look at something else
FEW = [c for c in CASES if not c.name[0].isdigit()]


def plain(
    query: Tensor, key: Tensor, value: Tensor, *, order: Tensor | None = None, **request: Any
) -> tuple[Tensor, Tensor]:
    """Straightforward torch, wholly in the dtype given: (out, lse). What the bar measures.

    order: in which keys are summed, int (k_len,); default as they stand.
    """
    call = Call.checked(query, key, value, **request)
    place, whole = call.place, Span(0, call.place.q_len, 0, call.place.k_len)
    key, value = (t.repeat_interleave(place.heads // place.kv_heads, 1) for t in (key, value))
    scores = call.scale * (query @ key.mT)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    for bias in call.biases:
        scores = scores + bias.tile(whole, scores.dtype)
    if scores.numel():
        hidden = ~call.program.visible(whole) | (scores == -torch.inf)
        scores = scores.masked_fill(hidden, -torch.inf)
    sinks = torch.full((place.heads,), -torch.inf) if call.sinks is None else call.sinks
    sinks = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
    scores = torch.cat([scores, sinks], -1)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores, -1).masked_fill(blind, 0)[..., :-1]
    if call.dropout is not None and weights.numel():
        weights = weights * call.dropout.factor(whole, place, weights.dtype)
    if order is not None:
        weights, value = weights[..., order], value[..., order, :]
    return weights @ value, torch.logsumexp(scores, -1)


def assert_within(
    ours: Tensor,
    plain: Tensor | Iterable[Tensor],
    exact: Tensor,
    dtype: torch.dtype | None = None,
    error: Callable[[Tensor], Tensor] = torch.amax,
    roundings: int = 1,
) -> None:
    """ours' error ≤ 2 × (plain's error + rounding), each by default the largest over the tensor.

    plain: what plain torch has; or several answers of it, such as by other orders of its sums, of
    which the worst counts: they are asked for until the bar is met.
    For float64 the truth has no more digits than what is tested: give plain in float32 and
    dtype float64, and plain's error is scaled down by what lies between the two.
    """
    assert ours.shape == exact.shape
    finite = exact.isfinite()
    every, some = bool(finite.all()), bool(finite.any())
    assert every or torch.equal(ours[~finite].double(), exact[~finite])

    def largest(tensor: Tensor, error: Callable[[Tensor], Tensor] = error) -> float:
        size = tensor.abs()
        return float(error(size if every else size[finite]))

    mine, theirs = largest(ours.double() - exact) if some else 0.0, 0.0
    scale = largest(exact, torch.amax) or 1.0 if some else 1.0
    for near in [plain] if isinstance(plain, Tensor) else plain:
        assert near.shape == exact.shape
        if not some:
            return
        eps = torch.finfo(near.dtype).eps
        theirs = max(theirs, largest(near.double() - exact))
        finer = torch.finfo(dtype or near.dtype).eps / eps
        bar = 2 * (theirs + roundings * eps * scale) * finer
        if mine <= bar:
            return
    pytest.fail(f"error {mine:.3e}, plain torch's {theirs * finer:.3e}, bar {bar:.3e}")
