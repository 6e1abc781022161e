"""A checkpoint is parameters, their average, the optimizer's tensors and the step: no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import RegardError, reason
from ...nn.models.saved import write_tensors

NAME = "checkpoint.safetensors"


def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    average: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    said: dict[str, str],
) -> None:
    """Written whole or not at all; said: the step and so on, as texts."""
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    tensors |= {f"average.{n}": p for n, p in average.items()}
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()["state"]
        for index, held in state.items():
            for name, tensor in held.items():
                tensors[f"optimizer.{number}.{index}.{name}"] = tensor
    made = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(folder / NAME, made, said)


def load_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    average: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
) -> dict[str, str] | None:
    """Everything put back in place; what was said, or None where there is no checkpoint."""
    from safetensors import safe_open

    if not (folder / NAME).exists():
        return None
    try:
        with safe_open(folder / NAME, framework="pt", device="cpu") as file:
            said: dict[str, str] = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise RegardError(f"cannot read the checkpoint in {folder}: {reason(error)}") from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
        for name, kept in average.items():
            kept.copy_(tensors[f"average.{name}"])
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".", 3)
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return said
