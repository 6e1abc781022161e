"""The blocks that transformers are stacks of: attention, cross-attention, feed-forward, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..call.biases import Bias
from ..call.masks import Full, Mask
from ..call.observers import Observer
from ..errors import RegardError
from .multihead import AttendingCache, Memory, MultiHeadAttention, start_of
from .positions import Positions

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and whether it gates
    "relu": (F.relu, False),
    "gelu": (F.gelu, False),
    "gelu-tanh": (partial(F.gelu, approximate="tanh"), False),
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
}


class FeedForward(nn.Module):
    """Each token by itself: down(act(up x)); gated, down(act(gate x) · up x).

    Vaswani et al. 2017, section 3.3 ("relu"); Hendrycks and Gimpel 2016 ("gelu", and "gelu-tanh",
    which GPT-2 has); Shazeer 2020, eq. 5 and 6 ("geglu", "swiglu").
    hidden: default 4 · dim; of a gated one 8/3 · dim, rounded up to a multiple of 8, which takes as
    many parameters. dropout: of the hidden numbers, in training.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise RegardError(f"activation is {activation!r}; give {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.act, gated = ACTIVATIONS[activation]
        if hidden is None:
            hidden = -(-8 * dim // 24) * 8 if gated else 4 * dim
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.up = nn.Linear(dim, hidden, **made)
        self.gate = nn.Linear(dim, hidden, **made) if gated else None
        self.down = nn.Linear(hidden, dim, **made)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) to (…, dim)."""
        if self.gate is None:
            hidden = self.act(self.up(x))
        else:
            hidden = self.act(self.gate(x)) * self.up(x)
        out: Tensor = self.down(self.dropout(hidden))
        return out

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class BlockSeen(NamedTuple):
    """What observers saw in one block, in their order: its self-attention, its cross-attention.

    cross is () in a block that has none.
    """

    own: tuple[Any, ...]
    cross: tuple[Any, ...] = ()


class Block(nn.Module):
    """Self-attention, cross-attention if `cross`, feed-forward: each adds to what came in.

    An encoder's block as it stands, a decoder's where it is called with `mask=Causal()`, an
    encoder-decoder's with `cross=True`.

    pre_norm: x + f(norm(x)) (Xiong et al. 2020); otherwise norm(x + f(x)) (Vaswani et al. 2017).
    norm: "layer" (Ba et al. 2016) or "rms" (Zhang and Sennrich 2019), with norm_eps.
    hidden, activation: of the `FeedForward`. dropout: of the weights, of the hidden numbers, and of
    what each part adds. memory_dim: size of what cross-attention reads, default dim.
    attention: further arguments of `MultiHeadAttention`, such as kv_heads, qk_norm, engine, or
    rotary (which the cross-attention does without).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        norm: str = "layer",
        norm_eps: float = 1e-5,
        pre_norm: bool = True,
        dropout: float = 0.0,
        bias: bool = True,
        cross: bool = False,
        memory_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        attention |= made | {"dropout": dropout, "norm_eps": norm_eps}
        self.pre_norm = pre_norm
        self.attention = MultiHeadAttention(dim, heads, **attention)
        self.attention_norm = norm_of(norm, dim, norm_eps, **made)
        self.cross_attention = self.cross_norm = None
        if cross:
            attention |= {"rotary": None, "key_dim": memory_dim, "value_dim": memory_dim}
            self.cross_attention = MultiHeadAttention(dim, heads, **attention)
            self.cross_norm = norm_of(norm, dim, norm_eps, **made)
        self.feed_forward = FeedForward(dim, hidden, activation=activation, dropout=dropout, **made)
        self.feed_forward_norm = norm_of(norm, dim, norm_eps, **made)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | Memory | None = None,
        *,
        mask: Mask = Full(),
        memory_mask: Mask = Full(),
        bias: Bias | Tensor | Sequence[Bias | Tensor] | None = None,
        observe: Sequence[Observer] | None = None,
        positions: Positions | None = None,
        cache: AttendingCache | None = None,
    ) -> Any:
        """x (batch, length, dim) to the same; memory (batch, k_len, memory_dim) for `cross`.

        mask, bias and cache are those of self-attention, memory_mask that of cross-attention;
        positions of x for both. memory may be what `remember` made of it.
        Returns x; with `observe`, also a `BlockSeen`.
        """
        if (self.cross_attention is None) != (memory is None):
            raise RegardError(
                "memory is given to a block without cross-attention; make it with cross=True"
                if self.cross_attention is None
                else "this block has cross-attention; give it a memory (batch, k_len, memory_dim)"
            )
        at = start_of(positions, cache)  # before the cache grows
        watching: dict[str, Any] = {"observe": () if observe is None else observe}

        def attend(h: Tensor) -> Any:
            return self.attention(h, mask=mask, bias=bias, positions=at, cache=cache, **watching)

        def attend_memory(h: Tensor) -> Any:
            assert self.cross_attention is not None
            return self.cross_attention(h, memory, mask=memory_mask, positions=at, **watching)

        x, own = self._added(x, attend, self.attention_norm)
        cross: tuple[Any, ...] = ()
        if self.cross_norm is not None:
            x, cross = self._added(x, attend_memory, self.cross_norm)
        x, _ = self._added(x, lambda h: (self.feed_forward(h), ()), self.feed_forward_norm)
        return x if observe is None else (x, BlockSeen(own, cross))

    def _added(
        self, x: Tensor, part: Callable[[Tensor], Any], norm: nn.Module
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """What comes of adding one part, and what observers saw in it."""
        out, seen = part(norm(x) if self.pre_norm else x)
        x = x + self.dropout(out)
        return x if self.pre_norm else norm(x), seen

    def remember(self, memory: Tensor) -> Memory:
        """Cross-attention's keys and values of a memory, projected once for many steps."""
        if self.cross_attention is None:
            raise RegardError("this block has no cross-attention to remember for")
        return self.cross_attention.remember(memory)


def norm_of(kind: str, dim: int, eps: float, *, bias: bool = True, **made: Any) -> nn.Module:
    """A norm of the last dimension by its name; only a layer norm can have a bias."""
    if kind == "layer":
        return nn.LayerNorm(dim, eps, bias=bias, **made)
    if kind == "rms":
        return nn.RMSNorm(dim, eps, **made)
    raise RegardError(f"norm is {kind!r}; give layer or rms")
