"""`regard.models` as models of transformers: `AutoModel.from_pretrained` reads what training wrote.

Importing this registers them. Weights and config.json are those of `nn.models.saved`, so what
`save_pretrained` writes `load_model` reads, and the other way about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from ..call.masks import Full, Mask, Padding
from ..errors import RegardError
from ..nn.models import LanguageModel, ModelConfig, RecurrentTranslator, TextEncoder, Translator

_NAMES = {
    "vocab_size": "vocab",
    "hidden_size": "dim",
    "num_attention_heads": "heads",
    "num_hidden_layers": "depth",
    "max_position_embeddings": "length",
}


class RegardConfig(PreTrainedConfig):
    """The fields of a `ModelConfig`, by their own names and by transformers'."""

    attribute_map = _NAMES

    def __init__(self, **given: Any) -> None:
        fields = {n: given.pop(n) for n in ModelConfig.__dataclass_fields__ if n in given}
        for theirs, ours in _NAMES.items():
            if theirs in given:
                fields[ours] = given.pop(theirs)
        own = ModelConfig(**{"vocab": 1} | fields)
        # What begins with decoder_ takes the place of what does not where transformers decodes
        own = replace(own, decoder_depth=own.decoder_depth or own.depth)
        for name, value in vars(own).items():
            setattr(self, name, value)
        super().__init__(**given)
        self.decoder_start_token_id = self.bos_token_id
        self.use_cache = False

    def own(self) -> ModelConfig:
        """What makes the model."""
        return ModelConfig.from_json(dict(vars(self)))


class RegardLMConfig(RegardConfig):
    """Of a `LanguageModel`."""

    model_type = "regard-lm"


class RegardEncoderConfig(RegardConfig):
    """Of a `TextEncoder`."""

    model_type = "regard-encoder"


class RegardTranslatorConfig(RegardConfig):
    """Of a `Translator`."""

    model_type = "regard-translator"


class RegardRecurrentTranslatorConfig(RegardConfig):
    """Of a `RecurrentTranslator`."""

    model_type = "regard-recurrent-translator"


@dataclass
class WrittenOutput(ModelOutput):
    """logits (batch, length, vocab), and the vectors that they are made of."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None


@dataclass
class ReadOutput(ModelOutput):
    """What a translator's encoder made of its source: a vector a token; which tokens are real, as
    generate() hands on no mask that it was not given; what a recurrent one ends with."""

    last_hidden_state: Tensor | None = None
    keep: Tensor | None = None  # bool (batch, length)
    final: Tensor | None = None  # (batch, dim)


class _Wrapped(PreTrainedModel):
    """What all share: the model of ours inside."""

    made: type[nn.Module]
    _supports_sdpa = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model: Any = self.made(config.own())
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """generate() reads all tokens anew at each step: no cache of its fits every mixer."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """They were drawn where the modules were made."""

    def get_input_embeddings(self) -> nn.Module:
        table: nn.Module = self.model.embedding
        return table

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.model.head
        return head


class RegardForCausalLM(_Wrapped, GenerationMixin):
    """`regard.models.LanguageModel`."""

    config_class = RegardLMConfig
    made = LanguageModel
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **rest: Any,
    ) -> WrittenOutput:
        """attention_mask (batch, length): 0 hides padding. labels: −100 is left out."""
        mask = _padding(attention_mask)
        added = self.config.positions in ("learned", "sinusoidal")
        if added and isinstance(mask, Padding) and not bool(mask.keep[:, 0].all()):
            raise RegardError(
                f"positions are {self.config.positions}: padding on the left would move them; "
                "pad on the right, or give texts of one length"
            )
        hidden, _ = self.model.hidden(input_ids, mask=mask)
        logits = self.model.head(hidden)
        loss = None if labels is None else _loss(logits[:, :-1], labels[:, 1:])
        return WrittenOutput(loss=loss, logits=logits, last_hidden_state=hidden)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """All tokens anew each time; `regard.models.generate` has the caches."""
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}


class RegardEncoder(_Wrapped):
    """`regard.models.TextEncoder`."""

    config_class = RegardEncoderConfig
    made = TextEncoder
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any
    ) -> BaseModelOutput:
        vectors = self.model(input_ids, mask=_padding(attention_mask))
        return BaseModelOutput(last_hidden_state=vectors)


class _EncoderPart(nn.Module):
    """A translator's encoder by itself."""

    main_input_name = "input_ids"

    def __init__(self, config: Any, model: Translator) -> None:
        super().__init__()
        self.config, self.embedding, self.stack = config, model.embedding, model.encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any
    ) -> ReadOutput:
        keep = (input_ids != self.config.pad if attention_mask is None else attention_mask).bool()
        vectors, _ = self.stack(input_ids, self.embedding, mask=_padding(keep))
        return ReadOutput(last_hidden_state=vectors, keep=keep)


