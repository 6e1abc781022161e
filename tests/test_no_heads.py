"""Zero heads, wherever heads are counted: one RegardError that says so, no matter who is asked."""

import pytest
import torch

import regard
import regard.nn.functional as functional
from regard import Causal, RegardError, TopK
from regard.cache import H2O, KVCache, PagedCache, WindowCache
from regard.nn import (
    Block,
    DeltaAttention,
    Encoder,
    LinearAttention,
    MultiHeadAttention,
    RelativePositions,
    Transformer,
)

NONE, SOME = torch.ones(1, 0, 5, 8), torch.ones(1, 4, 5, 8)
CALLS = {
    "attention": lambda q, k: regard.attention(q, k, k),
    "reference": lambda q, k: regard.attention(q, k, k, engine="reference"),
    "tiled": lambda q, k: regard.attention(q, k, k, mask=Causal(), engine="tiled"),
    "observed": lambda q, k: regard.attention(q, k, k, observe=[TopK(2)]),
    "explain": lambda q, k: regard.explain(q, k, k),
    "observe": lambda q, k: regard.observe(q, k, observe=[TopK(2)]),
    "linear": lambda q, k: regard.linear_attention(q, k, k),
    "drop-in": lambda q, k: functional.scaled_dot_product_attention(q, k, k, enable_gqa=True),
    "cache": lambda q, k: KVCache().attend(q, k, k),
    "window cache": lambda q, k: WindowCache(4).attend(q, k, k),
    "evicting cache": lambda q, k: KVCache(evict=H2O(4)).attend(q, k, k),
    "paged cache": lambda q, k: PagedCache(4).attend(q, k, k),
}
MODULES = {
    "MultiHeadAttention": lambda n: MultiHeadAttention(16, n),
    "kv_heads": lambda n: MultiHeadAttention(16, 4, kv_heads=n),
    "Block": lambda n: Block(16, n),
    "Encoder": lambda n: Encoder(1, 16, n),
    "LinearAttention": lambda n: LinearAttention(16, n),
    "DeltaAttention": lambda n: DeltaAttention(16, n),
    "RelativePositions": lambda n: RelativePositions(n),
    "Transformer": lambda n: Transformer(vocab=9, dim=16, heads=n, encoder=1),
    "Transformer, T5": lambda n: Transformer(
        vocab=9, dim=16, heads=n, decoder=1, positions="relative"
    ),
}


@pytest.mark.parametrize("key", [NONE, SOME], ids=["no kv_heads", "kv_heads"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_of_no_heads_is_refused(call, key):
    with pytest.raises(RegardError, match=r"no (kv_)?heads; give|must divide heads"):
        call(NONE, key)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_of_no_kv_heads_is_refused(call):
    with pytest.raises(RegardError, match=r"kv_heads"):
        call(SOME, NONE)


@pytest.mark.parametrize("number", [0, -2, 2.5, "2"])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_module_of_no_heads_is_refused(make, number):
    with pytest.raises(RegardError, match=r"heads"):
        make(number)
