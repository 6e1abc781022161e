"""Tiny random models of any architecture of transformers, made from its configuration, and inputs.

Sizes go by the names of the configuration's fields, so that most architectures need no line of
their own; `OWN` holds what others need.
"""

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

import zoo
from tiny_inputs import IMAGE, VOCAB, inputs

__all__ = ["Way", "build", "inputs", "model_classes", "names"]

PATCH = 8
SIZES: list[tuple[Any, str]] = [
    (32, "hidden_size d_model n_embd dim embed_dim emb_dim d_embed word_embed_proj_dim "
         "embedding_size decoder_hidden_size encoder_hidden_size projection_dim hidden_dim "
         "output_dim out_hidden_size fusion_hidden_size vision_hidden_size bottleneck_size "
         "encoder_embed_dim decoder_embed_dim adapter_dim classifier_proj_size d_latents "
         "conv_dim_size hidden_size_per_layer_input"),
    (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
        "decoder_attention_heads attention_heads num_encoder_attention_heads "
        "num_decoder_attention_heads decoder_num_attention_heads encoder_num_attention_heads "
        "num_key_value_heads mamba_n_heads num_cross_attention_heads "
        "num_self_attention_heads decoder_num_heads encoder_num_heads"),
    (2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth "
        "num_decoder_layers num_encoder_layers decoder_num_hidden_layers l_layers r_layers "
        "x_layers encoder_num_hidden_layers speech_decoder_prenet_layers num_local_experts "
        "num_experts n_routed_experts num_experts_per_tok moe_num_experts "
        "num_self_attends_per_block num_speech_encoder_layers decoder_depth encoder_depth "
        "num_blocks_per_stage"),
    (48, "intermediate_size d_ff n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner "
         "dim_feedforward decoder_intermediate_size encoder_intermediate_size mlp_dim "
         "moe_intermediate_size shared_expert_intermediate_size expert_ffn_dim ffn_hidden_size "
         "intermediate_size_mlp decoder_ffn_dim encoder_ffn_dim ffn_size"),
    (VOCAB, "vocab_size n_words src_vocab_size tgt_vocab_size vocab_size_per_layer_input"),
    (128, "max_position_embeddings n_positions max_seq_len n_ctx max_source_positions "
          "max_target_positions max_sequence_length"),
    (IMAGE, "image_size"),
    (PATCH, "patch_size patch_stride d_kv d_head qk_rope_head_dim "
            "qk_nope_head_dim v_head_dim attention_head_size head_dim"),
    (4, "rotary_dim window_size"),
    (16, "q_lora_rank kv_lora_rank"),
    (1, "n_shared_experts num_random_blocks n_group topk_group moe_num_shared_experts top_k "
        "first_k_dense_replace num_encoder_blocks_ moe_top_k moe_k"),
    (0.0, "dropout attention_dropout hidden_dropout_prob attention_probs_dropout_prob "
          "activation_dropout layerdrop encoder_layerdrop decoder_layerdrop drop_path_rate"),
]  # fmt: skip
BY_NAME = {name: size for size, names in SIZES for name in names.split()}
TOKENS = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "sep_token_id": 2, "cls_token_id": 1, "forced_eos_token_id": None,
    "forced_bos_token_id": None, "lang_id": 0,
}  # fmt: skip
SERIES = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1], "num_time_features": 1,
}  # fmt: skip
# What the names do not say: sizes that must fit each other, or fields that mean something else
OWN: dict[str, dict[str, Any]] = {
    "longformer": {"attention_window": 4},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64},
    "big_bird": {"attention_type": "block_sparse", "block_size": 2},
    "bigbird_pegasus": {"block_size": 2},
    "longt5": {"local_radius": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "xlnet": {"d_head": 8},
    "transfo-xl": {"cutoffs": [20, 40]},
    "swin": {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "patch_size": 4},
    "swinv2": {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "image_size": 32,
               "patch_size": 4},
    "swin2sr": {"embed_dim": 8, "depths": [2], "num_heads": [2], "patch_size": 1, "window_size": 4},
    "donut-swin": {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "patch_size": 4},
    "maskformer-swin": {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "patch_size": 4},
    "hiera": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": [7, 7],
              "patch_stride": [4, 4], "patch_padding": [3, 3], "masked_unit_size": [4, 4],
              "query_stride": [2, 2], "num_query_pool": 1, "image_size": [32, 32]},
    "cvt": {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 1, 2],
            "drop_rate": [0.0] * 3, "drop_path_rate": [0.0] * 3, "image_size": 64},
    "levit": {"hidden_sizes": [16, 32, 32], "num_attention_heads": [2, 4, 4], "depths": [1, 1, 1],
              "key_dim": [8, 8, 8], "patch_size": 16, "image_size": 64},
    "pvt": {"hidden_sizes": [8, 16, 16, 16], "num_attention_heads": [1, 2, 2, 2],
            "depths": [1, 1, 1, 1], "patch_sizes": [4, 2, 2, 2], "image_size": 64},
    "perceiver": {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_blocks": 1,
                  "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
    "funnel": {"block_sizes": [1, 1], "d_head": 8, "d_inner": 48},
    "funnel-base": {"block_sizes": [1, 1], "d_head": 8, "d_inner": 48},
    "prophetnet": {"ngram": 2},
    "fsmt": {"langs": ["en", "de"]},
    "codegen": {"rotary_dim": 4},
    "openai-gpt": {"afn": "gelu"},
    "cpmant": {"dim_head": 8, "vocab_size": 100},
    "mobilevit": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32],
                  "num_attention_heads": 4, "patch_size": 2, "image_size": 64},
    "imagegpt": {"vocab_size": 64},
    "flaubert": {"max_position_embeddings": 128, "n_langs": 1},
    "xlm": {"n_langs": 1},
    "squeezebert": {"embedding_size": 32},
    "mpnet": {},
    "esm": {"position_embedding_type": "rotary", "vocab_size": VOCAB, "mask_token_id": 4},
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "visual_embed": False},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 4},
    "bros": {"hidden_size": 64},
    "pegasus_x": {"block_size": 4, "num_global_tokens": 3, "stagger_local_blocks": True},
    "sam": {}, "groupvit": {},
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16, "mamba_d_state": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_d_head": 16,
                         "mamba_d_state": 8, "shared_intermediate_size": 48},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "esmc": {"num_key_value_heads": 4},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1]},
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "lxmert": {"visual_feat_dim": 8, "visual_pos_dim": 4},
    "speecht5": {"vocab_size": VOCAB},
    "tvp": {},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 32},
    "mgp-str": {"image_size": [32, 32], "patch_size": [8, 8], "max_token_length": 5},
    "timesformer": {"num_frames": 2},
    "vits": {"upsample_initial_channel": 16, "upsample_rates": [2, 2], "flow_size": 32,
             "upsample_kernel_sizes": [4, 4], "prior_encoder_num_wavenet_layers": 1,
             "posterior_encoder_num_wavenet_layers": 1, "spectrogram_bins": 16},
}  # fmt: skip


