"""Attention at the hardware's speed, with the weights in sight at any length."""
# ruff: noqa: I001 (a name a line would hide the list)

from .attend import attention, explain, observe
from .biases import ALiBi, RelativeBias
from .dropout import Dropout
from .errors import NoEngine, RegardError
from .masks import Causal, Dense, Documents, Edges, First, Full, Heads, Mask  # fmt: skip
from .masks import Padding, Predicate, Window  # fmt: skip
from .observers import Distances, Effect, Entropy, LogSumExp, Map, MaxScore, NormTopK  # fmt: skip
from .observers import Received, Rows, TopK  # fmt: skip
from .recording import Recording
from .watched import Cut
from .watching import watch

__version__ = "0.1.0"
__all__ = [
    "ALiBi", "Causal", "Cut", "Dense", "Distances", "Documents", "Dropout", "Edges", "Effect",
    "Entropy", "First", "Full", "Heads", "LogSumExp", "Map", "Mask", "MaxScore", "NoEngine",
    "NormTopK", "Padding", "Predicate", "Received", "Recording", "RegardError", "RelativeBias",
    "Rows", "TopK", "Window", "attention", "explain", "observe", "watch",
]  # fmt: skip
