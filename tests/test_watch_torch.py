"""Watching models of plain torch.nn: MultiheadAttention, TransformerEncoder."""

import pytest
import torch
from torch import nn

import regard
import regard.huggingface
import zoo
from test_watch_models import EVERY_KEY, assert_output, watched
from zoo import dense


def test_plain_torch_model():
    model, x = zoo.plain(), zoo.random(2, 5, 32)
    output, seen = watched(model, {"x": x})
    assert [layer.name for layer in seen] == ["blocks.0", "blocks.1"]
    for layer, block in zip(seen, model.blocks, strict=True):
        query, key, _ = block.heads(x)
        hidden = torch.ones(5, 5).triu(1).bool()
        scores = (query @ key.mT / 8**0.5).masked_fill(hidden, -torch.inf)
        torch.testing.assert_close(dense(layer.seen[0], 5), scores.softmax(-1))
        x = x + block(x)
    assert_output(output, x)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind, k_len", [("self", 5), ("cross", 5), ("cross", 7)])
def test_multihead_attention(kind, k_len, need_weights, padded):
    model = nn.ModuleDict({"attend": zoo.multihead()})
    query = zoo.random(2, 5, 32)
    key = query if kind == "self" else zoo.random(2, k_len, 32)
    hidden = zoo.padding(right=2, length=k_len) == 0
    settings = {"key_padding_mask": hidden} if padded else {}
    call = model["attend"]
    with torch.no_grad():
        exact = call(query, key, key, average_attn_weights=False, **settings)[1]
        theirs = call(query, key, key, need_weights=need_weights, **settings)
        with regard.watch(model, observe=[EVERY_KEY]) as seen:
            ours = call(query, key, key, need_weights=need_weights, **settings)
    (layer,) = seen
    assert (layer.name, layer.kind, layer.heads) == ("attend", kind, 4)
    torch.testing.assert_close(dense(layer.seen[0], k_len), exact)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [False, True])
def test_transformer_encoder(grad):
    """Unwatched and without gradients, PyTorch takes a fused path: padded rows are then 0."""
    model, x = zoo.transformer_encoder(), zoo.random(2, 5, 32)
    kept = zoo.padding(right=2, length=5).bool()
    with torch.set_grad_enabled(grad):
        theirs = model(x, src_key_padding_mask=~kept)
        with regard.watch(model, observe=[EVERY_KEY]) as seen:
            ours = model(x, src_key_padding_mask=~kept)
    assert_output(ours, theirs, kept)
    assert [layer.name for layer in seen] == ["layers.0.self_attn", "layers.1.self_attn"]
    for layer, block in zip(seen, model.layers, strict=True):
        settings = dict(key_padding_mask=~kept, average_attn_weights=False)
        exact = block.self_attn(x, x, x, **settings)[1]
        torch.testing.assert_close(dense(layer.seen[0], 5), exact)
        x = block(x, src_key_padding_mask=~kept)
