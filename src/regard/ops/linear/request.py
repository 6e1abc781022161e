"""Request: one checked call of linear attention, as it was asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...call.checked import FLOATS, Call
from ...call.numbers import real
from ...call.opcodes import Op
from ...errors import RegardError
from . import features
from .state import LinearState


@dataclass(frozen=True, eq=False)
class Request:
    """What fits together: shapes as in `linear_attention`.

    call: query, key, value and their place; its mask has Causal joined where causal.
    query_ids (batch, q_len), key_ids (batch, k_len): documents, negative for none; or both None.
    keep (batch, k_len): the keys that padding shows, or None. state_heads: the heads of a state.
    """

    call: Call
    feature_map: Any
    decay: Tensor | None
    beta: Tensor | None
    causal: bool
    normalise: bool
    scale: float
    state: LinearState | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    keep: Tensor | None
    state_heads: int

    @classmethod
    def checked(
        cls,
        call: Call,
        *,
        feature_map: Any,
        decay: Tensor | None,
        beta: Tensor | None,
        causal: bool,
        normalise: bool | None,
        scale: float | None,
        state: LinearState | None,
    ) -> Request:
        """The request, or a RegardError that shows the shapes and says what to do."""
        features.check(feature_map)
        if causal and call.place.q_len != call.place.k_len:
            raise RegardError(
                f"{call}: causal linear attention takes a query for each key; give the keys before "
                "them as state, or causal=False"
            )
        for name, given in (("decay", decay), ("beta", beta)):
            if given is not None and not causal:
                raise RegardError(f"{name} is an order in time; it needs causal=True")
        state_heads = call.place.kv_heads
        for name, given in (("decay", decay), ("beta", beta)):
            if given is not None:
                state_heads = max(state_heads, _heads(name, given, call))
        _check_values(decay, call)
        normalise = _normalised(normalise, feature_map, beta)
        if normalise and scale is not None:
            raise RegardError(f"scale {scale} cancels in normalised weights; give normalise=False")
        ids, keep = _mask(call, causal)
        if state is not None and not isinstance(state, LinearState):
            raise RegardError(f"state is a {type(state).__name__}; give the LinearState of a call")
        request = cls(
            call, feature_map, decay, beta, causal, normalise,
            1.0 if scale is None else real(scale, "scale"), state, *ids, keep, state_heads,
        )  # fmt: skip
        if ids[0] is not None and ids[1] is not None:
            request._check_documents(ids[0])
        return request

    @property
    def needs_grad(self) -> bool:
        """Whether anything that goes in, or is in a function for features, asks for a gradient."""
        if not torch.is_grad_enabled():
            return False
        state = self.state
        given = (self.decay, self.beta, *((state.memory, state.normaliser) if state else ()))
        own = not isinstance(self.feature_map, features.Favor) and callable(self.feature_map)
        return own or self.call.needs_grad or any(t is not None and t.requires_grad for t in given)

    def part(self, start: int, stop: int, state: LinearState | None) -> Request:
        """Of the tokens start … stop − 1 of a causal request, after those that left this state."""
        call, place = self.call, self.call.place
        assert call.value is not None
        query, key, value = (t[:, :, start:stop] for t in (call.query, call.key, call.value))
        count, first = stop - start, place.query_start + start
        here = replace(place, q_len=count, k_len=count, query_start=first, key_start=first)
        decay, beta = (
            t if t is None or t.dim() == 1 else t[:, :, start:stop] for t in (self.decay, self.beta)
        )
        query_ids, key_ids, keep = (
            None if t is None else t[:, start:stop]
            for t in (self.query_ids, self.key_ids, self.keep)
        )
        return replace(
            self, call=replace(call, query=query, key=key, value=value, place=here), decay=decay,
            beta=beta, state=state, query_ids=query_ids, key_ids=key_ids, keep=keep,
        )  # fmt: skip

    def check_state(self, width: int) -> None:
        """RegardError if the state given is not one of `width` features and this call's sizes."""
        state, call = self.state, self.call
        if state is None:
            return
        assert call.value is not None
        row = (call.place.batch, self.state_heads, width)
        wanted: dict[str, tuple[int, ...]] = {"memory": (*row, call.value.shape[-1])}
        if self.normalise != (state.normaliser is not None):
            has, does = ("a", "does not") if state.normaliser is not None else ("no", "does")
            raise RegardError(f"state has {has} normaliser, and this call {does} normalise")
        if self.normalise:
            wanted["normaliser"] = row
        if state.shift is not None:
            if not (self.normalise and isinstance(self.feature_map, features.Favor)):
                raise RegardError("state has a shift, as random features do; give the same Favor")
            wanted["shift"] = row
        for name, shape in wanted.items():
            given = getattr(state, name)
            if given.shape != shape or (given.dtype, given.device) != (
                call.working, call.place.device,
            ):  # fmt: skip
                raise RegardError(
                    f"state: {name} is {tuple(given.shape)} {given.dtype} on {given.device}; this "
                    f"call needs {shape} {call.working} on {call.place.device} (batch, state_heads,"
                    " features, v_dim)"
                )

    def _check_documents(self, ids: Tensor) -> None:
        if self.state is not None and not self.causal:
            raise RegardError("a state has no document when causal=False; give one or the other")
        if self.state is not None and self.state.document is None:
            raise RegardError(
                "state comes from a call without documents; begin with Documents, or leave it out"
            )
        if not self.causal or torch.compiler.is_compiling() or not ids.numel():
            return
        assert self.key_ids is not None
        if not torch.equal(ids, self.key_ids):
            raise RegardError("causal linear attention: give Documents one row of ids, no key_ids")
        # Filled over its gaps, a row must change as often as it has ids
        filled = filled_ids(ids, None if self.state is None else self.state.document)
        shown = filled[:, 1:] != filled[:, :-1]
        ranked = filled.sort(dim=-1).values
        if not torch.equal(shown.sum(-1), (ranked[:, 1:] != ranked[:, :-1]).sum(-1)):
            raise RegardError(
                "Documents: an id comes back after another; a document must be one run of tokens, "
                "as its state is forgotten at its end"
            )


