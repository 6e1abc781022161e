"""Caches: the keys and values of the tokens seen so far, and which of them to evict."""

from .call.pages import Pages
from .ops.cache import H2O, TOVA, KVCache, PagedCache, SnapKV, WindowCache

__all__ = ["H2O", "TOVA", "KVCache", "PagedCache", "Pages", "SnapKV", "WindowCache"]
