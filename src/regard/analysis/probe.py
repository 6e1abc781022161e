"""A reader's model, run on one text as often as needed: with cuts, with observers, in copies.

Everything here needs transformers, which ``pip install "regard[look]"`` brings.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call.observers import Observer
from ..capture.layers import Cut, Layer
from ..capture.recording import Recording
from ..capture.watching import watch
from ..errors import RegardError
from . import over_ranks
from .text_model import Encoded, TextModel, quiet
from .words import Words


@dataclass(frozen=True)
class ModelRun:
    """One run. final (copies, tokens, width): the last layer's vectors, after its last norm.

    logits (copies, vocabulary): of the token after the text; None without a language model's head.
    """

    final: Tensor
    logits: Tensor | None
    layers: list[Layer]
    recording: Recording | None


class Probe:
    """A text in a model. An encoder-decoder's text is read by its encoder alone."""

    base: Any

    def __init__(self, reader: TextModel, text: str) -> None:
        self.reader = reader
        self.encoded: Encoded = reader.encode(text)
        limit = reader.limit
        if limit is not None and len(self.encoded.ids) > limit:
            raise RegardError(
                f"the text has {len(self.encoded.ids):,} tokens, but {reader.name} has positions "
                f"for {limit:,}"
            )
        self.words: Words = Words.of(self.encoded.about())
        whole = reader.model
        self.base = whole.base_model
        if reader.family == "encoder-decoder":
            self.base = whole = whole.get_encoder()
        self.model: Any = whole
        self.writes: bool = self.model is not self.base and reader.family == "causal"
        if not self.writes:
            self.model = self.base

    def __len__(self) -> int:
        return len(self.encoded.ids)

    @contextlib.contextmanager
    def running(
        self,
        copies: int = 1,
        *,
        observe: Sequence[Observer] = (),
        cut: Sequence[Cut] = (),
        keep_qk: bool = False,
    ) -> Iterator[ModelRun]:
        """Run the model on ``copies`` of the text; gradients flow where they are enabled."""
        over_ranks.alone("to compare, cut or measure effects")
        finals: list[Tensor] = []
        took = inspect.signature(self.model.forward).parameters
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([self.encoded.ids] * copies, dtype=torch.int64, device="cpu")
        }
        if getattr(self.model.config, "use_cache", None) and "use_cache" in took:
            inputs["use_cache"] = False
        if self.writes and "logits_to_keep" in took:
            inputs["logits_to_keep"] = 1
        with quiet(), contextlib.ExitStack() as stack:
            stack.callback(
                self.base.register_forward_hook(
                    lambda _, __, output: finals.append(output[0])
                ).remove
            )
            with watch(self.model, observe=observe, cut=cut, keep_qk=keep_qk) as seen:
                output = self.model(**inputs)
            logits = output.logits[:, -1] if self.writes else None
            recording = None
            if keep_qk:
                recording = seen.recording(model=self.reader.name, **self.encoded.about())
            yield ModelRun(finals[0], logits, seen.layers, recording)

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Gradients from the embeddings on and none of the parameters, which stay as they were."""
        asked = [(p, p.requires_grad) for p in self.model.parameters()]
        hook = self.base.get_input_embeddings().register_forward_hook(
            lambda _, __, out: out.detach().requires_grad_()
        )
        try:
            for parameter, _ in asked:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            hook.remove()
            for parameter, before in asked:
                parameter.requires_grad_(before)

    def token(self, number: int) -> str:
        """A token of the vocabulary as text; by its name where it is none by itself."""
        tokenizer = self.reader.tokenizer
        text: str = tokenizer.decode([number], clean_up_tokenization_spaces=False)
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            name = tokenizer.convert_ids_to_tokens(number)
            return f"<{number}>" if name is None else str(name)
        return text

    def vector(self, final: Tensor, word: int) -> Tensor:
        """A word's vector in the final ones: the mean over its tokens, (copies, width)."""
        tokens = self.words[word].tokens
        return final[:, tokens.start : tokens.stop].mean(1)
