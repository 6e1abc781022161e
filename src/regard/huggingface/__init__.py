"""`import regard.huggingface` makes `attn_implementation="regard"` valid."""

from .attention import NAME, CompactMask, attend, mask, using_regard
from .generation import generation_cache

__all__ = ["NAME", "CompactMask", "attend", "generation_cache", "mask", "using_regard"]
