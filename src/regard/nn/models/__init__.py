"""Small models of our own: a decoder LM, an encoder, translators; each with a choice of mixer."""

from .config import MIXERS, ModelConfig
from .decoding import beam_search, generate
from .encoder import TextEncoder
from .language_model import LanguageModel
from .mixers import MixerState
from .recurrent_translator import AdditiveAttention, RecurrentTranslator
from .sorter import load_sorter
from .stories import StoryTokenizer, load_stories
from .translator import Translator

__all__ = [
    "MIXERS",
    "AdditiveAttention",
    "LanguageModel",
    "MixerState",
    "ModelConfig",
    "RecurrentTranslator",
    "StoryTokenizer",
    "TextEncoder",
    "Translator",
    "beam_search",
    "generate",
    "load_sorter",
    "load_stories",
]
