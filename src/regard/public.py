"""The public names; `import regard` brings them with the first that is asked for."""
# ruff: noqa: I001, RUF022 (a name a line would hide the list; H2O is no constant)

from .ops.attend import attention, explain, observe
from .call.biases import ALiBi, RelativeBias
from .ops.cache import H2O, KVCache, PagedCache, SnapKV, TOVA, WindowCache
from .call.top_blocks import TopBlocks
from .call.dropout import Dropout
from .errors import NoEngine, RegardError
from .ops.linear import Favor, LinearState, linear_attention
from .report.look_result import LookResult, look
from .call.masks import Causal, Dense, Documents, Edges, First, Full, Heads, Mask
from .call.masks import Padding, Predicate, Window
from .ops.merging import merge, piecewise
from .call.observers import Distances, Effect, Entropy, LogSumExp, Map, MaxScore, NormTopK
from .call.observers import Received, Rows, TopK
from .call.pages import Pages
from .call.sparse_masks import BigBird, BlockSparse, Chunks, Dilated, Fixed, Longformer, Strided
from .capture.record import record
from .capture.recording import Recording
from .capture.layers import Cut
from .capture.watching import watch
from .analysis.context_loss import Unseen, unseen, unseen_mass, unseen_recorded
from .ops.merging import stitch

__all__ = [
    "ALiBi", "BigBird", "BlockSparse", "Causal", "Chunks", "Cut", "Dense", "Dilated", "Distances",
    "Documents", "Dropout", "Edges", "Effect", "Entropy", "Favor", "First", "Fixed", "Full",
    "H2O", "Heads", "KVCache", "LinearState", "LogSumExp", "Longformer", "LookResult", "Map",
    "Mask", "MaxScore", "NoEngine", "NormTopK", "Padding", "PagedCache", "Pages", "Predicate",
    "Received", "Recording", "RegardError", "RelativeBias", "Rows", "SnapKV", "Strided", "TOVA",
    "TopBlocks", "TopK", "Unseen", "Window", "WindowCache", "attention", "explain",
    "linear_attention", "look", "merge", "observe", "piecewise", "record", "stitch",
    "unseen", "unseen_mass", "unseen_recorded", "watch",
]  # fmt: skip
