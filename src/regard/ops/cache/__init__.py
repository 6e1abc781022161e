"""Caches: the keys and values of the tokens seen so far, and what a policy keeps of them."""

from .base import Cache, mark, owner_of, tell
from .eviction import H2O, TOVA, Eviction, SnapKV
from .kv_cache import KVCache
from .paged_cache import PagedCache, Tables
from .window_cache import WindowCache

__all__ = [
    "H2O", "TOVA", "Cache", "Eviction", "KVCache", "PagedCache", "SnapKV", "Tables", "WindowCache",
    "mark", "owner_of", "tell",
]  # fmt: skip
