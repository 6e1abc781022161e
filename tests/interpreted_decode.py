"""What test_triton_decode.py has its workers do, in which Triton interprets its kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Generator, Tensor

import regard.engines.second_pass.weigh
import test_pages
from cases import MASKS, REQUESTS, Case, Sizes, at, bools, floats, left_padding
from interpreted import check_case
from observer_truths import parts
from regard import (
    ALiBi,
    Causal,
    Distances,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    NormTopK,
    Padding,
    Received,
    Rows,
    TopK,
    Window,
    attention,
    observe,
)
from regard.cache import Pages
from regard.call.checked import Call
from regard.engines.second_pass.triton import few_queries as few
from regard.engines.second_pass.triton import few_queries_kernel as chunks
from regard.engines.second_pass.triton import read as reading
from regard.sparse import BlockSparse

SIZES = {
    "one query": at(1, 150),
    "few queries": at(3, 150),
    "groups": at(5, 150, heads=6, kv_heads=1),
    "as many as can be": at(16, 150, heads=8, kv_heads=1, batch=1),
    "many heads": at(2, 70, heads=40, kv_heads=1, batch=1),
    "apart": at(2, 150, kv_heads=4),
}


def _blocks(s: Sizes, g: Generator) -> dict[str, Any]:
    return {"mask": BlockSparse(bools(g, s.batch, s.heads, 1, 10), 16), "sinks": floats(g, s.heads)}


OWN = {
    "blocks": _blocks,
    "padded": lambda s, g: {"mask": left_padding(s, (150, 60)) & Causal() & Window(100)},
    "placed": lambda s, g: {"mask": Causal(), "query_start": 180, "key_start": 37},
}


def check(
    sizes: str, name: str, dtype: torch.dtype, observers: list | None, block_k: int, chunk: int
) -> None:
    """A mask or request of the shared cases, of few queries, in small chunks."""
    build = OWN.get(name) or REQUESTS.get(name) or (lambda s, g: {"mask": MASKS[name](s, g)})
    before = few.CHUNK
    try:
        few.CHUNK = chunk
        case = Case(name, SIZES[sizes], build)
        assert not check_case(case, dtype, observers, (16, block_k))
    finally:
        few.CHUNK = before


def many_chunks() -> None:
    """More of them than are joined at once; the bits do not hang on the neighbours."""
    query, key, _ = Case("", at(1, 280, heads=1, kv_heads=1)).tensors(dtype=torch.float32)
    keep = torch.ones(2, 280, dtype=torch.bool)
    keep[1, 250:] = False
    asked = [TopK(5), Received(), Entropy(), Map(4, 4), MaxScore(), Distances(4)]
    before = few.CHUNK, chunks._PART
    try:
        few.CHUNK, chunks._PART = 16, tl.constexpr(16)
        call = Call.checked(query, key, None, mask=Padding(keep))
        _, lse = attention(query, key, key, mask=Padding(keep), return_lse=True, engine="tiled")
        ours = reading.read(call, asked, lse, False, (16, 16))
        alone = reading.read(call.item(1), asked, lse[1:].clone(), False, (16, 16))
    finally:
        few.CHUNK, chunks._PART = before
    theirs = observe(query, key, observe=asked, mask=Padding(keep))
    for observer, tensors, own, wanted in zip(asked, ours, alone, theirs, strict=True):
        for mine, single, truth in zip(tensors, own, parts(wanted).values(), strict=True):
            assert torch.equal(mine[1:], single), observer
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5, msg=str(observer))


def shards() -> None:
    """With the lse of all keys, a shard's weights are exp(score − lse), as in torch."""
    query, key, _ = Case("", at(4, 150)).tensors(dtype=torch.float32)
    (lse,) = observe(query, key, observe=[LogSumExp()], mask=Causal())
    asked = [TopK(4), Received(), Entropy(), Map(8, 8), Rows([-1])]
    place = {"query_start": 146, "key_start": 60, "mask": Causal()}
    call = Call.checked(query, key[:, :, 60:130], None, **place)
    ours = reading.read(call, asked, lse.values, True, (16, 32))
    theirs = observe(query, key[:, :, 60:130], observe=asked, lse=lse.values, **place)
    for observer, tensors, wanted in zip(asked, ours, theirs, strict=True):
        truth = parts(wanted).values()
        for mine, one in zip(tensors, truth, strict=False):
            torch.testing.assert_close(mine, one, rtol=1e-5, atol=1e-5, msg=str(observer))


