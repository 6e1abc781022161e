"""Wrong values, wherever they are given: a RegardError that says what stands beside the call.

What is wrong with a request of `attention` stands in tests/test_errors.py, with a command in
tests/test_wrong_commands.py.
"""

import numpy as np
import pytest
import torch

from regard import (
    Dense,
    Distances,
    Documents,
    Dropout,
    Edges,
    First,
    Heads,
    Map,
    NormTopK,
    Padding,
    Received,
    RegardError,
    RelativeBias,
    Rows,
    TopK,
    Window,
    attention,
)
from regard.cache import H2O, TOVA, KVCache, PagedCache, SnapKV, WindowCache
from regard.linear import Favor
from regard.sparse import BlockSparse

ARRAY = np.ones((2, 7), dtype=bool)


def drawn(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def filled(cache):
    cache.append(drawn(2, 2, 3, 8), drawn(2, 2, 3, 6))
    return cache


VALUES = {
    # masks, biases, observers
    "TopK(0)": (lambda: TopK(0), "TopK(k=0): give k ≥ 1"),
    "Map(0, 3)": (lambda: Map(0, 3), "give rows ≥ 1, cols ≥ 1 and reduce sum or max"),
    "Map mean": (lambda: Map(3, 3, "mean"), "give rows ≥ 1, cols ≥ 1 and reduce sum or max"),
    "Received median": (lambda: Received(heads="median"), "each, sum, mean, group_sum or"),
    "Received back": (lambda: Received((5, 3)), "a range (start, stop) of positions"),
    "Distances(0)": (lambda: Distances(0), "give bins ≥ 1, or edges that rise from 0"),
    "Distances from 1": (lambda: Distances((1, 2)), "edges that rise from 0"),
    "Distances down": (lambda: Distances((0, 5, 3)), "edges that rise from 0"),
    "Distances twice": (lambda: Distances((0, 3, 3)), "edges that rise from 0"),
    "Dropout(1)": (lambda: Dropout(1.0), "dropout is 1.0; give 0 ≤ p < 1"),
    "Dropout(-0.1)": (lambda: Dropout(-0.1), "dropout is -0.1; give 0 ≤ p < 1"),
    "Window(2.5)": (lambda: Window(2.5), "Window: n is 2.5; give a whole number"),
    "Window(ahead)": (lambda: Window(2, ahead="3"), "Window: ahead is '3'; give a whole number"),
    "First(NaN)": (lambda: First(float("nan")), "First: n is nan; give a whole number"),
    "Heads(3)": (lambda: Heads(3), "Heads: heads is 3; give a list of whole numbers"),
    "Heads([1.5])": (lambda: Heads([1.5]), "is 1.5; give a whole number"),
    "Rows(3)": (lambda: Rows(3), "Rows: indices is 3; give a list of whole numbers"),
    "Rows([0.5])": (lambda: Rows([0.5]), "Rows: indices is 0.5; give a whole number"),
    "TopK(2.0)": (lambda: TopK(2.0), "TopK: k is 2.0; give a whole number"),
    "Map(2.5, 2)": (lambda: Map(2.5, 2), "Map: rows is 2.5; give a whole number"),
    "Received(5)": (lambda: Received(5), "Received: queries is 5; give a list"),
    "Received of three": (lambda: Received((1, 2, 3)), "a range (start, stop) of positions"),
    "Distances(2.5)": (lambda: Distances(2.5), "Distances: bins is 2.5; give a list"),
    "Distances(99)": (lambda: Distances(99), "beyond every distance"),
    "Padding of an array": (lambda: Padding(ARRAY), "Padding: keep is a ndarray; give a torch"),
    "Padding of a list": (lambda: Padding([True]), "Padding: keep is a list; give a torch"),
    "Dense of an array": (lambda: Dense(ARRAY), "Dense: visible is a ndarray; give a torch"),
    "Documents of a list": (lambda: Documents([0, 1]), "query_ids is a list; give a torch"),
    "BlockSparse": (lambda: BlockSparse(ARRAY, 4), "layout is a ndarray; give a torch"),
    "WindowCache(2.5)": (lambda: WindowCache(2.5), "window is 2.5; give a whole number"),
    "H2O(2.5)": (lambda: H2O(2.5), "H2O: budget is 2.5; give a whole number"),
    "RelativeBias": (
        lambda: RelativeBias(drawn(8, 4), max_distance=2.5),
        "max_distance is 2.5; give a whole",
    ),
    "triples": (
        lambda: Edges([(1, 2, 3), (4, 5, 6)]),
        "Edges: pairs are (2, 3); give (query, key)",
    ),
    "edges on their side": (
        lambda: Edges(torch.zeros(2, 5)),
        "Edges: pairs are (2, 5); give (query",
    ),
    "NormTopK(0)": (lambda: NormTopK(0), "give k ≥ 1"),
    "Window(0)": (lambda: Window(0), "give n ≥"),
    "Window(3, -1)": (lambda: Window(3, ahead=-1), "give n ≥"),
    "First(-1)": (lambda: First(-1), "give n ≥"),
    **{
        f"cu_seqlens {rows}": (
            lambda rows=rows: Documents.from_cu_seqlens(torch.tensor(rows)),
            "must be one row that starts at 0",
        )
        for rows in ([1, 3], [0, 3, 2], [[0, 3]])
    },
    "documents of floats": (
        lambda: asked(Documents(torch.tensor([0.2, 0.7, 1.0]))),
        "query_ids is torch.float32; give integers",
    ),
    "an additive mask": (
        lambda: asked(Padding(torch.tensor([[0.0, 0.0, -torch.inf]]))),
        "keep is torch.float32",
    ),
    "Favor(0)": (lambda: Favor(0), "give features ≥ 1 and seed ≥ 0"),
    "Favor(8, -1)": (lambda: Favor(8, -1), "give features ≥ 1 and seed ≥ 0"),
    # caches
    "capacity": (lambda: KVCache(capacity=-1), "capacity is -1; give a number of slots"),
    "evict": (lambda: KVCache(evict=5), "evict is 5; give a policy, such as H2O(512)"),
    "window": (lambda: WindowCache(0), "WindowCache(0, first=0): give window ≥ 1, first ≥ 0"),
    "first": (lambda: WindowCache(4, first=-1), "give window ≥ 1, first ≥ 0"),
    "block": (lambda: PagedCache(0), "PagedCache(0, pages=None): give page_size ≥ 1 and pages ≥ 1"),
    "blocks": (lambda: PagedCache(4, pages=0), "pages=0): give page_size ≥ 1 and pages ≥ 1"),
    "empty": (lambda: KVCache().key, "KVCache() is empty: append keys and values first"),
    "empty pages": (lambda: PagedCache().tables(), "is empty: append keys and values first"),
    "layout": (lambda: KVCache().layout, "nothing was appended yet"),
    "rows": (lambda: filled(KVCache()).select([2]), "select: rows [2]; the batch has items 0 … 1"),
    "crop": (lambda: filled(KVCache()).crop(4), "crop: 4 of 3 tokens"),
    "fork": (lambda: filled(PagedCache()).fork(2), "fork: row 2; the batch has items 0 … 1"),
    "fork length": (lambda: filled(PagedCache()).fork(1, 4), "length 4; item 1 has 3 tokens"),
    # policies
    "no budget": (lambda: TOVA(0), "TOVA(budget=0): the budget is 0 keys"),
    "no room": (
        lambda: H2O(4, recent=5),
        "H2O(budget=4, recent=5): the budget is 4 keys, of which the last 5 are exempt; give "
        "budget ≥ 1, and no more exempt keys than that",
    ),
    "negative": (lambda: H2O(4, recent=-1), "of which the last -1 are exempt"),
    "window of a policy": (
        lambda: SnapKV(16),
        "the budget is 16 keys, of which the last 32 are exempt",
    ),
    "no window": (lambda: SnapKV(16, window=0), "give window ≥ 1 and an odd kernel"),
    "kernel": (lambda: SnapKV(64, kernel=4), "give window ≥ 1 and an odd kernel"),
    "pool": (lambda: SnapKV(64, pool="sum"), "pool is mean or max"),
}


def asked(mask, **more):
    tensor = drawn(1, 1, 3, 8)
    return attention(tensor, tensor, tensor, mask=mask, **more)


@pytest.mark.parametrize("make, said", VALUES.values(), ids=VALUES)
def test_it_says_what_is_wrong(make, said):
    with pytest.raises(RegardError) as error:
        make()
    assert said in str(error.value)
    assert type(error.value) is RegardError
