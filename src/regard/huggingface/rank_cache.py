"""A `Cache` of transformers whose keys lie on the ranks of `context_parallel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from ..errors import RegardError
from ..ops.cache import mark
from ..ops.distributed.steps import Held, Run
from ..ops.region import Region

_ONE_BEAM = "over ranks each item goes on as one sequence; give num_beams=1, num_return_sequences=1"


class RankLayer(cache_utils.CacheLayerMixin):
    """One layer: this rank's ranges of the prompt, and, where it holds its end, the new tokens."""

    is_sliding = False  # the masks that transformers makes are then over all tokens
    is_croppable = False

    def __init__(self, ranges: list[tuple[int, int]], length: int) -> None:
        """length: of the prompt, of which this rank holds these ranges."""
        # Not the parent's: `keys` and `values` are here as `runs`
        self._ranges, self._prompt = ranges, length
        self._ends = ranges[-1][1] == length
        self.runs: list[Run] = []
        self.length, self.is_initialized = 0, False

    def __repr__(self) -> str:
        own = sum(each.stop - each.start for each in self.runs)
        return f"RankLayer({own} of {self.length} keys)"

    @property
    def keys(self) -> Tensor | None:
        """Keys of this rank (batch, kv_heads, own, dim)."""
        return torch.cat([each.key for each in self.runs], 2) if self.runs else None

    @property
    def values(self) -> Tensor | None:
        """Values of this rank (batch, kv_heads, own, v_dim)."""
        return torch.cat([each.value for each in self.runs], 2) if self.runs else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """The prompt's part first, which comes back as it is; then new tokens, in every rank."""
        if not self.runs:
            self._read(key_states, value_states)
            return key_states, value_states
        if not self.length:
            raise RegardError("the prompt is being read; a layer reads it once")
        if key_states.shape[0] != self.runs[0].key.shape[0]:
            raise RegardError(_ONE_BEAM)
        if self._ends:
            last = self.runs[-1]
            both = ((last.key, key_states), (last.value, value_states))
            self.runs[-1] = Run(last.start, *(torch.cat(pair, 2) for pair in both))
        self.length += key_states.shape[2]
        marked = key_states.view_as(key_states)
        mark(marked, Held(self.runs, self.length))
        return marked, value_states

    def _read(self, key: Tensor, value: Tensor) -> None:
        sizes = [stop - start for start, stop in self._ranges]
        if key.shape[2] != sum(sizes):
            raise RegardError(
                f"this rank holds {sum(sizes)} tokens of the prompt, not {key.shape[2]}; read it "
                "by regard.huggingface.prefill"
            )
        parts = zip(self._ranges, key.split(sizes, 2), value.split(sizes, 2), strict=True)
        self.runs = [Run(start, k, v) for (start, _), k, v in parts]
        if self._ends:  # new tokens: apart, so that the prompt's keys are not copied for each
            self.runs.append(Run(self._prompt, key[:, :, :0], value[:, :, :0]))
        self.is_initialized = True

    def settle(self) -> None:
        """The prompt is read."""
        self.length = self._prompt

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.runs, self.length, self.is_initialized = [], 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise RegardError(_ONE_BEAM)

    batch_select_indices = batch_repeat_interleave = crop = reorder_cache


class RankCache(cache_utils.Cache):
    """The layers of a model; made by `prefill`."""

    def __init__(self, region: Region, length: int) -> None:
        ranges = region.ranges(length)
        super().__init__(layer_class_to_replicate=lambda: RankLayer(ranges, length))

    def read(self) -> None:
        """The prompt is read: RegardError where a layer has not."""
        for layer in self.layers:
            if not isinstance(layer, RankLayer) or not layer.runs:
                raise RegardError("prefill: a layer of this model kept no keys in the cache")
            layer.settle()
