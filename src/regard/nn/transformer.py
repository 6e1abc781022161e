"""Stacks of blocks, and `Transformer`: tokens in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..call.biases import ALiBi, Bias
from ..call.masks import Causal, Full, Mask
from ..call.numbers import head_counts
from ..call.observers import Observer
from ..errors import RegardError
from .blocks import Block, BlockSeen, norm_of
from .multihead import AttendingCache, Memory, start_of
from .positions import (
    LearnedPositions,
    Positions,
    RelativePositions,
    Rotary,
    SinusoidalPositions,
)

Positioning = SinusoidalPositions | LearnedPositions | Rotary | RelativePositions | ALiBi
Biases = Bias | Tensor | Sequence[Bias | Tensor] | None


class Encoder(nn.Module):
    """`depth` blocks one after another and, where they are pre-norm, a norm after the last.

        encoder = Encoder(6, 512, 8, positions=Rotary(64), norm="rms", activation="swiglu")
        y = encoder(x, mask=Padding(keep))
        y, seen = encoder(x, observe=[TopK(8)])      # seen[3].own[0]: block 3's TopK

    positions: how tokens are told apart. Sinusoidal and learned ones are added to what comes in,
    a `Rotary` turns queries and keys in every block, `RelativePositions` and `ALiBi` are a bias in
    every block. block: further arguments of `Block`.
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        heads: int,
        *,
        positions: Positioning | None = None,
        **block: Any,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise RegardError(f"depth is {depth}; give a number of blocks ≥ 1")
        self.positions = positions
        rotary = positions if isinstance(positions, Rotary) else None
        self.layers = nn.ModuleList(Block(dim, heads, rotary=rotary, **block) for _ in range(depth))
        self.norm: nn.Module | None = None
        if block.get("pre_norm", True):
            made = {name: block[name] for name in ("bias", "device", "dtype") if name in block}
            eps = block.get("norm_eps", 1e-5)
            self.norm = norm_of(block.get("norm", "layer"), dim, eps, **made)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | Sequence[Memory] | None = None,
        *,
        mask: Mask = Full(),
        memory_mask: Mask = Full(),
        bias: Biases = None,
        observe: Sequence[Observer] | None = None,
        positions: Positions | None = None,
        caches: Sequence[AttendingCache] | None = None,
    ) -> Any:
        """x (batch, length, dim) to the same, through every block.

        memory: what cross-attention reads, (batch, k_len, memory_dim), or what `remember` made of
            it. memory_mask: what it may see of that.
        mask, bias: of every self-attention. caches: one a block.
        positions: the first token's, or a tensor (length,) or (batch, length); default 0, and with
            caches as many as they have seen.

        Returns x; with `observe`, also a tuple of `BlockSeen`, one a block.
        """
        depth = len(self.layers)
        for name, given in (("caches", caches), ("memory", memory)):
            if given is not None and not isinstance(given, Tensor) and len(given) != depth:
                raise RegardError(f"{name} are {len(given)} for {depth} blocks; give one a block")
        positions = start_of(positions, caches[0] if caches else None)
        if isinstance(self.positions, SinusoidalPositions | LearnedPositions):
            x = self.positions(x, positions)
        request: dict[str, Any] = {
            "mask": self._seen_by(mask), "memory_mask": memory_mask, "bias": self._bias(bias),
            "positions": positions, "observe": observe,
        }  # fmt: skip
        seen: list[BlockSeen] = []
        for number, layer in enumerate(self.layers):
            read = memory if memory is None or isinstance(memory, Tensor) else memory[number]
            x = layer(x, read, cache=caches[number] if caches else None, **request)
            if observe is not None:
                x, one = x
                seen.append(one)
        x = x if self.norm is None else self.norm(x)
        return x if observe is None else (x, tuple(seen))

    def remember(self, memory: Tensor) -> list[Memory]:
        """Every block's keys and values of a memory, projected once for many steps."""
        layers: Any = self.layers  # typed as modules alone
        return [layer.remember(memory) for layer in layers]

    def _seen_by(self, mask: Mask) -> Mask:
        """What self-attention may see."""
        return mask

    def _bias(self, bias: Biases) -> Biases:
        """The caller's bias and that of the positions."""
        if isinstance(self.positions, RelativePositions):
            own: Bias = self.positions()
        elif isinstance(self.positions, ALiBi):
            own = self.positions
        else:
            return bias
        if bias is None:
            return own
        return [own, bias] if isinstance(bias, Bias | Tensor) else [own, *bias]


