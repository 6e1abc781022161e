"""A watched model computes what it computes unwatched, to the bit, whatever it is made of."""

import inspect

import pytest
import torch
import transformers as hf
from torch import nn

import regard
import zoo
from regard import Entropy, Received, TopK

SIGHT = [TopK(4), Received(), Entropy()]
TINY = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=128,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
# Decoders and encoders of transformers that take these settings as they are, or with these more
DECODERS = [
    "AfmoeForCausalLM",
    "ApertusForCausalLM",
    "ArceeForCausalLM",
    "BitNetForCausalLM",
    "CohereForCausalLM",
    "Cohere2ForCausalLM",
    "DiffLlamaForCausalLM",
    "DogeForCausalLM",
    "Ernie4_5ForCausalLM",
    "Exaone4ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GlmForCausalLM",
    "Glm4ForCausalLM",
    "GPTNeoXForCausalLM",
    "GPTBigCodeForCausalLM",
    "GPT2LMHeadModel",
    "GraniteForCausalLM",
    "HeliumForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "JetMoeForCausalLM",
    "LlamaForCausalLM",
    "Llama4ForCausalLM",
    "MiniMaxForCausalLM",
    "MinistralForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "NanoChatForCausalLM",
    "NemotronForCausalLM",
    "OlmoForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoeForCausalLM",
    "OPTForCausalLM",
    "PersimmonForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "PhimoeForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
    "VaultGemmaForCausalLM",
    "BioGptForCausalLM",
    "BertLMHeadModel",
    "RobertaForCausalLM",
    "ElectraForCausalLM",
    "CamembertForCausalLM",
    "XLMRobertaForCausalLM",
    "Data2VecTextForCausalLM",
    "RobertaPreLayerNormForCausalLM",
    "ErnieForCausalLM",
]
ENCODERS = [
    "AlbertModel",
    "BertModel",
    "CamembertModel",
    "Data2VecTextModel",
    "DistilBertModel",
    "ElectraModel",
    "ErnieModel",
    "EuroBertModel",
    "LayoutLMModel",
    "MobileBertModel",
    "ModernBertModel",
    "NomicBertModel",
    "RobertaModel",
    "RobertaPreLayerNormModel",
    "XLMRobertaModel",
    "MarkupLMModel",
    "SplinterModel",
]
SEQ2SEQ = [
    "BartForConditionalGeneration",
    "BigBirdPegasusForConditionalGeneration",
    "BlenderbotForConditionalGeneration",
    "BlenderbotSmallForConditionalGeneration",
    "MarianMTModel",
    "MBartForConditionalGeneration",
    "M2M100ForConditionalGeneration",
    "NllbMoeForConditionalGeneration",
    "PegasusForConditionalGeneration",
    "PegasusXForConditionalGeneration",
    "PLBartForConditionalGeneration",
    "T5ForConditionalGeneration",
    "MT5ForConditionalGeneration",
    "UMT5ForConditionalGeneration",
    "SwitchTransformersForConditionalGeneration",
]
MORE = dict(
    num_local_experts=2, num_experts_per_tok=1, num_experts=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, expert_ffn_dim=16, n_routed_experts=2,
    encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, d_model=32, decoder_start_token_id=1, d_kv=8, d_ff=48,
    num_heads=4, num_layers=2, is_decoder=True, embedding_size=32, hidden_dropout=0.0,
    mamba_n_heads=4, block_size=4, num_random_blocks=1, word_embed_proj_dim=32, ffn_dim=48,
    intermediate_size_mlp=48, layer_types=None, forced_eos_token_id=None, attention_heads=4,
    num_decoder_layers=2, n_embd=32, n_layer=2, n_head=4, dim=32, n_layers=2, n_heads=4,
    hidden_dim=48,
)  # fmt: skip


def build(name: str, decoder: bool) -> nn.Module:
    """A tiny model of random weights, whose eager function or sdpa is transformers' own choice."""
    made = getattr(hf, name, None)
    if made is None:
        pytest.skip(f"this transformers has no {name}")
    takes = inspect.signature(made.config_class.__init__).parameters
    own = set(getattr(made.config_class, "__dataclass_fields__", {})) | set(takes)
    given = {k: v for k, v in (MORE | TINY).items() if k in own and v is not None}
    given |= {"is_decoder": decoder} if "is_decoder" in own else {}
    if "layer_types" in own and name.startswith("MiniMax"):
        given["layer_types"] = ["linear_attention", "full_attention"]
    return zoo.seeded(lambda: made(made.config_class(**given)).eval())


def inputs_of(model: nn.Module, padded: str | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (2, 16), generator=generator)
    keep = torch.ones_like(ids)
    if padded == "left":
        keep[1, :5] = 0
    if padded == "right":
        keep[1, 11:] = 0
    given = {"input_ids": ids, "attention_mask": keep}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :7]
    return given


def tensors(output) -> list[torch.Tensor]:
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [t for t in values if isinstance(t, torch.Tensor)]


@torch.no_grad()
def assert_same(model: nn.Module, given: dict, **settings):
    alone = model(**given)
    with regard.watch(model, observe=SIGHT, verify=True, **settings) as seen:
        watched = model(**given)
    pairs = list(zip(tensors(watched), tensors(alone), strict=True))
    assert pairs
    for ours, theirs in pairs:
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
    return seen


KINDS = (
    [(n, True) for n in DECODERS] + [(n, False) for n in ENCODERS] + [(n, True) for n in SEQ2SEQ]
)


@pytest.mark.sample(every=7)
@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("name, decoder", KINDS, ids=[n for n, _ in KINDS])
def test_logits_to_the_bit(name, decoder, padded):
    model = build(name, decoder)
    seen = assert_same(model, inputs_of(model, padded))
    assert any(layer.pattern for layer in seen)
