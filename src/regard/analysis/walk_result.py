"""What a walk found: one word's way through one head, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .words import Words


@dataclass(frozen=True)
class Token:
    """A token as the walk names it: its word's label, its own characters, its id."""

    word: str
    piece: str
    id: int
    special: bool
    whole: bool

    @property
    def name(self) -> str:
        """The word; for one of a word's several tokens, its piece of it."""
        return self.word if self.whole else self.piece


@dataclass(frozen=True, eq=False)
class WalkText:
    """A text that is read: its words, and its tokens by name."""

    text: str
    words: Words
    tokens: list[Token]
    first: int  # the number of its first word, over both texts of an encoder-decoder


@dataclass(frozen=True, eq=False)
class Embedded:
    """A row that an embedding gave: kind "word", "position" or "type", its number, the vector."""

    kind: str
    row: int | None
    vector: Tensor


@dataclass(frozen=True, eq=False)
class Weighing:
    """From q·k to the weights of one head, for one query: each float64 (keys,).

    scaled is dots × scale; capped only where the scores are soft-capped, bias where something is
    added; scores are the result, −inf where hidden. exps are exp(scores − shift), total their sum
    with the learned sink's. sink: the learned sink's logit, if there is one.
    """

    dots: Tensor
    scale: float
    scaled: Tensor
    softcap: float | None
    capped: Tensor | None
    bias: Tensor | None
    scores: Tensor
    visible: Tensor
    shift: float
    exps: Tensor
    total: float
    weights: Tensor
    sink: float | None
    sink_exp: float
    sink_weight: float


@dataclass(frozen=True)
class Check:
    """How far the walk is from the model at one place: the largest difference, and numbers."""

    what: str
    difference: float
    size: float
    fine: bool


@dataclass(frozen=True, eq=False)
class Walk:
    """One word's way through one head. Vectors are float64, (model_dim,) but for those said.

    at: the query's token among reader.tokens. kind: "self", "encoder", "decoder" or "cross".
    chosen: where no one head was asked for, what the strongest reads and its weight; among: which
    heads it was chosen from.
    embedded, entered: what the first layer takes (normed: by a norm); x: what this layer, number
    `block` of its stack, takes; taken: what its attention does (None where it is x).
    query (dim,), keys (keys, dim), values (keys, v_dim) as the attention received them, rotated
    where the model rotates. mixed (v_dim,): Σ weight · value. written (heads, model_dim): what each
    head adds through W_O, bias what W_O adds by itself, attended their sum.
    scaled: between the two the model changes what the heads give (a gate, a norm).
    base, residual: the vector that attended is added to, and the sum, where the model was seen to
    do so. handed: what the layer hands on.
    """

    model: str
    module: str
    kind: str
    layer: int
    head: int
    block: int
    heads: int
    kv_heads: int
    layers: int
    rotary: bool
    engine: str
    chosen: tuple[str, float] | None
    among: str
    reader: WalkText
    source: WalkText
    word: int
    at: int
    embedded: list[Embedded]
    entered: Tensor | None
    normed: bool
    x: Tensor
    taken: Tensor | None
    query: Tensor
    keys: Tensor
    values: Tensor
    weighing: Weighing
    mixed: Tensor
    scaled: bool
    written: Tensor
    bias: Tensor | None
    attended: Tensor
    base: Tensor | None
    residual: Tensor | None
    handed: Tensor | None
    checks: list[Check]

    @property
    def token(self) -> Token:
        """The token that reads."""
        return self.reader.tokens[self.at]

    @property
    def shares(self) -> Tensor:
        """The share of each head, and then of the bias, in attended, along it: they sum to 1."""
        parts = self.written
        parts = torch.cat([parts, (self.attended - parts.sum(0))[None]])
        return parts @ self.attended / self.attended.square().sum().clamp(min=1e-300)
