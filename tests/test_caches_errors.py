"""What caches refuse, and what they leave as it was."""

import pytest
import torch

from regard import Padding, RegardError, TopK
from regard.cache import KVCache, PagedCache
from test_caches import LENGTH, caches, drawn
from test_caches_memory import go_on

# Wrong input

ODD = drawn(3)

QKV = (ODD.query, ODD.key, ODD.value)

WRONG = {
    "query of 3 dims": ((ODD.query[0], ODD.key, ODD.value), {}, "each needs 4 dimensions"),
    "lengths apart": (
        (ODD.query[:, :, :2], ODD.key, ODD.value), {},
        "query (2, 4, 2, 8), key (2, 2, 3, 8): each new token has a query and a key",
    ),
    "value": ((ODD.query, ODD.key, ODD.value[:, :1]), {}, "the first three the same"),
    "dtypes": ((ODD.query, ODD.key, ODD.value.float()), {}, "give both in one dtype"),
    "heads": ((ODD.query[:, :3], ODD.key, ODD.value), {}, "kv_heads 2 must divide heads 3"),
    "other kv_heads": (
        (ODD.query, ODD.key[:, :1], ODD.value[:, :1]), {},
        "the cache holds 2 kv_heads, dim 8 and v_dim 6, torch.float64 on cpu",
    ),
    "other dtype": (tuple(t.float() for t in QKV), {}, "torch.float64 on cpu"),
    "other batch": (tuple(t[:1] for t in QKV), {}, "the cache holds a batch of 2"),
    "lengths too long": (QKV, {"lengths": [4, 1]}, "lengths [4, 1]: give one number for each of 2"),
    "lengths too few": (QKV, {"lengths": [1]}, "lengths [1]: give one number for each of 2 items"),
    "mask": (QKV, {"mask": Padding(torch.ones(2, 4).bool())}, "this call needs (2, 6)"),
    "no mask": (QKV, {"mask": torch.ones(3, 3)}, "give a regard mask"),
    "bias": (QKV, {"bias": torch.ones(3, 5)}, "does not broadcast to (2, 4, 3, 6)"),
    "no bias": (QKV, {"bias": ["x"]}, "bias holds 'x'"),
    "observer": (QKV, {"observe": TopK(2)}, "observe is TopK(k=2) alone; give a list"),
    "engine": (QKV, {"engine": "x"}, "no engine is named 'x'"),
}  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize("given, more, said", WRONG.values(), ids=WRONG)
@caches
def test_wrong_input_leaves_the_cache_as_it_was(make, shown, given, more, said):
    data, cache = drawn(), make()
    go = [t[:, :, :3] for t in (data.query, data.key, data.value)]
    cache.attend(*go)
    with pytest.raises(RegardError) as error:
        cache.attend(*given, **more)
    assert said in str(error.value)
    assert cache.lengths.tolist() == [3, 3]
    go_on(cache, data, [0, 1], 3, 37, shown)


@pytest.mark.parametrize("make", [KVCache, PagedCache])
def test_a_first_call_that_fails_leaves_no_shapes(make):
    data, cache = drawn(), make()
    with pytest.raises(RegardError, match="kv_heads 3 must divide heads 4"):
        cache.attend(data.query, data.query[:, :3], data.query[:, :3])
    cache.attend(data.query[:1], data.key[:1], data.value[:1])
    assert cache.lengths.tolist() == [LENGTH]


def test_added_sequences_stay_when_a_call_fails():
    cache = PagedCache(4)
    cache.add(2)
    with pytest.raises(RegardError, match="kv_heads 3 must divide heads 4"):
        cache.attend(ODD.query, ODD.query[:, :3], ODD.query[:, :3])
    assert cache.lengths.tolist() == [0, 0]
    cache.attend(*QKV, lengths=[2, 3])
    assert cache.lengths.tolist() == [2, 3]


@pytest.mark.parametrize("make", [KVCache, PagedCache])
def test_a_cache_keeps_no_graph(make):
    cache, (query, key, value) = make(), QKV
    with pytest.raises(RegardError, match=r"keeps no graph; run under torch.no_grad"):
        cache.attend(query, key.clone().requires_grad_(), value)
    with torch.no_grad():
        out = cache.attend(query, key.clone().requires_grad_(), value)
    assert not out.requires_grad
    # A gradient by the query alone is whole
    asked = query.clone().requires_grad_()
    make().attend(asked, key, value).sum().backward()
    assert asked.grad is not None
