"""Keys and values in pages: read in place, the same as gathered, at any lengths."""

import pytest
import torch

from cases import Case, at
from regard import (
    ALiBi,
    Causal,
    Entropy,
    Full,
    Map,
    NoEngine,
    NormTopK,
    Padding,
    Received,
    RegardError,
    TopK,
    Window,
    attention,
)
from regard.cache import Pages
from regard.sparse import TopBlocks

ROWS = {"decode": 1, "few": 5, "prefill": 90}


def paged(lengths: list[int], size: int, q_len: int, dtype=torch.float32, heads=4, kv_heads=2):
    """Query, pools, pages, and the keys and values that lie in them, in order."""
    rng = torch.Generator().manual_seed(0)
    batch, most = len(lengths), -(-max(lengths) // size)
    query, key, value = Case(
        "", at(q_len, most * size, batch=batch, heads=heads, kv_heads=kv_heads, dim=16, v_dim=24)
    ).tensors(dtype=dtype)
    order = torch.randperm(batch * most + 3, generator=rng)[: batch * most].view(batch, most)
    pools = []
    for tensor in (key, value):
        pool = torch.full((batch * most + 3, kv_heads, size, tensor.shape[-1]), torch.nan).to(dtype)
        pool[order] = tensor.unflatten(2, (most, size)).transpose(1, 2)
        pools.append(pool)
    used = torch.arange(most) * size < torch.tensor(lengths)[:, None]
    table = order.where(used, -1).to(torch.int32)
    return query, *pools, Pages(table, torch.tensor(lengths)), key, value


@pytest.mark.sample(2)
@pytest.mark.parametrize("engine", ["cpu", "tiled", "reference"])
@pytest.mark.parametrize("size", [1, 16, 48, 256])
@pytest.mark.parametrize("q_len", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("lengths", [[300, 300], [1, 300, 77], [0, 40], [1500]], ids=str)
def test_pages_are_their_keys_in_order(lengths, q_len, size, engine):
    query, key_pool, value_pool, pages, key, value = paged(lengths, size, q_len)
    n = max(lengths)
    keep = torch.arange(n) < torch.tensor(lengths)[:, None]
    asked = [TopK(3), Received(), Entropy(), Map(8, 8)]
    for mask in (Full(), Causal() & Window(200)):
        request = {"bias": ALiBi(), "return_lse": True, "query_start": 1000, "observe": asked}
        truth = attention(
            query, key[:, :, :n], value[:, :, :n], mask=mask & Padding(keep), engine="reference",
            **request,
        )  # fmt: skip
        ours = attention(
            query, key_pool, value_pool, mask=mask, pages=pages, engine=engine, **request
        )
        for mine, wanted in zip(ours[:2], truth[:2], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
        for mine, wanted in zip(ours[2], truth[2], strict=True):
            for name in ("weights", "indices", "sum", "count", "values"):
                if hasattr(wanted, name):
                    torch.testing.assert_close(
                        getattr(mine, name), getattr(wanted, name), rtol=1e-4, atol=1e-5
                    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pages_of_short_floats(dtype):
    query, key_pool, value_pool, pages, key, value = paged([130, 200], 32, 3, dtype)
    ours = attention(query, key_pool, value_pool, pages=pages, engine="cpu")
    keep = torch.arange(200) < torch.tensor([130, 200])[:, None]
    truth = attention(
        query, key[:, :, :200], value[:, :, :200], mask=Padding(keep), engine="reference"
    )
    torch.testing.assert_close(ours, truth, rtol=1e-2, atol=1e-2)


def test_what_pages_cannot_serve_is_said():
    query, key, value, pages, *_ = paged([40, 30], 16, 2)
    with pytest.raises(RegardError, match="give Pages"):
        attention(query, key, value, pages=pages.table)
    with pytest.raises(RegardError, match=r"table \(1, 3\).*give \(2, pages of an item\)"):
        attention(query, key, value, pages=Pages(pages.table[:1], pages.lengths))
    with pytest.raises(RegardError, match="lengths reach 99, the table holds 3 pages of 16"):
        attention(query, key, value, pages=Pages(pages.table, torch.tensor([99, 1])))
    wrong = pages.table.clone()
    wrong[0, 0] = 700
    with pytest.raises(RegardError, match="names page 700; the pool has"):
        attention(query, key, value, pages=Pages(wrong, pages.lengths))
    with pytest.raises(NoEngine, match="they take no gradients"):
        attention(query.requires_grad_(), key, value, pages=pages, engine="cpu")


def test_the_second_pass_reads_pages_too():
    query, key_pool, value_pool, pages, key, value = paged([40, 40], 16, 2)
    asked = [NormTopK(2)]
    _, (ours,) = attention(query, key_pool, value_pool, pages=pages, observe=asked)
    _, (truth,) = attention(query, key[:, :, :40], value[:, :, :40], observe=asked)
    assert torch.equal(ours.indices, truth.indices)
    torch.testing.assert_close(ours.norms, truth.norms)


@pytest.mark.parametrize("engine", ["cpu", "tiled"])
def test_blocks_are_chosen_among_the_keys_in_order(engine):
    query, key_pool, value_pool, pages, key, value = paged([130, 200], 32, 40)
    keep = torch.arange(200) < torch.tensor([130, 200])[:, None]
    mask = Causal() & TopBlocks(2, 16)
    request = {"query_start": 160, "engine": engine, "return_lse": True}
    ours = attention(query, key_pool, value_pool, mask=mask, pages=pages, **request)
    mask = mask & Padding(keep)
    truth = attention(query, key[:, :, :200], value[:, :, :200], mask=mask, **request)
    torch.testing.assert_close(ours, truth)
