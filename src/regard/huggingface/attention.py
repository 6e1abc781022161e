"""Hugging Face: `import regard.huggingface` makes `attn_implementation="regard"` valid.

transformers asks a mask function for a mask (masks.py), hands it through the model, and calls the
attention function in each layer.

A watched model keeps its own mask and attention functions, whose output is its own to the bit: they
are only found by way of ours, which read beside them (`Watching`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from ..call.biases import Bias, DenseBias
from ..call.checked import Call
from ..call.masks import Causal, Dense, Documents, Full, Mask
from ..engines import run
from ..engines.second_pass.weigh import whole_rows
from ..errors import RegardError
from ..ops import beside, region
from ..ops.cache import owner_of
from ..ops.distributed.steps import Held
from ..ops.watches import WatchedCall, meet
from .config import NAME
from .masks import CompactMask
from .swapped_configs import SKIPPED, watched_name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function: transformers' arguments in, (out, weights) out.

    out (batch, q_len, heads, v_dim). Weights (batch, heads, q_len, k_len) are returned only where
    the model was asked for them. A watched model's own function computes both, unless edges are
    cut, or effects asked for.
    """
    caller = sys._getframe(1)
    name, met = watched_name(module, caller.f_locals.get("self")), meet(module)
    if (parallel := region.current()) is not None:
        eager = name == "eager"
        return _over_ranks(
            parallel, met, module, query, key, value, attention_mask, eager=eager, **given
        )
    if name is None:
        return _compute(met, module, query, key, value, attention_mask, **given)
    eager = name == "eager"
    if met is not None and met.replaced:
        beside.check_draws(given.get("dropout"), met.name)
        return _compute(met, module, query, key, value, attention_mask, eager=eager, **given)
    function = _own_function(name.own, caller.f_code.co_names, caller.f_globals)

    def own() -> tuple[Tensor, Tensor | None]:
        answer: tuple[Tensor, Tensor | None] = function(
            module, query, key, value, attention_mask, **given
        )
        return answer

    def read() -> Call:
        still = (query.detach(), key.detach(), value.detach())
        asked = given | {"dropout": 0.0, "eager": eager}  # weights are observed before dropout
        return _call(met, module, *still, attention_mask, **asked)

    if met is None:  # another thread's
        return own()
    return met.beside(own, read, lambda answer: answer[0].transpose(1, 2))


def _over_ranks(
    parallel: region.Region,
    met: WatchedCall | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **given: Any,
) -> tuple[Tensor, None]:
    """Attention over the ranks of `context_parallel`, of which this one has its own tokens."""
    held = owner_of(key)
    if isinstance(held, Held):
        return _step(parallel, met, module, query, held, attention_mask, dropout, **given), None
    request, starts = _request(met, module, query, key.shape[2], attention_mask, **given)
    if held is not None or starts != (0, 0) or query.shape[2] != key.shape[2]:
        raise RegardError(
            f"{type(module).__name__}: context_parallel takes a whole sequence at once; here "
            f"{query.shape[2]} queries follow {key.shape[2]} keys in a cache of one rank: "
            "use_cache=False, or, to generate, the cache of regard.huggingface.prefill"
        )
    if _asked_for_weights(given):
        raise RegardError("context_parallel: whole weights lie on no rank; give observers")
    request |= {"dropout": dropout or None, "query_start": 0, "key_start": 0}
    query = _spread(query, key)
    if _holds(request["mask"], Documents):
        with contextlib.suppress(RegardError):  # a rank without a jump must not wait for this one
            parallel.run(query, key, value, **request)
        raise RegardError(
            "transformers took jumps in position_ids for packed documents; give an attention_mask, "
            "which regard.distributed.shard adds"
        )
    if met is None:
        out, *_ = parallel.run(query, key, value, **request)
    else:
        out, _ = met.over_ranks(parallel, query, key, value, request)
    return out.transpose(1, 2).contiguous(), None


def _step(
    parallel: region.Region,
    met: WatchedCall | None,
    module: nn.Module,
    query: Tensor,
    held: Held,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **given: Any,
) -> Tensor:
    """A decode step: new tokens, the same in every rank, on the keys that each rank holds."""
    request, starts = _request(met, module, query, held.length, attention_mask, **given)
    if dropout or _asked_for_weights(given):
        raise RegardError(
            "generate() over ranks takes no dropout, and no rank has whole weights: model.eval(), "
            "and give observers"
        )
    request |= {"query_start": starts[0], "key_start": starts[1]}
    if met is None:
        out, *_ = parallel.step(query, held, **request)
    else:
        out = met.step(parallel, query, held, request)
    return out.transpose(1, 2).contiguous()


def _holds(mask: Mask, kind: type[Mask]) -> bool:
    """Whether anything in a mask is of this kind."""
    parts = (getattr(mask, name, None) for name in ("left", "right", "mask"))
    return isinstance(mask, kind) or any(isinstance(p, Mask) and _holds(p, kind) for p in parts)


def _own_function(name: str, names: tuple[str, ...], found: dict[str, Any]) -> Callable[..., Any]:
    """The function that a caller of these names would have got, had it not been watched."""
    interface = found.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    eager = [found[n] for n in names if n.endswith("eager_attention_forward") and n in found]
    if name not in interface and not eager:
        raise RegardError(f"watch: no attention function {name!r} is known where it is called")
    return interface.get_interface(name, eager[0] if eager else None)


