"""Every form that torch's attention function takes, inside `watch`: its output, its weights."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalVariant, causal_lower_right, causal_upper_left

import regard
import regard.nn.functional
from cases import assert_within
from regard import Cut, Edges, Rows
from zoo import random

Q_LEN, K_LEN, DIM = 5, 7, 8
EVERY_ROW = Rows(range(K_LEN))  # by positions: where causal is lower right, the last ones


def visible(*shape: int) -> Tensor:
    """A bool mask whose rows all see something."""
    shown = random(*shape) > 0
    shown[..., 0] = True
    return shown


# sizes before the last two of query and of key, arguments, (heads, kv_heads)
FORMS = {
    "2-D": ((), (), {}, (1, 1)),
    "3-D": ((2,), (2,), {}, (1, 1)),
    "3-D and 2-D": ((2,), (), {}, (1, 1)),
    "3-D, a mask an item": ((2,), (2,), {"attn_mask": visible(2, Q_LEN, K_LEN)}, (1, 1)),
    "4-D": ((2, 4), (2, 4), {"scale": 0.3}, (4, 4)),
    "5-D": ((2, 3, 4), (2, 3, 4), {"is_causal": True}, (4, 4)),
    "5-D, a bias for some": ((2, 3, 4), (2, 3, 4), {"attn_mask": random(3, 1, 5, 7)}, (4, 4)),
    "5-D, a bias for all": ((2, 3, 4), (2, 3, 4), {"attn_mask": random(2, 3, 4, 5, 7)}, (4, 4)),
    "one head of keys": ((2, 4), (2, 1), {}, (4, 1)),
    "keys for all items": ((2, 4), (1, 4), {}, (4, 4)),
    "keys without a batch": ((2, 4), (4,), {}, (4, 4)),
    "queries for all": ((1, 1), (2, 4), {}, (4, 4)),
    "grouped": ((2, 4), (2, 2), {"enable_gqa": True}, (4, 2)),
    "grouped, 3-D": ((4,), (2,), {"enable_gqa": True}, (4, 2)),
    "grouped, 5-D": ((2, 3, 4), (2, 3, 2), {"enable_gqa": True, "is_causal": True}, (4, 2)),
    "a mask of one row": ((2, 4), (2, 4), {"attn_mask": visible(2, 1, 1, K_LEN)}, (4, 4)),
    "lower right": ((2, 4), (2, 4), {"attn_mask": causal_lower_right(Q_LEN, K_LEN)}, (4, 4)),
    "upper left": ((2, 4), (2, 4), {"attn_mask": causal_upper_left(Q_LEN, K_LEN)}, (4, 4)),
}
forms = pytest.mark.parametrize("before, of_keys, more, heads", FORMS.values(), ids=FORMS)


class Calls(nn.Module):
    """A module that calls one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor, **more) -> Tensor:
        return self.function(*tensors, **more)


def drawn(before: tuple, of_keys: tuple) -> list[Tensor]:
    return [
        random(*before, Q_LEN, DIM),
        random(*of_keys, K_LEN, DIM),
        -random(*of_keys, K_LEN, DIM),
    ]


def by_torch(query: Tensor, key: Tensor, **more) -> Tensor:
    """The weights (…, q_len, k_len) that torch's own function uses: it mixes the unit vectors."""
    unit = torch.eye(K_LEN, DIM, dtype=key.dtype).expand(*key.shape[:-2], -1, -1)
    return F.scaled_dot_product_attention(query, key, unit, **more)[..., :K_LEN]


@forms
def test_output_and_weights(before, of_keys, more, heads):
    query, key, value = drawn(before, of_keys)
    module = Calls(F.scaled_dot_product_attention)
    alone = module(query, key, value, **more)
    with regard.watch(module, observe=[EVERY_ROW]) as seen:
        watched = module(query, key, value, **more)
    assert torch.equal(watched, alone)
    (layer,) = seen
    assert (layer.heads, layer.kv_heads) == heads
    plain = by_torch(query, key, **more)
    exact = by_torch(query.double(), key.double(), **as_double(more))
    weights = layer.seen[0].weights.reshape(plain.shape)
    assert_within(weights, plain, exact)


@forms
def test_cut(before, of_keys, more, heads):
    """Where an edge is cut, regard computes: in torch's shape, and what the mask would give."""
    query, key, value = drawn(before, of_keys)
    module = Calls(F.scaled_dot_product_attention)
    with regard.watch(module, cut=[Cut("", Edges([(4, 1), (4, 2)]))]):
        ours = module(query, key, value, **more)
    weights = by_torch(query.double(), key.double(), **as_double(more))
    row = 4 - (K_LEN - Q_LEN if stands_last(more) else 0)
    weights[..., row, 1:3] = 0
    wide = value.double()
    if more.get("enable_gqa"):
        wide = wide.repeat_interleave(heads[0] // heads[1], -3)
    torch.testing.assert_close(ours, (weights / weights.sum(-1, keepdim=True) @ wide).float())


@forms
def test_the_drop_in(before, of_keys, more, heads):
    """regard's function of this name gives the same inside, and its weights are seen."""
    query, key, value = drawn(before, of_keys)
    module = Calls(regard.nn.functional.scaled_dot_product_attention)
    alone = module(query, key, value, **more)
    with regard.watch(module, observe=[EVERY_ROW]) as seen:
        watched = module(query, key, value, **more)
    assert torch.equal(watched, alone)
    plain = by_torch(query, key, **more)
    exact = by_torch(query.double(), key.double(), **as_double(more))
    assert_within(seen[0].seen[0].weights.reshape(plain.shape), plain, exact)


def stands_last(more: dict) -> bool:
    """Whether the queries stand at the last keys."""
    variant = getattr(more.get("attn_mask"), "variant", None)
    return variant == CausalVariant.LOWER_RIGHT


def as_double(more: dict) -> dict:
    return {
        name: x.double() if type(x) is Tensor and x.is_floating_point() else x
        for name, x in more.items()
    }


def test_mask_and_is_causal():
    """torch says that it takes no two: 2.13 hides what either hides (on CPUs), 2.15 refuses."""
    query, key, value = (random(2, 4, 6, DIM) for _ in range(3))
    module, mask = Calls(F.scaled_dot_product_attention), visible(6, 6)
    try:
        alone = module(query, key, value, attn_mask=mask, is_causal=True)
    except RuntimeError as torchs:  # watched, the call fails as it does alone
        with regard.watch(module), pytest.raises(RuntimeError, match=re.escape(str(torchs))):
            module(query, key, value, attn_mask=mask, is_causal=True)
        return
    with regard.watch(module, observe=[Rows(range(6))]) as seen:
        module(query, key, value, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(seen[0].seen[0].weights @ value, alone)


@pytest.mark.parametrize("mixed", [False, True])
def test_autocast(mixed):
    """torch's function computes in autocast's dtype, whatever it is given."""
    query, key, value = (random(2, 4, 6, DIM) for _ in range(3))
    key, value = (key.bfloat16(), value.bfloat16()) if mixed else (key, value)
    module = Calls(F.scaled_dot_product_attention)
    with torch.autocast("cpu", torch.bfloat16):
        alone = module(query, key, value)
        with regard.watch(module, observe=[Rows(range(6))], keep_qk=True) as seen:
            watched = module(query, key, value)
    assert torch.equal(watched, alone)
    assert watched.dtype == torch.bfloat16
    exact = (query.bfloat16().double() @ key.bfloat16().double().mT / DIM**0.5).softmax(-1)
    torch.testing.assert_close(seen[0].seen[0].weights.double(), exact, rtol=0, atol=1e-6)
