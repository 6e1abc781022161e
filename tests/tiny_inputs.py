"""What a tiny model's forward takes: by the names of its parameters, in more than one way."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import zoo

VOCAB, LENGTH, IMAGE = 64, 16, 32


def inputs(model: nn.Module, padded: bool = False, image: bool = False) -> dict[str, Tensor]:
    """What its forward takes, by the names of its parameters.

    padded: on the right, where it takes text. image: beside the text, where it takes both.
    """
    generator = torch.Generator().manual_seed(3)
    takes = inspect.signature(model.forward).parameters
    config = model.config
    ids = torch.randint(5, VOCAB - 4, (2, LENGTH), generator=generator)
    keep = torch.ones_like(ids)
    if padded:
        keep[1, 11:] = 0
    given: dict[str, Tensor] = {}
    main = getattr(model, "main_input_name", "input_ids")
    if "input_ids" in takes:
        given |= {"input_ids": ids}
        if "attention_mask" in takes:
            given |= {"attention_mask": keep}
    given |= _special(type(model).__name__, generator)
    if main == "pixel_values" or ("pixel_values" in takes and (image or "input_ids" not in takes)):
        given["pixel_values"] = _image(config, generator)
    if main == "pixel_values_videos":
        frames = getattr(config, "num_frames", 4)
        given[main] = torch.randn(2, frames, 3, *_sides(config), generator=generator)
    if main == "input_values":
        shape = (2, 1600)
        if hasattr(config, "num_mel_bins") and not hasattr(config, "conv_kernel"):
            shape = (2, getattr(config, "max_length", 64), config.num_mel_bins)
        given = {"input_values": torch.randn(*shape, generator=generator)}
    if main == "input_features":
        mels = getattr(config, "num_mel_bins", None) or getattr(
            config, "input_feat_per_channel", 80
        )
        shape = (2, 64, mels) if "2" in type(model).__name__ else (2, mels, 64)
        given = {"input_features": torch.randn(*shape, generator=generator)}
    if config.is_encoder_decoder or "decoder_input_ids" in takes:
        given["decoder_input_ids"] = ids[:, :7]
    if "bbox" in takes:
        given["bbox"] = torch.zeros(2, LENGTH, 8 if "Bros" in type(model).__name__ else 4).long()
    return given


def _special(name: str, generator: torch.Generator) -> dict[str, Tensor]:
    """What only this class takes."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if name.startswith("Lxmert"):
        return {"visual_feats": noise(2, 3, 8), "visual_pos": noise(2, 3, 4)}
    if name.startswith("Perceiver"):
        return {"inputs": noise(2, LENGTH, 32)}
    return {}


