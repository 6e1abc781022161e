"""Hugging Face: `import regard.huggingface` makes `attn_implementation="regard"` valid.

transformers asks a mask function for a mask, hands it through the model, and calls the attention
function in each layer. Ours hands on a `CompactMask`: a tensor to the model, a regard mask to us,
so that no N × N mask is ever built.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers import masking_utils as hf
from transformers.utils import output_capturing

from .biases import Bias, DenseBias
from .caching import owner_of
from .call import Call
from .engines import run
from .errors import RegardError
from .lowered import Span
from .masks import Causal, Dense, Documents, Full, Mask, Padding, Predicate, Window
from .watched import active
from .weigh import whole_rows

NAME = "regard"
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
    """The mask function: transformers' arguments in, a `CompactMask` out."""
    if torch.compiler.is_compiling():
        dense: Tensor | None = hf.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            use_vmap=use_vmap, device=device, **rest,
        )  # fmt: skip
        return dense
    shown = _translated(mask_function, use_vmap)
    keep = hf.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keep is not None:
        keep = keep[:, kv_offset : kv_offset + kv_length].to(device=device, dtype=torch.bool)
        if not bool(keep.all()):
            shown = Padding(keep) if isinstance(shown, Full) else shown & Padding(keep)
    return CompactMask(
        shown, (batch_size, q_length, kv_length), (int(q_offset), kv_offset), torch.device(device)
    )


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
        return Window(held["sliding_window"], ahead=_FOREVER)
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


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function: transformers' arguments in, (out, weights) out.

    out (batch, q_len, heads, v_dim). Weights (batch, heads, q_len, k_len) are returned only where
    the model was asked for them.
    """
    if cache is not None:
        raise RegardError("regard cannot read a paged cache yet; use the default cache")
    where = next(((w, n) for w in active() if (n := w.call_of(module)) is not None), None)
    kind = _kind(module, where[1] if where else "")
    held = owner_of(key)  # a cache that evicts: the mask speaks of more keys than there are
    k_len = key.shape[2] if held is None else held.layout.length
    shown, biases, start, key_start = _shown(module, query, k_len, attention_mask, is_causal)
    if position_bias is not None:
        if position_bias.shape[-1] not in (1, k_len):
            raise RegardError(
                f"{type(module).__name__} computed a position bias for {position_bias.shape[-1]} "
                f"keys of {k_len} tokens, as if none were evicted; use KVCache() or PagedCache()"
            )
        biases.append(DenseBias(position_bias))
    if where:
        start = where[0].position(where[1], kind, start)
        kept = where[0].cut_of(where[1])
        shown = shown if kept is None else shown & kept
    if query.shape[0] != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)
    request: dict[str, Any] = dict(
        mask=shown, bias=biases or None, scale=scaling, softcap=softcap, sinks=s_aux
    )
    wanted, asked = where is not None and where[0].wants(where[1]), _asked_for_weights(rest)
    call: Call | None = None
    seen: dict[int, Any] = {}
    if held is None:
        call = Call.checked(
            query, key, value, **request, dropout=dropout or None, query_start=start,
            key_start=key_start,
        )  # fmt: skip
        if where and wanted:
            call = where[0].asking(where[1], call)
        out, lse, seen = run(call)
    else:
        if dropout:
            raise RegardError("a cache that evicts takes no dropout; use model.eval()")
        if wanted or asked:
            call = held.in_positions(query, **request)
        with torch._C.DisableTorchFunction():  # the call is recorded here
            out, lse = held.attend_appended(query, **request, return_lse=True)
    if where and wanted and call:
        where[0].record(where[1], kind, call, lse, out, seen)
    weights = None
    if asked and call:
        weights = whole_rows(call, lse.detach(), (0, call.place.q_len)).to(query.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _shown(
    module: nn.Module, query: Tensor, k_len: int, given: Tensor | None, is_causal: bool | None
) -> tuple[Mask, list[Bias | Tensor], int, int]:
    """(mask, biases, query_start, key_start) from what arrives as the mask."""
    q_len = query.shape[2]
    if given is None:
        # As in transformers: causal from the top left, as a cache may hold unwritten keys
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if q_len > 1:
            return (Causal() if causal else Full()), [], 0, 0
        return Full(), [], k_len - 1 if causal else 0, 0
    if given.shape[-2] not in (1, q_len) or given.shape[-1] not in (1, k_len):
        raise RegardError(
            f"the model's mask is {tuple(given.shape)}, its query {tuple(query.shape)}, of {k_len} "
            f"keys; the last two sizes of the mask must be ({q_len}, {k_len}), or 1"
        )
    if isinstance(given, CompactMask):
        return given.regard, [], *given.starts
    start = k_len - q_len
    if given.dtype == torch.bool:
        return Dense(given), [], start, 0
    if not given.is_floating_point():
        raise RegardError(
            f"the mask is {given.dtype}; give bool (True: visible) or floats to add to the scores"
        )
    # Additive masks hide by the dtype's lowest number, which is no score
    visible = given > torch.finfo(given.dtype).min / 2
    added = given.masked_fill(~visible, 0)
    return Dense(visible), ([DenseBias(added)] if bool(added.any()) else []), start, 0


def _kind(module: nn.Module, name: str) -> str:
    said = f"{name.rsplit('.', 1)[-1]} {type(module).__name__}".lower()
    cross = getattr(module, "is_cross_attention", False) or any(
        part in said for part in ("cross", "encdec", "encoder_attn")
    )
    return "cross" if cross else "self"


def _asked_for_weights(rest: dict[str, Any]) -> bool:
    """Whether this forward collects attentions; not every family passes the keyword on."""
    collecting = output_capturing._active_collector.get() or {}
    return bool(rest.get("output_attentions")) or any("attentions" in k for k in collecting)


@contextlib.contextmanager
def using_regard(model: nn.Module) -> Iterator[None]:
    """Route a model's attention through `attend` while inside, on copies of its configs."""
    memo: dict[int, Any] = {}
    swapped: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            for attribute, config in list(vars(module).items()):
                if isinstance(config, PreTrainedConfig):
                    own = copy.deepcopy(config, memo)
                    _set(own)
                    swapped.append((module, attribute, config))
                    vars(module)[attribute] = own
        yield
    finally:
        for module, attribute, config in swapped:
            vars(module)[attribute] = config


def _set(config: PreTrainedConfig) -> None:
    config._attn_implementation_internal = NAME
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            _set(getattr(config, key))


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