def filled_ids(ids: Tensor, before: Tensor | None) -> Tensor:
    """(batch, n + 1): the document that is open before each token, and after the last; −1: none."""
    start = ids.new_full((len(ids), 1), -1) if before is None else before.to(ids)[:, None]
    both = torch.cat([start, ids], 1)
    at = torch.arange(both.shape[1], device=ids.device, dtype=torch.int64).expand_as(both)
    return both.gather(1, at.masked_fill(both < 0, 0).cummax(1).values)


def _heads(name: str, given: Any, call: Call) -> int:
    """The heads that it is given for; RegardError unless its shape is one of those it may have."""
    place = call.place
    sizes = {place.kv_heads, place.heads}
    row = f"(batch {place.batch}, heads {place.heads} or kv_heads {place.kv_heads}, {place.k_len})"
    if not isinstance(given, Tensor) or given.dtype not in FLOATS or given.device != place.device:
        what = f"{given.dtype} on {given.device}" if isinstance(given, Tensor) else repr(given)
        raise RegardError(f"{name} is {what}; give a tensor of floats on {place.device}")
    leading = (place.batch, place.k_len)
    if name == "decay" and given.dim() == 1 and given.shape[0] in sizes:
        return int(given.shape[0])
    most = 4 if name == "decay" else 3
    fits = 3 <= given.dim() <= most and (given.shape[0], given.shape[2]) == leading
    if fits and given.shape[1] in sizes:
        return int(given.shape[1])
    forms = f"one per token {row}"
    if name == "decay":
        forms = f"one per head ({place.heads},), {forms}, or one more dimension of features"
    raise RegardError(f"{name} is {tuple(given.shape)}; give {forms}")


def _check_values(decay: Tensor | None, call: Call) -> None:
    """A decay above 1 is most likely one that was given as a factor."""
    if decay is None or torch.compiler.is_compiling():
        return
    # The largest is one pass over them and one number; NaN is not above 0
    if decay.numel() and bool(decay.detach().amax() > 0):
        raise RegardError(
            f"decay reaches {float(decay.max()):.3g}; it is the natural logarithm of the factor, "
            "so at most 0: give torch.log(factor)"
        )


def _normalised(normalise: bool | None, feature_map: Any, beta: Tensor | None) -> bool:
    if normalise is None:
        return features.positive(feature_map) and beta is None
    if normalise and beta is not None:
        raise RegardError("the delta rule (beta) has weights of either sign: normalise=False")
    if normalise and feature_map in (None, "identity"):
        raise RegardError(
            "the identity map has weights of either sign, and their sum may be 0: "
            "normalise=False, or feature_map='elu'"
        )
    return normalise


def _mask(call: Call, causal: bool) -> tuple[tuple[Tensor | None, Tensor | None], Tensor | None]:
    """(query ids, key ids), keep: what documents and padding say, one row for each batch item."""
    ids: tuple[Tensor | None, Tensor | None] = (None, None)
    keep: Tensor | None = None
    batch = call.place.batch

    def rows(at: int) -> Tensor:
        return call.program.tensors[at].expand(batch, -1)

    for op, args in call.program.instructions():
        if op == Op.DOCUMENTS and ids[0] is None:
            ids = (rows(args[0]), rows(args[1]))
        elif op == Op.PADDING:
            keep = rows(args[0]) if keep is None else keep & rows(args[0])
        elif op == Op.CAUSAL and not causal:
            raise RegardError(f"mask {call.mask} and causal=False contradict each other")
        elif op not in (Op.FULL, Op.CAUSAL, Op.AND):
            raise RegardError(
                f"mask {call.mask}: linear attention has no single pairs to hide; it takes "
                "Documents, Padding, and both joined by &"
            )
    return ids, keep
