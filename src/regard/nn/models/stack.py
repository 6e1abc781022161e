"""Blocks of a mixer and a feed-forward, and stacks of them: what every model here is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...call.masks import Full, Mask
from ...call.observers import Observer
from ...errors import RegardError
from ..blocks import FeedForward, norm_of
from ..multihead import Memory, MultiHeadAttention
from ..positions import LearnedPositions, Positions, Rotary, SinusoidalPositions
from .config import ModelConfig
from .mixers import MixerState, checked_tokens, mixer_of


class BlockResults(NamedTuple):
    """What observers saw in a block: its mixer (() of a recurrence), its cross-attention."""

    own: tuple[Any, ...]
    cross: tuple[Any, ...] = ()


class MixerBlock(nn.Module):
    """x + mixer(norm x), + cross(norm x) where it reads a memory, + feed-forward(norm x)."""

    def __init__(
        self, kind: str, config: ModelConfig, *, causal: bool, cross: bool, rotary: Rotary | None
    ) -> None:
        super().__init__()
        norm = (config.norm, config.dim, config.norm_eps)
        self.mixer_norm = norm_of(*norm, bias=config.bias)
        self.mixer = mixer_of(kind, config, causal=causal, rotary=rotary)
        self.cross_norm: nn.Module | None = None
        self.cross_attention: MultiHeadAttention | None = None
        if cross:
            self.cross_norm = norm_of(*norm, bias=config.bias)
            self.cross_attention = MultiHeadAttention(
                config.dim, config.heads, kv_heads=config.kv_heads, bias=config.bias,
                qk_norm=config.qk_norm, norm_eps=config.norm_eps, dropout=config.dropout,
                engine=config.engine,
            )  # fmt: skip
        self.feed_forward_norm: nn.Module | None = None
        self.feed_forward: FeedForward | None = None
        if config.hidden != 0:
            self.feed_forward_norm = norm_of(*norm, bias=config.bias)
            self.feed_forward = FeedForward(
                config.dim, config.hidden, activation=config.activation, bias=config.bias,
                dropout=config.dropout,
            )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | Memory | None = None,
        *,
        mask: Mask = Full(),
        memory_mask: Mask = Full(),
        state: MixerState | None = None,
        positions: Positions | None = None,
        observe: Sequence[Observer] | None = None,
    ) -> tuple[Tensor, BlockResults]:
        """x (batch, length, dim) to the same, and what observers saw."""
        watching = () if observe is None else observe
        out = self.mixer(
            self.mixer_norm(x), mask=mask, state=state, positions=positions, observe=watching
        )
        out, own = out if isinstance(out, tuple) else (out, ())
        x, cross = x + self.dropout(out), ()
        if self.cross_attention is not None and self.cross_norm is not None:
            if memory is None:
                raise RegardError("this decoder reads a memory; give what the encoder made")
            out, cross = self.cross_attention(
                self.cross_norm(x), memory, mask=memory_mask, observe=watching
            )
            x = x + self.dropout(out)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x, BlockResults(own, cross)


class Stack(nn.Module):
    """Embedded tokens through blocks, and a norm after the last.

    Embeddings are drawn with variance 1/dim and multiplied by √dim (Vaswani et al. 2017, 3.4), so
    that logits by the same table begin with variance 1.
    """

    def __init__(
        self, config: ModelConfig, kinds: Sequence[str], *, causal: bool, cross: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.positions: nn.Module | None = None
        if config.positions == "learned":
            self.positions = LearnedPositions(config.length, config.dim)
        elif config.positions == "sinusoidal":
            self.positions = SinusoidalPositions(config.dim)
        rotary = Rotary(config.dim // config.heads) if config.positions == "rotary" else None
        self.blocks = nn.ModuleList(
            MixerBlock(kind, config, causal=causal, cross=cross, rotary=rotary) for kind in kinds
        )
        self.norm = norm_of(config.norm, config.dim, config.norm_eps, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        tokens: Tensor,
        embedding: nn.Embedding,
        memory: Tensor | Sequence[Memory] | None = None,
        *,
        mask: Mask = Full(),
        memory_mask: Mask = Full(),
        states: Sequence[MixerState] | None = None,
        positions: int | None = None,
        observe: Sequence[Observer] | None = None,
    ) -> tuple[Tensor, tuple[BlockResults, ...]]:
        """tokens (batch, length) to (batch, length, dim), and what observers saw.

        positions: that of the first token, default as many as the states have seen.
        """
        if positions is None:
            positions = states[0].length if states else 0
        x = embedding(checked_tokens(tokens)) * self.config.dim**0.5
        if self.positions is not None:
            x = self.positions(x, positions)
        x = self.dropout(x)
        seen = []
        for number, block in enumerate(self.blocks):
            read = memory if memory is None or isinstance(memory, Tensor) else memory[number]
            x, one = block(
                x, read, mask=mask, memory_mask=memory_mask, positions=positions, observe=observe,
                state=None if states is None else states[number],
            )  # fmt: skip
            seen.append(one)
        for state in states or ():
            state.length += tokens.shape[1]
        return self.norm(x), tuple(seen)

    def states(self) -> list[MixerState]:
        """A fresh state for each block."""
        return [MixerState() for _ in self.blocks]

    def remember(self, memory: Tensor) -> list[Memory]:
        """Every block's keys and values of a memory, projected once for many steps."""
        blocks: Any = self.blocks  # typed as modules alone
        return [block.cross_attention.remember(memory) for block in blocks]


def embedding_of(config: ModelConfig) -> nn.Embedding:
    """The table of tokens, drawn with variance 1/dim."""
    table = nn.Embedding(config.vocab, config.dim)
    nn.init.normal_(table.weight, std=config.dim**-0.5)
    return table


def head_of(config: ModelConfig, table: nn.Embedding) -> nn.Linear:
    """Vectors to logits; with the table's weights where they are tied (Press and Wolf 2017)."""
    head = nn.Linear(config.dim, config.vocab, bias=False)
    nn.init.normal_(head.weight, std=config.dim**-0.5)
    if config.tie:
        head.weight = table.weight
    return head
