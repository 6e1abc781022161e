"""`verify`: weights that explain an output are taken, whatever the scores; others are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regard
from regard import MaxScore, RegardError, Rows

hf = pytest.importorskip("transformers")
from transformers import AttentionInterface  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
IDS = torch.arange(3, 43)[None]


def llama(implementation: str, dtype: torch.dtype) -> nn.Module:
    """One whose scores are some hundreds."""
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlamaModel._from_config(config, attn_implementation=implementation)
    for layer in model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            nn.init.normal_(part.weight, std=2.0)
        nn.init.normal_(layer.self_attn.v_proj.weight, std=0.3)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_large_scores_are_no_change_of_them(implementation, dtype):
    """A weight's rounding grows with its score: the bar is plain torch's distance from float64."""
    model = llama(implementation, dtype)
    with torch.no_grad():
        alone = model(IDS).last_hidden_state
        with regard.watch(model, observe=[MaxScore()], verify=True) as seen:
            ours = model(IDS).last_hidden_state
    assert torch.equal(ours, alone)
    assert float(seen[0].seen[0].values.max()) > 300


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_change_is_found_beside_large_scores(dtype, monkeypatch):
    def changed(module, query, key, value, mask, **more):
        return sdpa_attention_forward(module, query, key, value * 1.5, mask, **more)

    monkeypatch.setitem(AttentionInterface._global_mapping, "changed", changed)
    model = llama("changed", dtype)
    with (
        torch.no_grad(), pytest.raises(RegardError, match="do not explain its output"),
        regard.watch(model, observe=[Rows([39])], verify=True),
    ):  # fmt: skip
        model(IDS)


def test_values_of_more_heads_than_keys():
    """As Nemotron 3's encoder has it; torch's function groups keys and values apart."""
    model = llama("sdpa", torch.float32)
    rows = []
    for heads in (2, 4):
        torch.manual_seed(1)
        model.layers[0].self_attn.v_proj = nn.Linear(32, 8 * heads, bias=False)
        with torch.no_grad():
            alone = model(IDS).last_hidden_state
            with regard.watch(model, observe=[Rows([39])], layers=[0], verify=True) as seen:
                assert torch.equal(model(IDS).last_hidden_state, alone)
        rows.append(seen[0].seen[0].weights)
    torch.testing.assert_close(*rows, rtol=0, atol=1e-6)
