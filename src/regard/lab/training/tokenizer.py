"""Byte-pair encodings trained on the data, saved as Hugging Face has them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import RegardError
from ...nn.models.saved import write_text

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<pad>", "<s>", "</s>"]


def train_tokenizer(texts: Iterable[str], vocab: int, *, ends: bool = False) -> Any:
    """A byte-level BPE of `vocab` tokens: every text has tokens, and comes back as it was.

    ends: every text it reads gets </s> behind it, as a translator's source does.
    """
    tk = _library()
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.normalizer = tk.normalizers.NFC()
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=ends)
    tokenizer.decoder = tk.decoders.ByteLevel()
    alphabet = sorted(tk.pre_tokenizers.ByteLevel.alphabet())
    if vocab < len(alphabet) + len(SPECIAL):
        raise RegardError(f"vocab is {vocab}; bytes alone need {len(alphabet) + len(SPECIAL)}")
    trainer = tk.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if ends:
        tokenizer.post_processor = tk.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", EOS)]
        )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """tokenizer.json, and tokenizer_config.json for `AutoTokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[PAD],
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "clean_up_tokenization_spaces": False,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(said, indent=2) + "\n")


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a saved model."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise RegardError(f"{folder} has no tokenizer.json")
    return _library().Tokenizer.from_file(str(path))


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise RegardError('tokenizers are missing: pip install "regard[train]"') from error
    return tokenizers
