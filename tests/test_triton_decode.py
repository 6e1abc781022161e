"""The second pass over few queries and over keys in pages, interpreted, on the shared cases."""

import pytest
import torch

from regard import (
    Causal,
    Distances,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    Padding,
    Received,
    Rows,
    TopK,
    explain,
)
from regard.cache import Pages
from regard.call.checked import Call
from regard.engines import sdpa, sdpa_cuda

SETS = [
    [Received(), TopK(3), Map(16, 16)],
    [Entropy(), MaxScore(), Distances(3)],
    [Received((147, 149), "group_mean"), LogSumExp(), Map(3, 200, "max")],
    [TopK(2), Rows([-1]), Map(16, 3)],
]
CHOSEN = {
    "one query": ["full", "documents", "padding", "edges", "predicate by head", "relative"],
    "few queries": [
        "causal", "heads", "dense", "blocks", "bias", "two biases",
        "placed", "padded",
    ],
    "groups": ["softcap and bias", "sinks alone", "chunks"],
    "as many as can be": ["sinks and window"],
    "many heads": ["alibi"],
    "apart": ["longformer"],
}  # fmt: skip


def jobs() -> dict[str, tuple]:
    """What the workers do: (module, function, arguments)."""
    where, jobs, n = "interpreted_decode", {}, 0
    for sizes, names in CHOSEN.items():
        for name in names:
            dtype = (torch.float32, torch.float32, torch.bfloat16, torch.float16)[n % 4]
            block_k, chunk = ((64, 64), (64, 512), (32, 64))[n % 3]
            asked = SETS[(n + n // 4) % len(SETS)]
            jobs[f"{sizes}: {name}"] = (where, "check", sizes, name, dtype, asked, block_k, chunk)
            n += 1
    every = (where, "check", "one query", "all at once", torch.float32, None, 64, 64)
    jobs["every observer"] = every
    jobs["pages: decode"] = (where, "pages", 1, 16, [100, 37])
    jobs["pages: few"] = (where, "pages", 5, 48, [0, 130])
    jobs["pages: prefill"] = (where, "pages", 40, 1, [70, 41])
    for name in ("many_chunks", "shards", "given_inaccurate", "bad_numbers", "neighbours"):
        jobs[name] = (where, name)
    return jobs


JOBS = jobs()


@pytest.mark.triton
@pytest.mark.parametrize("job", JOBS)
def test_interpreted(job, interpreting):
    assert not interpreting(JOBS[job])


def paged(lengths: list[int], mask=None) -> Call:
    query, pool = torch.zeros(2, 4, 40, 16), torch.zeros(9, 2, 16, 16)
    table = torch.arange(8).view(2, 4)
    pages = Pages(table, torch.tensor(lengths))
    return Call.checked(query.bfloat16(), pool.bfloat16(), pool.bfloat16(), pages=pages, mask=mask)


def test_a_copy_of_pages_hides_what_is_beyond_an_end():
    """Where all items are as long nothing is hidden, so that kernels without masks serve too."""
    alike, ragged = paged([40, 40], Causal()), paged([40, 30], Causal())
    assert sdpa._in_order(alike) is alike.program
    assert torch.equal(sdpa._in_order(ragged).tensors[-1], ragged.pages.keep())
    square = Call.checked(
        alike.query, alike.query, alike.query, mask=Padding(torch.ones(40).bool())
    )
    assert sdpa._in_order(square) is square.program
    assert sdpa_cuda.plain(alike)


def test_explain_says_who_copies():
    query, pool = torch.zeros(2, 4, 3, 16), torch.zeros(9, 2, 16, 16)
    pages = Pages(torch.arange(8).view(2, 4), torch.tensor([64, 20]))
    said = explain(query, pool, pool, pages=pages, observe=[TopK(2)])
    assert list(said)[-2:] == ["pages", "second pass by triton"]
    assert said["pages"] == [
        f"{name} copies keys and values out of them, 0.0 MiB" for name in ("tiled", "reference")
    ]
    assert said["sdpa"] == ["keys lie in pages; its kernel reads none"]
    assert said["second pass by triton"] == ["query is on cpu; the kernel runs on cuda"]
    assert "pages" not in explain(query, query, query)