class Decoder(Encoder):
    """Blocks whose self-attention sees the past alone: `Causal()` joins every mask.

    cross=True: each also reads a memory, the output of an encoder.
    """

    def _seen_by(self, mask: Mask) -> Mask:
        return Causal() if isinstance(mask, Full) else Causal() & mask


class TransformerSeen(NamedTuple):
    """What observers saw: a `BlockSeen` for each block; () where there is no such stack."""

    encoder: tuple[BlockSeen, ...] = ()
    decoder: tuple[BlockSeen, ...] = ()


class Transformer(nn.Module):
    """Tokens in, logits out: an encoder, a decoder, or both. Vaswani et al. 2017.

        gpt = Transformer(vocab=50257, dim=768, heads=12, decoder=12)
        bert = Transformer(vocab=30522, dim=768, heads=12, encoder=12)
        translate = Transformer(vocab=8000, dim=512, heads=8, encoder=6, decoder=6)
        logits = translate(target, source)

    encoder, decoder: how many blocks. source_vocab: of the encoder's tokens, where both are; by
    default one embedding serves both. tie: the logits use the embedding's weights (Press and Wolf
    2017).
    positions: "sinusoidal" (the embeddings are then multiplied by √dim, section 3.4), "learned"
    (up to `length`), "rotary", "relative" (T5's: one table a stack), "alibi", None, or a module
    that the stacks share. block: further arguments of `Block`, such as norm="rms",
    activation="swiglu", kv_heads=2, dropout=0.1 (which also falls on the embeddings).
    """

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        heads: int,
        encoder: int = 0,
        decoder: int = 0,
        source_vocab: int | None = None,
        positions: str | Positioning | None = "rotary",
        length: int | None = None,
        tie: bool = True,
        **block: Any,
    ) -> None:
        super().__init__()
        if encoder < 0 or decoder < 0 or not encoder + decoder:
            raise RegardError(
                f"encoder {encoder}, decoder {decoder}: give the blocks of at least one"
            )
        if source_vocab is not None and not (encoder and decoder):
            raise RegardError("source_vocab is of an encoder beside a decoder; give vocab alone")
        made = {name: block[name] for name in ("device", "dtype") if name in block}
        self.embed = nn.Embedding(vocab, dim, **made)
        self.embed_source: nn.Embedding | None = None
        if source_vocab is not None:
            self.embed_source = nn.Embedding(source_vocab, dim, **made)
        self.encoder: Encoder | None = None
        self.decoder: Decoder | None = None

        def told(bidirectional: bool) -> Positioning | None:
            if not isinstance(positions, str):
                return positions
            head_dim = block.get("head_dim") or dim // head_counts(dim, heads)[1]
            return _positioning(positions, dim, heads, head_dim, length, bidirectional, **made)

        if encoder:
            self.encoder = Encoder(encoder, dim, heads, positions=told(True), **block)
        if decoder:
            self.decoder = Decoder(
                decoder, dim, heads, positions=told(False), cross=bool(encoder), **block
            )
        self.head = nn.Linear(dim, vocab, bias=False, **made)
        self.dropout = nn.Dropout(block.get("dropout", 0.0))
        waves = positions == "sinusoidal" or isinstance(positions, SinusoidalPositions)
        self.scale = dim**0.5 if waves else 1.0
        for table in (self.embed, self.embed_source):
            if table is not None:
                nn.init.normal_(table.weight, std=dim**-0.5 if waves else 0.02)
        if tie:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        source: Tensor | None = None,
        *,
        mask: Mask = Full(),
        source_mask: Mask = Full(),
        observe: Sequence[Observer] | None = None,
        positions: Positions | None = None,
        caches: Sequence[AttendingCache] | None = None,
    ) -> Any:
        """Logits (batch, length, vocab) of tokens (batch, length), integers.

        source (batch, source_length): the encoder's tokens, where there is a decoder too.
        mask: of the self-attention over tokens (a decoder joins Causal()); source_mask: what may be
        seen of source, such as Padding(keep). positions, caches: of the stack that reads tokens.
        Returns logits; with `observe`, also a `TransformerSeen`.
        """
        if (source is not None) != (self.encoder is not None and self.decoder is not None):
            raise RegardError(
                "this model has an encoder and a decoder; give tokens and source"
                if source is None
                else "source is for a model with an encoder and a decoder; give tokens alone"
            )
        request: dict[str, Any] = {"observe": observe, "positions": positions, "caches": caches}
        seen = TransformerSeen()
        if self.decoder is None:
            x = self.encode(tokens, mask=mask, **request)
            if observe is not None:
                x, told = x
                seen = TransformerSeen(encoder=told)
            logits: Tensor = self.head(x)
            return logits if observe is None else (logits, seen)
        memory = None
        if source is not None:
            memory = self.encode(source, mask=source_mask, observe=observe)
            if observe is not None:
                memory, told = memory
                seen = TransformerSeen(encoder=told)
        answer = self.decode(tokens, memory, mask=mask, memory_mask=source_mask, **request)
        if observe is None:
            return answer
        return answer[0], seen._replace(decoder=answer[1])

    def encode(self, tokens: Tensor, **request: Any) -> Any:
        """The encoder's output (batch, length, dim); request: what `Encoder` takes."""
        if self.encoder is None:
            raise RegardError("this model has no encoder")
        return self.encoder(self._embedded(tokens, self.embed_source or self.embed), **request)

    def decode(
        self, tokens: Tensor, memory: Tensor | Sequence[Memory] | None = None, **request: Any
    ) -> Any:
        """Logits of the decoder's tokens, with the encoder's output or `remember`'s as memory.

        request: what `Decoder` takes. With `observe`, also a tuple of `BlockSeen`.
        """
        if self.decoder is None:
            raise RegardError("this model has no decoder")
        answer = self.decoder(self._embedded(tokens, self.embed), memory, **request)
        if request.get("observe") is None:
            return self.head(answer)
        return self.head(answer[0]), answer[1]

    def remember(self, memory: Tensor) -> list[Memory]:
        """The decoder's keys and values of an encoder's output, projected once for many steps."""
        if self.decoder is None:
            raise RegardError("this model has no decoder")
        return self.decoder.remember(memory)

    def _embedded(self, tokens: Tensor, table: nn.Embedding) -> Tensor:
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise RegardError(
                f"tokens are {tuple(tokens.shape)} {tokens.dtype}; give integers (batch, length)"
            )
        return self.dropout(F.embedding(tokens, table.weight) * self.scale)


def _positioning(
    kind: str,
    dim: int,
    heads: int,
    head_dim: int,
    length: int | None,
    bidirectional: bool,
    **made: Any,
) -> Positioning:
    """The positions that a name stands for."""
    if kind == "learned":
        if length is None:
            raise RegardError("learned positions end somewhere; give length, the most tokens")
        return LearnedPositions(length, dim, **made)
    if kind == "relative":
        return RelativePositions(heads, bidirectional=bidirectional, **made)
    if kind == "sinusoidal":
        return SinusoidalPositions(dim)
    if kind == "rotary":
        return Rotary(head_dim)
    if kind == "alibi":
        return ALiBi()
    raise RegardError(
        f"positions is {kind!r}; give sinusoidal, learned, rotary, relative, alibi, or a module"
    )
