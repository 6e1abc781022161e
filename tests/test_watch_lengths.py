"""Masks and lengths that are not those of a plain decoder: more queries than keys, windows of 0,
masks of one key that stand for all."""

import pytest
import torch
import transformers as hf
from torch import nn

import regard
import regard.huggingface
import zoo
from regard import Causal, Dense, Full, Received, RegardError, Rows, attention
from test_watch_bits import tensors
from test_watch_models import assert_output, unwatched

EVERY_ROW = Rows(range(256))


def segformer(**more) -> nn.Module:
    """Its keys are pooled: 256 queries read 16 of them."""
    config = hf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 1], hidden_sizes=[16, 32],
        num_attention_heads=[2, 4], patch_sizes=[7, 3], strides=[2, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )  # fmt: skip
    return zoo.seeded(lambda: hf.SegformerModel._from_config(config, **more))


def q_former(**more) -> nn.Module:
    """8 learned queries read 5 patches, beside their self-attention."""
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = hf.Blip2QFormerConfig(
        **sizes, encoder_hidden_size=32, cross_attention_frequency=1, vocab_size=zoo.VOCAB
    )
    return zoo.seeded(lambda: hf.Blip2QFormerModel._from_config(config, **more))


def qwen2_moe(**more) -> nn.Module:
    """Its default settings: `sliding_window` is 0, which stands for none."""
    config = hf.Qwen2MoeConfig(
        **zoo.DECODER, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    assert config.sliding_window == 0
    return zoo.seeded(lambda: hf.Qwen2MoeForCausalLM._from_config(config, **more))


READ = {"query_embeds": zoo.random(2, 8, 32), "encoder_hidden_states": zoo.random(2, 5, 32)}
# the model, its inputs, (kind, q_len, k_len) of each layer
UNLIKE = {
    "SegFormer": (
        segformer, lambda: {"pixel_values": zoo.random(2, 3, 32, 32)},
        [("self", 256, 16), ("self", 64, 64)],
    ),
    "Q-Former": (
        q_former,
        lambda: READ,
        [("self", 8, 8), ("cross", 8, 5)] * 2,
    ),
    "Q-Former, padded": (
        q_former,
        lambda: READ | {"encoder_attention_mask": zoo.padding(right=2, length=5)},
        [("self", 8, 8), ("cross", 8, 5)] * 2,
    ),
    "Qwen2-MoE": (qwen2_moe, lambda: {"input_ids": zoo.ids()}, [("self", 11, 11)] * 2),
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("build, inputs, layers", UNLIKE.values(), ids=UNLIKE)
def test_lengths_and_kinds(build, inputs, layers, implementation):
    model, given = build(attn_implementation=implementation), inputs()
    alone = unwatched(model, given)
    with (
        torch.no_grad(),
        regard.watch(model, observe=[EVERY_ROW, Received()], keep_qk=True, verify=True) as seen,
    ):
        watched = model(**given)
    for ours, theirs in zip(tensors(watched), tensors(alone), strict=True):
        assert torch.equal(ours, theirs)
    assert [(x.kind, x.q_len, x.k_len) for x in seen] == layers
    recording = seen.recording()
    for number, layer in enumerate(seen):
        rows, received = layer.seen
        assert rows.weights.shape[2:] == (layer.q_len, layer.k_len)
        torch.testing.assert_close(rows.weights.sum(2), received.sum, rtol=0, atol=1e-4)
        torch.testing.assert_close(recording.weights(number), rows.weights[0], rtol=0, atol=1e-6)
    shown = build(attn_implementation="regard")
    assert_output(unwatched(shown, given)[0], alone[0])


@pytest.mark.parametrize("name, module, kind", [
    ("encoder.layer.0.crossattention.self", "BertSelfAttention", "cross"),
    ("encoder.layer.0.attention.self", "BertSelfAttention", "self"),
    ("decoder.layers.0.encoder_attn", "BartAttention", "cross"),
    ("cross_encoder.layers.0.self_attn", "Attention", "self"),
    ("cross.self_attn", "Attention", "self"),
    ("decoder.block.0.layer.1.EncDecAttention", "T5Attention", "cross"),
    ("", "Attention", "self"),
])  # fmt: skip
def test_kind_by_name(name, module, kind):
    assert regard.capture.module_tree.kind_of(type(module, (nn.Module,), {})(), name) == kind


def minimax(layers: str, **more) -> nn.Module:
    kinds = {"l": "linear_attention", "f": "full_attention"}
    config = hf.MiniMaxConfig(
        **zoo.DECODER | dict(num_hidden_layers=len(layers)), num_local_experts=2,
        num_experts_per_tok=1, layer_types=[kinds[x] for x in layers], block_size=4,
    )  # fmt: skip
    return zoo.seeded(lambda: hf.MiniMaxForCausalLM._from_config(config, **more))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", ["lf", "fl", "llf"])
def test_generation_of_a_hybrid(layers, implementation):
    """Where the first layer is linear, transformers hands on a mask of one key for all."""
    model, prompt = minimax(layers, attn_implementation=implementation), {"input_ids": zoo.ids()}
    settings = dict(max_new_tokens=6, do_sample=False, output_logits=True,
                    return_dict_in_generate=True)  # fmt: skip
    alone = model.generate(**prompt, **settings)
    with regard.watch(model, observe=[EVERY_ROW], verify=True) as seen:
        watched = model.generate(**prompt, **settings)
    ours = minimax(layers, attn_implementation="regard").generate(**prompt, **settings)
    assert torch.equal(watched.sequences, alone.sequences)
    assert torch.equal(ours.sequences, alone.sequences)
    assert all(map(torch.equal, watched.logits, alone.logits))
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(alone.logits), rtol=1e-3,
                               atol=1e-4)  # fmt: skip
    (layer,) = (x for x in seen if x.pattern)
    weights = layer.seen[0].weights
    assert weights.shape[2:] == (16, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert (weights.triu(1) == 0).all()


def test_a_mask_of_one_key_is_spread():
    """What transformers made for 1 key, handed on with 6: its element says it for all of them."""
    module, x = nn.Module(), zoo.random(2, 4, 6, 8)
    last = x[:, :, -1:]
    for starts, mask in (((5, 0), Causal()), ((0, 3), ~Causal())):
        compact = regard.huggingface.CompactMask(mask, (2, 1, 1), starts, torch.device("cpu"))
        out, _ = regard.huggingface.attend(module, last, x, x, compact)
        right = attention(last, x, x, mask=Full(), engine="reference")
        torch.testing.assert_close(out.transpose(1, 2), right)


def test_a_tensor_without_elements_is_refused():
    """The compiled engine reads addresses; one of nothing would end the process."""
    empty = regard.huggingface.CompactMask(Causal(), (2, 6, 6), (0, 0), torch.device("cpu"))
    x = zoo.random(2, 4, 6, 8)
    with pytest.raises(RegardError, match=r"CompactMask \(2, 1, 6, 6\) holds no elements"):
        attention(x, x, x, mask=Dense(empty), engine="cpu")
