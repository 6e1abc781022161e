"""The effects of a layer's edges on disk: a file of their own beside the layer's.

They come from a backward pass, which reaches the layers last to first, after the layers' own files
are whole; a run that is killed in it leaves those layers' that were reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .by_effect import EdgeEffects
from .index_file import read_index, write_index
from .recorded_layer import RecordedLayer
from .stored import StoredTensors, read, write
from .stored_layer import named

EDGES = 64  # kept of each query
_FIELDS = ("indices", "effects", "weights")


def effect_file(layer: Path) -> Path:
    """The file of a layer's effects. layer: the file of its calls, `layer-000.safetensors`."""
    return layer.with_name(layer.name.replace("layer-", "effect-", 1))


def write_effects(path: Path, name: str, edges: EdgeEffects) -> None:
    """Write them; what no query lists is left out. name: of the layer's module."""
    most = max(1, int((edges.indices >= 0).sum(-1).max())) if edges.indices.numel() else 1
    kept = dict(zip(_FIELDS, (t[..., :most] for t in edges.tensors), strict=True))
    write(path, kept | {"indices": kept["indices"].int()}, {"name": name})


def effect_files(folder: Path) -> list[Path]:
    """All such files of a recording."""
    return sorted(folder.glob("effect-*.safetensors"))


def write_beside(path: Path, layer: RecordedLayer) -> Path | None:
    """Write a layer's effects beside its file, where it has any. The file that was written."""
    if layer.effects is None:
        return None
    indices, *others = layer.effects.tensors
    indices = read(indices)
    positions = (indices + layer.key_start).where(indices >= 0, -1)
    write_effects(effect_file(path), layer.name, EdgeEffects(positions, *others))
    return effect_file(path)


def join_effects(
    layers: Sequence[RecordedLayer], folder: Path, found: Mapping[int, EdgeEffects],
    said: dict[str, Any],
) -> None:  # fmt: skip
    """Write effects beside a recording that is whole, and say so in its index.

    found: by a layer's place in the recording; said: of the target.
    """
    index = read_index(folder)
    entries = index.of(list, "layers")
    for number, edges in found.items():
        path = effect_file(folder / entries[number]["file"])
        write_effects(path, layers[number].name, edges)
        entries[number]["effects"] = path.name
        add_effects(layers[number], path)
    write_index(folder, index.of(dict, "about") | {"effect": said}, entries, whole=True)


def add_effects(layer: RecordedLayer, path: Path) -> str:
    """Give a layer what its effects' file holds; what is wrong with the file, or nothing."""
    try:
        with named(path):
            layer.effects = _read(path, layer)
    except RegardError as error:
        layer.effects_damage = str(error)
    return layer.effects_damage


def _read(path: Path, layer: RecordedLayer) -> EdgeEffects:
    if path.is_symlink():
        raise ValueError(f"{path.name} is a link; it may lead outside the recording")
    file = StoredTensors(path)
    layer.files.append(file)
    if file.said.of(str, "name") != layer.name:
        raise ValueError(f"it is of the layer {file.said['name']!r}")
    found = EdgeEffects(*(file[name] for name in _FIELDS))
    if layer.key_start:  # the file has positions
        found = EdgeEffects(_own_keys(read(found.indices), layer.key_start), *found.tensors[1:])
    row = (layer.batch, layer.heads, layer.q_len)
    for name, tensor in zip(_FIELDS, found.tensors, strict=True):
        whole = name == "indices"
        fits = tensor.dtype == torch.int32 if whole else tensor.dtype.is_floating_point
        if tensor.dim() != 4 or tensor.shape[:3] != row or not fits:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}; it has rows {row}")
        if tensor.shape != found.indices.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, unlike indices")
    return found


def _own_keys(positions: Tensor, key_start: int) -> Tensor:
    """Positions of keys as recorded keys from 0; −1 stays."""
    return (positions - key_start).where(positions >= 0, -1)
