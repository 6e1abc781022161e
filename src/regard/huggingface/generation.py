"""`generation_cache` and `prefill`: caches for Hugging Face's `generate()`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegardError
from ..ops import region
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


@torch.no_grad()
def prefill(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Read a prompt over the ranks of `context_parallel`: a `Cache` for `generate()` to go on from.

        with regard.context_parallel(mesh):
            cache = regard.huggingface.prefill(model, inputs)
            model.generate(**inputs, past_key_values=cache, max_new_tokens=20)

    inputs: the whole prompt, the same in every rank: input_ids, and attention_mask where there is
    padding. Each rank reads its part of all tokens but the last, and holds the keys of these; the
    last token is the first that `generate()` reads. New tokens' keys lie with the rank that holds
    the prompt's end. Each new token is computed in every rank; only its rows of attention travel.
    All ranks return the same tokens; where these are drawn, give all the same torch.manual_seed.

    RegardError outside of `context_parallel`, and for a prompt of fewer than two tokens. No beam
    search.
    """
    from .rank_cache import RankCache

    parallel = region.current()
    if parallel is None:
        raise RegardError("prefill reads a prompt over ranks; call it inside context_parallel")
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2:
        raise RegardError("prefill: give input_ids (batch, length) of at least two tokens")
    length, taken = ids.shape[1], inspect.signature(model.forward).parameters
    if "position_ids" not in taken:
        raise RegardError(
            f"prefill: {type(model).__name__} takes no position_ids, so no part of a prompt"
        )
    holds = any(stop > start for start, stop in parallel.ranges(length - 1))
    if "nothing" in parallel.tell("some" if holds else "nothing"):
        raise RegardError(
            f"prefill: a prompt of {length} tokens leaves one of {parallel.place[1]} ranks "
            "without any; read so short a one in one process"
        )
    given = {
        name: t[:, :-1] if isinstance(t, Tensor) and t.shape[1:2] == (length,) else t
        for name, t in inputs.items()
    }
    if (keep := given.get("attention_mask")) is not None and "position_ids" not in given:
        given["position_ids"] = (keep.long().cumsum(-1) - 1).masked_fill(keep == 0, 0)
    cache = RankCache(parallel, length - 1)
    more = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
    model(**parallel.cut(given), past_key_values=cache, use_cache=True, **more)
    cache.read()
    return cache
