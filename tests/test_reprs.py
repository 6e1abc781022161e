"""Reprs are short: sizes and few numbers, never what a tensor holds. Results by their observers."""

import pytest
import torch
from torch import nn

import regard
from regard import (
    ALiBi,
    Causal,
    Cut,
    Dense,
    Distances,
    Documents,
    Dropout,
    Edges,
    Effect,
    Entropy,
    Heads,
    LogSumExp,
    Map,
    MaxScore,
    NormTopK,
    Padding,
    Predicate,
    Received,
    RegardError,
    RelativeBias,
    Rows,
    TopK,
    Window,
)
from regard.cache import Pages
from regard.sparse import BlockSparse

OBSERVERS = [
    TopK(3), Received(), Entropy(), Map(4, 4), MaxScore(), Rows([0, 3]), Distances(), LogSumExp(),
    NormTopK(2), Effect(2),
]  # fmt: skip
N = 300
VALUES = [
    *OBSERVERS,
    Rows(range(N)), NormTopK(3, torch.rand(64, 64)),
    Causal() & Window(3), Documents(torch.arange(N)), Padding(torch.ones(1, N).bool()),
    BlockSparse(torch.ones(64, 64).bool(), 64), Edges([(i, i) for i in range(N)]),
    Dense(torch.ones(N, N).bool()), ~Dense(torch.ones(N, N).bool()), Heads(range(N)),
    Predicate(lambda batch, head, query, key: query > key),
    Cut(3, Dense(torch.ones(N, N).bool())), ALiBi(torch.rand(N)), RelativeBias(torch.rand(32, 8)),
    Dropout(0.1, torch.tensor(3)), regard.context.unseen(Window(10), N),
    Pages(torch.zeros(4, N, dtype=torch.int32), torch.ones(4, dtype=torch.int32)),
    regard.linear_attention(*[torch.randn(1, 2, 30, 16)] * 3, return_state=True)[1],
]  # fmt: skip


class Two(nn.Module):
    """Attention twice."""

    def forward(self, q):
        return [nn.functional.scaled_dot_product_attention(q, q, q) for _ in range(2)]


def seen_by(*observers, keep_qk=False):
    torch.manual_seed(0)
    model = Two()
    with regard.watch(model, observe=observers, keep_qk=keep_qk) as seen:
        model(torch.randn(1, 2, 7, 8))
    return seen


def is_short(value):
    said = repr(value)
    assert 0 < len(said) < 200
    assert "tensor(" not in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_what_is_given_has_a_short_repr(value):
    assert type(value).__name__ in is_short(value) or value.__class__.__str__ is not object.__str__


@pytest.mark.parametrize("q_len", [0, 40])
def test_results_have_short_reprs(q_len):
    torch.manual_seed(0)
    q = torch.randn(2, 3, q_len, 8, requires_grad=True)
    out, seen = regard.attention(q, q, q, observe=OBSERVERS)
    assert is_short(seen[-1]) == "EffectSeen(not measured: no backward() yet)"
    out.sum().backward()
    for result in seen:
        said = is_short(result)
        assert said.startswith(f"{type(result).__name__}(batch 2, heads 3, ")
    assert f"q_len {q_len}, k 3" in repr(seen[0])
    assert ("% of the mass listed" in repr(seen[0])) == (q_len > 0)


def test_a_result_says_its_numbers():
    q = torch.zeros(1, 1, 4, 8)  # every key is read alike
    _, (top, received, entropy) = regard.attention(
        q, q, q, observe=[TopK(2), Received(), Entropy()]
    )
    assert repr(top) == (
        "TopKSeen(batch 1, heads 1, q_len 4, k 2; largest weight 0.250, 50.0% of the mass listed)"
    )
    assert repr(received) == (
        "ReceivedSeen(batch 1, heads 1, k_len 4; 4 queries, largest mean 0.25)"
    )
    assert repr(entropy) == (
        "EntropySeen(batch 1, heads 1, q_len 4; mean 1.386, least 1.386, most 1.386)"
    )


def test_a_result_without_data_has_a_repr():
    q = torch.empty(1, 2, 7, 8, device="meta")
    assert "batch 1, heads 2, q_len 7" in is_short(regard.call.results.EntropySeen(q[..., 0]))


def test_what_watch_saw_has_short_reprs():
    seen = seen_by(TopK(2), Received(), keep_qk=True)
    assert "Two, 2 layers" in is_short(seen)
    layer = is_short(seen[0])
    assert "heads 2, q_len 7, k_len 7, observed by [TopK(k=2), Received(" in layer
    recording = seen.recording(text="a b c d e f g " * 9, tokens=list("abcdefg"))
    assert is_short(recording).startswith("Recording(Two, 2 layers, heads 2, 7 tokens, 'a b c d")
    assert "heads 2, q_len 7, k_len 7" in is_short(recording.layers[0])
    is_short(recording.layers[0].chunks[0])


def test_a_watch_that_saw_nothing_yet_has_a_repr():
    model = Two()
    with regard.watch(model) as seen:
        assert "0 layers so far" in is_short(seen)


def test_a_result_is_picked_by_its_observer():
    seen = seen_by(TopK(2), Received(), Received(heads="sum"))
    layer = seen[1]
    top, each, pooled = layer.seen
    assert layer[TopK] is top
    assert layer[TopK(2)] is top
    assert layer[Received()] is each
    assert layer[Received(heads="sum")] is pooled
    assert layer[-1] is pooled
    assert [*layer] == [top, each, pooled]


def test_an_observer_that_holds_a_tensor_is_picked():
    projection = torch.rand(16, 16)
    layer = seen_by(NormTopK(2, projection), Rows([1]))[0]
    assert layer[NormTopK(2, projection)] is layer.seen[0]
    with pytest.raises(RegardError, match="was not observed by NormTopK"):
        layer[NormTopK(2, projection.clone())]


@pytest.mark.parametrize(
    "which, said",
    [
        (Entropy, r"was not observed by Entropy, but by TopK\(k=2\), Received"),
        (TopK(3), r"was not observed by TopK\(k=3\), but by"),
        (Received, "was observed by several Received: name one of"),
        ("TopK", "give an observer, its class, or a number"),
        (dict, "give an observer, its class, or a number"),
    ],
    ids=str,
)
def test_what_picks_no_result_says_so(which, said):
    layer = seen_by(TopK(2), Received(), Received(heads="sum"))[0]
    with pytest.raises(RegardError, match=said):
        layer[which]
