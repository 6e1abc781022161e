"""The calls of the compiled kernels: forward, backward, effect, pooled, columns, evict."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...call.biases import Kind
from ...call.checked import Call
from ...call.observers import Observer, Received
from .. import hidden
from ..second_pass.pooled import SIDE, Rectangle
from . import native
from .call_struct import TYPES, Buffers, Watching, offsets, parts_of, words_of
from .structs import (
    BACKWARD,
    CALL,
    COLUMNS,
    EFFECT,
    EVICT,
    POOLED,
    RECEIVED,
    ROWS,
    TILE,
    VIEW,
)

NONE = torch.empty(0, dtype=torch.float32, device="cpu")
Ranked = tuple[Tensor, Tensor, Tensor]  # indices, effect, weights


def run(call: Call, observers: tuple[Observer, ...] = (), stats: bool = False) -> list[Tensor]:
    """Call the kernel: out, lse, stats, and the tensors that the observers' `shapes` name.

    stats (batch, heads, q_len, 2), empty unless asked for: each row's top, which is near its
    largest score, and the sum of exp(score − top).
    """
    found = _run(call, observers, stats)
    # The kernel adds −∞ to a score, which hides none that is NaN
    if any(b.dense for b in call.biases) and not hidden.finite(found[0]):
        before = found
        found = _run(call.hidden_by_biases(), observers, stats)
        at = 3
        for observer in observers:
            if isinstance(observer, Received):  # counts who sees a key by the mask as it was given
                found[at + 1] = before[at + 1]
            at += len(observer.shapes(call.place, call.working))
    return found


def _run(call: Call, observers: tuple[Observer, ...], stats: bool) -> list[Tensor]:
    place, query, value = call.place, call.query, call.value
    assert value is not None
    rows = (place.batch, place.heads, place.q_len)
    out = torch.empty(*rows, value.shape[-1], dtype=query.dtype, device="cpu")
    lse = torch.empty(rows, dtype=torch.float32, device="cpu")
    kept = Buffers()
    saved = torch.empty(*rows, 2, dtype=torch.float32, device="cpu") if stats else NONE
    watching = Watching(call, observers, lse) if observers else None
    if lse.numel():
        observe = watching.packed(kept) if watching else 0
        _check(library().regard_forward(words_of(call, out, lse, saved, kept, observe)))
    return [out, lse, saved, *(watching.tensors() if watching else ())]


class Again:
    """One call again and again, but for its query and how many keys stand in the same buffers.

    call: of one query for each item, whose mask shows all keys; without biases, sinks and dropout.
    Its key and value are views of the buffers' beginning. observe: the address of a RegardObserve.
    """

    def __init__(self, call: Call, observe: int = 0) -> None:
        query, value = call.query, call.value
        assert value is not None
        self.shape, self.stride, self.dtype = query.shape, query.stride(), query.dtype
        self._out = (*self.shape[:3], value.shape[-1])
        out, lse = self._made()
        self._kept, self._words = Buffers(), array("q")
        self._words.frombytes(words_of(call, out, lse, None, self._kept, observe))
        self._at = self._words.buffer_info()[0]
        self._forward = library().regard_forward

    def run(self, query: Tensor, k_len: int) -> tuple[Tensor, Tensor]:
        """(out, lse). query: of the first's shape, strides and dtype."""
        out, lse = self._made()
        words, at = self._words, CALL.at
        words[at["k_len"]], words[at["query_start"]] = k_len, k_len - 1
        words[at["threads"]], words[at["parts"]] = torch.get_num_threads(), parts_of(self.dtype)
        words[at["query"]] = query.data_ptr()  # a view begins with its address
        words[at["out"]], words[at["lse"]] = out.data_ptr(), lse.data_ptr()
        if lse.numel():
            _check(self._forward(self._at))
        return out, lse

    def _made(self) -> tuple[Tensor, Tensor]:
        return torch.empty(self._out, dtype=self.dtype, device="cpu"), torch.empty(
            self.shape[:3], dtype=torch.float32, device="cpu"
        )


