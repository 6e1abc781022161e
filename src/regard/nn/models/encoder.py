"""`TextEncoder`: tokens in, a vector for each that knows both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...call.masks import Full, Mask
from ...call.observers import Observer
from .config import ModelConfig
from .stack import Stack, embedding_of, head_of


class TextEncoder(nn.Module):
    """Vectors of tokens, each made of what stands on both sides.

    encoder = TextEncoder(ModelConfig(vocab=512, dim=128, depth=4))
    vectors = encoder(tokens, mask=Padding(keep))         # (batch, length, dim)
    logits = encoder.head(vectors)                        # of hidden tokens (Devlin 2019)
    """

    kind = "encoder"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding_of(config)
        self.stack = Stack(config, config.encoder_mixers(config.depth), causal=False)
        self.head = head_of(config, self.embedding)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Mask = Full(),
        observe: Sequence[Observer] | None = None,
    ) -> Any:
        """(batch, length, dim) of tokens (batch, length); with `observe`, also what blocks saw."""
        vectors, seen = self.stack(tokens, self.embedding, mask=mask, observe=observe)
        return vectors if observe is None else (vectors, seen)
