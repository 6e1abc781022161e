"""Results as DataFrames: named index, positions of the sequence, every number once."""

import sys
from dataclasses import fields

import pytest
import torch
from torch import nn

import regard
from regard import (
    Causal,
    Distances,
    Effect,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    NormTopK,
    Received,
    RegardError,
    Rows,
    TopK,
    Window,
)
from regard.cache import H2O, KVCache
from regard.call import edge_results, results

INDEX = {
    TopK(3): (["batch", "head", "query", "rank"], ["key", "weight"]),
    NormTopK(2): (["batch", "head", "query", "rank"], ["key", "norm", "weight"]),
    Effect(2): (["batch", "head", "query", "rank"], ["key", "effect", "weight"]),
    Received(): (["batch", "head", "key"], ["sum", "count", "mean"]),
    Entropy(): (["batch", "head", "query"], ["entropy"]),
    MaxScore(): (["batch", "head", "query"], ["max_score"]),
    LogSumExp(): (["batch", "head", "query"], ["lse"]),
    Rows([21, -1]): (["batch", "head", "query", "key"], ["weight"]),
    Map(4, 4): (["batch", "head", "query", "key"], ["weight"]),
    Distances(4): (["batch", "head", "distance"], ["past", "future"]),
}


@pytest.fixture(scope="module")
def seen():
    """What all observers see of 6 queries from position 20 on, of keys from position 16."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 8, requires_grad=True)
    k = torch.randn(2, 2, 10, 8)
    out, seen = regard.attention(
        q, k, k, mask=Causal() & Window(4), query_start=20, key_start=16, observe=list(INDEX)
    )
    out.sum().backward()
    return dict(zip(INDEX, seen, strict=True))


@pytest.mark.parametrize("observer", INDEX, ids=str)
def test_the_index_has_names_and_positions(seen, observer):
    frame = seen[observer].to_pandas()
    names, columns = INDEX[observer]
    assert list(frame.index.names) == names
    assert list(frame.columns) == columns
    assert frame.index.is_unique
    assert frame.notna().all(axis=None)
    levels = {name: set(frame.index.get_level_values(name)) for name in names}
    assert levels["batch"] == {0, 1}
    assert levels["head"] == {0, 1, 2, 3}
    if "query" in levels and observer not in (Rows([21, -1]), Map(4, 4)):
        assert levels["query"] == set(range(20, 26))


def test_single_numbers_stand_at_their_positions(seen):
    top, rows = seen[TopK(3)], seen[Rows([21, -1])]
    found = top.to_pandas()
    assert found.loc[(1, 2, 23, 1), "key"] == int(top.indices[1, 2, 3, 1])
    assert found.loc[(1, 2, 23, 1), "weight"] == float(top.weights[1, 2, 3, 1])
    assert rows.queries == (21, 25)
    assert rows.to_pandas().loc[(1, 3, 25, 24), "weight"] == float(rows.weights[1, 3, 1, 8])
    received = seen[Received()].to_pandas()
    assert received.loc[(0, 1, 18), "sum"] == float(seen[Received()].sum[0, 1, 2])
    pooled = seen[Map(4, 4)]
    assert pooled.cols.size > 1
    frame = pooled.to_pandas()["weight"]
    last = (pooled.cols.first + pooled.cols.count - 1) * pooled.cols.size
    first = pooled.rows.first * pooled.rows.size
    assert frame.loc[(0, 0, first, last)] == float(pooled.weights[0, 0, 0, -1])
    near = seen[Distances(4)].to_pandas()
    assert near.loc[(1, 1, 2), "past"] == float(seen[Distances(4)].past[1, 1, 2])


def test_keys_that_are_not_there_are_left_out():
    q = torch.randn(1, 1, 3, 8)
    _, (top,) = regard.attention(q, q, q, mask=Causal(), observe=[TopK(3)])
    frame = top.to_pandas()
    assert len(frame) == 6
    assert (frame["key"] >= 0).all()


def test_merged_queries_keep_their_positions():
    q = torch.randn(1, 2, 8, 8)
    asked = [TopK(2), Entropy(), NormTopK(2)]
    parts = [
        regard.attention(q[:, :, a:b], q[:, :, :b], q[:, :, :b], mask=Causal(), observe=asked)[1]
        for a, b in ((3, 5), (5, 8))
    ]
    for first, second in zip(*parts, strict=True):
        queries = first.then(second).to_pandas().index.get_level_values("query")
        assert sorted(set(queries)) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("make", [KVCache, lambda: KVCache(evict=H2O(8))], ids=["full", "H2O"])
def test_of_a_cache_they_are_positions_of_the_sequence(make):
    torch.manual_seed(0)
    cache, q = make(), torch.randn(1, 2, 20, 8)
    for a, b in ((0, 16), (16, 19), (19, 20)):
        new = q[:, :, a:b]
        _, seen = cache.attend(new, new, new, observe=[TopK(2), Entropy()])
        for result in seen:
            assert set(result.to_pandas().index.get_level_values("query")) == set(range(a, b))


def test_items_at_different_positions_each_have_their_own():
    result = results.EntropySeen(torch.rand(2, 1, 3), query_start=(4, 10))
    frame = result.to_pandas()
    assert frame.index.tolist() == [(0, 0, q) for q in (4, 5, 6)] + [
        (1, 0, q) for q in (10, 11, 12)
    ]
    assert frame["entropy"].tolist() == result.values.flatten().tolist()


def test_half_precision_becomes_single():
    frame = results.EntropySeen(torch.rand(1, 1, 3).bfloat16()).to_pandas()
    assert frame["entropy"].dtype == "float32"


def test_what_a_watched_model_saw_begins_with_the_layer():
    class Two(nn.Module):
        def forward(self, q):
            return [nn.functional.scaled_dot_product_attention(q, q, q) for _ in range(2)]

    model = Two()
    with regard.watch(model, observe=[Entropy(), TopK(2)]) as seen:
        model(torch.randn(1, 2, 5, 8))
    frame = seen.to_pandas("entropy")
    assert list(frame.index.names) == ["layer", "batch", "head", "query"]
    assert len(frame) == 2 * 2 * 5
    assert len(seen.to_pandas(TopK)) == len(frame) * 2
    with pytest.raises(RegardError, match="'entropies' is no observer; there are"):
        seen.to_pandas("entropies")


def test_what_a_window_hides_is_a_table():
    frame = regard.context.unseen(Window(2), 4).to_pandas()
    assert frame["hidden"].tolist() == [0, 0, 1, 2]
    assert frame["pairs"].tolist() == [1, 2, 3, 4]


def test_a_missing_package_is_named(monkeypatch):
    result = results.EntropySeen(torch.rand(1, 1, 3))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RegardError, match=r'needs pandas: pip install "regard\[plot\]"'):
        result.to_pandas()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RegardError, match=r'needs matplotlib: pip install "regard\[plot\]"'):
        result.plot()


KINDS = {
    "indices": "keys", "weights": "shares", "rest": "mass", "sink": "mass", "norms": "lengths",
    "query_start": "position", "key_start": "position", "queries": "positions", "q_len": "count",
    "sum": "mass", "count": "count", "values": "of the class", "rows": "cells", "cols": "cells",
    "reduce": "how", "most": "asked", "past": "mass", "future": "mass", "edges": "distances",
}  # fmt: skip


def test_fields_are_named_alike():
    """A new result takes these words, or adds one here; `indices` are keys, wherever they stand."""
    found = [
        held
        for module in (results, edge_results)
        for name, held in vars(module).items()
        if name.endswith("Seen") and name != "EffectSeen"
    ]
    assert len(found) >= 9
    for kind in found:
        assert {f.name for f in fields(kind)} <= set(KINDS), kind
