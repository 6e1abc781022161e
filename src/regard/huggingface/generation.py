"""`generation_cache`: our caches in Hugging Face's `generate()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..ops.cache import Cache, KVCache


def generation_cache(make: Callable[[], Cache] = KVCache, config: Any = None) -> Any:
    """A `Cache` for a Hugging Face model, each of whose layers is a cache that `make` makes.

        model.set_attn_implementation("regard")
        cache = regard.huggingface.generation_cache(lambda: KVCache(evict=H2O(512)))
        model.generate(**inputs, past_key_values=cache)
        cache.nbytes

    make: `KVCache`, `PagedCache`, `lambda: WindowCache(1024, first=4)` and so on. A cache that
    forgets (a window, a policy) needs the attention of `regard`; `KVCache()` and `PagedCache()`
    work with any. config: the model's (`model.config`), needed where some of its layers are not
    attention (Mamba, convolutions): those keep transformers' own caches. An encoder-decoder takes
    it as `transformers.EncoderDecoderCache(cache, DynamicCache())`.

    Positions go on from the true length, whatever was evicted, and masks (padding, sliding windows)
    are asked at the positions that are held. `cache.caches` are the layers' caches.
    """
    from .cache import GenerationCache

    return GenerationCache(make, config)
