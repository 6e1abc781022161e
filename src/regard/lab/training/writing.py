"""What trained models write: a text that goes on, sentences in the other language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import RegardError
from ...nn.models import LanguageModel, RecurrentTranslator, Translator, beam_search, generate
from ...nn.models.saved import load_model
from .batches import padded
from .tokenizer import PAD, load_tokenizer

Told = Callable[[str, float | None], None]
TOKENS_A_BATCH = 2048  # of sources, padding included: beams multiply what is held


def load_writer(folder: str | Path) -> tuple[LanguageModel, Any]:
    """The language model that `regard train lm` left in a folder, and its tokenizer."""
    model = load_model(folder)
    if not isinstance(model, LanguageModel):
        raise RegardError(
            f"{folder} is a {model.kind}; it does not go on with a text: use regard translate"
        )
    return model, load_tokenizer(folder)


def load_translator(folder: str | Path) -> tuple[Translator | RecurrentTranslator, Any]:
    """The translator that `regard train translate` left in a folder, and its tokenizer."""
    model = load_model(folder)
    if not isinstance(model, Translator | RecurrentTranslator):
        raise RegardError(f"{folder} is of kind {model.kind}, no translator: use regard generate")
    return model, load_tokenizer(folder)


def continue_text(
    model: LanguageModel,
    tokenizer: Any,
    text: str,
    count: int,
    *,
    told: Told = lambda what, share: None,
    **how: Any,
) -> str:
    """What the model writes behind a text, of `count` tokens. how: as in `generate`."""
    ids = tokenizer.encode(text).ids
    written: list[Tensor] = []

    def step(column: Tensor) -> None:
        written.append(column)
        told(f"{len(written):,} of {count:,} tokens", len(written) / count)

    prompt = torch.tensor([ids], dtype=torch.int64, device="cpu")
    generate(model, prompt, count, step=step, **how)
    said: str = tokenizer.decode([int(column) for column in written])
    return said


def translate_texts(
    model: Translator | RecurrentTranslator,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    beams: int = 5,
    told: Told = lambda what, share: None,
) -> list[str]:
    """Each text in the target language, by beam search; an empty text stays empty."""
    ids = [tokenizer.encode(text.strip()).ids for text in texts]
    order = [n for n, text in enumerate(texts) if text.strip()]
    order.sort(key=lambda n: -len(ids[n]))  # a batch is of one length, nearly
    found, done = [""] * len(texts), 0
    while done < len(order):
        told(f"{done:,} of {len(order):,} texts", done / len(order))
        size = max(TOKENS_A_BATCH // len(ids[order[done]]), 1)
        chosen = order[done : done + size]
        source = padded([ids[n] for n in chosen], PAD, torch.device("cpu"))
        for n, target in zip(chosen, beam_search(model, source, beams=beams), strict=True):
            found[n] = tokenizer.decode(target).strip()
        done += size
    return found