class _RecurrentEncoderPart(nn.Module):
    """The same of a recurrent one."""

    main_input_name = "input_ids"

    def __init__(self, config: Any, model: RecurrentTranslator) -> None:
        super().__init__()
        self.config, self.model = config, model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any
    ) -> ReadOutput:
        keep = (input_ids != self.config.pad if attention_mask is None else attention_mask).bool()
        vectors, final = self.model.read(input_ids, keep)
        return ReadOutput(last_hidden_state=vectors, keep=keep, final=final)


class RegardForConditionalGeneration(_Wrapped, GenerationMixin):
    """`regard.models.Translator`."""

    config_class = RegardTranslatorConfig
    made: type[nn.Module] = Translator
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        return _EncoderPart(self.config, self.model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        labels: Tensor | None = None,
        **rest: Any,
    ) -> WrittenOutput:
        """The source, or what `get_encoder()` made of it, and the target so far."""
        if decoder_input_ids is None and labels is not None:
            before = labels[:, :-1].masked_fill(labels[:, :-1] == -100, max(self.config.pad, 0))
            decoder_input_ids = F.pad(before, (1, 0), value=self.config.bos)
        if decoder_input_ids is None:
            raise RegardError("a translator needs decoder_input_ids, or labels")
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        if attention_mask is None:
            attention_mask = getattr(encoder_outputs, "keep", None)
        hidden = self._decoded(decoder_input_ids, encoder_outputs, attention_mask)
        logits = self.model.head(hidden)
        return WrittenOutput(
            loss=None if labels is None else _loss(logits, labels),
            logits=logits,
            last_hidden_state=hidden,
            encoder_last_hidden_state=encoder_outputs[0],
        )

    def _decoded(self, target: Tensor, read: Any, keep: Tensor | None) -> Tensor:
        """The vectors of target tokens, of what the encoder made; keep: of the source."""
        hidden: Tensor = self.model.decoder(
            target, self.model.embedding, read[0], memory_mask=_padding(keep)
        )[0]
        return hidden

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """All tokens anew each time; `regard.models.beam_search` has the caches."""
        kept = ("attention_mask", "encoder_outputs")
        return {"decoder_input_ids": input_ids} | {name: kwargs.get(name) for name in kept}


class RegardRecurrentForConditionalGeneration(RegardForConditionalGeneration):
    """`regard.models.RecurrentTranslator`."""

    config_class = RegardRecurrentTranslatorConfig
    made = RecurrentTranslator

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        return _RecurrentEncoderPart(self.config, self.model)

    def _decoded(self, target: Tensor, read: Any, keep: Tensor | None) -> Tensor:
        if not isinstance(read, ReadOutput) or keep is None:
            raise RegardError("encoder_outputs are none of this model's get_encoder()")
        state = self.model.state_of(read.last_hidden_state, read.final, keep.bool())
        hidden: Tensor = self.model.vectors(target, state)[0]
        return hidden


def _padding(keep: Tensor | None) -> Mask:
    if keep is None or bool(keep.all()):
        return Full()
    return Padding(keep.bool())


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def _register() -> None:
    for made, autos in (
        (RegardForCausalLM, (AutoModel, AutoModelForCausalLM)),
        (RegardEncoder, (AutoModel,)),
        (RegardForConditionalGeneration, (AutoModel, AutoModelForSeq2SeqLM)),
        (RegardRecurrentForConditionalGeneration, (AutoModel, AutoModelForSeq2SeqLM)),
    ):
        config: Any = made.config_class
        AutoConfig.register(config.model_type, config)
        for auto in autos:
            auto.register(config, made)


_register()
