"""The model that `regard.look` is given, loaded or by name, as a `TextModel`.

Everything here needs transformers, which ``pip install "regard[look]"`` brings.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..call.brief import shortened
from ..errors import RegardError
from .text_model import EXTRA, TextModel, family_of, load

_GIVE = "give a folder, a name, (model, tokenizer), or an object with .model and .tokenizer"


def read_as(given: Any, *, generate: bool = False, head: bool = False) -> TextModel:
    """A reader of what was given; RegardError in one line where it can read no text."""
    if given is None or isinstance(given, str | os.PathLike):
        name = None if given is None else os.fspath(given)
        return load(name, generate=generate, head=head)
    model, tokenizer = _pair(given)
    model = _pretrained(model)
    config = model.config
    title = Path(str(getattr(config, "name_or_path", "") or type(model).__name__)).name
    _check(model, tokenizer, title)
    family = family_of(config, type(model).__name__)
    if generate and family == "encoder":
        raise RegardError(f"{title} is an encoder: it generates no text")
    if generate and not model.can_generate():
        raise RegardError(
            f"{type(model).__name__} has no head that names the next token; give generate=0, or "
            "load it by AutoModelForCausalLM"
        )
    return TextModel(title, model, tokenizer, family)


def _pair(given: Any) -> tuple[Any, Any]:
    """Model and tokenizer of what was given."""
    if isinstance(given, tuple | list) and len(given) == 2:
        model, tokenizer = given
        if callable(getattr(model, "convert_ids_to_tokens", None)):
            model, tokenizer = tokenizer, model
    else:
        tokenizer = getattr(given, "tokenizer", None)
        model = given if isinstance(given, nn.Module) else getattr(given, "model", None)
        if isinstance(given, nn.Module) and tokenizer is None:
            raise RegardError(f"{type(given).__name__} has no tokenizer; give (model, tokenizer)")
    if not isinstance(model, nn.Module):
        raise RegardError(f"model is {shortened(repr(given), 60)}; {_GIVE}")
    return model, tokenizer


def _pretrained(model: nn.Module) -> Any:
    """The model of transformers that was given, or the one inside (a sentence encoder's)."""
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise RegardError(f"reading a model needs transformers: {EXTRA}") from error
    found = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    kind = type(model).__name__
    if not found:
        raise RegardError(f"{kind} is no transformers model; regard.watch takes any torch module")
    inside = set(found[0].modules())  # modules() begins with the outermost
    if not inside.issuperset(found):
        raise RegardError(f"{kind} holds several models; give one of them, and its tokenizer")
    return found[0]


def _check(model: Any, tokenizer: Any, title: str) -> None:
    if not callable(getattr(tokenizer, "convert_ids_to_tokens", None)):
        raise RegardError(f"{title}: {shortened(repr(tokenizer), 60)} is no tokenizer; {_GIVE}")
    if not getattr(tokenizer, "is_fast", False):
        raise RegardError(f"{title} has no fast tokenizer, which knows the characters of a token")
    if model.main_input_name != "input_ids":
        raise RegardError(f"{title} reads {model.main_input_name}, not text")
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise RegardError(f"{title} is on {', '.join(sorted(devices))}; move it to the CPU to look")


@contextlib.contextmanager
def reading(reader: TextModel | None) -> Iterator[None]:
    """While inside, the model draws no dropout; afterwards every module trains as it did."""
    modules = [] if reader is None else list(reader.model.modules())
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training