def _sides(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", IMAGE)
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else tuple(size)


def _image(config: Any, generator: torch.Generator) -> Tensor:
    config = getattr(config, "vision_config", None) or config
    shape = (2, getattr(config, "num_channels", 3), *_sides(config))
    if "Timesformer" in type(config).__name__ or "TimeSformer" in type(config).__name__:
        shape = (2, config.num_frames, *shape[1:])
    return torch.randn(*shape, generator=generator)


def variants(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inputs to try one after the other: the plainest first, then other layouts of the same."""
    given = inputs(model)
    takes = inspect.signature(model.forward).parameters
    needed = {
        n for n, p in takes.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD
    }
    known = {n for n in takes if n in MADE and n not in given}
    yield given
    for names in (known & needed, known):
        if names:
            yield _filled(model.config, given, names)
    if "input_ids" in given and "pixel_values" in takes:
        image = inputs(model, image=True)
        yield image
        yield _filled(model.config, image, known)
    for name, layouts in LAYOUTS.items():
        for layout in layouts if name in given or name in takes else ():
            other = given | {name: noise(*layout(model.config))}
            yield other
            if known - {name}:
                yield _filled(model.config, other, known - {name})


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def _filled(config: Any, given: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """With what MADE knows of these names: in its order, since some follow from others."""
    given = dict(given)
    for name, make in MADE.items():
        if name in names:
            given[name] = make(config, given)
    return given


def _of(config: Any, *names: str, default: int) -> int:
    """The first of these fields that a configuration, or its part for images or sound, has."""
    for part in ("", "vision_config", "audio_config", "encoder_config", "text_config"):
        inner = getattr(config, part, None) if part else config
        for name in names:
            value = getattr(inner, name, None)
            if isinstance(value, int):
                return value
    return default


def _mels(config: Any) -> int:
    return _of(
        config,
        "num_mel_bins",
        "feature_size",
        "input_feat_per_channel",
        "input_dim",
        "input_size",
        default=80,
    )


def _frames(config: Any) -> int:
    """As many as positions, of which Whisper's encoders keep every second."""
    return 2 * _of(config, "max_source_positions", default=32)


def _patches(config: Any, given: dict[str, Tensor]) -> Tensor:
    """Flattened patches of two images of 4 × 4."""
    size = _of(config, "patch_size", default=8) ** 2 * _of(config, "temporal_patch_size", default=1)
    return noise(32, _of(config, "in_channels", "in_chans", "num_channels", default=3) * size)


def _grid(config: Any, given: dict[str, Tensor]) -> Tensor:
    return torch.tensor([[1, 4, 4]] * 2)


def _ones_like_time(config: Any, given: dict[str, Tensor]) -> Tensor:
    features = given.get("input_features")
    if features is None:
        features = noise(2, 64, 80)
    time = features.shape[2] if features.shape[1] == _mels(config) else features.shape[1]
    return torch.ones(2, time, dtype=torch.long)


def _series(name: str) -> Callable[[Any, dict[str, Tensor]], Tensor]:
    return lambda config, given: zoo.series()[name]


def _ids(config: Any, given: dict[str, Tensor]) -> Tensor:
    return torch.arange(20, 36).expand(2, -1).clone()


MADE: dict[str, Callable[[Any, dict[str, Tensor]], Tensor]] = {
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "merge_sizes": lambda c, g: torch.ones(2).long(),
    "hidden_states": _patches,
    "target_sizes": lambda c, g: torch.tensor([[4, 4]] * 2),
    "past_time_features": _series("past_time_features"),
    "past_observed_mask": _series("past_observed_mask"),
    "future_values": _series("future_values"),
    "future_time_features": _series("future_time_features"),
    "input_features_mask": _ones_like_time,
    "query_embeds": lambda c, g: noise(2, 8, _of(c, "hidden_size", default=32)),
    "qformer_input_ids": _ids,
    "encoder_hidden_states": lambda c, g: noise(2, 8, _of(c, "encoder_hidden_size", default=32)),
    "input_points": lambda c, g: noise(2, 1, 1, 2).abs(),
    "decoder_input_ids": lambda c, g: torch.arange(20, 27).expand(2, -1).clone(),
    "state": lambda c, g: noise(2, _of(c, "max_state_dim", default=32)),
    "task_inputs": lambda c, g: torch.ones(2, _of(c, "task_seq_len", default=8)).long(),
    "pixel_attention_mask": lambda c, g: torch.ones(2, 16).long(),
    "spatial_shapes": lambda c, g: torch.tensor([[4, 4]] * 2),
    "flattened_patches": lambda c, g: noise(2, 16, 2 + 3 * _of(c, "patch_size", default=16) ** 2),
    "states": lambda c, g: noise(2, 4, _of(c, "state_dim", default=17)),
    "actions": lambda c, g: noise(2, 4, _of(c, "act_dim", default=4)),
    "returns_to_go": lambda c, g: noise(2, 4, 1),
    "timesteps": lambda c, g: torch.arange(4).expand(2, -1),
    "prompt_pixel_values": lambda c, g: noise(2, 3, *_sides(c)),
    "prompt_masks": lambda c, g: noise(2, 3, *_sides(c)),
}  # fmt: skip
# Of what is given: other shapes that the same name has elsewhere
LAYOUTS: dict[str, list[Callable[[Any], tuple[int, ...]]]] = {
    "hidden_states": [lambda c: (32, 2 * _patches(c, {}).shape[1])],
    "input_features": [
        lambda c: (2, 64, _mels(c)),
        lambda c: (2, _mels(c), _frames(c)),
        lambda c: (2, _frames(c), _mels(c)),
        lambda c: (2, 64, 2 * _mels(c)),
        lambda c: (2, 1, 1001, 64),
    ],
    "input_values": [lambda c: (2, 1, 1600), lambda c: (2, 1600), lambda c: (2, 1, 16000)],
    "audio_values": [lambda c: (2, 1, 16000)],
    "audio_mel": [lambda c: (2, 64, 128)],
    "pixel_values": [
        lambda c: (32, 2 * _patches(c, {}).shape[1]),
        lambda c: (32, _patches(c, {}).shape[1]),
        lambda c: (32, 3, _of(c, "patch_size", default=8), _of(c, "patch_size", default=8)),
        lambda c: (2, 16, _patches(c, {}).shape[1]),
        lambda c: (2, _of(c, "num_frames", default=4), 3, *_sides(c)),
        lambda c: (2, 2, 3, *_sides(c)),
        lambda c: (2, 1, 3, *_sides(c)),
        lambda c: (2, 3, 224, 224),
    ],
    "past_values": [
        lambda c: (2, 9), lambda c: (2, _of(c, "context_length", default=32), 1),
        lambda c: (2, 64),
    ],
}  # fmt: skip
