"""What the function in torch.nn.functional.scaled_dot_product_attention's place refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_upper_left

from regard import RegardError
from regard.nn.functional import scaled_dot_product_attention
from test_functional import E, L, S, bools, by_torch, drawn, three


def wrong(*shapes: tuple[int, ...], **request_: Any) -> tuple[list[Tensor], dict[str, Any]]:
    return [drawn(*s) for s in shapes], request_


Q, K = (2, 4, L, E), (2, 4, S, E)

REFUSED = {
    "one dimension": (wrong((E,), (S, E), (S, E)), "query (8,), key (7, 8), value (7, 8): each"),
    "dims": (wrong(Q, (2, 4, S, 9), K), "query has dim 8, key 9; make them equal"),
    "heads": (
        wrong(Q, (2, 2, S, E), (2, 2, S, E)),
        "query (2, 4, 5, 8), key (2, 2, 7, 8), value (2, 2, 7, 8): what stands before the last two "
        "must broadcast; enable_gqa groups the heads",
    ),
    "items": (wrong(Q, (3, 4, S, E), (3, 4, S, E)), "must broadcast; enable_gqa groups"),
    "heads that do not divide": (
        wrong(Q, (2, 3, S, E), (2, 3, S, E), enable_gqa=True),
        "kv_heads must divide heads, and what stands before them must broadcast",
    ),
    "more key heads": (
        wrong((2, 2, L, E), K, K, enable_gqa=True),
        "kv_heads must divide heads",
    ),
    "grouped of two dimensions": (
        wrong((L, E), (S, E), (S, E), enable_gqa=True),
        "enable_gqa needs (heads, length, dim), 3 dimensions or more",
    ),
    "mask of other keys": (
        wrong(Q, K, K, attn_mask=bools(L, 6)),
        "attn_mask (5, 6) does not broadcast to the weights, (2, 4, 5, 7)",
    ),
    "mask of other heads": (wrong(Q, K, K, attn_mask=bools(3, L, S)), "attn_mask (3, 5, 7)"),
    "mask of more items": (
        wrong((1, 4, L, E), (1, 4, S, E), (1, 4, S, E), attn_mask=bools(2, 4, L, S)),
        "attn_mask (2, 4, 5, 7) does not broadcast to the weights, (1, 4, 5, 7)",
    ),
    "mask of more dimensions": (
        wrong(Q, K, K, attn_mask=bools(1, 2, 4, L, S)),
        "attn_mask (1, 2, 4, 5, 7) does not broadcast to the weights",
    ),
    "mask of integers": (
        wrong(Q, K, K, attn_mask=torch.ones(L, S).int()),
        "attn_mask is torch.int32, query torch.float64; give a mask that is bool, float32 or of "
        "the query's dtype",
    ),
    "mask of halves": (wrong(Q, K, K, attn_mask=drawn(L, S).half()), "attn_mask is torch.float16"),
    "dropout": (wrong(Q, K, K, dropout_p=1.5), "dropout_p is 1.5; give a probability"),
    "dtypes": (
        ([drawn(*Q), drawn(*K).float(), drawn(*K)], {}),
        "query (2, 4, 5, 8) float64 on cpu, key (2, 4, 7, 8) float32 on cpu",
    ),
    "integers": (
        ([torch.ones(s, dtype=torch.int64) for s in (Q, K, K)], {}),
        "give all of them in one dtype of float64, float32, float16, bfloat16",
    ),
    "devices": (
        ([drawn(*Q), drawn(*K).to("meta"), drawn(*K)], {}),
        "move all of them to one device",
    ),
}


@pytest.mark.parametrize("call, said", REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused(call, said):
    """By an error that both kinds of caller catch."""
    tensors, request_ = call
    with pytest.raises(RegardError) as error:
        scaled_dot_product_attention(*tensors, **request_)
    assert said in str(error.value)
    assert isinstance(error.value, RuntimeError)
    with pytest.raises((RuntimeError, IndexError)):
        by_torch(*tensors, **request_)


def test_a_mask_beside_causal_is_refused():
    """As documented, and as torch's mathematics does; its CPU kernel lets it pass."""
    tensors = three(2, 4)
    for mask in (bools(L, S), drawn(L, S)):
        with pytest.raises(RuntimeError, match="should not be set when is_causal=True"):
            by_torch(*tensors, attn_mask=mask, is_causal=True)
        with pytest.raises(RegardError, match="attn_mask and is_causal are both given"):
            scaled_dot_product_attention(*tensors, attn_mask=mask, is_causal=True)
    for function in (scaled_dot_product_attention, by_torch):
        with pytest.raises(ValueError, match="causal"):
            function(*tensors, attn_mask=causal_upper_left(L, S), is_causal=True)


def test_missing_values_are_refused():
    """torch's CPU kernel reads beyond them."""
    with pytest.raises(RegardError, match="key and value must agree"):
        scaled_dot_product_attention(drawn(*Q), drawn(*K), drawn(2, 4, 6, E))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    parts = [drawn(4, n, E) for n in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.strided)
    with pytest.raises(RegardError, match="nested tensors are not taken; pack the sequences"):
        scaled_dot_product_attention(nested, nested, nested)


def test_meta_tensors_have_a_shape():
    out = scaled_dot_product_attention(*(t.to("meta") for t in three(2, 3, 4)), is_causal=True)
    assert (out.shape, out.device.type) == ((2, 3, 4, L, E), "meta")
