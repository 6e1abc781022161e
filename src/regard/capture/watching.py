"""`watch`: read the attention of a live model; nothing stays patched after the block."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from ..call.observers import Observer
from ..errors import RegardError
from ..ops.watches import inside_of
from .collector import Collector
from .intercept import Intercept
from .layers import Cut, Watched
from .module_tree import of_hugging_face
from .options import WatchOptions
from .softmaxes import Softmaxes, attention_modules

_LOCK = threading.Lock()
_WATCHING: set[int] = set()
_VERIFIED: weakref.WeakSet[type] = weakref.WeakSet()  # classes of modules, once watched
_INTERFACE = ("ALL_ATTENTION_FUNCTIONS", "AttentionInterface")
_TORCH_CALLS = ("scaled_dot_product_attention(", "multi_head_attention_forward(")
_REGARD = re.compile(r"^\s*(?:import|from)\s+regard\b", re.MULTILINE)


def watch(
    model: nn.Module,
    observe: Sequence[Observer] | None = (),
    layers: Sequence[int | str] | int | str | None = None,
    keep_qk: bool = False,
    cut: Sequence[Cut] | None = (),
    verify: bool | None = None,
    count_padding: bool = False,
    keep: Literal["last", "all"] = "last",
) -> AbstractContextManager[Watched]:
    """Watch a model's attention inside a `with` block; yields the `Watched` that fills.

        with regard.watch(model, observe=[TopK(8), Received()]) as seen:
            model(**inputs)
        top, received = seen["model.layers.0.self_attn"].seen

    model: a Hugging Face model that goes through `AttentionInterface`; any torch model that calls
        `F.scaled_dot_product_attention` or `regard.attention`, or has `nn.MultiheadAttention` or
        modules of `regard.nn`; or any module that holds such, one or several.
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
    return WatchBlock(
        model, WatchOptions(observe, layers, keep_qk, cut, verify, count_padding, keep)
    )


class WatchBlock(AbstractContextManager["Watched"]):
    """What `watch` returns: each time that it is entered, the model is watched anew."""

    def __init__(self, model: nn.Module, options: WatchOptions) -> None:
        self._model, self._options = model, options
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Watched:
        return self._stack.enter_context(_watching(self._model, self._options))

    def __exit__(self, *raised: Any) -> bool | None:
        return self._stack.__exit__(*raised)


@contextlib.contextmanager
def _watching(model: nn.Module, options: WatchOptions) -> Iterator[Watched]:
    """One block of `watch`."""
    parts = _parts(model)
    hugging = any(map(of_hugging_face, parts))
    sources = _sources(model)
    _check(model, hugging, sources)
    # Once a class: whether what is read explains its output depends on its code, not on its numbers
    kinds = {type(part) for part in parts}
    if options.verify is None:
        options = replace(options, verify=not kinds <= set(_VERIFIED))
    collector = Collector(model, options)
    with contextlib.ExitStack() as stack:
        # What is entered first is left last: no other thread may watch while the doors are still
        # open
        stack.enter_context(_claimed(model, parts))
        stack.enter_context(collector.tracker.following())
        # Where a source cannot be read (a notebook's), both ways may lead to attention
        unknown = sources is None
        interface = hugging and (unknown or any(w in s for s in sources or () for w in _INTERFACE))
        if interface:
            from ..huggingface import using_regard

            stack.enter_context(using_regard(model))
        # Each way has one door, so that no call is met twice; a mode sees what no interface does
        if unknown or not interface or _calls_torch(model, sources or []):
            stack.enter_context(Intercept(collector))
        if by_itself := attention_modules(model):
            stack.enter_context(Softmaxes(collector, model, by_itself))
        stack.enter_context(inside_of(collector))
        yield collector.watched
    # A block in which the model never ran is no mistake: it may have been left early
    if not collector.tracker.ran:
        return
    if options.verify:
        _VERIFIED.update(kinds)
    if collector.undone:
        which = ", ".join(str(c.layer) for c in collector.undone)
        raise RegardError(f"cut: no attention call is in layer {which}; nothing was cut there")
    if not collector.touched:
        raise RegardError(
            f"{type(model).__name__} ran, but computed no attention where it can be watched: it "
            "takes no softmax over keys, or not inside a module of attention"
        )
    collector.check_wanted()


def _parts(model: nn.Module) -> list[nn.Module]:
    """All modules of a model; RegardError for what is none, or cannot be followed."""
    if not isinstance(model, nn.Module):
        raise RegardError(f"watch takes a torch module, not a {type(model).__name__}")
    for name, part in model.named_modules():
        said = f"{name}, a {type(part).__name__}, " if name else "this model "
        if "_orig_mod" in part._modules:
            raise RegardError(f"{said}is compiled; watch the original, model._orig_mod")
        if part._compiled_call_impl is not None:
            raise RegardError(f"{said}was compiled in place; watch it without .compile()")
        if isinstance(part, nn.DataParallel) and len(part.device_ids) > 1:
            raise RegardError(f"{said}runs on copies; watch what it holds, its .module, on one GPU")
    return list(model.modules())


@contextlib.contextmanager
def _claimed(model: nn.Module, parts: list[nn.Module]) -> Iterator[None]:
    """Nobody else watches what computes here; RegardError where somebody does."""
    # Two models may share an embedding, but nothing that has modules of its own
    own = {id(model)} | {id(part) for part in parts if part._modules}
    with _LOCK:
        if own & _WATCHING:
            shared = "" if id(model) in _WATCHING else "holds a part that "
            raise RegardError(f"this {type(model).__name__} {shared}is being watched already")
        _WATCHING.update(own)
    try:
        yield
    finally:
        with _LOCK:
            _WATCHING.difference_update(own)


def _check(model: nn.Module, hugging: bool, sources: list[str] | None) -> None:
    """RegardError where a model surely offers nothing to watch."""
    if _has_attention(model) or any(map(_REGARD.search, sources or ())):
        return
    if attention_modules(model):
        return
    ways = (*_INTERFACE, *_TORCH_CALLS) if hugging else _TORCH_CALLS
    if sources is not None and not any(way in s for s in sources for way in ways):
        raise RegardError(
            f"{type(model).__name__} cannot be watched: none of its modules goes through "
            "transformers' AttentionInterface, F.scaled_dot_product_attention or "
            "nn.MultiheadAttention, or takes a softmax over keys"
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