def given_inaccurate() -> None:
    """Rows of large lse are divided by their own sum, in columns too: their lse is rounded."""
    query, key = torch.randn(1, 2, 3, 16) * 300, torch.randn(1, 2, 50, 16)
    _, lse = attention(query.double(), key.double(), key.double(), return_lse=True)
    asked = [Received(), Map(2, 2), Distances(3)]
    off = lse.float() * (1 + 3e-5)
    received, pooled, far = reading.read(Call.checked(query, key, None), asked, off, False)
    torch.testing.assert_close(received[0].sum(-1), torch.full((1, 2), 3.0))
    torch.testing.assert_close(pooled[0].sum((-1, -2)), torch.full((1, 2), 3.0))
    torch.testing.assert_close((far[0] + far[1]).sum(-1), torch.full((1, 2), 3.0))


def bad_numbers() -> None:
    """A NaN among the queries shows in its row and nowhere else."""
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 40, 16)
    query[0, 1, 2, 3] = torch.nan
    value = torch.randn(1, 2, 40, 16)
    _, lse = attention(query, key, value, return_lse=True, engine="tiled")
    asked = [TopK(3), Received(), Entropy(), MaxScore(), Map(4, 4, "max")]
    call = Call.checked(query, key, None)
    top, received, entropy, score, pooled = reading.read(call, asked, lse, False, (16, 16))
    for rows in (top[1].isnan().all(-1), entropy[0].isnan(), score[0].isnan()):
        assert rows.nonzero().tolist() == [[0, 1, 2]]
    assert received[0].isnan().all(-1).nonzero().tolist() == [[0, 1]]
    assert pooled[0].isnan().any(-1).any(-1).nonzero().tolist() == [[0, 1]]


def pages(q_len: int, size: int, lengths: list[int]) -> None:
    """Keys read where they lie, as `weigh` does it on a GPU, against a copy of them in order."""
    asked = [
        TopK(3), Received(), Entropy(), Map(8, 8), Distances(4), MaxScore(), Rows([-1]), NormTopK(2)
    ]  # fmt: skip
    query, key_pool, value_pool, table, *_ = test_pages.paged(lengths, size, q_len)
    request: dict[str, Any] = {
        "mask": Causal() & Window(60), "bias": ALiBi(), "engine": "tiled", "observe": asked,
        "pages": table,
    }  # fmt: skip
    out, wanted = attention(query, key_pool, value_pool, **request)
    again, seen, calls = in_pages(query, key_pool, value_pool, request)
    assert [(c.pages is not None, c.key.shape) for c in calls] == [(True, key_pool.shape)]
    assert torch.equal(out, again)
    for observer, mine, theirs in zip(asked, seen, wanted, strict=True):
        a, b = (parts(r) for r in (mine, theirs))
        for name, tensor in a.items():
            torch.testing.assert_close(tensor, b[name], rtol=1e-4, atol=1e-5, msg=f"{observer}")


def in_pages(
    query: Tensor, key: Tensor, value: Tensor, request: dict[str, Any]
) -> tuple[Tensor, tuple, list[Call]]:
    """attention with the kernels where there is no GPU, and the calls that they were given."""
    before, read, calls = regard.engines.second_pass.weigh.kernel_refuses, reading.read, []
    try:
        regard.engines.second_pass.weigh.kernel_refuses = reading.why_not
        reading.read = lambda call, *rest: calls.append(call) or read(call, *rest)
        out, seen = attention(query, key, value, **request)
    finally:
        regard.engines.second_pass.weigh.kernel_refuses, reading.read = before, read
    return out, seen, calls


def neighbours() -> None:
    """An item's bits are the same beside a longer one."""
    query, key, _, table, *_ = test_pages.paged([40, 280], 16, 1)
    asked = [TopK(3), Entropy(), Distances(4), MaxScore()]
    one = Pages(table.table[:1], table.lengths[:1])
    start = {"query_start": 280}
    lse = observe_lse(query, key, table, start)
    both = reading.read(
        Call.checked(query, key, None, pages=table, **start), asked, lse, False, (16, 32)
    )
    alone = reading.read(
        Call.checked(query[:1], key, None, pages=one, **start), asked, lse[:1], False, (16, 32)
    )
    for observer, mine, single in zip(asked, both, alone, strict=True):
        for a, b in zip(mine, single, strict=True):
            assert torch.equal(a[:1], b), observer


def observe_lse(query: Tensor, key: Tensor, table: Pages, start: dict[str, int]) -> Tensor:
    call = Call.checked(query, key, None, pages=table, **start).gathered()
    scores = call.scale * query @ call.key.repeat_interleave(2, 1).mT
    hidden = ~table.keep()[:, None, None]
    return scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
