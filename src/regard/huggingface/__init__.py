"""`import regard.huggingface` makes `attn_implementation="regard"` valid."""

from .attention import CompactMask, attend, mask
from .config import NAME
from .generation import generation_cache
from .swapped_configs import using_regard

__all__ = ["NAME", "CompactMask", "attend", "generation_cache", "mask", "using_regard"]
