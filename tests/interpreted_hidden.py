"""What test_hidden_cuda.py has its workers do: kernels that mend what PyTorch's spoil, interpreted.

In the place of PyTorch's kernels stands plain torch, which multiplies what is hidden by 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import test_pages
from cases import MASKS, REQUESTS, Case, assert_within, at, plain
from interpreted import case_of
from regard import Causal, Documents, Padding, Predicate, Window, attention
from regard.call.checked import Call
from regard.call.geometry import Span
from regard.engines import hidden, sdpa, sdpa_cuda
from regard.engines.blocks import launch as blocks
from regard.engines.decode import engine as decode

BAD = (torch.nan, torch.inf, -torch.inf)
DIM, HEADS, KV_HEADS, K_LEN = 16, 4, 2, 70
KEPT = torch.arange(K_LEN) % 5 != 2
REQUESTS_OF: dict[str, tuple[int, dict[str, Any]]] = {  # with so many queries
    "square causal": (K_LEN, {"mask": Causal()}),
    "the future": (40, {"mask": Causal(), "query_start": 0}),
    "window": (40, {"mask": Causal() & Window(16)}),
    "padding": (40, {"mask": Padding(KEPT[None])}),
    "documents": (40, {"mask": Documents(torch.arange(40) % 3 - 1, torch.arange(K_LEN) // 30)}),
    "by head": (40, {"mask": Predicate(lambda b, h, q, k: (k % 7 != 3) & (k - h != q))}),
    "a bias of −∞": (
        40, {"bias": torch.zeros(1, HEADS, 40, K_LEN).masked_fill(~KEPT, -torch.inf)}
    ),
}  # fmt: skip


def _scores(call: Call, laid: sdpa_cuda.Laid) -> Tensor:
    """As PyTorch's kernels: a causal mask of their own sets scores, any other is added to them."""
    key = call.key.repeat_interleave(call.place.heads // call.place.kv_heads, 1)
    scores = call.scale * call.query @ key.mT
    if laid[0] is not None:
        return scores + laid[0]
    shown = call.program.visible(Span(0, call.place.q_len, 0, call.place.k_len))
    return scores.masked_fill(~shown, -torch.inf)


def _forward(call: Call, laid: sdpa_cuda.Laid) -> tuple[Tensor, Tensor]:
    scores = _scores(call, laid).float()
    lse = scores.logsumexp(-1)
    group = call.place.heads // call.place.kv_heads
    out = (scores - lse[..., None]).exp().to(call.value.dtype) @ call.value.repeat_interleave(
        group, 1
    )
    if laid[1] is None:
        return out, lse
    return out.masked_fill(laid[1][..., None], 0), lse.masked_fill(laid[1], -torch.inf)


def _backward(
    call: Call, laid: sdpa_cuda.Laid, out: Tensor, lse: Tensor, grad: Tensor
) -> sdpa_cuda.Gradients:
    group = call.place.heads // call.place.kv_heads
    key, value = (t.repeat_interleave(group, 1).float() for t in (call.key, call.value))
    query, grad = call.query.float(), grad.float()
    if laid[1] is not None:
        lse = lse.masked_fill(laid[1], 0)
    p = (_scores(call, laid).float() - lse[..., None]).exp()
    delta = (grad * out.float()).sum(-1, keepdim=True)
    ds = p * (grad @ value.mT - delta)
    found = (call.scale * ds @ key, call.scale * ds.mT @ query, p.mT @ grad)
    d_query, *others = (g.to(call.query.dtype) for g in found)
    d_key, d_value = (g.unflatten(1, (call.place.kv_heads, group)).sum(2) for g in others)
    return d_query, d_key, d_value


def kernel_of(call: Call, capability: tuple[int, int]) -> sdpa_cuda.Kernel:
    able = next(k for k in sdpa_cuda.preference(capability) if not k.why_not(call, capability))
    return replace(able, forward=_forward, backward=_backward)


@contextmanager
def on_gpu() -> Iterator[None]:
    """Engine `sdpa` as on a Hopper GPU, but for PyTorch's kernels themselves."""
    with ExitStack() as stack:
        for where, name, value in (
            (sdpa_cuda, "serves", lambda call: True),
            (sdpa_cuda, "kernel_of", kernel_of),
            (sdpa, "capability", lambda call: (9, 0)),
            (hidden, "spread_by", lambda call, out: False),
            (blocks, "forward_blocks", lambda call: (32, 32)),
            (blocks, "backward_blocks", lambda call: (32, 16)),
        ):
            stack.enter_context(patch.object(where, name, value))
        yield


def drawn(q_len: int, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(HEADS, q_len), (KV_HEADS, K_LEN), (KV_HEADS, K_LEN)]
    return [torch.randn(1, *s, DIM, generator=rng).to(dtype) for s in shapes]


def seen(call: Call) -> Tensor:
    """Who sees whom: bool (1, heads, q_len, k_len)."""
    shown = call.program.visible(Span(0, call.place.q_len, 0, K_LEN))
    for bias in call.biases:
        shown = shown & (bias.tensor > -torch.inf)
    return shown.expand(1, HEADS, -1, -1)


def gradients(tensors: list[Tensor], request: dict[str, Any], engine: str) -> list[Tensor]:
    """out, and gradients of query, key and value."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = attention(*leaves, **request, engine=engine)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def unseen(name: str, dtype: torch.dtype, part: int) -> None:
    """What no row sees changes nothing, forward and backward, against float64 on clean numbers."""
    q_len, request = REQUESTS_OF[name]
    tensors = drawn(q_len, dtype)
    call = Call.checked(*tensors, **request)
    if name == "square causal":  # the last row sees all keys: nothing is hidden from every row
        hides = torch.zeros(1, KV_HEADS, K_LEN, dtype=torch.bool)
    else:
        hides = ~seen(call).unflatten(1, (KV_HEADS, -1)).any(2).any(2)
        assert hides.any()
    exactly = {n: v.double() if isinstance(v, Tensor) else v for n, v in request.items()}
    truth = gradients([t.double() for t in tensors], exactly, "reference")
    near = gradients(tensors, request, "reference")
    for bad in BAD:
        dirty = [t.clone() for t in tensors]
        for dim in (3, 12):
            dirty[part][..., dim] = dirty[part][..., dim].masked_fill(hides, bad)
        with on_gpu():
            found = gradients(dirty, request, "sdpa")
            alone, lse = attention(*dirty, **request, engine="sdpa", return_lse=True)
        assert torch.equal(alone, found[0])
        for mine, theirs, exact in zip(found, near, truth, strict=True):
            assert_within(mine, theirs, exact, dtype)
        blind = ~seen(call).any(-1)
        assert torch.equal(lse == -torch.inf, blind.expand(lse.shape))


def reached(call: Call) -> list[Tensor]:
    """Which rows, queries, keys and values a bad number may reach, by what sees it."""
    shown = seen(call)
    query, key, value = (~t.isfinite().all(-1) for t in (call.query, call.key, call.value))
    bad = (key | value).repeat_interleave(HEADS // KV_HEADS, 1)
    rows = shown.any(-1) & query | (shown & bad[:, :, None]).any(-1)
    keys = (shown & rows[..., None]).any(2).unflatten(1, (KV_HEADS, -1)).any(2)
    return [rows, rows, keys, keys]


def partly(name: str, part: int) -> None:
    """A number that some rows see: the others are right, and where it goes is as in `tiled`."""
    q_len, request = REQUESTS_OF[name]
    tensors = drawn(q_len, torch.float32)
    places = [(1, 25), (0, 33), (1, q_len - 2)] if part == 0 else [(1, 21)]  # one key head's
    for bad in BAD:
        dirty = [t.clone() for t in tensors]
        for head, token in places:
            dirty[part][0, head, token, 5] = bad
        with on_gpu():
            found = gradients(dirty, request, "sdpa")
        wanted = gradients(dirty, request, "tiled")
        assert torch.equal(found[0].isfinite(), wanted[0].isfinite())
        for n, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
            assert not (mine.isfinite() & ~theirs.isfinite()).any(), (bad, n)
            # Of what a pair with a vanished weight gives IEEE has 0 · ∞ = NaN, and `tiled` 0
            apart = ~reached(Call.checked(*dirty, **request))[n]
            assert theirs[apart].isfinite().all()
            torch.testing.assert_close(mine[apart], theirs[apart], rtol=1e-4, atol=1e-5)


def clean() -> None:
    """Where all is finite, what PyTorch's kernel left stays, to the bit."""
    for name in ("square causal", "padding"):
        q_len, request = REQUESTS_OF[name]
        tensors = drawn(q_len, torch.float32)
        with on_gpu():
            mended = gradients(tensors, request, "sdpa")
            with patch.object(blocks, "mendable", lambda call: False):
                call = Call.checked(*tensors, **request)
                assert torch.equal(mended[0], sdpa.forward(call)[0])
            with patch.object(blocks, "mend"), patch.object(blocks, "mend_gradients"):
                left = gradients(tensors, request, "sdpa")
        assert all(torch.equal(a, b) for a, b in zip(mended, left, strict=True))


def compiled() -> None:
    """An op of ours under a compiler, and under torch.func: what eager calls give, to the bit."""
    for name in ("square causal", "padding"):
        q_len, request = REQUESTS_OF[name]
        dirty = drawn(q_len, torch.float32)
        dirty[2][0, 1, 27, 5] = torch.nan
        weights = torch.linspace(-1, 1, dirty[0].numel()).view(dirty[0].shape)

        def call(*qkv: Tensor, request: dict[str, Any] = request) -> Tensor:
            return attention(*qkv, **request, engine="sdpa")

        def loss(*qkv: Tensor, weights: Tensor = weights) -> Tensor:
            return (call(*qkv) * weights).sum()

        with on_gpu():
            eager = gradients(dirty, request, "sdpa")
            leaves = [t.clone().requires_grad_() for t in dirty]
            out = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
            found = [out.detach(), *torch.autograd.grad(out, leaves, weights)]
            mapped = torch.func.grad(loss, argnums=(0, 1, 2))(*dirty)
        assert eager[0].isnan().any() == (name == "square causal")  # padding is seen by no row
        assert eager[0].isfinite().any()
        for pair in (*zip(found, eager, strict=True), *zip(mapped, eager[1:], strict=True)):
            torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


def forward(name: str, dtype: torch.dtype, tile: tuple[int, int]) -> None:
    """All of a shared case by the kernel of blocks, against float64."""
    build = REQUESTS.get(name) or (lambda s, g: {"mask": MASKS[name](s, g)})
    known = name in REQUESTS or name in MASKS
    case = Case(name, at(50, 90), build) if known else case_of(name)
    tensors, request = case.tensors(dtype=dtype), case.request(dtype)
    call = Call.checked(*tensors, **request)
    assert not blocks.refusals(call)
    ours = blocks.attend(call, tile)
    exactly, truly = case.exactly(dtype)
    truth = attention(*exactly, **truly, engine="reference", return_lse=True)
    for mine, theirs, true in zip(ours, plain(*tensors, **request), truth, strict=True):
        assert_within(mine, theirs, true, dtype)


def pages(q_len: int, size: int, lengths: list[int]) -> None:
    """A prompt over keys and values that stay where they lie, amid NaN; nothing is copied."""
    query, key_pool, value_pool, table, key, value = test_pages.paged(lengths, size, q_len)
    n = max(lengths)
    asked = {"mask": Causal(), "query_start": n - q_len}
    with (
        patch.object(decode, "why_not", decode.refusals),
        patch.object(type(table), "gather", side_effect=AssertionError("copied")),
        patch.object(blocks, "forward_blocks", lambda call: (16, 32)),
    ):
        ours = attention(
            query, key_pool, value_pool, **asked, pages=table, engine="decode", return_lse=True
        )
    keep = torch.arange(n) < torch.tensor(lengths)[:, None]
    given = (query, key[:, :, :n], value[:, :, :n])
    request = asked | {"mask": Causal() & Padding(keep)}
    truth = attention(*(t.double() for t in given), **request, engine="reference", return_lse=True)
    for mine, theirs, true in zip(ours, plain(*given, **request), truth, strict=True):
        assert_within(mine, theirs, true)
