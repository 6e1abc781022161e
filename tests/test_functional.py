"""`scaled_dot_product_attention` against torch's function itself, and its documentation's text."""

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import regard
from cases import DTYPES, assert_within
from regard import NoEngine, Received, Rows, TopK
from regard.nn.functional import scaled_dot_product_attention

L, S, E = 5, 7, 8  # the letters of torch's documentation: queries, keys, dim


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bools(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def three(*before: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(drawn(*before, n, E, dtype=dtype, seed=n + i) for i, n in enumerate((L, S, S)))


def by_torch(*args: Any, **kwargs: Any) -> Tensor:
    """torch's function by its own mathematics: its CPU kernel breaks some of what it documents."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's documentation says, in the dtype given; a row that sees nothing is 0."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).tril().logical_not()
        scores = scores.masked_fill(hidden, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ value


def test_the_signature_is_torchs():
    """Its arguments by name and by place; ours come after, by name alone."""
    ours = list(inspect.signature(scaled_dot_product_attention).parameters.values())
    said = "query, key, value, attn_mask=None, dropout_p=0.0,\n        is_causal=False, scale=None"
    assert said in (F.scaled_dot_product_attention.__doc__ or "")
    assert [(p.name, p.default) for p in ours[3:]] == [
        ("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False), ("scale", None),
        ("enable_gqa", False), ("observe", None), ("engine", "auto"),
    ]  # fmt: skip
    assert [p.kind.name for p in ours[6:]] == ["KEYWORD_ONLY"] * 4
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        with pytest.raises(TypeError):
            function(*three(2, 4), None, 0.0, False, 1.0)


def no_row() -> Tensor:
    mask = bools(L, S)
    mask[2] = False
    return mask


def some_hidden() -> Tensor:
    mask = drawn(2, 1, L, S)
    mask[:, :, :, 3] = -torch.inf
    mask[:, :, 1] = -torch.inf
    return mask


REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -1.0},
    "negative scale, causal": {"scale": -1.0, "is_causal": True},
    "no scale, causal": {"scale": 0.0, "is_causal": True},
    "bool": {"attn_mask": bools(L, S)},
    "bool of keys": {"attn_mask": bools(1, S)},
    "bool of queries": {"attn_mask": bools(L, 1)},
    "bool of heads": {"attn_mask": bools(4, L, S)},
    "bool of items": {"attn_mask": bools(2, 1, 1, S)},
    "bool of all": {"attn_mask": bools(2, 4, L, S)},
    "bool of one": {"attn_mask": bools(1, 1, 1, 1)},
    "float": {"attn_mask": drawn(L, S)},
    "float of heads": {"attn_mask": drawn(4, 1, S)},
    "float of all": {"attn_mask": drawn(2, 4, L, S)},
    "float that hides": {"attn_mask": some_hidden()},
    "a hidden row": {"attn_mask": no_row()},
    "nothing visible": {"attn_mask": torch.zeros(L, S, dtype=torch.bool)},
    "all −inf": {"attn_mask": torch.full((L, S), -torch.inf).double()},
    "transposed mask": {"attn_mask": bools(S, L).mT},
    "strided mask": {"attn_mask": drawn(L, 2 * S)[:, ::2]},
}
every_request = pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)


def at(dtype: torch.dtype, request_: dict[str, Any]) -> dict[str, Any]:
    """The request with its float mask in dtype."""
    mask = request_.get("attn_mask")
    if mask is None or mask.dtype == torch.bool:
        return request_
    return request_ | {"attn_mask": mask.to(dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_request
def test_is_the_documented_formula(request_, dtype):
    tensors, request_ = three(2, 4, dtype=dtype), at(dtype, request_)
    ours = scaled_dot_product_attention(*tensors, **request_)
    assert ours.dtype == dtype
    exact = documented(*(t.double() for t in tensors), **at(torch.float64, request_))
    low = torch.float32 if dtype == torch.float64 else dtype
    plain = documented(*(t.to(low) for t in tensors), **at(low, request_))
    assert_within(ours, plain, exact, dtype)


def assert_as(ours: Tensor, function, tensors, request_: dict) -> None:
    """In float64 as the function has it; the bar is what it has in float32, scaled."""
    exact = function(*tensors, **request_)
    plain = function(*(t.float() for t in tensors), **at(torch.float32, request_))
    assert_within(ours, plain, exact, torch.float64)


@every_request
def test_is_torchs_function(request_):
    tensors = three(2, 4)
    ours = scaled_dot_product_attention(*tensors, **request_)
    assert_as(ours, by_torch, tensors, request_)


@every_request
def test_gradients_are_torchs(request_):
    """Of query, key, value, and of a float mask; finite, and 0 where nothing is seen."""
    grads = []
    for function in (scaled_dot_product_attention, by_torch):
        leaves = [t.requires_grad_() for t in three(2, 4)]
        mine = dict(request_)
        mask = mine.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            mine["attn_mask"] = mask.detach().clone().requires_grad_()
            leaves.append(mine["attn_mask"])
        out = function(*leaves[:3], **mine)
        out.backward(drawn(*out.shape, seed=3))
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs.nan_to_num(), rtol=1e-10, atol=1e-12)


SHAPES = {
    "two dimensions": ((L, E), (S, E), (S, E)),
    "three": ((3, L, E), (3, S, E), (3, S, E)),
    "four": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E)),
    "five": ((2, 3, 4, L, E), (2, 3, 4, S, E), (2, 3, 4, S, E)),
    "six": ((2, 1, 3, 2, L, E), (2, 1, 3, 2, S, E), (2, 1, 3, 2, S, E)),
    "another v_dim": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, 3)),
    "one key head": ((2, 4, L, E), (2, 1, S, E), (2, 1, S, E)),
    "one query head": ((2, 1, L, E), (2, 4, S, E), (2, 4, S, E)),
    "one value head": ((2, 4, L, E), (2, 4, S, E), (2, 1, S, E)),
    "one key head, four of values": ((2, 1, L, E), (2, 1, S, E), (2, 4, S, E)),
    "one item of keys": ((2, 4, L, E), (1, 4, S, E), (1, 4, S, E)),
    "one item of queries": ((1, 4, L, E), (2, 4, S, E), (2, 4, S, E)),
    "three broadcast": ((3, L, E), (1, S, E), (1, S, E)),
    "queries of fewer dimensions": ((4, L, E), (2, 4, S, E), (2, 4, S, E)),
    "keys of fewer dimensions": ((2, 4, L, E), (4, S, E), (S, E)),
    "five broadcast": ((2, 1, 4, L, E), (1, 3, 1, S, E), (3, 4, S, E)),
    "no item": ((0, 4, L, E), (0, 4, S, E), (0, 4, S, E)),
    "no query": ((2, 4, 0, E), (2, 4, S, E), (2, 4, S, E)),
    "no key": ((2, 4, L, E), (2, 4, 0, E), (2, 4, 0, E)),
    "neither": ((2, 4, 0, E), (2, 4, 0, E), (2, 4, 0, E)),
    "no dim": ((2, 4, L, 0), (2, 4, S, 0), (2, 4, S, 3)),
    "no v_dim": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, 0)),
    "one of everything": ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)),
    "no item of five": ((2, 0, 4, L, E), (2, 0, 4, S, E), (2, 0, 4, S, E)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_any_leading_sizes(shapes, is_causal):
    tensors = [drawn(*s, seed=i) for i, s in enumerate(shapes)]
    ours = scaled_dot_product_attention(*tensors, is_causal=is_causal)
    assert_as(ours, by_torch, tensors, {"is_causal": is_causal})
    leaves = [t.clone().requires_grad_() for t in tensors]
    scaled_dot_product_attention(*leaves, is_causal=is_causal).sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


GROUPED = {
    "four": ((2, 4, L, E), (2, 2, S, E), (2, 2, S, E)),
    "multi-query": ((2, 4, L, E), (2, 1, S, E), (2, 1, S, E)),
    "alike": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E)),
    "three dimensions": ((4, L, E), (2, S, E), (2, S, E)),
    "five": ((2, 3, 4, L, E), (2, 3, 2, S, E), (2, 3, 2, S, E)),
    "one item of keys": ((2, 4, L, E), (1, 2, S, E), (1, 2, S, E)),
    "values of fewer heads": ((2, 4, L, E), (2, 2, S, E), (2, 1, S, E)),
    "keys of fewer heads": ((2, 4, L, E), (2, 1, S, E), (2, 2, S, 3)),
}


@pytest.mark.parametrize("shapes", GROUPED.values(), ids=GROUPED)
def test_grouped_heads(shapes):
    tensors = [drawn(*s, seed=i) for i, s in enumerate(shapes)]
    for request_ in ({}, {"is_causal": True}, {"attn_mask": bools(4, L, S)}):
        ours = scaled_dot_product_attention(*tensors, enable_gqa=True, **request_)
        for function in (documented, by_torch):
            assert_as(ours, function, tensors, {"enable_gqa": True, **request_})


@pytest.mark.parametrize(
    "shape",
    [(L, S), (1, S), (4, L, S), (1, 1, S), (3, 4, L, S), (1, 1, L, S), (2, 3, 4, L, S),
     (2, 1, 1, 1, S), (1, 3, 1, L, S), (1, 1, 1, 1, 1)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_five_dimensions(shape, kind):
    tensors = [drawn(2, 3, 4, n, E, seed=n) for n in (L, S, S)]
    mask = bools(*shape) if kind == "bool" else drawn(*shape)
    ours = scaled_dot_product_attention(*tensors, attn_mask=mask)
    assert_as(ours, by_torch, tensors, {"attn_mask": mask})


@pytest.mark.parametrize("rank", [2, 3])
def test_masks_of_few_dimensions(rank):
    tensors = [drawn(*(3,) * (rank - 2), n, E, seed=n) for n in (L, S, S)]
    for shape in ((L, S), (L, 1), (3, L, S), (3, 1, S))[: 2 * rank - 2]:
        mask = bools(*shape)
        ours = scaled_dot_product_attention(*tensors, attn_mask=mask)
        assert_as(ours, by_torch, tensors, {"attn_mask": mask})


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize("q_len, k_len", [(5, 5), (5, 7), (7, 5), (1, 6), (6, 1)])
def test_causal_is_top_left(q_len, k_len):
    """Query 0 sees key 0, whatever the lengths; torch's two causal biases as masks."""
    query, key, value = (drawn(2, 4, n, E, seed=n) for n in (q_len, k_len, k_len))
    square = torch.ones(q_len, k_len, dtype=torch.bool)
    left, right = square.tril(), square.tril(k_len - q_len)
    for ours, mask in (
        (scaled_dot_product_attention(query, key, value, is_causal=True), left),
        (scaled_dot_product_attention(query, key, value, causal_upper_left(q_len, k_len)), left),
        (scaled_dot_product_attention(query, key, value, causal_lower_right(q_len, k_len)), right),
    ):
        assert_as(ours, documented, (query, key, value), {"attn_mask": mask})


LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed last": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.stack([t, t.new_full((), torch.nan).expand_as(t)], -1)[..., 0],
    "from the back": lambda t: torch.cat([t, t], 1)[:, t.shape[1] :],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1, :1].expand_as(t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout, dtype):
    laid = [layout(t) for t in three(2, 4, dtype=dtype)]
    leaves = [t.detach().requires_grad_() for t in laid]
    ours = scaled_dot_product_attention(*leaves, is_causal=True)
    same = scaled_dot_product_attention(*(t.contiguous() for t in laid), is_causal=True)
    torch.testing.assert_close(ours.detach(), same)
    ours.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_a_float32_mask_with_other_dtypes():
    """torch takes float32 masks with every query."""
    mask = drawn(L, S, dtype=torch.float32)
    for dtype in DTYPES:
        tensors = three(2, 4, dtype=dtype)
        ours = scaled_dot_product_attention(*tensors, attn_mask=mask)
        assert ours.dtype == dtype
        wanted = documented(*(t.double() for t in tensors), mask.double())
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("what", ["query", "key", "value", "mask"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_surfaces(what, value):
    tensors = dict(zip(("query", "key", "value"), three(2, 4), strict=True))
    mask = drawn(L, S)
    target = mask if what == "mask" else tensors[what][1, 2]
    target[3] = value
    ours = scaled_dot_product_attention(**tensors, attn_mask=mask)
    theirs = by_torch(**tensors, attn_mask=mask)
    assert torch.equal(ours.isnan(), theirs.isnan())


def test_dropout_is_always_applied():
    tensors = three(2, 4)
    exact = scaled_dot_product_attention(*tensors)
    torch.manual_seed(1)
    first = scaled_dot_product_attention(*tensors, dropout_p=0.4)
    torch.manual_seed(1)
    assert torch.equal(scaled_dot_product_attention(*tensors, dropout_p=0.4), first)
    assert not torch.allclose(first, exact)
    mean = torch.stack([scaled_dot_product_attention(*tensors, dropout_p=0.4) for _ in range(500)])
    assert float((mean.mean(0) - exact).abs().mean()) < 0.1
    assert torch.equal(scaled_dot_product_attention(*tensors, dropout_p=0.0), exact)


def test_dropout_of_everything():
    leaves = [t.requires_grad_() for t in three(2, 4)]
    out = scaled_dot_product_attention(*leaves, dropout_p=1.0)
    assert not out.any()
    out.sum().backward()
    assert not any(leaf.grad.any() for leaf in leaves)
    with torch.no_grad():
        assert torch.equal(out, by_torch(*leaves, dropout_p=1.0))


def test_autocast_is_torchs():
    """Results in autocast's dtype; float64 stays."""
    for dtype, mask in (
        (torch.float32, None), (torch.float16, None), (torch.float64, None),
        (torch.float32, drawn(L, S, dtype=torch.float32)), (torch.float32, bools(L, S)),
    ):  # fmt: skip
        tensors = three(2, 4, dtype=dtype)
        for on in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=on):
                ours = scaled_dot_product_attention(*tensors, attn_mask=mask)
                theirs = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
            assert ours.dtype == theirs.dtype
            # Two kernels round to 8 bits, or 11: a last place of numbers around 1
            torch.testing.assert_close(ours, theirs, rtol=0.016, atol=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query, key, value = three(2, 4, dtype=torch.float32)
        mixed = scaled_dot_product_attention(query, key.bfloat16(), value.half())
    assert mixed.dtype == torch.bfloat16


def test_gradcheck():
    """Against finite differences, mask included; torch's suite does so for its mathematics."""
    leaves = [drawn(1, 2, n, 4, seed=n).requires_grad_() for n in (3, 4, 4)]
    mask = drawn(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(scaled_dot_product_attention, (*leaves, mask))
    assert torch.autograd.gradcheck(
        lambda *t: scaled_dot_product_attention(*t, is_causal=True), leaves
    )


def test_second_derivatives_by_the_reference():
    leaves = [drawn(1, 2, n, 3, seed=n).requires_grad_() for n in (2, 3, 3)]
    run = lambda *t: scaled_dot_product_attention(*t, engine="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, leaves)


def test_observers():
    """(out, seen), the leading sizes flattened to (batch, heads)."""
    for before, flat in (((), (1, 1)), ((3,), (1, 3)), ((2, 4), (2, 4)), ((2, 3, 4), (6, 4))):
        tensors = three(*before)
        watchers = [TopK(2), Received(), Rows([1])]
        out, (top, received, rows) = scaled_dot_product_attention(*tensors, observe=watchers)
        assert torch.equal(out, scaled_dot_product_attention(*tensors))
        assert top.weights.shape == (*flat, L, 2)
        weights = (tensors[0] @ tensors[1].mT / math.sqrt(E)).softmax(-1).view(*flat, L, S)
        torch.testing.assert_close(received.sum, weights.sum(2))
        torch.testing.assert_close(rows.weights[:, :, 0], weights[:, :, 1])


def test_a_named_engine():
    tensors = three(2, 4)
    for engine in ("tiled", "reference"):
        out = scaled_dot_product_attention(*tensors, engine=engine)
        torch.testing.assert_close(out, by_torch(*tensors))
    with pytest.raises(NoEngine, match="sdpa: dropout is given"):
        scaled_dot_product_attention(*tensors, dropout_p=0.1, engine="sdpa")


def test_one_line_swaps_it_in(monkeypatch):
    """torch's own modules compute with it: `nn.TransformerEncoderLayer`, say."""
    layer = torch.nn.TransformerEncoderLayer(E, 2, 16, 0.0, batch_first=True).double()
    x, hide = drawn(2, 6, E), torch.ones(6, 6, dtype=torch.bool).triu(1)
    wanted = layer(x, src_mask=hide)
    calls = []

    def ours(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", ours)
    torch.testing.assert_close(layer(x, src_mask=hide), wanted)
    assert calls


def test_watch_sees_it():
    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    model = Model()
    with regard.watch(model, observe=[TopK(2)]) as seen:
        out = model(*three(2, 4))
    assert torch.equal(out, model(*three(2, 4)))
    assert seen[0].seen[0].weights.shape == (2, 4, L, 2)
