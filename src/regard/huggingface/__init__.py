"""`import regard.huggingface` makes `attn_implementation="regard"` valid, and adds our models."""

from .attention import attend
from .config import NAME
from .generation import generation_cache, prefill
from .masks import CompactMask, mask
from .own_models import RegardConfig
from .swapped_configs import using_regard

__all__ = [
    "NAME",
    "CompactMask",
    "RegardConfig",
    "attend",
    "generation_cache",
    "mask",
    "prefill",
    "using_regard",
]
