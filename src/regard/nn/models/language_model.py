"""`LanguageModel`: a decoder that names the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...call.masks import Full, Mask
from ...call.observers import Observer
from .config import ModelConfig
from .mixers import MixerState
from .stack import Stack, embedding_of, head_of


class LanguageModel(nn.Module):
    """Tokens in, the logits of each next token out.

    model = LanguageModel(ModelConfig(vocab=512, dim=128, depth=4, mixer="softmax"))
    logits = model(tokens)                                # (batch, length, vocab)
    states = model.states()                               # a cache for each block
    logits = model(prompt, states=states); logits = model(next_token, states=states)
    logits, seen = model(tokens, observe=[TopK(8)])       # seen[2].own[0]: block 2's TopK
    """

    kind = "lm"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding_of(config)
        self.stack = Stack(config, config.mixers(config.depth), causal=True)
        self.head = head_of(config, self.embedding)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Mask = Full(),
        states: Sequence[MixerState] | None = None,
        positions: int | None = None,
        observe: Sequence[Observer] | None = None,
    ) -> Any:
        """Logits (batch, length, vocab) of tokens (batch, length); with `observe`, also what each
        block saw.

        mask: joined with the past, in softmax mixers any, in others Padding and Documents.
        states: of `states()`; they hold the tokens before. positions: that of the first token,
        default as many as the states have seen.
        """
        hidden, seen = self.hidden(
            tokens, mask=mask, states=states, positions=positions, observe=observe
        )
        logits = self.head(hidden)
        return logits if observe is None else (logits, seen)

    def hidden(self, tokens: Tensor, **request: Any) -> tuple[Tensor, Any]:
        """The vectors that `head` makes logits of (batch, length, dim), and what blocks saw."""
        return self.stack(tokens, self.embedding, **request)

    def states(self) -> list[MixerState]:
        """A fresh state for each block: a cache, a `LinearState`, a hidden state."""
        return self.stack.states()
