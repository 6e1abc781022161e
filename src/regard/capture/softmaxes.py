"""Attention that a model computes by itself: the softmax over keys is caught inside its modules.

Such a model holds the weights of a layer for a moment anyway: they are read there, and dropped.
What its softmax takes and returns is not changed, so the model's output is its own to the bit,
unless edges are cut. Queries and keys are not known here, only scores: `layouts` says whose.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..call.checked import Call
from ..call.geometry import Span
from ..call.masks import Dense, Full, Mask
from ..call.observers import NormTopK
from ..errors import RegardError
from ..ops.beside import CHECKED_ROWS
from ..ops.watches import WatchedCall
from .collector import Collector
from .layouts import Local, Scores, laid_out

_NAMED = re.compile("Attention|Attn")
# What these take a softmax over is no key: sampled points, landmarks, lags, chosen queries, a map
_OTHERS = re.compile(
    "Deformable|MHAttentionMap|LinearSelfAttention|EfficientAdditive|Nystrom|ProbSparse|"
    "Autoformer|Neighborhood"
)
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
_PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum")


def attention_modules(model: nn.Module) -> set[str]:
    """The names of the modules that compute attention with a softmax of their own."""
    return {n for n, m in model.named_modules() if _has_softmax(type(m))}


def _has_softmax(kind: type) -> bool:
    """Whether a class of attention modules names a softmax in its own methods."""
    if not _NAMED.search(kind.__name__) or _OTHERS.search(kind.__name__):
        return False
    own = [c for c in kind.__mro__ if c.__module__.split(".")[0] not in ("torch", "builtins")]
    methods = [inspect.unwrap(f) for c in own for f in vars(c).values() if inspect.isfunction(f)]
    return any("softmax" in name.lower() for f in methods for name in f.__code__.co_names)


class Softmaxes(TorchFunctionMode):
    """While active, each softmax over keys in one of the modules named is recorded."""

    def __init__(self, collector: Collector, model: nn.Module, names: set[str]) -> None:
        super().__init__()
        self._collector, self._model, self._names = collector, model, names
        self._calls: dict[str, WatchedCall] = {}  # the last one of each module
        self._held: dict[int, Tensor] = {}
        self._unproved: list[tuple[str, str, Tensor]] = []
        self._reordered = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._collector.within:  # what a watched function calls is recorded with it
            return func(*args, **kwargs)
        if func in _SOFTMAX:
            owner = self._owner()
            if owner is not None and _over_last(*args, **kwargs):
                return self._softmax(owner, func, *args, **kwargs)
        elif getattr(func, "__name__", "") == "index_select":
            self._selected(*args, **kwargs)
        elif self._unproved and getattr(func, "__name__", "") in _PRODUCTS:
            self._prove(args)
        return func(*args, **kwargs)

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        super().__exit__(kind, value, traceback)
        if kind is None:
            self._demand_proof()
            self._check_replaced()

    def _check_replaced(self) -> None:
        """RegardError where the model has put other modules in place (BigBird on short texts)."""
        known = self._collector.tracker.names
        new = [n for n, m in self._model.named_modules() if n in self._names and id(m) not in known]
        if new:
            raise RegardError(
                f"{new[0]} was replaced while the model ran, and its weights were not seen; "
                "run the model once before watching it"
            )

    def _owner(self) -> str | None:
        """The attention module that runs now; its softmax may be a module of its own."""
        name = self._collector.tracker.innermost
        while name and "Softmax" in type(self._collector.modules[name]).__name__:
            name = name.rpartition(".")[0]
        return name if name in self._names else None

    def _softmax(
        self, owner: str, func: Callable[..., Tensor], input: Tensor, *rest: Any, **given: Any
    ) -> Tensor:
        module = self._collector.modules[owner]
        with torch.no_grad(), torch._C.DisableTorchFunction():
            found = laid_out(module, input, lambda: _running(module), self._held)
        if not found:
            return func(input, *rest, **given)
        self._demand_proof(owner)
        met = [self._met(owner, part) for part in found]
        whole = found[0] if found[0].shape == input.shape else None  # its own numbers, in order
        kept = met[0].kept
        if kept is not None:
            if whole is None:
                raise RegardError(f"cut: {met[0].name} attends in blocks of its own; cut elsewhere")
            whole = self._hiding(met[0], whole, kept)
            input, found = whole.scores.reshape(input.shape), [whole]
        weights = func(input, *rest, **given)
        if kept is not None:  # a row that sees nothing more mixes nothing
            weights = weights.nan_to_num(0.0)
        laid = weights
        if whole is not None and weights.dim() == 3:
            laid = weights.unflatten(0, (-1, whole.scores.shape[1]))
            if met[0].effects:
                weights = laid.flatten(0, 1)  # so that gradients pass through what is watched
        for call, part in zip(met, found, strict=True):
            if call.wanted:
                self._record(call, part, laid if whole is not None else None)
        if whole is not None and met[0].verifying:
            self._unproved.append((owner, met[0].name, laid.detach()))
        return weights

    def _met(self, owner: str, part: Scores) -> WatchedCall:
        if not part.follows:
            self._calls[owner] = self._collector.met(owner)
        return self._calls[owner]

    @torch.no_grad()
    def _hiding(self, met: WatchedCall, part: Scores, kept: Mask) -> Scores:
        """The scores with −inf where an edge is cut."""
        call, _ = self._read(met, part)
        place = call.place
        program = kept.lower(place, call.query, call.key)
        shown = program.visible(Span(0, place.q_len, 0, place.k_len))
        return replace(part, scores=part.scores.masked_fill(~shown, -torch.inf))

    def _record(self, met: WatchedCall, part: Scores, weights: Tensor | None) -> None:
        """Hand on a call; weights (batch, heads, q_len, k_len) as the softmax returned them."""
        asked = self._collector.options
        if asked.keep_qk or any(isinstance(o, NormTopK) for o in self._collector.observe):
            raise RegardError(
                f"{met.name} computes attention by itself: its weights are seen, but no queries, "
                "keys or values; watch it without keep_qk and NormTopK"
            )
        if met.effects and weights is None:
            raise RegardError(
                f"{met.name} attends in blocks of its own; Effect cannot be read there"
            )
        call, lse = self._read(met, part)
        if call.place.query_start > 0 and self._reordered and not part.follows:
            raise RegardError(
                f"{met.name}: the cache was reordered between two steps (beam search?); generate "
                "with num_beams=1 to watch"
            )
        if met.effects and weights is not None:
            # With the keys themselves as values, the output is the weights
            keys = torch.eye(call.place.k_len, dtype=call.query.dtype, device=call.place.device)
            call = replace(call, value=keys.expand(*call.key.shape[:2], -1, -1))
        met.record(call, lse, weights if met.effects else None)

    @torch.no_grad()
    def _read(self, met: WatchedCall, part: Scores) -> tuple[Call, Tensor]:
        """The scores as a call whose bias they are, and their log-sum-exp (batch, heads, q_len)."""
        scores = part.scores.detach()
        scores = scores if scores.dtype == torch.float64 else scores.float()
        lse = scores.logsumexp(-1)
        hidden = ((scores - lse[..., None]).exp() == 0) | (scores <= part.floor)
        lse = lse.masked_fill(hidden.all(-1), -torch.inf)
        start = self._start(met, part, hidden)
        query, key = (scores.new_zeros(*scores.shape[:2], n, 0) for n in scores.shape[2:])
        shown: Mask = Dense(~hidden) if bool(hidden.any()) else Full()
        scores = scores.masked_fill(hidden, 0)
        call = Call.checked(query, key, None, mask=shown, bias=scores, scale=1.0, query_start=start)
        return call, lse

    def _start(self, met: WatchedCall, part: Scores, hidden: Tensor) -> int:
        """The first query's position: the last one stands at the last key that it sees.

        Where there are more keys than queries: those of a cache, which may hold unwritten ones.
        """
        if part.follows and part.start is not None:
            return part.start
        q_len, k_len = part.scores.shape[2:]
        start = part.start or 0
        if part.start is None and met.kind == "self" and q_len < k_len:
            seen = (~hidden[:, :, -1]).flatten(0, 1).any(0).nonzero()
            start = max((int(seen[-1]) if len(seen) else k_len - 1) + 1 - q_len, 0)
        if met.kind == "self" and start == 0:
            self._reordered = False
        return met.position(start)

    def _selected(self, tensor: Tensor, dim: int, index: Tensor) -> None:
        """Between two forwards, a cache's items are put in another order: by beam search."""
        if self._collector.tracker.innermost is None and tensor.dim() > 2:
            order = torch.arange(len(index), dtype=index.dtype, device=index.device)
            if tensor.shape[dim] != len(index) or not torch.equal(index, order):
                self._reordered = True

    def _prove(self, args: Any) -> None:
        """The weights as read must be what is multiplied with the values."""
        given = [t for a in args for t in (a if isinstance(a, list | tuple) else (a,))]
        for one in list(self._unproved):
            weights = one[2]
            if any(_same(weights, t) for t in given if isinstance(t, Tensor)):
                self._unproved.remove(one)

    def _demand_proof(self, owner: str = "") -> None:
        """RegardError where a layer has ended without."""
        left = [name for by, name, _ in self._unproved if by != owner]
        if left:
            self._unproved.clear()
            raise RegardError(
                f"{left[0]}: the weights as read are not those that it multiplies with its values: "
                "the model changes them in a way of its own; watch(…, verify=False) reads them "
                "nonetheless"
            )


def _over_last(input: Tensor, dim: int | None = None, *rest: Any, **given: Any) -> bool:
    """Whether this is a softmax over the last of several dimensions."""
    return dim is not None and input.dim() > 2 and dim % input.dim() == input.dim() - 1


def _same(weights: Tensor, given: Tensor) -> bool:
    """Whether a product's operand holds these weights, up to rounding; rows of NaN aside."""
    if given.shape[-2:] != weights.shape[-2:] or given.numel() != weights.numel():
        return False
    ours, theirs = weights.flatten(0, -3)[:, -CHECKED_ROWS:], given.detach()
    theirs = theirs.reshape(-1, *given.shape[-2:])[:, -CHECKED_ROWS:].to(ours.dtype)
    near = 2 * max(torch.finfo(given.dtype).eps, torch.finfo(weights.dtype).eps)
    return bool((((ours - theirs).abs() <= near) | ours.isnan()).all())


def _running(module: nn.Module) -> list[Local]:
    """The variables of the module's functions that run now, then those of all that called them."""
    found: list[Local] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        if found or frame.f_locals.get("self") is module:
            found.append(frame.f_locals)
        frame = frame.f_back
    return found
