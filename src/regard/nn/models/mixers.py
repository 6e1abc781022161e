"""Mixers by name: what lets one token of a sequence know of others.

Each takes x (batch, length, dim) to the same. In a decoder a token sees itself and the past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...call.biases import ALiBi, Bias
from ...call.masks import Causal, Full, Mask, Padding, Window
from ...call.observers import Observer
from ...errors import RegardError
from ...ops.cache import Cache, KVCache, WindowCache
from ..linear import DeltaAttention, LinearAttention, LinearMixer
from ..multihead import AttendingCache, MultiHeadAttention, start_of
from ..positions import Positions, Rotary
from .config import RECURRENT, ModelConfig


class MixerState:
    """What the tokens so far leave for those to come, in one block; a mixer rewrites it.

    held: None before the first token; then a cache of keys and values, a `LinearState`, or the
    hidden state of a recurrence. length: the tokens so far.
    """

    def __init__(self, held: Any = None, length: int = 0) -> None:
        self.held, self.length = held, length

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        if isinstance(self.held, Cache):
            return self.held.nbytes
        return sum(t.nbytes for t in _tensors(self.held))

    def select(self, rows: Tensor) -> None:
        """Keep these items of the batch, in this order: beams that live on, and their copies."""
        if isinstance(self.held, Cache):
            self.held.select(rows)
        else:
            self.held = _selected(self.held, rows)


def _tensors(held: Any) -> list[Tensor]:
    if isinstance(held, Tensor):
        return [held]
    if isinstance(held, tuple | list):
        return [t for part in held for t in _tensors(part)]
    if is_dataclass(held):
        return [t for f in fields(held) for t in _tensors(getattr(held, f.name))]
    return []


def _selected(held: Any, rows: Tensor) -> Any:
    """The rows of every tensor (batch, …)."""
    if isinstance(held, Tensor):
        return held.index_select(0, rows)
    if isinstance(held, tuple | list):
        return type(held)(_selected(part, rows) for part in held)
    if is_dataclass(held) and not isinstance(held, type):
        kept = {f.name: _selected(getattr(held, f.name), rows) for f in fields(held)}
        return replace(held, **kept)
    return held


class SoftmaxMixer(nn.Module):
    """Softmax attention, with any mask; `window`: each token sees so many, itself included."""

    def __init__(
        self, config: ModelConfig, *, causal: bool, window: int | None, rotary: Rotary | None
    ) -> None:
        super().__init__()
        self.causal, self.window = causal, window
        self.bias: Bias | None = ALiBi() if config.positions == "alibi" else None
        self.attention = MultiHeadAttention(
            config.dim, config.heads, kv_heads=config.kv_heads, bias=config.bias,
            qk_norm=config.qk_norm, norm_eps=config.norm_eps, rotary=rotary,
            dropout=config.dropout, engine=config.engine,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask = Full(),
        state: MixerState | None = None,
        observe: Sequence[Observer] | None = None,
        positions: Positions | None = None,
    ) -> Any:
        """mask: joined with what this mixer hides by itself."""
        cache = None if state is None else self._cache(state)
        return self.attention(
            x, mask=self._seen_by(mask), bias=self.bias, observe=observe,
            positions=start_of(positions, cache), cache=cache,
        )  # fmt: skip

    def _cache(self, state: MixerState) -> AttendingCache:
        if state.held is None:
            state.held = KVCache() if self.window is None else WindowCache(self.window)
        held: AttendingCache = state.held
        return held

    def _seen_by(self, mask: Mask) -> Mask:
        own: Mask = Causal() if self.causal else Full()
        if self.window is not None:
            near = Window(self.window, ahead=0 if self.causal else self.window - 1)
            own = near if isinstance(own, Full) else own & near
        if isinstance(mask, Full):
            return own
        return mask if isinstance(own, Full) else own & mask


class StateMixer(nn.Module):
    """Linear attention or the delta rule: a state of fixed size in the place of a cache."""

    def __init__(self, attention: LinearMixer) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask = Full(),
        state: MixerState | None = None,
        observe: Sequence[Observer] | None = None,
        positions: Positions | None = None,
    ) -> Any:
        """mask: Full, Padding, Documents. positions are the state's own."""
        if state is None:
            return self.attention(x, mask=mask, observe=observe)
        out, state.held, *seen = self.attention(
            x, mask=mask, state=state.held, return_state=True, observe=observe
        )
        return (out, *seen) if seen else out


