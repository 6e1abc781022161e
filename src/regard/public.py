"""The public names; `import regard` brings them with the first that is asked for."""
# ruff: noqa: I001 (a name a line would hide the list)

from .ops.attend import attention, explain, observe
from .ops.distributed.front import context_parallel
from .call.biases import ALiBi, RelativeBias
from .call.dropout import Dropout
from .errors import NoEngine, RegardError
from .ops.linear import linear_attention
from .analysis.heads import HeadScores, heads
from .report.look_result import LookResult, look
from .call.masks import Causal, Dense, Documents, Edges, First, Full, Heads, Mask
from .call.masks import Padding, Predicate, Window
from .ops.merging import merge, piecewise
from .call.observers import Distances, Effect, Entropy, LogSumExp, Map, MaxScore, NormTopK
from .call.observers import Received, Rows, TopK
from .capture.record import record
from .capture.recording import Recording
from .capture.layers import Cut
from .capture.watching import watch

__all__ = [
    "ALiBi", "Causal", "Cut", "Dense", "Distances", "Documents", "Dropout", "Edges", "Effect",
    "Entropy", "First", "Full", "HeadScores", "Heads", "LogSumExp", "LookResult", "Map", "Mask",
    "MaxScore", "NoEngine", "NormTopK", "Padding", "Predicate", "Received", "Recording",
    "RegardError", "RelativeBias", "Rows", "TopK", "Window", "attention", "context_parallel",
    "explain", "heads", "linear_attention", "look", "merge", "observe", "piecewise", "record",
    "watch",
]  # fmt: skip

NAMESPACES = [
    "cache",
    "context",
    "distributed",
    "linear",
    "models",
    "nn",
    "sparse",
]  # `huggingface` needs transformers
