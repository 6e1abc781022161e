"""Attention at the hardware's speed, with the weights in sight at any length."""

from .attend import attention, explain, observe
from .biases import ALiBi, RelativeBias
from .dropout import Dropout
from .errors import NoEngine, RegardError
from .masks import Causal, Dense, Documents, Edges, First, Full, Mask, Padding, Predicate, Window
from .observers import Distances, Entropy, LogSumExp, Map, MaxScore, Received, Rows, TopK
from .recording import Recording
from .watching import watch

__version__ = "0.1.0"
__all__ = [
    "ALiBi", "Causal", "Dense", "Distances", "Documents", "Dropout", "Edges", "Entropy", "First",
    "Full", "LogSumExp", "Map", "Mask", "MaxScore", "NoEngine", "Padding", "Predicate", "Received",
    "Recording", "RegardError", "RelativeBias", "Rows", "TopK", "Window", "attention", "explain",
    "observe", "watch",
]  # fmt: skip