def run_backward(
    call: Call, out: Tensor, stats: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    wanted: Sequence[bool], delta: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor | None], Tensor | None]:  # fmt: skip
    """Gradients of (query, key, value), of the biases where wanted, and of the sinks.

    delta (batch, heads, q_len): grad_out · out − grad_lse, where it is known already.
    """
    call = _apart(call)
    place, value = call.place, call.value
    assert value is not None
    if delta is None:
        delta = (grad_out.float() * out.float()).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse.float()
    delta = delta.float().contiguous()
    tensors = (call.query, call.key, value)
    made = torch.empty if delta.numel() and place.k_len else torch.zeros
    grads = [made(t.shape, dtype=t.dtype, device="cpu") for t in tensors]
    dense = [
        torch.zeros(b.tensor.shape, dtype=torch.float32, device="cpu")
        if w and b.kind == Kind.DENSE
        else None
        for b, w in zip(call.biases, wanted, strict=True)
    ]
    along = None
    if any(w and b.kind != Kind.DENSE for b, w in zip(call.biases, wanted, strict=True)):
        along = torch.zeros(
            place.heads, max(place.q_len + place.k_len - 1, 0), dtype=torch.float32, device="cpu"
        )
    if delta.numel() and place.k_len:
        kept = Buffers()
        views = [
            (0,) * VIEW.words if g is None else kept.view(g, 0)
            for g, b in zip(dense, call.biases, strict=True)
            if b.kind == Kind.DENSE
        ]
        kind = TYPES[grad_out.dtype]
        sizes = [b.tensor.numel() for b in call.biases if b.kind == Kind.DENSE]
        d_query, d_key, d_value = (g.data_ptr() for g in grads)
        words = BACKWARD.flat(
            grad_out=kept.view(grad_out, kind),
            stats=stats.data_ptr(),
            delta=delta.data_ptr(),
            type=TYPES[call.query.dtype],
            d_query=d_query,
            d_key=d_key,
            d_value=d_value,
            d_by_offset=kept.tensor(along),
            d_bias=kept.integers([n for v in views for n in v]),
            bias_floats=kept.integers(sizes),
        )
        forward_words = words_of(call, out, delta, None, kept)
        _check(library().regard_backward(forward_words, BACKWARD.pack(*words)))
    d_biases: list[Tensor | None] = []
    for bias, want, gradient in zip(call.biases, wanted, dense, strict=True):
        if want and bias.kind != Kind.DENSE:
            assert along is not None
            gradient = bias.collect_along(along, offsets(call))
        d_biases.append(None if gradient is None else gradient.to(bias.tensor.dtype))
    d_sinks = None
    if call.sinks is not None:
        share = (call.sinks.float()[:, None] - stats[..., 0]).exp() / stats[..., 1]
        d_sinks = -(share * delta).sum((0, 2)).to(call.sinks.dtype)
    return grads, d_biases, d_sinks


def _apart(call: Call) -> Call:
    """With its biases of −∞ in the mask, too, where the kernel would add them to a NaN."""
    return call.hidden_by_biases() if hidden.beside_biases(call) else call


def effect(
    call: Call, out: Tensor, stats: Tensor, k: int, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices, effect, weights) of the k edges of each row that matter most to a scalar.

    grad: the scalar's gradient of out; both (batch, heads, q_len, v_dim).
    """
    call = _apart(call)
    place = call.place
    rows = (place.batch, place.heads, place.q_len, k)
    indices = torch.full(rows, -1, dtype=torch.int32, device="cpu")
    sizes, weights = (
        torch.zeros(rows, dtype=torch.float32, device="cpu"),
        torch.zeros(rows, dtype=torch.float32, device="cpu"),
    )
    delta = (grad.float() * out.float()).sum(-1).contiguous()
    if delta.numel():
        kept = Buffers()
        wanted = EFFECT.flat(
            grad_out=kept.view(grad, TYPES[grad.dtype]),
            stats=stats.data_ptr(),
            delta=delta.data_ptr(),
            k=k,
            index=indices.data_ptr(),
            effect=sizes.data_ptr(),
            weight=weights.data_ptr(),
        )
        _check(
            library().regard_effect(words_of(call, out, delta, None, kept), EFFECT.pack(*wanted))
        )
    return indices, sizes, weights


def pooled(call: Call, lse: Tensor, tiles: Sequence[Rectangle], largest: bool) -> Tensor:
    """As `second_pass.pooled.tiles_in_torch` defines it: (tiles, 128, 128) float32."""
    out = torch.empty(len(tiles), SIDE, SIDE, dtype=torch.float32, device="cpu")
    if not len(tiles):
        return out
    kept = Buffers()
    words = [
        TILE.flat(batch=t.batch, head=t.head, zoom=t.zoom, row=t.row, col=t.col) for t in tiles
    ]
    wanted = POOLED.flat(
        count=len(tiles),
        is_max=largest,
        tile=kept.integers([n for w in words for n in w]),
        lse=kept.tensor(lse.float().contiguous()),
        out=out.data_ptr(),
    )
    still = replace(_apart(call), value=call.key, dropout=None)  # neither is read
    given = words_of(still, call.query, lse, None, kept)
    _check(library().regard_pooled(given, POOLED.pack(*wanted)))
    return out


def columns(call: Call, lse: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What the queries start … stop − 1 give each key, and how many of them see it.

    (batch, heads, k_len) float32 and int32. The call's keys may be some of many; lse is that of
    all.
    """
    total, count = _columns(_apart(call), lse, rows)
    if hidden.beside_biases(call):  # who sees a key is said by the mask as it was given
        count = _columns(call, lse, rows)[1]
    return total, count