def _compute(
    met: WatchedCall | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention by regard."""
    held = owner_of(key)  # a cache that evicts: the mask speaks of more keys than there are
    asked = _asked_for_weights(given)
    if held is None:
        call = _call(met, module, query, key, value, attention_mask, dropout=dropout, **given)
        out, lse, _ = run(call) if met is None else met.run(call)
    else:
        if dropout:
            raise RegardError("a cache that evicts takes no dropout; use model.eval()")
        request, _ = _request(met, module, query, held.layout.length, attention_mask, **given)
        query = _spread(query, key)
        wanted = met is not None and met.wanted
        if wanted or asked:
            call = held.in_positions(query, **request)
        with torch._C.DisableTorchFunction():  # the call is recorded here
            out, lse = held.attend_appended(query, **request, return_lse=True)
        if met is not None and wanted:
            met.record(call, lse, out)
    weights = None
    if asked:
        weights = whole_rows(call, lse.detach(), (0, call.place.q_len)).to(query.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _call(
    met: WatchedCall | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **given: Any,
) -> Call:
    """transformers' arguments as a call."""
    request, starts = _request(met, module, query, key.shape[2], attention_mask, **given)
    if key.shape[1] != value.shape[1]:  # torch's function groups each by itself
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    return Call.checked(
        _spread(query, key), key, value, **request, dropout=dropout or None,
        query_start=starts[0], key_start=starts[1],
    )  # fmt: skip


def _spread(query: Tensor, key: Tensor) -> Tensor:
    """Learned queries serve every item."""
    return query if query.shape[0] == key.shape[0] else query.expand(key.shape[0], -1, -1, -1)


def _request(
    met: WatchedCall | None,
    module: nn.Module,
    query: Tensor,
    k_len: int,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    eager: bool = False,
    **rest: Any,
) -> tuple[dict[str, Any], tuple[int, int]]:
    """(what `Call.checked` takes, the positions of the first query and key).

    eager: the model's own function knows of no mask but the one that it is given.
    """
    if cache is not None:
        raise RegardError("regard cannot read a paged cache yet; use the default cache")
    is_causal = False if eager else is_causal
    shown, biases, start, key_start = _shown(module, query, k_len, attention_mask, is_causal)
    if position_bias is not None:
        if position_bias.shape[-1] not in (1, k_len):
            raise RegardError(
                f"{type(module).__name__} computed a position bias for {position_bias.shape[-1]} "
                f"keys of {k_len} tokens, as if none were evicted; use KVCache() or PagedCache()"
            )
        biases.append(DenseBias(position_bias))
    if met is not None:
        start, shown = met.position(start), met.visible(shown)
    request: dict[str, Any] = dict(
        mask=shown, bias=biases or None, scale=scaling, softcap=softcap, sinks=s_aux
    )
    return request, (start, key_start)


def _shown(
    module: nn.Module, query: Tensor, k_len: int, given: Tensor | None, is_causal: bool | None
) -> tuple[Mask, list[Bias | Tensor], int, int]:
    """(mask, biases, query_start, key_start) from what arrives as the mask."""
    q_len = query.shape[2]
    compact = getattr(given, "regard_mask", given)
    if isinstance(compact, CompactMask) and compact.shape[-2:] == (q_len, k_len):
        return compact.regard, [], *compact.starts
    if isinstance(given, CompactMask):  # of other lengths: its elements are spread over the call's
        given = given.dense()
    if given is None:
        # As in transformers: causal from the top left, as a cache may hold unwritten keys
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        starts = vars(SKIPPED).get("starts", {}).get((q_len, k_len))
        if starts is not None and causal:
            return (Causal() if q_len > 1 else Full()), [], *starts
        if q_len > 1:
            return (Causal() if causal else Full()), [], 0, 0
        return Full(), [], k_len - 1 if causal else 0, 0
    if given.shape[-2] not in (1, q_len) or given.shape[-1] not in (1, k_len):
        raise RegardError(
            f"the model's mask is {tuple(given.shape)}, its query {tuple(query.shape)}, of {k_len} "
            f"keys; the last two sizes of the mask must be ({q_len}, {k_len}), or 1"
        )
    last = (max(k_len - q_len, 0), 0)
    start, key_start = vars(SKIPPED).get("starts", {}).get((q_len, k_len), last)
    if given.dtype == torch.bool:
        return Dense(given), [], start, key_start
    if not given.is_floating_point():
        raise RegardError(
            f"the mask is {given.dtype}; give bool (True: visible) or floats to add to the scores"
        )
    # Additive masks hide by the dtype's lowest number, which is no score
    visible = given > torch.finfo(given.dtype).min / 2
    added = given.masked_fill(~visible, 0)
    return Dense(visible), ([DenseBias(added)] if bool(added.any()) else []), start, key_start


def _asked_for_weights(rest: dict[str, Any]) -> bool:
    """Whether this forward collects attentions; not every family passes the keyword on."""
    collecting = output_capturing._active_collector.get() or {}
    return bool(rest.get("output_attentions")) or any("attentions" in k for k in collecting)


AttentionInterface.register(NAME, attend)
