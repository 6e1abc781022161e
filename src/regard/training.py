"""Training: one plain loop, the data and tokenizers that it reads, checkpoints that survive."""

from .lab.training import (
    LanguageTask,
    TrainingPlan,
    TranslationTask,
    continue_text,
    load_tokenizer,
    load_translator,
    load_writer,
    read_pairs,
    read_text,
    train,
    train_tokenizer,
    translate_texts,
)

__all__ = [
    "LanguageTask", "TrainingPlan", "TranslationTask", "continue_text", "load_tokenizer",
    "load_translator", "load_writer", "read_pairs", "read_text", "train", "train_tokenizer",
    "translate_texts",
]  # fmt: skip
