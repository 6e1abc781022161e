"""Training: one plain loop, the data and tokenizers that it reads, checkpoints that survive."""

from .corpus import read_pairs, read_text
from .loop import TrainingPlan, train
from .tasks import LanguageTask, TranslationTask
from .tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "LanguageTask", "TrainingPlan", "TranslationTask", "load_tokenizer", "read_pairs", "read_text",
    "train", "train_tokenizer",
]  # fmt: skip
