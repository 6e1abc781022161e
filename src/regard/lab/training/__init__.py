"""Training: one plain loop, the data and tokenizers that it reads, checkpoints that survive."""

from .corpus import read_pairs, read_text
from .loop import TrainingPlan, train
from .tasks import LanguageTask, TranslationTask
from .tokenizer import load_tokenizer, train_tokenizer
from .writing import continue_text, load_translator, load_writer, translate_texts

__all__ = [
    "LanguageTask", "TrainingPlan", "TranslationTask", "continue_text", "load_tokenizer",
    "load_translator", "load_writer", "read_pairs", "read_text", "train", "train_tokenizer",
    "translate_texts",
]  # fmt: skip
