"""What test_decode_engine.py has its workers do: engine `decode`, its kernels interpreted."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

import test_pages
from cases import MASKS, REQUESTS, Case, assert_within, plain
from interpreted_decode import OWN, SIZES
from regard import Causal, Entropy, Padding, TopK, attention
from regard.cache import Pages
from regard.call.checked import Call
from regard.engines.decode import engine as decode
from regard.engines.second_pass.triton import few_queries as few


def check(sizes: str, name: str, dtype: torch.dtype, block_k: int, chunk: int) -> None:
    """A mask or request of the shared cases, of few queries, against float64."""
    build = OWN.get(name) or REQUESTS.get(name) or (lambda s, g: {"mask": MASKS[name](s, g)})
    case = Case(name, SIZES[sizes], build)
    tensors, request = case.tensors(dtype=dtype), case.request(dtype)
    call = Call.checked(*tensors, **request)
    assert not decode.refusals(call)
    with patch.object(few, "CHUNK", chunk):
        ours = decode.attend(call, block_k)
    exactly, truly = case.exactly(dtype)
    truth = attention(*exactly, **truly, engine="reference", return_lse=True)
    assert (ours[0].dtype, ours[1].dtype) == (dtype, torch.float32)
    for mine, theirs, true in zip(ours, plain(*tensors, **request), truth, strict=True):
        assert_within(mine, theirs, true, dtype)


def pages(q_len: int, size: int, lengths: list[int]) -> None:
    """Keys and values read where they lie, amid NaN, against a copy of them in order."""
    query, key_pool, value_pool, table, key, value = test_pages.paged(lengths, size, q_len)
    n = max(lengths)
    ours = decode.attend(
        Call.checked(query, key_pool, value_pool, mask=Causal(), pages=table, query_start=n - q_len)
    )
    keep = torch.arange(n) < torch.tensor(lengths)[:, None]
    given = (query, key[:, :, :n], value[:, :, :n])
    request: dict[str, Any] = {"mask": Causal() & Padding(keep), "query_start": n - q_len}
    truth = attention(*(t.double() for t in given), **request, engine="reference", return_lse=True)
    for mine, theirs, true in zip(ours, plain(*given, **request), truth, strict=True):
        assert_within(mine, theirs, true)


def neighbours() -> None:
    """An item's bits are the same beside a longer one, and from run to run."""
    query, key, value, table, *_ = test_pages.paged([40, 1300], 16, 1)
    both, again = (decode.attend(_at_end(query, key, value, table)) for _ in range(2))
    one = Pages(table.table[:1], table.lengths[:1])
    alone = decode.attend(_at_end(query[:1], key, value, one))
    for mine, twice, single in zip(both, again, alone, strict=True):
        assert torch.equal(mine, twice)
        assert torch.equal(mine[:1], single)


def _at_end(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: Pages) -> Call:
    return Call.checked(query, key, value, pages=table, query_start=1299)


def bad_numbers() -> None:
    """Hidden ones change no bit; those that are seen reach the rows that see them, as in tiled."""
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 40, 16, generator=rng) for n in (4, 2, 2))
    query, mask = query[:, :, :3], Causal()  # the last of 40 keys
    clean = decode.attend(Call.checked(query, key, value, mask=mask & ~_last(5)))
    spoiled = [key.clone(), value.clone()]
    for tensor in spoiled:
        tensor[:, :, 35:] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, 3])[:, None]
    hidden = decode.attend(Call.checked(query, *spoiled, mask=mask & ~_last(5)))
    assert all(torch.equal(a, b) for a, b in zip(clean, hidden, strict=True))
    for odd in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]):
        seen = value.clone()
        seen[0, 1, 40 - len(odd) :, 3] = torch.tensor(odd)  # the last row sees all, the others less
        out, _ = decode.attend(Call.checked(query, key, seen, mask=mask))
        wanted = attention(query, key, seen, mask=mask, engine="tiled")
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def _last(n: int) -> Padding:
    return Padding(torch.arange(40) >= 40 - n)


def observed() -> None:
    """By its name, with observers: nothing is copied out of the pages."""
    query, key, value, table, *_ = test_pages.paged([100, 37], 16, 1)
    asked = [TopK(3), Entropy()]
    request: dict[str, Any] = {"mask": Causal(), "pages": table, "observe": asked}
    out, wanted = attention(query, key, value, **request, engine="tiled")
    with (
        patch.object(decode, "why_not", decode.refusals),
        patch("regard.engines.second_pass.weigh.kernel_refuses", lambda call: []),
        patch.object(Pages, "gather", side_effect=AssertionError("copied")),
    ):
        mine, seen = attention(query, key, value, **request, engine="decode")
    torch.testing.assert_close(mine, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[0].weights, wanted[0].weights, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[0].indices, wanted[0].indices)
