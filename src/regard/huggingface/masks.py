"""transformers' masks as regard masks: the mask function of `attn_implementation="regard"`.

It hands on a `CompactMask`: a tensor to the model, a regard mask to us (attention.py), so that no
N × N mask is ever built. A watched model gets its own mask, with what it means beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers import masking_utils as hf

from ..call.checked import Call
from ..call.geometry import Span
from ..call.masks import Causal, Documents, Full, Mask, Padding, Predicate, Window
from ..ops import region
from .config import NAME
from .swapped_configs import SKIPPED, Watching

_FOREVER = 2**31  # a window that ends nowhere


class CompactMask(Tensor):
    """A bool mask (batch, 1, q_len, k_len) that holds no elements, only what they would say.

    Any operation on it first computes the elements, so a model that slices or inverts it gets the
    truth; only then are they built.
    """

    regard: Mask
    starts: tuple[int, int]

    @staticmethod
    def __new__(
        cls, mask: Mask, shape: tuple[int, int, int], starts: tuple[int, int], device: Any
    ) -> CompactMask:
        """shape: batch, q_len, k_len. starts: positions of the first query and key."""
        size = (shape[0], 1, *shape[1:])
        self: CompactMask = Tensor._make_wrapper_subclass(
            cls, size, dtype=torch.bool, device=device
        )
        self.regard, self.starts = mask, starts
        return self

    def dense(self) -> Tensor:
        """The elements, True: visible."""
        batch, _, q_len, k_len = self.shape
        like = torch.empty(0, device=self.device, dtype=torch.float32)
        query, key = (like.expand(batch, 1, n, 0) for n in (q_len, k_len))
        call = Call.checked(
            query, key, None, mask=self.regard, query_start=self.starts[0], key_start=self.starts[1]
        )
        visible = call.program.visible(Span(0, q_len, 0, k_len))
        return visible.expand(batch, 1, q_len, k_len).contiguous()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CompactMask({self.regard}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            mask = args[0]
            batch, _, q_len, k_len = mask.shape
            return cls(mask.regard, (batch, q_len, k_len), mask.starts, mask.device)
        args, kwargs = torch.utils._pytree.tree_map_only(
            CompactMask, lambda mask: mask.dense(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = hf.causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **rest: Any,
) -> Tensor | None:
    """The mask function: transformers' arguments in, a `CompactMask` out.

    A watched model gets its own mask, which says beside its elements what they mean.
    """
    name = getattr(rest.get("config"), "_attn_implementation", None)
    # Over ranks the model's own function computes nothing
    if isinstance(name, Watching) and not name.over and region.current() is None:
        make = dict(hf.ALL_MASK_ATTENTION_FUNCTIONS).get(name.own)
        if make is None:  # then transformers makes none
            return None
        own = make(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            use_vmap=use_vmap, device=device, **rest,
        )  # fmt: skip
        starts, skipped = (int(q_offset), kv_offset), vars(SKIPPED).setdefault("starts", {})
        if mask_function is not hf.bidirectional_mask_function:
            skipped[q_length, kv_length] = starts
        if own is None:
            return None
        own.regard_mask = _compact(
            batch_size, q_length, kv_length, starts, mask_function, attention_mask, use_vmap, device
        )
        return own
    if torch.compiler.is_compiling():
        dense: Tensor | None = hf.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            use_vmap=use_vmap, device=device, **rest,
        )  # fmt: skip
        return dense
    return _compact(
        batch_size, q_length, kv_length, (int(q_offset), kv_offset), mask_function, attention_mask,
        use_vmap, device,
    )  # fmt: skip


def _compact(
    batch: int, q_len: int, k_len: int, starts: tuple[int, int],
    function: Callable[..., Tensor], attention_mask: Tensor | None, use_vmap: bool, device: Any,
) -> CompactMask:  # fmt: skip
    """What transformers' mask means, without its elements."""
    shown, start = _translated(function, use_vmap), starts[1]
    keep = hf.prepare_padding_mask(attention_mask, k_len, start)
    if keep is not None:
        keep = keep[:, start : start + k_len].to(device=device, dtype=torch.bool)
        # Ranks decide alike, whether or not their own part has padding
        if region.current() is not None or not bool(keep.all()):
            shown = Padding(keep) if isinstance(shown, Full) else shown & Padding(keep)
    return CompactMask(shown, (batch, q_len, k_len), starts, torch.device(device))


def _translated(function: Callable[..., Tensor], use_vmap: bool) -> Mask:
    """transformers' index function as a regard mask: by name where it is one of theirs."""
    name = getattr(function, "__qualname__", "").split(".<locals>")[0]
    known = getattr(function, "__module__", "") == hf.__name__
    held = inspect.getclosurevars(function).nonlocals if known else {}
    if known and name == "causal_mask_function":
        return Causal()
    if known and name == "bidirectional_mask_function":
        return Full()
    if known and name == "sliding_window_overlay":
        n = held["sliding_window"]  # where 0 stands for none, no layer asks for the mask made of it
        return Window(n, ahead=_FOREVER) if n else ~Causal()
    if known and name == "sliding_window_bidirectional_overlay":
        return Window(held["sliding_window"] + 1, ahead=held["sliding_window"])
    if known and name == "packed_sequence_mask_function":
        return Documents(held["packed_sequence_mask"])
    if known and name in ("and_masks", "or_masks"):
        first, *others = (_translated(f, use_vmap) for f in held["mask_functions"])
        for other in others:
            first = first & other if name == "and_masks" else first | other
        return first

    def broadcast(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        one = torch.zeros_like(head[:, :1])
        if not use_vmap:
            return function(batch, one, query, key)
        with hf.TransformGetItemToIndex():
            indices = (t.flatten() for t in (batch, one, query, key))
            visible: Tensor = hf._vmap_expansion_sdpa(function)(*indices)
            return visible

    return Predicate(broadcast)


AttentionMaskInterface.register(NAME, mask)
