"""`watch`: read the attention of a live model; nothing stays patched after the block."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import nn

from .errors import RegardError
from .intercept import Intercept
from .observers import Observer
from .watched import Cut, Watched

_LOCK = threading.Lock()
_WATCHING: set[int] = set()
_VERIFIED: weakref.WeakSet[type] = weakref.WeakSet()  # classes of models, once watched
_INTERFACE = ("ALL_ATTENTION_FUNCTIONS", "AttentionInterface")
_TORCH_CALLS = ("scaled_dot_product_attention(", "multi_head_attention_forward(")
_REGARD = re.compile(r"^\s*(?:import|from)\s+regard\b", re.MULTILINE)


@contextlib.contextmanager
def watch(
    model: nn.Module,
    observe: Sequence[Observer] = (),
    layers: Sequence[int | str] | int | str | None = None,
    keep_qk: bool = False,
    cut: Sequence[Cut] = (),
    verify: bool | None = None,
    count_padding: bool = False,
    keep: Literal["last", "all"] = "last",
) -> Iterator[Watched]:
    """Watch a model's attention inside a `with` block; yields the `Watched` that fills.

        with regard.watch(model, observe=[TopK(8), Received()]) as seen:
            model(**inputs)
        top, received = seen["model.layers.0.self_attn"].seen

    model: a Hugging Face model that goes through `AttentionInterface`, or any torch model that
        calls `F.scaled_dot_product_attention` or `regard.attention`, or has `nn.MultiheadAttention`
        or modules of `regard.nn`.
    observe: what to keep of every layer's weights. layers: only these: numbers of layers (3; −1
        is the last), or modules' names and patterns ("decoder.*"). keep_qk: also keep q, k and lse,
        O(N) a layer, for `seen.recording()`. cut: edges or whole heads to remove; the rest of the
        model runs on.
    verify: check on some rows of each call that the weights as read give the model's output; by
        default only the first time that a class of models is watched, in its first block.
    count_padding: by default Received, Map and Distances leave out the queries that are padding
        (tokens that the mask hides as keys), so that an item's do not depend on its neighbours;
        True counts them. Observers of rows keep all rows.
    keep: "last": a new forward replaces the last one's results; "all": they stay, the steps of a
        diffusion or the turns of a chat, and `seen.forwards[n]` is the n-th.

    In `generate()` each new token's row is appended; after beam search each row's history is that
    of the beam it stands for.
    The model's own attention computes its outputs, which equal the unwatched ones to the bit, but
    where edges are cut or an `Effect` is asked for. Other threads that run the model compute as
    ever and are not recorded. RegardError on entry if the model cannot be watched; on leaving, if
    it ran without computing attention where it could be seen, or without a layer asked for.
    """
    hugging = _hugging_face(model)
    _check(model, hugging)
    verify = type(model) not in _VERIFIED if verify is None else verify
    watched = Watched(model, observe, layers, keep_qk, cut, verify, count_padding, keep)
    with _LOCK:
        if id(model) in _WATCHING:
            raise RegardError(f"this {type(model).__name__} is being watched already")
        _WATCHING.add(id(model))
    with contextlib.ExitStack() as stack:
        stack.callback(_WATCHING.discard, id(model))
        stack.enter_context(watched.tracker.following())
        sources = _sources(model) or []
        interface = hugging and any(way in s for s in sources for way in _INTERFACE)
        if interface:
            from .huggingface import using_regard

            stack.enter_context(using_regard(model))
        if not interface or _calls_torch(model, sources):
            stack.enter_context(Intercept(watched))
        stack.enter_context(watched)
        yield watched
    if watched.tracker.ran and verify:
        _VERIFIED.add(type(model))
    if watched.tracker.ran and watched.undone:
        layers = ", ".join(str(c.layer) for c in watched.undone)
        raise RegardError(f"cut: no attention call is in layer {layers}; nothing was cut there")
    if watched.tracker.ran and not watched.touched:
        raise RegardError(
            f"{type(model).__name__} ran, but computed no attention where it can be watched: it "
            "computes attention by itself, or has none"
        )
    if watched.tracker.ran:
        watched.check_wanted()


def _hugging_face(model: nn.Module) -> bool:
    """Whether it is a Hugging Face model; without importing transformers for any other."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _check(model: nn.Module, hugging: bool) -> None:
    """RegardError where a model surely offers nothing to watch."""
    if not isinstance(model, nn.Module):
        raise RegardError(f"watch takes a torch module, not a {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise RegardError("this model is compiled; watch the original, model._orig_mod")
    sources = _sources(model)
    if _has_attention(model) or any(map(_REGARD.search, sources or ())):
        return
    ways = (*_INTERFACE, *_TORCH_CALLS) if hugging else _TORCH_CALLS
    if sources is not None and not any(way in s for s in sources for way in ways):
        raise RegardError(
            f"{type(model).__name__} cannot be watched: none of its modules goes through "
            "transformers' AttentionInterface, F.scaled_dot_product_attention or "
            "nn.MultiheadAttention; it computes attention by itself, or has none"
        )


def _has_attention(model: nn.Module) -> bool:
    """Whether it has torch's attention module, or one of ours."""
    return any(
        isinstance(m, nn.MultiheadAttention) or type(m).__module__.startswith("regard.")
        for m in model.modules()
    )


def _calls_torch(model: nn.Module, sources: list[str]) -> bool:
    """Whether a Hugging Face model also has attention outside the interface."""
    if _has_attention(model) or any(map(_REGARD.search, sources)):
        return True
    return any(call in source for source in sources for call in _TORCH_CALLS)


def _sources(model: nn.Module) -> list[str] | None:
    """The source files that define the model's classes; None if one cannot be read."""
    files = {c.__module__ for m in model.modules() for c in type(m).__mro__}
    own = {f for f in files if f.split(".")[0] not in ("torch", "builtins")}
    own = {f for f in own if not f.startswith("transformers.") or ".models." in f}
    sources = []
    for name in sorted(own):
        module = sys.modules.get(name)
        try:
            sources.append(inspect.getsource(module) if module else "")
        except (OSError, TypeError):
            return None
    return sources
