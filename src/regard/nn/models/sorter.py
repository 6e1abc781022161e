"""`load_sorter`: a minGPT that sorts, as JSON with its weights in base64."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import RegardError, reason
from .config import ModelConfig
from .language_model import LanguageModel
from .saved import filled

PARTS = {
    "ln_1": "mixer_norm",
    "attn.c_proj": "mixer.attention.out_proj",
    "ln_2": "feed_forward_norm",
    "mlp.c_fc": "feed_forward.up",
    "mlp.c_proj": "feed_forward.down",
}


def load_sorter(folder: str | Path) -> LanguageModel:
    """The model of a folder with gpt-nano-sort-model.json: behind six letters, the same sorted.

    model = load_sorter("gpt-nano-sort")
    generate(model, torch.tensor([[2, 0, 1, 1, 0, 2]]), 6)[:, 6:]  # 0 0 1 1 2 2: A A B B C C
    """
    path = Path(folder) / "gpt-nano-sort-model.json"
    try:
        said = json.loads(path.read_text("utf-8"))
        sizes = said["config"]
        depth, heads, dim, vocab, length = (
            int(sizes[name]) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
        )
        held = {name: _tensor(one) for name, one in said.items() if name != "config"}
        state = _state(held, depth, dim)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RegardError(
            f"{folder} has no gpt-nano-sort-model.json to read: {reason(error)}"
        ) from error
    config = ModelConfig(
        vocab=vocab, dim=dim, heads=heads, depth=depth, length=length, positions="learned",
        norm="layer", bias=True, activation="gelu-tanh", tie=False,
    )  # fmt: skip
    model: LanguageModel = filled(LanguageModel, config, state)
    return model


def _tensor(said: dict[str, Any]) -> Tensor:
    numbers = np.frombuffer(base64.b64decode(said["data"]), "<f4").reshape(said["shape"])
    return torch.from_numpy(numbers.copy())


def _state(held: dict[str, Tensor], depth: int, dim: int) -> dict[str, Tensor]:
    """The weights by our names; queries, keys and values apart."""
    # Here a token's vector is √dim times its row
    state = {
        "embedding.weight": held["transformer.wte.weight"] / dim**0.5,
        "stack.positions.weight": held["transformer.wpe.weight"],
        "head.weight": held["lm_head.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"stack.norm.{kind}"] = held[f"transformer.ln_f.{kind}"]
        for n in range(depth):
            theirs, ours = f"transformer.h.{n}", f"stack.blocks.{n}"
            for name, own in PARTS.items():
                state[f"{ours}.{own}.{kind}"] = held[f"{theirs}.{name}.{kind}"]
            parts = held[f"{theirs}.attn.c_attn.{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                state[f"{ours}.mixer.attention.{name}_proj.{kind}"] = part
    return state
