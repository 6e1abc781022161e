"""Models on disk as Hugging Face has them: model.safetensors beside config.json, no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RegardError, reason
from .config import ModelConfig
from .encoder import TextEncoder
from .language_model import LanguageModel
from .recurrent_translator import RecurrentTranslator
from .translator import Translator

KINDS: dict[str, Any] = {
    made.kind: made for made in (LanguageModel, TextEncoder, Translator, RecurrentTranslator)
}
ARCHITECTURES = {
    "lm": "RegardForCausalLM",
    "encoder": "RegardEncoder",
    "translator": "RegardForConditionalGeneration",
    "recurrent-translator": "RegardRecurrentForConditionalGeneration",
}
PREFIX = "model."  # of every weight's name, as the wrappers of `regard.huggingface` name them


def save_model(model: Any, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write model.safetensors and config.json; weights: others in the place of the model's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict() if weights is None else weights)
    if model.config.tie:
        state.pop("head.weight", None)
    named = {PREFIX + name: tensor.cpu().contiguous() for name, tensor in state.items()}
    write_tensors(folder / "model.safetensors", named, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(config_json(model), indent=2) + "\n")


def config_json(model: Any) -> dict[str, Any]:
    """What config.json says of a model."""
    config: ModelConfig = model.config
    ids = {f"{name}_token_id": getattr(config, name) for name in ("pad", "bos", "eos")}
    said: dict[str, Any] = {
        "model_type": f"regard-{model.kind}",
        "architectures": [ARCHITECTURES[model.kind]],
        "is_encoder_decoder": "translator" in model.kind,
        "tie_word_embeddings": config.tie,
        "dtype": "float32",
    }
    return said | {n: i if i >= 0 else None for n, i in ids.items()} | asdict(config)


def load_model(folder: str | Path) -> Any:
    """The model that `save_model` wrote, on the CPU, in evaluation."""
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        said = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RegardError(f"{folder} is no model: {_missing(folder)}") from error
    kind = str(said.get("model_type", "")).removeprefix("regard-")
    if kind not in KINDS:
        raise RegardError(f"{folder} is no model of regard's: it is of type {kind!r}")
    try:
        state = load_file(folder / "model.safetensors", device="cpu")
    except Exception as error:
        raise RegardError(f"{folder} has no model.safetensors to read: {reason(error)}") from error
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    if said.get("tie", True):
        state["head.weight"] = state["embedding.weight"]
    return filled(KINDS[kind], ModelConfig.from_json(said), state)


def _missing(folder: Path) -> str:
    """Why a folder has no config.json to read, as far as one can see."""
    if not folder.exists():
        return "there is no such folder"
    if (folder / "run.json").exists():
        return "its training is not over; give the same command again, and it goes on"
    return "it has no config.json to read"


def filled(kind: Any, config: ModelConfig, state: Mapping[str, Tensor]) -> Any:
    """A model with these weights, on the CPU, in evaluation."""
    with torch.device("cpu"):
        model: nn.Module = kind(config)
    model.load_state_dict(state)
    return model.eval()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all: a temporary name, fsync, rename."""
    from safetensors.torch import save

    _write(path, save(dict(tensors), metadata))


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    _write(path, text.encode("utf-8"))


def _write(path: Path, data: bytes) -> None:
    made = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(made, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(made, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the name, too, must survive
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