class RecurrentMixer(nn.Module):
    """torch's LSTM, GRU or RNN: one token after another. Hochreiter and Schmidhuber 1997 …

    bidirectional (in an encoder): half of the vector reads from the left, half from the right.
    """

    def __init__(self, kind: str, dim: int, *, causal: bool) -> None:
        super().__init__()
        made = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
        if not causal and dim % 2:
            raise RegardError(f"dim {dim} is odd; half of it reads each way in an encoder")
        size = dim if causal else dim // 2
        self.recurrence: nn.RNNBase = made(dim, size, batch_first=True, bidirectional=not causal)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask = Full(),
        state: MixerState | None = None,
        observe: Sequence[Observer] | None = None,
        positions: Positions | None = None,
    ) -> Any:
        """mask: Full, or Padding at the end. There are no weights to observe: results are ()."""
        if isinstance(mask, Padding):
            out = self._packed(x, mask.keep)
        elif isinstance(mask, Full):
            # torch keeps (layers, batch, size) even where the batch is first
            before = None if state is None or state.held is None else _transposed(state.held)
            out, held = self.recurrence(x, before)
            if state is not None:
                state.held = _transposed(held)
        else:
            raise RegardError(f"a recurrence reads all in turn; it takes no mask {mask}")
        return out if observe is None else (out, ())

    def _packed(self, x: Tensor, keep: Tensor) -> Tensor:
        """Each item by its own length; what comes of padding is 0."""
        if bool((keep[:, 1:] & ~keep[:, :-1]).any()):
            raise RegardError("a recurrence takes padding at the end alone; pad on the right")
        lengths = keep.sum(-1)
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        out, _ = nn.utils.rnn.pad_packed_sequence(
            self.recurrence(packed)[0], batch_first=True, total_length=x.shape[1]
        )
        return out


def _transposed(held: Any) -> Any:
    if isinstance(held, tuple):
        return tuple(part.transpose(0, 1).contiguous() for part in held)
    return held.transpose(0, 1).contiguous()


def mixer_of(kind: str, config: ModelConfig, *, causal: bool, rotary: Rotary | None) -> nn.Module:
    """The mixer that a name stands for. causal: a decoder's; otherwise it sees both sides."""
    if kind in RECURRENT:
        return RecurrentMixer(kind, config.dim, causal=causal)
    if kind in ("softmax", "window"):
        window = config.window if kind == "window" else None
        return SoftmaxMixer(config, causal=causal, window=window, rotary=rotary)
    if not causal and kind != "linear":
        raise RegardError(
            f"the mixer {kind} reads one way; an encoder takes softmax, window, linear, lstm, gru "
            "or rnn: give encoder_mixer"
        )
    made: dict[str, Any] = {"kv_heads": config.kv_heads, "norm_eps": config.norm_eps}
    made["bias"] = config.bias
    attention: LinearMixer
    if kind == "linear":
        attention = LinearAttention(config.dim, config.heads, causal=causal, **made)
    elif kind == "gla":
        made |= {"feature_map": None, "decay": "channel", "gate": True}
        attention = LinearAttention(config.dim, config.heads, **made)
    else:
        gated = {"decay": "gated", "gate": True} if kind == "gated-delta" else {}
        attention = DeltaAttention(config.dim, config.heads, **made, **gated)
    return StateMixer(attention)


def checked_tokens(tokens: Tensor) -> Tensor:
    """The tokens, if they are integers (batch, length)."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise RegardError(
            f"tokens are {tuple(tokens.shape)} {tokens.dtype}; give integers (batch, length)"
        )
    return tokens