def _columns(call: Call, lse: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    place = call.place
    shape = (place.batch, place.heads, place.k_len)
    total = torch.zeros(shape, dtype=torch.float32, device="cpu")
    count = torch.zeros(shape, dtype=torch.int32, device="cpu")
    start, stop = max(rows[0], 0), min(rows[1], place.q_len)
    if total.numel() and start < stop:
        kept = Buffers()
        received = RECEIVED.flat(
            first=start, last=stop, sum=total.data_ptr(), count=count.data_ptr()
        )
        wanted = COLUMNS.flat(lse=kept.tensor(lse.float().contiguous()), received=received)
        still = replace(call, value=call.key, sinks=None, dropout=None)  # none is read
        given = words_of(still, call.query, lse, None, kept)
        _check(library().regard_columns(given, COLUMNS.pack(*wanted)))
    return total, count


def step_of(
    key: Tensor, value: Tensor, positions: Tensor, total: Tensor | None, seen: Tensor | None,
    by_layer: bool,
) -> array[int]:  # fmt: skip
    """What `evict` goes by, as long as these tensors live; all but key and value are contiguous.

    key and value: buffers (batch, kv_heads, at least as many slots, dim). positions int32 (batch,
    kv_heads or 1, slots). seen float32 (batch, heads, slots): what the slots received; a slot's
    worth is its sum over a kv head's heads, or its mean over all (by_layer); without seen it is the
    same for all. total float32 like positions: the sums so far; worth is then total + this.
    """
    batch, kv_heads = key.shape[:2]
    heads, slots = positions.shape[1:]
    words = EVICT.flat(
        keep_below=0,
        keep_from=0,
        next=0,
        batch=batch,
        kv_heads=kv_heads,
        heads=heads,
        slots=slots,
        key=_rows(key),
        value=_rows(value),
        positions=positions.data_ptr(),
        total=0 if total is None else total.data_ptr(),
        query_heads=heads if seen is None else seen.shape[1],
        by_layer=seen is not None and by_layer,
        seen=0 if seen is None else seen.data_ptr(),
    )
    return array("q", words)


def _rows(buffer: Tensor) -> list[int]:
    size = buffer.element_size()
    stride = [n * size for n in buffer.stride()[:3]]
    return ROWS.flat(data=buffer.data_ptr(), stride=stride, bytes=buffer.shape[3] * size)


def evict(step: array[int], among: tuple[int, int], following: int) -> None:
    """Let go of one of the filled slots in every head; the last, the newest, takes its place.

    It is the slot of least worth, of equals that of the earliest position, of those at positions
    among[0] … among[1] − 1. total becomes total + seen. The last slot, which is free then, gets the
    position `following`, and a total of 0. step: of `step_of`.
    """
    at = EVICT.at
    step[at["keep_below"]], step[at["keep_from"]] = among
    step[at["next"]] = following
    _check(library().regard_evict(step.buffer_info()[0]))


def library() -> ctypes.CDLL:
    """The library, which `why_not` has found."""
    loaded = native.library()
    assert loaded is not None
    return loaded


def _check(code: int) -> None:
    if code:
        kind = MemoryError if code == 1 else RuntimeError
        raise kind(f"engine cpu: {library().regard_error(code).decode()}")
