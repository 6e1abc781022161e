"""Who looks into stacks of blocks: `observe=`, `watch`, cuts and effects."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard import (
    Causal,
    Cut,
    Effect,
    Entropy,
    Heads,
    NormTopK,
    Received,
    Rows,
    TopK,
)
from regard.nn import (
    Transformer,
)
from test_blocks import DIM, HEADS
from test_nn import drawn, seeded, tokens


def small(**more: Any) -> Transformer:
    return seeded(
        lambda: Transformer(vocab=11, dim=DIM, heads=HEADS, encoder=1, decoder=2, **more)
    ).eval()


def test_observe_reaches_every_layer():
    model = small()
    logits, seen = model(tokens(), tokens(9), observe=[TopK(2), Entropy()])
    assert torch.equal(logits, model(tokens(), tokens(9)))
    assert [len(seen.encoder), len(seen.decoder)] == [1, 2]
    for block in (*seen.encoder, *seen.decoder):
        for part in (block.own, block.cross)[: 1 if block in seen.encoder else 2]:
            assert [type(s).__name__ for s in part] == ["TopKSeen", "EntropySeen"]
    assert seen.encoder[0].cross == ()
    assert seen.decoder[1].cross[0].weights.shape == (2, HEADS, 7, 2)
    decoder = Transformer(vocab=11, dim=DIM, heads=HEADS, decoder=1)
    assert len(decoder(tokens(), observe=[Entropy()])[1].decoder) == 1
    encoder = Transformer(vocab=11, dim=DIM, heads=HEADS, encoder=1)
    assert len(encoder(tokens(), observe=[Entropy()])[1].encoder) == 1


def test_watch_sees_every_layer():
    """By name, with the same results as observe=, and the same logits to the bit."""
    model, given = small(), (tokens(), tokens())
    watchers = [TopK(2), Received(), Rows([3])]
    with regard.watch(model, observe=[*watchers, NormTopK(2)], keep_qk=True) as seen:
        logits = model(*given)
    assert torch.equal(logits, model(*given))
    assert [(layer.name, layer.kind) for layer in seen] == [
        ("encoder.layers.0.attention", "self"),
        ("decoder.layers.0.attention", "self"),
        ("decoder.layers.0.cross_attention", "cross"),
        ("decoder.layers.1.attention", "self"),
        ("decoder.layers.1.cross_attention", "cross"),
    ]
    _, told = model(*given, observe=watchers)
    parts = [told.encoder[0].own, *(p for b in told.decoder for p in b)]
    for layer, part in zip(seen, parts, strict=True):
        top, received, rows, _ = layer.seen
        torch.testing.assert_close(top.weights, part[0].weights)
        assert torch.equal(top.indices, part[0].indices)
        torch.testing.assert_close(received.sum, part[1].sum)
        torch.testing.assert_close(rows.weights, part[2].weights)
    weights = seen.recording().weights("decoder.layers.1.cross_attention", 1)
    torch.testing.assert_close(weights[3], told.decoder[1].cross[2].weights[0, 1, 0])


def test_watch_and_observe_together():
    model = small()
    with regard.watch(model, observe=[Entropy()]) as seen:
        _, told = model(tokens(), tokens(), observe=[Entropy()])
    mine = told.decoder[0].own[0].values
    torch.testing.assert_close(seen["decoder.layers.0.attention"].seen[0].values, mine)


def test_watch_follows_a_decoding_model():
    """Rows are appended step by step, in self- and in cross-attention."""
    model = small()
    target, source = tokens(), tokens(9, seed=1)
    with torch.no_grad():
        with regard.watch(model, observe=[TopK(2)]) as whole:
            model(target, source)
        with regard.watch(model, observe=[TopK(2)]) as seen:
            memory = model.remember(model.encode(source))
            caches = [regard.cache.KVCache() for _ in range(2)]
            for a, b in ((0, 4), (4, 5), (5, 7)):
                model.decode(target[:, a:b], memory, caches=caches)
    for layer in seen:
        assert layer.q_len == whole[layer.name].q_len
        torch.testing.assert_close(layer.seen[0].weights, whole[layer.name].seen[0].weights)
        assert torch.equal(layer.seen[0].indices, whole[layer.name].seen[0].indices)


def test_watch_cuts():
    """A head cut is a head whose output is 0; what the caller's mask hides stays hidden."""
    model, given = small(), (tokens(), tokens(9))
    name = "decoder.layers.1.cross_attention"
    with regard.watch(model, cut=[Cut(name, Heads([2]))]):
        out = model(*given)
    with torch.no_grad():
        model.get_submodule(name).out_proj.weight[:, 8:12] = 0
    torch.testing.assert_close(out, model(*given))
    with regard.watch(
        model, observe=[Rows([4])], cut=[Cut("decoder.layers.0.attention", Heads([1]))]
    ) as seen:
        model(*given)
    weights = seen["decoder.layers.0.attention"].seen[0].weights
    assert not weights[:, 1].any()
    assert not weights[:, :, :, 5:].any()
    assert (weights[:, 0, 0, :5] > 0).all()


def test_watch_measures_effects():
    """Of an edge whose removal changes the scalar: the first order is near the real change."""
    model, given = small(), (tokens(), tokens(9))
    name = "decoder.layers.1.cross_attention"
    with regard.watch(model, observe=[Effect(3)], layers=[name]) as seen:
        logit = model(*given)[0, 6, 2]
        logit.backward()
    (effect,) = seen[name].seen
    key = int(effect.indices[0, 1, 6, 0])
    cut = regard.Edges([(6, key)]) & Heads([1])
    with torch.no_grad(), regard.watch(model, cut=[Cut(name, cut)]):
        real = float(model(*given)[0, 6, 2] - logit)
    assert float(effect.effect[0, 1, 6, 0]) == pytest.approx(real, rel=0.3)


class Own(nn.Module):
    """A model of one's own that calls `regard.attention` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor, **request: Any) -> Any:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return regard.attention(q, k, v, **request)


def test_watch_sees_a_model_that_calls_regard():
    model, x = seeded(Own), drawn(2, 9, DIM)
    request = {"mask": Causal(), "return_lse": True, "observe": [Entropy()]}
    with regard.watch(model, observe=[TopK(2)]) as seen:
        out, lse, (entropy,) = model(x, **request)
    wanted, wanted_lse, (wanted_entropy,) = model(x, **request)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)
    torch.testing.assert_close(entropy.values, wanted_entropy.values)
    assert seen[0].kind == "self"
    assert seen[0].seen[0].weights.shape == (2, HEADS, 9, 2)