def names() -> list[str]:
    """All architectures that transformers names."""
    return sorted(CONFIG_MAPPING_NAMES)


MAPPINGS = (
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    auto.MODEL_MAPPING,
)  # fmt: skip


def model_classes(kind: str) -> list[type]:
    """An architecture's models, one that generates first if there is one; [] where it is a part."""
    config = CONFIG_MAPPING[kind]
    found: list[type] = []
    for mapping in MAPPINGS:
        if config in mapping:
            models = mapping[config]
            found += models if isinstance(models, tuple | list) else [models]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Way:
    """How a configuration is made small."""

    sizes: dict[str, Any] = field(default_factory=dict)  # others than usual, by fields' names
    fills: bool = False  # sizes go to fields of no default, too; parts get what OWN says of them
    cuts: bool = False  # lists of one entry a layer become as short as the layers are few
    wide: bool = False  # only layers, words and experts are few


RESNET = {"embedding_size": 16, "hidden_sizes": [16] * 4, "depths": [1] * 4}  # timm's stand-in
FEW = {name: size for name, size in BY_NAME.items() if size in (2, VOCAB, 0.0)}
SIZED = (int, float)


def shrunk(kind: type, config: Any, own: dict[str, Any], way: Way) -> Any:
    """A configuration of the same class, with small sizes."""
    sizes = (FEW if way.wide else BY_NAME) | way.sizes
    takes = set(inspect.signature(kind.__init__).parameters)
    takes |= set(getattr(kind, "__dataclass_fields__", {}))
    given: dict[str, Any] = {}
    for name in takes:
        value = field_of(config, name)
        if isinstance(value, hf.PreTrainedConfig):
            part = OWN.get(value.model_type, {}) if way.fills else {}
            if way.fills and value.model_type == "timm_backbone":
                value, part = hf.ResNetConfig(), RESNET | {"out_indices": list(value.out_indices)}
            given[name] = shrunk(type(value), value, part, way)
        elif name in TOKENS:
            given[name] = TOKENS[name]
        elif name in sizes and isinstance(value, SIZED) and not isinstance(value, bool):
            given[name] = type(value)(sizes[name])
        elif name in sizes and value is None and way.fills:
            given[name] = sizes[name]
        elif isinstance(value, list | tuple) and way.cuts:
            layers = field_of(config, "num_hidden_layers")
            if len(value) == layers:
                given[name] = value[: sizes["num_hidden_layers"]]
    given |= own
    if "num_key_value_heads" in takes and "num_key_value_heads" not in own and not way.wide:
        heads = 4 if "kv_lora_rank" in takes else 2
        given["num_key_value_heads"] = way.sizes.get("num_key_value_heads", heads)
    return kind(**given)


def field_of(config: Any, name: str) -> Any:
    """None where it is not there, or differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # some properties of configurations raise, each its own error
        return None


WIDEST = 150_000_000  # parameters


def build(
    kind: str, way: Way | None = None, model: type | None = None, **settings: Any
) -> nn.Module:
    """A tiny model in eval mode, its weights far from uniform."""
    way = way or Way()
    made = model or model_classes(kind)[0]
    config = CONFIG_MAPPING[kind]
    config = shrunk(config, config(), OWN.get(kind, {}), way)
    if kind in ("bert", "roberta", "electra", "camembert"):
        config.is_decoder = True
    if not way.wide:
        return zoo.seeded(lambda: made._from_config(config, **settings))
    with torch.device("meta"):
        size = sum(p.numel() for p in made(copy.deepcopy(config)).parameters())
    if size > WIDEST:
        raise ValueError(f"{size:,} parameters")
    return zoo.seeded(lambda: made._from_config(config, **settings), std=0.05)
