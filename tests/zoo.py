"""Small random models, one a family, with inputs, and the weights that eager attention gives."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface

VOCAB, BATCH, LENGTH, WINDOW = 100, 2, 11, 4
# Of weights that a model of transformers gives: its own float32, through other operations, and its
# code has no float64 truth to measure a bar by
AS_MODELS = {"rtol": 0, "atol": 1e-5}

# fmt: off
ENCODER = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=64,
)
DECODER = ENCODER | dict(
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)
SEQ2SEQ = dict(
    vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
)
T5_LIKE = dict(
    vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
    decoder_start_token_id=0, eos_token_id=None,
)
# fmt: on


@dataclass(frozen=True)
class Family:
    """A model family: `build()` a small one in eval mode, `inputs()` to call it with."""

    name: str
    model: type
    settings: type
    arguments: dict
    inputs: Callable[[], dict[str, Tensor]]

    def config(self) -> hf.PreTrainedConfig:
        return self.settings(**self.arguments)

    def build(self, **kwargs) -> nn.Module:
        return seeded(lambda: self.model._from_config(self.config(), **kwargs))

    def __str__(self) -> str:
        return self.name


def seeded(make: Callable[[], nn.Module], seed: int = 0, std: float = 0.3) -> nn.Module:
    """A random model, its parameters large enough for weights far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().float().eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=std)
            elif "sinks" in name:
                nn.init.normal_(parameter)
    return model


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def ids(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def padding(left: int = 0, right: int = 0, length: int = LENGTH) -> Tensor:
    """attention_mask (batch, length) whose second sequence has some padding."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, :left] = 0
    mask[1, length - right :] = 0
    return mask


def encoder() -> dict[str, Tensor]:
    return {"input_ids": ids(), "attention_mask": padding(right=3)}


def decoder() -> dict[str, Tensor]:
    return {"input_ids": ids(), "attention_mask": padding(left=3)}


def target() -> dict[str, Tensor]:
    mask = padding(right=2, length=7)
    return {"decoder_input_ids": ids(7, seed=1), "decoder_attention_mask": mask}


def seq2seq() -> dict[str, Tensor]:
    return encoder() | target()


def audio() -> dict[str, Tensor]:
    return {"input_features": random(BATCH, 8, 20)} | target()


def series() -> dict[str, Tensor]:
    return {
        "past_values": random(BATCH, 9), "past_time_features": random(BATCH, 9, 1),
        "past_observed_mask": torch.ones(BATCH, 9), "future_values": random(BATCH, 4),
        "future_time_features": random(BATCH, 4, 1),
    }  # fmt: skip


def image() -> dict[str, Tensor]:
    return {"pixel_values": random(BATCH, 3, 12, 12)}


# fmt: off
FAMILIES = [
    Family("BERT", hf.BertModel, hf.BertConfig, ENCODER, encoder),
    Family("DistilBERT", hf.DistilBertModel, hf.DistilBertConfig, dict(
        vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48), encoder),
    Family("RoBERTa", hf.RobertaModel, hf.RobertaConfig, ENCODER, encoder),
    Family("GPT-2", hf.GPT2LMHeadModel, hf.GPT2Config, dict(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=None), decoder),
    Family("Llama", hf.LlamaForCausalLM, hf.LlamaConfig, DECODER, decoder),
    Family("Mistral", hf.MistralForCausalLM, hf.MistralConfig, DECODER | dict(
        sliding_window=WINDOW), decoder),
    Family("Qwen3", hf.Qwen3ForCausalLM, hf.Qwen3Config, DECODER, decoder),
    Family("Gemma 2", hf.Gemma2ForCausalLM, hf.Gemma2Config, DECODER | dict(
        sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=2.0), decoder),
    Family("Gemma 3", hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, DECODER | dict(
        sliding_window=WINDOW, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"]), decoder),
    Family("gpt-oss", hf.GptOssForCausalLM, hf.GptOssConfig, DECODER | dict(
        sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1,
        rope_parameters=dict(rope_type="default", rope_theta=1e4)), decoder),
    Family("T5", hf.T5ForConditionalGeneration, hf.T5Config, T5_LIKE, seq2seq),
    Family("BART", hf.BartForConditionalGeneration, hf.BartConfig, SEQ2SEQ, seq2seq),
    Family("Marian", hf.MarianMTModel, hf.MarianConfig, SEQ2SEQ, seq2seq),
    Family("Whisper", hf.WhisperForConditionalGeneration, hf.WhisperConfig, SEQ2SEQ | dict(
        num_mel_bins=8, max_source_positions=10, max_target_positions=64), audio),
    Family("ViT", hf.ViTModel, hf.ViTConfig, dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=12, patch_size=4), image),
]
# Beyond the list. ALBERT applies one module in every layer; Falcon calls torch's
# attention itself; Switch hands on a float mask of one row, made by itself.
UNUSUAL = [
    Family("ALBERT", hf.AlbertModel, hf.AlbertConfig, ENCODER | dict(embedding_size=16), encoder),
    Family("Falcon", hf.FalconForCausalLM, hf.FalconConfig, dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64), lambda: {"input_ids": ids()}),
    Family("Switch", hf.SwitchTransformersForConditionalGeneration, hf.SwitchTransformersConfig,
           T5_LIKE | dict(num_experts=2), seq2seq),
]
# Its own attention is of chosen queries, through no interface; between encoder and decoder it does.
PARTLY = Family("Informer", hf.InformerModel, hf.InformerConfig, dict(
    prediction_length=4, context_length=8, lags_sequence=[1], num_time_features=1, d_model=32,
    encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, distil=False), series)
# fmt: on


@dataclass(frozen=True)
class Eager:
    """What one attention module computes under eager.

    weights (batch, heads, q, k). visible (batch, q): the rows that see a key; where none is to be
    seen, eager spreads 1/n over all keys. group: its place in the output, "cross_attentions" say.
    """

    weights: Tensor
    visible: Tensor
    group: str = ""

    @property
    def exact(self) -> Tensor:
        """The weights, with 0 in the rows that see no key."""
        return self.weights * self.visible[:, None, :, None]


@torch.no_grad()
def eager_attentions(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Eager]:
    """`output_attentions` under eager, by the modules' qualified names, in the order of calls."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def interface(self, implementation: str, eager: Callable) -> Callable:
        def attend(module, query, key, value, mask, **kwargs):
            out, weights = eager(module, query, key, value, mask, **kwargs)
            visible = torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool)
            if mask is not None:  # 0 where visible, finfo.min elsewhere
                visible &= (mask == 0).any(-1)[:, 0]
            found[names[module]] = weights, visible
            return out, weights

        return attend

    with mock.patch.object(AttentionInterface, "get_interface", interface):
        output = model(**inputs, output_attentions=True)
    groups = {id(w): key for key in output if "attentions" in key for w in output[key]}
    assert len(groups) == len(found)
    return {name: Eager(w, visible, groups[id(w)]) for name, (w, visible) in found.items()}


