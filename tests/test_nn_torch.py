"""MultiHeadAttention with the weights of torch.nn.MultiheadAttention."""

from typing import Any

import pytest
import torch
from torch import nn

from regard import (
    Causal,
    Dense,
    Padding,
    RegardError,
    Rows,
)
from regard.nn import (
    MultiHeadAttention,
)
from test_nn import MODEL, drawn, seeded

TORCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim": {"kdim": 12},
    "vdim": {"vdim": 7},
    "kdim and vdim": {"kdim": 12, "vdim": 7, "bias": False},
    "sequence first": {"batch_first": False},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", TORCHES.values(), ids=TORCHES)
def test_torchs_state_dict_gives_torchs_numbers(config, dtype):
    """Loaded, or by from_torch: outputs and weights, under each kind of mask that torch takes."""
    config = {"batch_first": True} | config
    theirs = seeded(lambda: nn.MultiheadAttention(MODEL, 4, **config), dtype).eval()
    ours = MultiHeadAttention.from_torch(theirs)
    assert not ours.training
    assert ours.dropout == config.get("dropout", 0.0)
    loaded = MultiHeadAttention(
        MODEL, 4, key_dim=config.get("kdim"), value_dim=config.get("vdim"),
        bias=config.get("bias", True), dtype=dtype,
    )  # fmt: skip
    missing = loaded.load_state_dict(theirs.state_dict(), strict=True)
    assert not missing.missing_keys + missing.unexpected_keys
    query = drawn(2, 9, MODEL, dtype=dtype)
    key = drawn(2, 13, theirs.kdim, dtype=dtype, seed=1)
    value = drawn(2, 13, theirs.vdim, dtype=dtype, seed=2)
    hide = torch.rand(9, 13, generator=torch.Generator().manual_seed(0)) < 0.3
    hide[:, 0] = False
    padded = torch.arange(13) >= torch.tensor([[13], [8]])
    added = drawn(8, 9, 13, dtype=dtype, seed=3)
    requests = [
        ({}, {}),
        ({"attn_mask": hide}, {"mask": ~Dense(hide)}),
        ({"key_padding_mask": padded}, {"mask": Padding(~padded)}),
        (
            {"attn_mask": hide, "key_padding_mask": padded},
            {"mask": ~Dense(hide) & Padding(~padded)},
        ),
        ({"attn_mask": added}, {"bias": added.unflatten(0, (2, 4))}),
    ]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype]
    for torchs, mine in requests:
        given = (query, key, value)
        if not theirs.batch_first:
            given = tuple(t.transpose(0, 1) for t in given)
        wanted, weights = theirs(*given, average_attn_weights=False, **torchs)
        wanted = wanted if theirs.batch_first else wanted.transpose(0, 1)
        for module in (ours, loaded.eval()):
            out, (rows,) = module(query, key, value, observe=[Rows(range(9))], **mine)
            rows = rows.weights
            torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(rows.to(dtype), weights, rtol=tolerance, atol=tolerance)


def test_torchs_gradients_are_ours():
    theirs = seeded(lambda: nn.MultiheadAttention(MODEL, 4, batch_first=True), torch.float64)
    ours = MultiHeadAttention.from_torch(theirs)
    x = drawn(2, 9, MODEL, dtype=torch.float64)
    hide = torch.ones(9, 9, dtype=torch.bool).triu(1)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    theirs(*[leaves[0]] * 3, attn_mask=hide, need_weights=False)[0].square().sum().backward()
    ours(leaves[1], mask=Causal()).square().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    for kind in ("weight", "bias"):
        joint = torch.cat([getattr(getattr(ours, f"{n}_proj"), kind).grad for n in "qkv"])
        torch.testing.assert_close(joint, getattr(theirs, f"in_proj_{kind}").grad)
        own = getattr(ours.out_proj, kind).grad
        torch.testing.assert_close(own, getattr(theirs.out_proj, kind).grad)


@pytest.mark.parametrize("assign", [False, True])
def test_torchs_state_inside_a_larger_model(assign):
    theirs = seeded(lambda: nn.Sequential(nn.Linear(3, MODEL), nn.MultiheadAttention(MODEL, 4)))
    ours = nn.Sequential(nn.Linear(3, MODEL), MultiHeadAttention(MODEL, 4))
    state = theirs.state_dict()
    names = list(state)
    ours.load_state_dict(state, assign=assign)
    assert list(state) == names  # the caller's own is left as it was
    x = drawn(2, 5, 3)
    wanted = theirs[0](x).transpose(0, 1)
    wanted = theirs[1](wanted, wanted, wanted, need_weights=False)[0].transpose(0, 1)
    torch.testing.assert_close(ours(x), wanted)
    again = MultiHeadAttention(MODEL, 4)
    again.load_state_dict(ours[1].state_dict())
    torch.testing.assert_close(again(ours[0](x)), wanted)


def test_what_torch_has_and_we_do_not():
    learned = nn.MultiheadAttention(MODEL, 4, add_bias_kv=True)
    said = "bias_k: torch's module was made with add_bias_kv=True"
    with pytest.raises(RegardError, match=said):
        MultiHeadAttention(MODEL, 4).load_state_dict(learned.state_dict())
    with pytest.raises(RegardError, match=said):
        MultiHeadAttention.from_torch(learned)
    with pytest.raises(RegardError, match="torch's module has add_zero_attn=True"):
        MultiHeadAttention.from_torch(nn.MultiheadAttention(MODEL, 4, add_zero_attn=True))
    with pytest.raises(RegardError, match=r"in_proj_weight \(60, 20\) .* heads 4, kv_heads 2"):
        MultiHeadAttention(MODEL, 4, kv_heads=2).load_state_dict(
            nn.MultiheadAttention(MODEL, 4).state_dict()
        )
    with pytest.raises(RuntimeError, match="Missing key"):
        MultiHeadAttention(MODEL, 4).load_state_dict(
            nn.MultiheadAttention(MODEL, 4, bias=False).state_dict()
        )
