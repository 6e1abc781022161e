"""`record`: a model's attention on one input, written layer by layer while the model runs."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegardError
from ..ops.beside import Rounding
from ..ops.region import current
from .by_effect import EdgeEffects
from .index_file import INDEX, as_json, entry_of, layer_file, write_index
from .layers import Layer
from .measured_effect import NEXT, Target, check_inputs, measure_effects, next_token
from .projection import output_projection
from .pyramid import observers
from .recorded_layer import kept_by
from .recording import Recording
from .saved_files import clean, free_folder
from .shard_writer import ShardWriter
from .stored_effect import EDGES, effect_file, write_effects
from .stored_layer import StoredLayer
from .watching import watch


def record(
    model: nn.Module,
    inputs: Any,
    folder: str | Path,
    *,
    layers: Sequence[int | str] | int | str | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    values: bool = False,
    observe: bool = True,
    top: int = 8,
    effect: bool | Callable[[Any], Tensor] = False,
    tokens: Sequence[str] | None = None,
    tokenizer: Any = None,
    text: str | None = None,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    verify: bool | None = None,
) -> Recording:
    """Run a model and write queries, keys and log-sum-exp of its attention, layer by layer.

        recording = regard.record(model, inputs, "folder", tokenizer=tokenizer)
        recording.tile(layer=3, head=1, zoom=4, row=0, col=0)  # 128 × 128 cells of 16 × 16 tokens

    A layer goes to its file when its attention is computed, and leaves memory; the result is mapped
    from the files. The model's output is its own, to the bit.

    inputs: what the model takes: token ids, a mapping of its arguments, or a function without
        arguments that runs it, such as `lambda: model.generate(**inputs)`, or a prefill in chunks.
        Calls that continue a sequence append to it; a new sequence replaces the last.
    layers: as for `watch`. dtype: of queries and keys as kept; None: the model's own. What is read
        beside them, and the log-sum-exp, belongs to the numbers that are kept.
    values: also keep values, and ‖W_O v‖ of each key (`Recording.norm_weights`).
    observe: keep the `top` largest weights of each row, what each key receives, entropy, distances,
        and pooled maps, from which coarse tiles are read. Padding's queries count.
    effect: also run the model forward and backward, and keep of each query the 64 edges whose
        removal would change a number of its output most (`Recording.effect`, `Effect`): the
        log-probability of the likeliest next token, or the scalar that a function of the output
        gives. The model keeps its activations meanwhile, O(N) a layer; nothing of it is changed.
    tokens: a name for each token; tokenizer: names them, and places them in the text.
    about: further facts, fit for JSON. overwrite: replace an older recording.

    Inside `context_parallel` inputs are the rank's own tokens, and each rank writes its own part of
    the recording; the first makes the folder, where all of them write.

    In beam search rows follow the beams that survive, as under `watch`.

    RegardError as of `watch`, and for a folder that is not free. A run that is
    stopped or killed leaves the layers that were whole, and `Recording.load` opens them.
    """
    folder = Path(folder)
    said = {"model": _name(model), "versions": _versions()} | dict(about or {})
    said |= _tokens(inputs, tokens, tokenizer, text)
    region, target = current(), _target(effect, inputs)
    if target is not None:
        said["effect"] = {"target": NEXT if effect is True else "as given", "edges": EDGES}

    def begin() -> _Writer:
        return _Writer(folder, model, said, overwrite, values)

    with begin() if region is None else ShardWriter(region, begin, model, values) as writer:
        asked = observers(top) if observe else ()
        with (
            torch.no_grad(),
            Rounding(dtype) as rounding,
            writer.keeping(rounding, asked),
            watch(
                model, observe=asked, layers=layers, keep_qk=True, verify=verify,
                count_padding=True,
            ) as seen,
        ):  # fmt: skip
            _run(model, inputs)
        if target is not None:
            assert isinstance(writer, _Writer)  # not over ranks: see _target
            measure_effects(model, inputs, target, EDGES, layers, writer.take_effects)
        writer.finish(seen.layers)
        made = Recording.load(writer.folder)
        writer.opened()
    return made


def _target(effect: Any, inputs: Any) -> Target | None:
    """What effects are measured on; None where they are not. RegardError for what is neither."""
    if effect is False:
        return None
    if effect is not True and not callable(effect):
        raise RegardError(
            f"effect is {effect!r}; give True, or a function of the model's output that returns "
            "a scalar"
        )
    if current() is not None:
        raise RegardError("effects are not recorded over several ranks; record without them")
    check_inputs(inputs)
    return next_token if effect is True else effect


def _run(model: nn.Module, inputs: Any) -> None:
    """Run the model on what it was given."""
    if isinstance(inputs, Tensor):
        model(inputs)
    elif isinstance(inputs, Mapping):
        model(**inputs)
    elif callable(inputs):
        inputs()
    else:
        raise RegardError(
            f"inputs is a {type(inputs).__name__}; give token ids, a mapping of the model's "
            "arguments, or a function that runs it"
        )


def _name(model: nn.Module) -> str:
    """What to call a model: the name that it was loaded by, else its class."""
    if not isinstance(model, nn.Module):
        raise RegardError(f"record takes a torch module, not a {type(model).__name__}")
    named = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return Path(named).name or type(model).__name__


def _versions() -> dict[str, str]:
    """What ran: the versions that a result may depend on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("regard", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _tokens(
    inputs: Any, tokens: Sequence[str] | None, tokenizer: Any, text: str | None
) -> dict[str, Any]:
    """What a recording says of its tokens."""
    said: dict[str, Any] = {} if text is None else {"text": text}
    if tokens is not None:
        return said | {"tokens": [str(token) for token in tokens]}
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if tokenizer is None or not isinstance(ids, Tensor) or ids.dim() not in (1, 2):
        return said
    if (region := current()) is not None:  # of which this rank has its own tokens
        ids = region.joined(ids, ids.dim() - 1)
    first: list[int] = (ids if ids.dim() == 1 else ids[0]).tolist()
    names = tokenizer.convert_ids_to_tokens(first)
    said["tokens"] = [f"<{i}>" if n is None else n for i, n in zip(first, names, strict=True)]
    if text is not None and getattr(tokenizer, "is_fast", False):
        placed = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        if placed["input_ids"] == first:
            said["offsets"] = [[int(a), int(b)] for a, b in placed["offset_mapping"]]
            said["special"] = [bool(s) for s in placed["special_tokens_mask"]]
    return said


class _Writer:
    """A recording's folder while it is written.

    An older recording stands aside until a layer of the new one is whole.
    """

    def __init__(
        self, folder: Path, model: nn.Module, about: dict[str, Any], overwrite: bool, values: bool
    ) -> None:
        as_json(about)
        self.folder, self._about = free_folder(folder, INDEX, overwrite), about
        self._old = self.folder.with_name(f".{self.folder.name}.old-{os.getpid()}")
        self._modules, self._values = dict(model.named_modules()), values
        self.layers: dict[str, StoredLayer] = {}

    def __enter__(self) -> _Writer:
        shutil.rmtree(self._old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(self._old)
        self.folder.mkdir(parents=True)
        write_index(self.folder, self._about, [], whole=False)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not any(layer.parts for layer in self.layers.values()):
            shutil.rmtree(self.folder)  # nothing of it can be read
            if self._old.exists():
                self._old.rename(self.folder)
        shutil.rmtree(self._old, ignore_errors=True)
        clean(self.folder)

    def keeping(self, rounding: Rounding, asked: Sequence[Any]) -> AbstractContextManager[None]:
        """While inside, what the watch keeps goes to files, layer by layer."""

        def make(name: str, index: int, kind: str) -> StoredLayer:
            before = self.layers.get(name)
            number = len(self.layers) if before is None else int(before.path.stem[6:])
            for file in self.folder.glob(f"layer-{number:03}.*"):  # of an earlier sequence
                file.unlink()
            path = layer_file(self.folder, number)
            of = self._projection if self._values else None
            self.layers[name] = made = StoredLayer(name, index, kind, path, rounding, asked, of)
            return made

        return kept_by(make)

    def opened(self) -> None:
        """Nobody else waits for it."""

    def _projection(self, name: str, width: int) -> Tensor:
        return output_projection(self._modules, name, width)

    def take_effects(self, name: str, edges: EdgeEffects) -> None:
        """Write what the edges of a layer do; the layer itself is whole by now."""
        layer = self.layers[name]
        layer.close()
        write_effects(effect_file(layer.path), name, edges)

    def finish(self, order: Sequence[Layer]) -> None:
        """Write what is left, and the index: the layers that were watched, in their order."""
        entries = []
        for watched in order:
            layer = self.layers.get(watched.name)
            path = effects = None
            if layer is not None:
                layer.close()
                path, beside = layer.path, effect_file(layer.path)
                effects = beside if beside.exists() else None
            entries.append(entry_of(watched, path, effects))
        write_index(self.folder, self._about, entries, whole=True)