def dense(top, k_len: int) -> Tensor:
    """TopK of at least every visible key, as the whole matrix (batch, heads, q, k)."""
    assert torch.all(top.rest.abs() < 1e-6)
    full = top.weights.new_zeros(*top.weights.shape[:-1], k_len)
    return full.scatter_add(-1, top.indices.long().clamp(min=0), top.weights)


# Models that are not plainly a stack of Hugging Face attention


@dataclass(frozen=True)
class Hybrid:
    """A model of two layers; the first has a `mixer` of that class instead of softmax attention."""

    name: str
    model: type
    settings: type
    arguments: dict
    mixer: str
    attention: str = "model.layers.1.self_attn"

    def build(self) -> nn.Module:
        return seeded(lambda: self.model(self.settings(**DECODER, **self.arguments)))

    def __str__(self) -> str:
        return self.name


# fmt: off
HYBRIDS = [
    Hybrid("Jamba", hf.JambaForCausalLM, hf.JambaConfig, dict(
        num_experts=1, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
        mamba_d_state=4, mamba_dt_rank=4), "JambaMambaMixer"),
    Hybrid("LFM2", hf.Lfm2ForCausalLM, hf.Lfm2Config, dict(
        layer_types=["conv", "full_attention"]), "Lfm2ShortConv"),
    Hybrid("Bamba", hf.BambaForCausalLM, hf.BambaConfig, dict(
        attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1,
        mamba_d_state=8), "BambaMixer"),
    Hybrid("Qwen3-Next", hf.Qwen3NextForCausalLM, hf.Qwen3NextConfig, dict(
        layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16),
        "Qwen3NextGatedDeltaNet"),
]
# fmt: on


def mamba() -> nn.Module:
    config = hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)
    return seeded(lambda: hf.MambaForCausalLM(config))


def nystromformer() -> nn.Module:
    """Attention by landmarks: it has no weights of single keys."""
    config = hf.NystromformerConfig(**ENCODER, num_landmarks=2, segment_means_seq_len=11)
    return seeded(lambda: hf.NystromformerModel(config))


def linear() -> nn.Module:
    """A model without any attention."""
    return seeded(lambda: nn.Linear(4, 4))


class Plain(nn.Module):
    """Two causal blocks of a model that calls F.scaled_dot_product_attention itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(PlainAttention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class PlainAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2).reshape(x.shape)


def plain() -> nn.Module:
    return seeded(Plain)


def multihead() -> nn.MultiheadAttention:
    return seeded(lambda: nn.MultiheadAttention(32, 4, batch_first=True))


def transformer_encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return seeded(lambda: nn.TransformerEncoder(layer, 2))
