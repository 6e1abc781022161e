"""A number that a row does not see changes nothing of it, though it be NaN or infinite.

0 · NaN is NaN: what a product over all keys would carry past a weight of 0. Reported elsewhere:
pytorch/pytorch#101967, Dao-AILab/flash-attention#2374. To the bit, rows, lse, what observers keep
and gradients are what a finite number in its place gives; what is seen is as IEEE has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from observer_truths import parts
from regard import (
    Causal,
    Dense,
    Distances,
    Documents,
    Effect,
    Entropy,
    Heads,
    Map,
    MaxScore,
    NormTopK,
    Padding,
    Predicate,
    Received,
    Rows,
    TopK,
    Window,
    attention,
)
from regard.cache import Pages
from regard.call.checked import Call
from regard.call.geometry import Span
from regard.engines import ENGINES
from regard.sparse import BlockSparse

BATCH, HEADS, KV_HEADS, K_LEN, DIM = 2, 4, 2, 200, 16
BAD = [math.nan, math.inf, -math.inf]
OBSERVERS = [
    TopK(3), Received(), Entropy(), MaxScore(), Rows([0, -1]), Map(8, 8), Distances(), NormTopK(2),
]  # fmt: skip


def every_third_block(q_len: int) -> BlockSparse:
    rows, cols = -(-q_len // 16) + 1, -(-K_LEN // 16)
    return BlockSparse((torch.arange(cols) % 3 > 0).expand(rows, cols), 16, (0, 0))


def left_in() -> Tensor:
    """Of each item, the keys that are no padding: bool (batch, k_len)."""
    return torch.arange(K_LEN)[None] < torch.tensor([[K_LEN - 6], [K_LEN - 70]])


# Each hides some keys from every query of some item and kv head
HIDING: dict[str, Callable[[int], dict[str, Any]]] = {
    "the future": lambda n: {"mask": Causal(), "query_start": 0},
    "before the window": lambda n: {"mask": Causal() & Window(16)},
    "padding": lambda n: {"mask": Padding(left_in())},
    "padding and the future": lambda n: {"mask": Padding(~left_in()) & Causal()},
    "other documents": lambda n: {
        "mask": Documents(torch.arange(n) % 2, torch.arange(K_LEN) // 30 % 4)
    },
    "other heads": lambda n: {"mask": Padding(left_in()) | Heads([2, 3])},
    "blocks": lambda n: {"mask": every_third_block(n), "query_start": 0},
    "predicate": lambda n: {"mask": Predicate(lambda b, h, q, k: (k % 7 != 3) & (k != q))},
    "dense": lambda n: {"mask": Dense(left_in()[:, None, None].expand(-1, 1, n, -1))},
    "a bias of −∞": lambda n: {
        "bias": torch.zeros(1, 1, n, K_LEN).masked_fill(torch.arange(K_LEN) % 5 == 2, -torch.inf)
    },
    "capped": lambda n: {"mask": Padding(left_in()), "softcap": 2.0},
}
ROWS = {"many rows": 150, "few rows": 3, "one row": 1}
DTYPES = {
    "reference": [torch.float64],
    "tiled": [torch.float64, torch.float32],
    "cpu": [torch.float32, torch.bfloat16, torch.float16],
    "sdpa": [torch.float32, torch.bfloat16],
}
RUNS = [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes]
HIDING_RUNS = [  # sdpa takes no cap
    (*run, kind) for run in RUNS for kind in HIDING if (run[0], kind) != ("sdpa", "capped")
]
every_run_and_kind = pytest.mark.parametrize(
    "engine, dtype, kind", HIDING_RUNS, ids=lambda x: str(x)[-8:] if x not in HIDING else x
)
every_run = pytest.mark.parametrize("engine, dtype", RUNS, ids=lambda x: str(x)[-8:])


def drawn(q_len: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(HEADS, q_len), (KV_HEADS, K_LEN), (KV_HEADS, K_LEN)]
    return [torch.randn(BATCH, *s, DIM, generator=rng).to(dtype) for s in shapes]


def seen(q_len: int, request: dict[str, Any]) -> Tensor:
    """Who sees whom: bool (batch, heads, q_len, k_len)."""
    call = Call.checked(*drawn(q_len, torch.float32), **request)
    shown = call.program.visible(Span(0, q_len, 0, K_LEN))
    for bias in call.biases:
        shown = shown & (bias.tensor > -torch.inf)
    return shown.expand(BATCH, HEADS, q_len, K_LEN)


def by_kv_head(shown: Tensor) -> Tensor:
    return shown.unflatten(1, (KV_HEADS, -1)).any(2)


def spoiled(tensors: list[Tensor], part: str, where: Tensor, bad: float) -> list[Tensor]:
    """With `bad` in one or two dims of the keys, or values, at `where` (batch, kv_heads, k_len)."""
    tensors = [t.clone() for t in tensors]
    given = tensors[1 if part == "key" else 2]
    for dim in (3, 12):
        given[..., dim] = given[..., dim].masked_fill(where, bad)
    return tensors


def results(tensors: list[Tensor], engine: str, request: dict[str, Any]) -> list[Tensor]:
    """Out, lse, what observers keep, and gradients."""
    out, lse = attention(*tensors, **request, engine=engine, return_lse=True) if (
        engine != "sdpa"
    ) else (attention(*tensors, **request, engine=engine), torch.zeros(()))  # fmt: skip
    asked = OBSERVERS
    _, watched = attention(*tensors, **request, engine=engine, observe=asked)
    found = [out, lse, *(t for w in watched for t in parts(w).values())]
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, (effect,) = attention(*leaves, **request, engine=engine, observe=[Effect(3)])
    out.float().sin().sum().backward()
    found += [out.detach(), effect.indices, effect.effects, effect.weights]
    return found + [t.grad for t in leaves]


@pytest.mark.sample(1, most=3)
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("rows", ROWS)
@every_run_and_kind
def test_what_no_row_sees_changes_no_bit(engine, dtype, kind, rows, part):
    q_len = ROWS[rows]
    request, tensors = HIDING[kind](q_len), drawn(q_len, dtype)
    call = Call.checked(*tensors, **request)
    if reasons := ENGINES[engine].why_not(call):
        pytest.skip(f"{engine}: {'; '.join(reasons)}")
    hidden = ~by_kv_head(seen(q_len, request)).any(2)
    assert hidden.any()
    right = results(spoiled(tensors, part, hidden, 0.5), engine, request)
    for bad in BAD:
        given = results(spoiled(tensors, part, hidden, bad), engine, request)
        for n, (a, b) in enumerate(zip(given, right, strict=True)):
            if n == len(right) - 2 and part == "key":
                assert not a[hidden].any()
            assert torch.equal(a, b), (bad, n)


@pytest.mark.sample(1, most=3)
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("rows", ROWS)
@every_run_and_kind
def test_what_a_row_sees_is_as_plain_attention_has_it(engine, dtype, kind, rows, part):
    """Of some keys, which some rows see and others do not: those to the bit, these as IEEE says."""
    q_len = ROWS[rows]
    request, tensors = HIDING[kind](q_len), drawn(q_len, dtype)
    call = Call.checked(*tensors, **request)
    if reasons := ENGINES[engine].why_not(call):
        pytest.skip(f"{engine}: {'; '.join(reasons)}")
    shown = seen(q_len, request)
    where = torch.zeros(BATCH, KV_HEADS, K_LEN, dtype=torch.bool)
    where[0, :, [1, 60, 140, 195]] = True
    sees = (shown & where.repeat_interleave(HEADS // KV_HEADS, 1)[:, :, None]).any(-1)
    right = attention(*spoiled(tensors, part, where, 0.5), **request, engine=engine)
    for bad in BAD:
        dirty = spoiled(tensors, part, where, bad)
        out = attention(*dirty, **request, engine=engine)
        assert torch.equal(out[~sees], right[~sees])
        for b, h, i in sees.nonzero()[:: max(1, int(sees.sum()) // 20)].tolist():
            alone = plain_row(dirty, call, b, h, i, shown[b, h, i])
            assert torch.equal(alone.isnan(), out[b, h, i].isnan()), (bad, b, h, i)
            assert torch.equal(alone.isinf(), out[b, h, i].isinf()), (bad, b, h, i)
            near = torch.isclose(out[b, h, i].double(), alone, 0.02, 0.02, equal_nan=True)
            assert near.all(), (bad, b, h, i)


def plain_row(tensors: list[Tensor], call: Call, b: int, h: int, i: int, shown: Tensor) -> Tensor:
    """One row from the keys that it sees alone, in float64."""
    query, key, value = (t.double() for t in tensors)
    kv = h // (HEADS // KV_HEADS)
    scores = call.scale * key[b, kv, shown] @ query[b, h, i]
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores[scores != -torch.inf] if (kept := scores != -torch.inf).any() else scores
    return scores.softmax(-1) @ value[b, kv, shown][kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q_len", [1, 40])
def test_pages_and_buffers_hold_what_they_like_beyond_the_end(q_len, dtype):
    query, key, value = drawn(q_len, dtype)
    lengths, size = torch.tensor([150, 61]), 16
    table = torch.arange(BATCH * 13).view(BATCH, 13).flip(0)
    kept = torch.arange(208).view(13, size) < lengths[:, None, None]
    found = []
    for bad in (0.5, *BAD):
        pools = []
        for tensor in (key, value):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, 8))
            pool = tensor.unflatten(2, (13, size)).transpose(1, 2)
            pool = pool.masked_fill(~kept[:, :, None, :, None], bad)
            pools.append(torch.cat([*pool.flip(0), torch.full_like(pool[0, :1], bad)]))
        pages = Pages(table, lengths)
        for engine in ("cpu", "tiled", "reference"):
            out, (top,) = attention(query, *pools, pages=pages, engine=engine, observe=[TopK(3)])
            held = torch.full((BATCH, KV_HEADS, K_LEN + 9, DIM), bad, dtype=dtype)
            held[:, :, :K_LEN] = key
            view = held[:, :, :K_LEN]
            found.append([out, top.weights, attention(query, view, view, engine=engine)])
    for n, given in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(given, found[n % 3], strict=True)), n


@pytest.mark.parametrize("bad", BAD)
@every_run
def test_a_query_that_sees_nothing_reaches_no_gradient(engine, dtype, bad):
    """Nor does the gradient that arrives at its row."""
    request: dict[str, Any] = {"mask": Documents(torch.arange(70) % 3 - 1, torch.arange(K_LEN) % 2)}
    found = []
    for number in (0.5, bad):
        query, key, value = drawn(70, dtype)
        query[:, :, ::3, 5] = number
        leaves = [t.requires_grad_() for t in (query, key, value)]
        if reasons := ENGINES[engine].why_not(Call.checked(*leaves, **request)):
            pytest.skip(f"{engine}: {'; '.join(reasons)}")
        out = attention(*leaves, **request, engine=engine)
        grad = out.detach().cos()
        if engine in ("tiled", "cpu"):
            grad[:, :, ::3, 2] = number
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_hidden_by_biases_in_every_way():
    """Whole tiles, by several biases, of one head or of all, in rows that see nothing."""
    tensors = drawn(70, torch.float32)
    some = torch.zeros(BATCH, HEADS, 70, K_LEN)
    some[0, :2, :, :150] = some[1, 1, 5] = some[:, :, :, 170:] = -torch.inf
    more = torch.zeros(1, 1, 70, 1)
    more[..., 60:, :] = -torch.inf
    request: dict[str, Any] = {"bias": [some, more]}
    unseen = ~by_kv_head((some + more) == 0).any(2)
    assert unseen.sum() == 2 * 2 * 30 + 150
    for engine in ("reference", "tiled", "cpu"):
        if ENGINES[engine].why_not(Call.checked(*tensors, **request)):
            continue
        right = results(spoiled(tensors, "key", unseen, 0.5), engine, request)
        for bad in BAD:
            found = results(spoiled(tensors, "key", unseen, bad), engine, request)
            assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True)), (engine, bad)


def test_explain_says_who_multiplies_what_is_hidden():
    tensors = drawn(150, torch.float32)
    (said,) = regard.explain(*tensors, mask=Causal())["hidden"]
    assert said.startswith("sdpa multiplies what is hidden by 0")
    assert "hidden" not in regard.explain(*tensors)
    assert "hidden" not in regard.explain(*tensors, mask=Causal(), softcap=2.0)
