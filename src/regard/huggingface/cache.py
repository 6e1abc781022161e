"""regard's caches as a `Cache` of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, cache_utils

from ..errors import RegardError
from ..ops.cache import Cache, mark
from .config import NAME

_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


class CacheLayer(cache_utils.CacheLayerMixin):
    """One layer of a `GenerationCache`: what transformers asks of a layer, asked of a cache."""

    is_sliding = False  # the masks that transformers makes are then over all tokens, as ours are

    def __init__(self, make: Callable[[], Cache]) -> None:
        # Not the parent's: `keys` and `values` are the cache's
        self._make, self.cache, self.is_initialized = make, make(), False

    def __repr__(self) -> str:
        return repr(self.cache)

    @property
    def keys(self) -> Tensor | None:
        """Keys held (batch, kv_heads, slots, dim)."""
        return self.cache.read()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """Values held (batch, kv_heads, slots, v_dim)."""
        return self.cache.read()[1] if self.is_initialized else None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can undo what was appended."""
        return self.cache.gapless

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        if not self.cache.settled:
            raise RegardError(
                f"{self.cache!r} evicts by what is attended to, and the model's attention does not "
                f'say it: call model.set_attn_implementation("{NAME}") first'
            )
        self.cache.append(key_states, value_states)
        self.is_initialized = True
        key, value = self.cache.read()
        if not self.cache.gapless:
            mark(key, self.cache)
        return key, value

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Masks speak of the whole sequence; `huggingface.attend` asks them for what is held
        return self.cache.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.cache, self.is_initialized = self._make(), False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.cache.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(len(self.cache.lengths), dtype=torch.int64, device="cpu")
            self.cache.select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise RegardError(f"crop({tokens_to_remove}): give how many tokens to remove, negative")
        if self.is_initialized and tokens_to_remove:
            self.cache.crop(-tokens_to_remove)


class GenerationCache(cache_utils.Cache):
    """A cache of transformers whose layers are caches of ours; made by `generation_cache`."""

    def __init__(self, make: Callable[[], Cache], config: PreTrainedConfig | None) -> None:
        if config is None:
            super().__init__(layer_class_to_replicate=lambda: CacheLayer(make))
            return
        decoder = config.get_text_config(decoder=True)
        kinds, arguments = cache_utils.get_layer_types_and_kwargs(decoder)
        theirs = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
        super().__init__(
            layers=[
                CacheLayer(make) if kind in _ATTENTION else theirs[kind](**given)
                for kind, given in zip(kinds, arguments, strict=True)
            ]
        )

    @property
    def caches(self) -> list[Cache]:
        """Our caches, of the layers that have softmax attention."""
        return [layer.cache for layer in self.layers if isinstance(layer, CacheLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes that our caches have allocated."""
        return sum(cache.nbytes for cache in self.caches)
