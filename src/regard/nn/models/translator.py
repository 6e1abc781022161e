"""`Translator`: an encoder reads the source, a decoder writes the target and reads both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...call.masks import Full, Mask, Padding
from ...call.observers import Observer
from ...errors import RegardError
from ..multihead import Memory
from .config import ModelConfig
from .mixers import MixerState
from .stack import BlockResults, Stack, embedding_of, head_of


class TranslatorResults(NamedTuple):
    """What observers saw, a `BlockResults` for each block."""

    encoder: tuple[BlockResults, ...] = ()
    decoder: tuple[BlockResults, ...] = ()


class DecoderState:
    """What is known before the next target token: of the source once, of the target so far.

    memory: keys and values of the source, a pair a block. mask: its padding. states: as in
    `LanguageModel`.
    """

    def __init__(self, memory: list[Memory], mask: Mask, states: list[MixerState]) -> None:
        self.memory, self.mask, self.states = memory, mask, states

    def select(self, rows: Tensor) -> None:
        """Keep these items of the batch, in this order."""
        self.memory = [
            Memory(m.key.index_select(0, rows), m.value.index_select(0, rows)) for m in self.memory
        ]
        if isinstance(self.mask, Padding):
            self.mask = Padding(self.mask.keep.index_select(0, rows))
        for state in self.states:
            state.select(rows)


class Translator(nn.Module):
    """Source and target in, the logits of each next target token out. One vocabulary for both.

        model = Translator(ModelConfig(vocab=8000, dim=256, depth=4, pad=0, bos=1, eos=2))
        logits = model(target, source)                 # (batch, target_length, vocab)
        state = model.begin(source)                    # the encoder's part, once
        logits = model.step(target[:, :1], state)      # one token after another
        logits, seen = model(target, source, observe=[TopK(8)])   # seen.decoder[2].cross[0]

    Tokens `pad` of the source are not read.
    """

    kind = "translator"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.cross != "attention":
            raise RegardError(
                f"cross is {config.cross!r}, which RecurrentTranslator takes; with mixer "
                f"{config.mixer!r} it is 'attention'"
            )
        self.config = config
        self.embedding = embedding_of(config)
        depth = config.decoder_depth or config.depth
        self.encoder = Stack(config, config.encoder_mixers(config.depth), causal=False)
        self.decoder = Stack(config, config.mixers(depth), causal=True, cross=True)
        self.head = head_of(config, self.embedding)

    def forward(
        self, target: Tensor, source: Tensor, *, observe: Sequence[Observer] | None = None
    ) -> Any:
        """Logits (batch, target_length, vocab) of target and source (batch, length) tokens.

        With `observe`, also a `TranslatorResults`.
        """
        hidden, seen = self.hidden(target, source, observe=observe)
        logits = self.head(hidden)
        return logits if observe is None else (logits, seen)

    def hidden(
        self, target: Tensor, source: Tensor, *, observe: Sequence[Observer] | None = None
    ) -> tuple[Tensor, TranslatorResults]:
        """The vectors that `head` makes logits of (batch, target_length, dim)."""
        mask = self.source_mask(source)
        memory, below = self.encoder(source, self.embedding, mask=mask, observe=observe)
        hidden, above = self.decoder(
            target, self.embedding, memory, memory_mask=mask, observe=observe
        )
        return hidden, TranslatorResults(below, above)

    def begin(self, source: Tensor) -> DecoderState:
        """The source read: what `step` needs."""
        mask = self.source_mask(source)
        memory, _ = self.encoder(source, self.embedding, mask=mask)
        return DecoderState(self.decoder.remember(memory), mask, self.decoder.states())

    def step(
        self, target: Tensor, state: DecoderState, *, observe: Sequence[Observer] | None = None
    ) -> Any:
        """Logits (batch, length, vocab) of the target tokens that follow those of the state."""
        hidden, seen = self.decoder(
            target, self.embedding, state.memory, memory_mask=state.mask, states=state.states,
            observe=observe,
        )  # fmt: skip
        logits = self.head(hidden)
        return logits if observe is None else (logits, seen)

    def source_mask(self, source: Tensor) -> Mask:
        """Padding of the tokens `pad`, or Full where there are none."""
        keep = source != self.config.pad
        return Full() if bool(keep.all()) else Padding(keep)
