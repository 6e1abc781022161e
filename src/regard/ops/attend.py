"""The front doors: `attention`, `observe`, `explain`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..call.biases import Bias
from ..call.checked import Call
from ..call.dropout import Dropout
from ..call.masks import Full, Mask
from ..call.observers import Observer
from ..call.pages import Pages
from ..call.top_blocks import by_content
from ..engines import copying, order, refusals, run, spreading, tiled
from ..engines.second_pass.weigh import explained, weigh
from ..errors import RegardError
from . import region


class Request(TypedDict, total=False):
    """What `attention` takes by name that says nothing of what it returns, for type checkers."""

    mask: Mask
    bias: Bias | Tensor | Sequence[Bias | Tensor] | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    dropout: Dropout | float | None
    query_start: int | None
    key_start: int
    pages: Pages | None
    engine: str


Given = Sequence[Observer]
Results = tuple[Any, ...]


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, observe: None = None,
    return_lse: Literal[False] = False, **request: Unpack[Request],
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, observe: None = None,
    return_lse: Literal[True], **request: Unpack[Request],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, observe: Given,
    return_lse: Literal[False] = False, **request: Unpack[Request],
) -> tuple[Tensor, Results]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, observe: Given,
    return_lse: Literal[True], **request: Unpack[Request],
) -> tuple[Tensor, Tensor, Results]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, observe: Given | None = None,
    return_lse: bool = False, **request: Unpack[Request],
) -> Any: ...  # fmt: skip
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask = Full(),
    bias: Bias | Tensor | Sequence[Bias | Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: Dropout | float | None = None,
    query_start: int | None = None,
    key_start: int = 0,
    pages: Pages | None = None,
    observe: Sequence[Observer] | None = None,
    return_lse: bool = False,
    engine: str = "auto",
    **unknown: Any,
) -> Any:
    """softmax(softcap(scale · q kᵀ) + bias, over the keys that mask shows) v. Vaswani et al. 2017.

    query (batch, heads, q_len, dim); key (batch, kv_heads, k_len, dim);
    value (batch, kv_heads, k_len, v_dim); kv_heads divides heads (grouped-query attention).

    mask: who may see whom, such as `Causal() & Window(1024)`.
    bias: added to the scores: `ALiBi()`, `RelativeBias(table)`, a tensor that broadcasts to
        (batch, heads, q_len, k_len), or several of them.
    scale: default 1 / √dim. softcap: scores become softcap · tanh(score / softcap).
    sinks (heads,): a learned logit per head in the denominator; rows then sum to less than 1.
    dropout: a probability, or `Dropout(p, seed)`.
    query_start, key_start: positions of the first query and key in the sequence. By default keys
        start at 0 and the last query stands at the last key.
    pages: key and value are then pools (pages, kv_heads, size, dim), which engines cpu and
        decode and the second pass on CUDA read in place, and others copy: `Pages(table, lengths)`.
    observe: what to keep of the weights, such as `[TopK(8), Received()]`.

    Returns out (batch, heads, q_len, v_dim); with `return_lse`, also the log-sum-exp
    (batch, heads, q_len); with `observe`, last, a tuple of results in its order. A row that sees no
    key is 0. Gradients flow through out and lse. RegardError if the request does not fit together;
    NoEngine if the named engine, or none of them, can run it: a named engine never falls back.
    """
    # The one list of what is asked for: whoever passes it on passes all of it
    request: dict[str, Any] = dict(
        mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout,
        query_start=query_start, key_start=key_start, pages=pages, observe=observe,
        return_lse=return_lse,
    )  # fmt: skip
    if has_torch_function_variadic(query, key, value):  # as torch's own: `watch` sees the call
        door: Any = attention
        return handle_torch_function(
            door, (query, key, value), query, key, value, **request, **unknown, engine=engine
        )
    if (parallel := region.current()) is not None:
        return parallel.attention(query, key, value, **request, **unknown, engine=engine)
    call = Call.checked(query, key, value, **request, **unknown)
    out, lse, seen = run(call, engine)
    if observe is None:
        return (out, lse) if return_lse else out
    results = weigh(call, lse, out, seen=seen)
    return (out, lse, results) if return_lse else (out, results)


def observe(
    query: Tensor,
    key: Tensor,
    *,
    observe: Sequence[Observer],
    lse: Tensor | None = None,
    mask: Mask = Full(),
    bias: Bias | Tensor | Sequence[Bias | Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_start: int | None = None,
    key_start: int = 0,
) -> tuple[Any, ...]:
    """The second pass alone: a tuple of results in the order of `observe`.

    query (batch, heads, q_len, dim); key (batch, kv_heads, k_len, dim). lse (batch, heads, q_len)
    is that of all keys; give it where `key` is one shard of them. Without it, it is computed from
    the keys given. The other arguments are those of `attention`.
    """
    call = Call.checked(
        query, key, None, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks,
        query_start=query_start, key_start=key_start, observe=observe,
    )  # fmt: skip
    shard = lse is not None
    if shard and by_content(mask):
        raise RegardError(
            f"mask {mask} chooses among all keys, and with lse these may be a shard of them; give "
            "no lse, or what its TopBlocks(…).choose(query, key, …) returns"
        )
    if lse is None:
        lse = tiled.log_sum_exp(call)
    if lse.shape != query.shape[:3] or lse.device != query.device:
        raise RegardError(
            f"lse is {tuple(lse.shape)} on {lse.device}; this call needs "
            f"{tuple(query.shape[:3])} on {query.device}"
        )
    return weigh(call, lse, shard=shard)


def explain(query: Tensor, key: Tensor, value: Tensor, **request: Any) -> dict[str, list[str]]:
    """Each engine's reasons against a request, in the order that `auto` tries them; [] if it can.

    With `observe`, last, as "second pass by triton": what of it the Triton kernel does not read; it
    is read in plain torch then. With `pages`, as "pages": who copies keys and values out of them,
    and how much. As "hidden", who multiplies what the mask hides by 0, and what becomes of a NaN
    there. As "order", where PyTorch's kernel is tried before ours: what was measured. Takes
    what `attention` takes, but `engine`. Inside `context_parallel`, first, as "by heads" and so on,
    each way's reasons, and as "travels" what the call would send; all ranks must ask.
    """
    if (parallel := region.current()) is not None:
        return parallel.explain(query, key, value, **request)
    call = Call.checked(query, key, value, **request)
    said = refusals(call)
    if first := order(call):
        said["order"] = [first]
    if spread := spreading(call):
        said["hidden"] = spread
    if call.pages is not None:
        place = call.place
        dims = query.shape[-1] + value.shape[-1]
        size = place.batch * place.kv_heads * place.k_len * dims * query.element_size()
        said["pages"] = [
            f"{name} copies keys and values out of them, {size / 2**20:.1f} MiB"
            for name in copying(call)
        ]
    if call.observers:
        said["second pass by triton"] = explained(call)
    return said
