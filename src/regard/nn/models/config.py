"""`ModelConfig`: the sizes and choices of a model, as they are saved beside its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import RegardError

MIXERS = (
    "softmax", "window", "linear", "gla", "delta", "gated-delta", "lstm", "gru", "rnn",
)  # fmt: skip
RECURRENT = ("lstm", "gru", "rnn")
POSITIONS = ("rotary", "learned", "sinusoidal", "alibi", "none")
CROSS = ("attention", "bahdanau", "none")


@dataclass(frozen=True)
class ModelConfig:
    """What a `LanguageModel`, `TextEncoder`, `Translator` or `RecurrentTranslator` is made by.

    vocab: how many tokens; source and target share one vocabulary. dim: size of a token's vector.
    heads, kv_heads: of attention, and of linear and delta mixers. depth: blocks; of a translator
    those of its encoder, decoder_depth (default depth) those of its decoder.
    mixer: what mixes tokens, one of `MIXERS`, or several in turn, "window softmax": block n takes
        the n-th of them, over and over. encoder_mixer: a translator's encoder, default mixer.
        A recurrent translator has one of lstm, gru and rnn.
    window: keys that the mixer "window" sees, self included; in an encoder to either side.
    positions: "rotary" and "alibi" act in softmax and window mixers alone; "learned" (up to
        length) and "sinusoidal" are added to the embeddings, whatever mixes them; "none".
    hidden: of the feed-forward layers; default as `regard.nn.FeedForward`; 0: none at all.
    cross: how a decoder reads the source: "attention", or in a recurrent translator "bahdanau"
        (Bahdanau et al. 2015) or "none" (the encoder's last state alone, Sutskever et al. 2014).
    length: the most tokens that the model is meant for. tie: the logits use the embedding.
    pad, bos, eos: ids of these tokens; −1: there is no such token.
    """

    vocab: int
    dim: int = 256
    heads: int = 4
    kv_heads: int | None = None
    depth: int = 4
    decoder_depth: int | None = None
    mixer: str = "softmax"
    encoder_mixer: str | None = None
    window: int = 64
    positions: str = "rotary"
    length: int = 512
    hidden: int | None = None
    activation: str = "swiglu"
    norm: str = "rms"
    norm_eps: float = 1e-5
    bias: bool = False
    qk_norm: bool = False
    dropout: float = 0.0
    tie: bool = True
    cross: str = "attention"
    engine: str = "auto"
    pad: int = -1
    bos: int = -1
    eos: int = -1

    def __post_init__(self) -> None:
        for name in (*self.mixers(self.depth), *self.encoder_mixers(self.depth)):
            if name not in MIXERS:
                raise RegardError(f"mixer is {name!r}; give {', '.join(MIXERS)}")
        if self.positions not in POSITIONS:
            raise RegardError(f"positions is {self.positions!r}; give {', '.join(POSITIONS)}")
        if self.cross not in CROSS:
            raise RegardError(f"cross is {self.cross!r}; give {', '.join(CROSS)}")
        for name in ("vocab", "dim", "heads", "depth", "window", "length"):
            if getattr(self, name) < 1:
                raise RegardError(f"{name} is {getattr(self, name)}; give a number ≥ 1")
        if self.dim % self.heads:
            raise RegardError(f"heads {self.heads} do not divide dim {self.dim}")
        if not 0 <= self.dropout < 1:
            raise RegardError(f"dropout is {self.dropout}; give 0 ≤ dropout < 1")

    @property
    def recurrent(self) -> bool:
        """Whether a translator of these choices is a `RecurrentTranslator`."""
        return self.mixers(1)[0] in RECURRENT

    def mixers(self, depth: int) -> list[str]:
        """The mixer of each of `depth` blocks."""
        return _in_turn(self.mixer, depth)

    def encoder_mixers(self, depth: int) -> list[str]:
        """The mixer of each of `depth` blocks of an encoder."""
        return _in_turn(self.encoder_mixer or self.mixer, depth)

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults, and vocab."""
        kept = {f.name: f.default for f in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != kept[name]}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> ModelConfig:
        """A config of the fields in `given` that are its own."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in given.items() if name in known})


def _in_turn(names: str, depth: int) -> list[str]:
    each = names.replace(",", " ").split() or [names]
    return [each[n % len(each)] for n in range(depth)]
