"""Small models of our own: a decoder LM, an encoder, translators; each with a choice of mixer."""

from .nn.models import (
    MIXERS,
    AdditiveAttention,
    LanguageModel,
    MixerState,
    ModelConfig,
    RecurrentTranslator,
    StoryTokenizer,
    TextEncoder,
    Translator,
    beam_search,
    generate,
    load_sorter,
    load_stories,
)

__all__ = [
    "MIXERS", "AdditiveAttention", "LanguageModel", "MixerState", "ModelConfig",
    "RecurrentTranslator", "StoryTokenizer", "TextEncoder", "Translator", "beam_search",
    "generate", "load_sorter", "load_stories",
]  # fmt: skip
