"""Compiled kernels for the CPU, with the observers inside the forward.

Kernels: kernels/cpu (Dao et al. 2022; lanes are queries). They read the mask's program, strides and
grouped heads in place, in O(N) memory. Scores and sums are float32; the same input gives the same
bits whatever the threads, the run, or the other items of the batch.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import transforms
from ..biases import Kind
from ..call import Call
from ..impact import Measured, attach
from ..kernels import native
from ..observers import (
    Distances,
    Effect,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    Observer,
    Received,
    Rows,
    TopK,
    parse,
    written,
)
from ..ops import Op
from ..packed import SCHEMA, pack, unpack

name = "cpu"

MOST_CODE = 1024  # integers of a mask's program (kernels/cpu/mask.h)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PLAIN = (Tensor, torch.nn.Parameter)
NONE = torch.empty(0)
DECODE = 16  # queries: as few leave memory the limit
FUSED = (TopK, Received, Entropy, MaxScore, LogSumExp, Map, Distances, Rows)


def why_not(call: Call) -> list[str]:
    """It takes every mask, bias, cap, sink and dropout; not float64, and no other device."""
    reasons = []
    if not native.AVAILABLE:
        reasons.append("this installation was built without the compiled kernels")
    if call.place.device.type != "cpu":
        reasons.append(f"query is on {call.place.device}; this engine runs on cpu")
    if call.query.dtype not in TYPES:
        kind = str(call.query.dtype).removeprefix("torch.")
        reasons.append(f"query is {kind}; it computes in float32")
    if call.pages is not None and (call.needs_grad or not direct(call)):
        reasons.append("keys lie in pages; they take no gradients, and no compiler or transform")
    if transforms.active():
        reasons.append("a transform of torch.func looks on; it serves none")
    if len(call.program.code) > MOST_CODE:
        reasons.append(f"the mask has {len(call.program.code)} integers, more than {MOST_CODE}")
    return reasons


def yields(call: Call) -> bool:
    """Whether PyTorch's kernel is faster, where both can: docs/benchmarks.md.

    Without vector instructions beyond the baseline it is, but for decoding; so too in bfloat16,
    where the processor has AMX and these kernels may not use it.
    """
    if not native.AVAILABLE or call.observers or call.place.q_len <= DECODE:
        return False
    return native.level() == 0 or (call.query.dtype == torch.bfloat16 and native.without_amx())


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable in everything that goes in."""
    out, lse, *_ = _computed(call, ())
    return out, lse


def observed(call: Call) -> tuple[Tensor, Tensor, dict[int, Any]]:
    """(out, lse, results): of those observers that the forward gathers itself, by their number."""
    mine = {i: o for i, o in enumerate(call.observers) if isinstance(o, FUSED)}
    out, lse, stats, *tensors = _computed(call, tuple(mine.values()))
    results: dict[int, Any] = {}
    still = replace(call, query=call.query.detach(), key=call.key.detach())
    for i, observer in enumerate(call.observers):
        if isinstance(observer, Effect) and not observer.norm and out.requires_grad and direct(call):
            by = partial(effect, still, out.detach(), stats, observer.k)
            results[i] = attach(call, lse, out, observer, by)
    for i, observer in mine.items():
        count = len(observer.shapes(call.place, call.working))
        results[i] = observer.result([t.detach() for t in tensors[:count]], call.place)
        del tensors[:count]
    return out, lse, results


def _computed(call: Call, observers: tuple[Observer, ...]) -> Any:
    """out, lse, stats, and the tensors of the observers: by the shortest way that serves the call.

    A registered op costs more than decoding one token does; it is for those who look at ops.
    """
    if not direct(call):
        return torch.ops.regard.cpu(
            call.query, call.key, call.value, *pack(call), written(observers), call.needs_grad
        )
    if not call.needs_grad:
        return run(call, observers)
    biases = [b.tensor for b in call.biases]
    return _Attention.apply(call, observers, call.query, call.key, call.value, call.sinks, *biases)


def direct(call: Call) -> bool:
    """Whether nobody but autograd looks at the ops of this call: no compiler, mode or transform."""
    return (
        not torch.compiler.is_compiling()
        and type(call.query) in PLAIN
        and type(call.key) in PLAIN
        and type(call.value) in PLAIN
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
    )


def run(call: Call, observers: tuple[Observer, ...] = (), stats: bool = False) -> list[Tensor]:
    """Call the kernel: out, lse, stats, and the tensors that the observers' `shapes` name.

    stats (batch, heads, q_len, 2), empty unless asked for: each row's largest score and sum.
    """
    place, query, value = call.place, call.query, call.value
    assert value is not None
    rows = (place.batch, place.heads, place.q_len)
    out = torch.empty(*rows, value.shape[-1], dtype=query.dtype)
    lse = torch.empty(rows)
    kept = Buffers()
    saved = torch.empty(*rows, 2) if stats else NONE
    watching = Watching(call, observers, lse) if observers else None
    if lse.numel():
        observe = watching.packed(kept) if watching else 0
        _check(library().regard_forward(words_of(call, out, lse, saved, kept, observe)))
    return [out, lse, saved, *(watching.tensors() if watching else ())]


def run_backward(
    call: Call, out: Tensor, stats: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor | None], Tensor | None]:  # fmt: skip
    """Gradients of (query, key, value), of the biases where wanted, and of the sinks."""
    place, value = call.place, call.value
    assert value is not None
    delta = (grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.float()
    delta = delta.contiguous()
    grads = [torch.zeros(t.shape) for t in (call.query, call.key, value)]
    dense = [torch.zeros(b.tensor.shape) if w and b.kind == Kind.DENSE else None
             for b, w in zip(call.biases, wanted, strict=True)]  # fmt: skip
    along = None
    if any(w and b.kind != Kind.DENSE for b, w in zip(call.biases, wanted, strict=True)):
        along = torch.zeros(place.heads, max(place.q_len + place.k_len - 1, 0))
    if delta.numel() and place.k_len:
        kept = Buffers()
        views = [
            (0,) * 6 if g is None else kept.view(g, 0)
            for g, b in zip(dense, call.biases, strict=True)
            if b.kind == Kind.DENSE
        ]
        kind = TYPES[grad_out.dtype]
        sizes = [b.tensor.numel() for b in call.biases if b.kind == Kind.DENSE]
        words = struct.pack(
            "6q8q",
            *kept.view(grad_out, kind), stats.data_ptr(), delta.data_ptr(),
            *(g.data_ptr() for g in grads), kept.tensor(along),
            kept.packed(f"{6 * len(views)}q", *(n for v in views for n in v)), kept.integers(sizes),
        )  # fmt: skip
        forward_words = words_of(call, out, delta, None, kept)
        _check(library().regard_backward(forward_words, words))
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
    tensors = (call.query, call.key, value)
    return [g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)], d_biases, d_sinks


def effect(call: Call, out: Tensor, stats: Tensor, k: int, grad: Tensor) -> Measured:
    """(indices, effect, weights) of the k edges of each row that matter most to a scalar.

    grad: the scalar's gradient of out; both (batch, heads, q_len, v_dim).
    """
    place = call.place
    rows = (place.batch, place.heads, place.q_len, k)
    indices = torch.full(rows, -1, dtype=torch.int32)
    sizes, weights = torch.zeros(rows), torch.zeros(rows)
    delta = (grad.float() * out.float()).sum(-1).contiguous()
    if delta.numel():
        kept = Buffers()
        wanted = struct.pack(
            "6q6q", *kept.view(grad, TYPES[grad.dtype]), stats.data_ptr(), delta.data_ptr(), k,
            indices.data_ptr(), sizes.data_ptr(), weights.data_ptr(),
        )  # fmt: skip
        _check(library().regard_effect(words_of(call, out, delta, None, kept), wanted))
    return indices, sizes, weights


def library() -> ctypes.CDLL:
    """The library, which `why_not` has found."""
    loaded = native.library()
    assert loaded is not None
    return loaded


def _check(code: int) -> None:
    if code:
        raise MemoryError(f"engine cpu: {library().regard_error(code).decode()}")


class _Attention(torch.autograd.Function):
    """The kernels under autograd, at a tenth of a registered op's cost."""

    @staticmethod
    def forward(ctx: Any, call: Call, observers: tuple[Observer, ...], *tensors: Any) -> Any:
        out, lse, stats, *seen = run(call, observers, stats=True)
        query, key, value, sinks, *biases = tensors
        ctx.call, ctx.wanted = _emptied(call), [b.requires_grad for b in biases]
        ctx.save_for_backward(query, key, value, sinks, out, stats, *biases)
        ctx.mark_non_differentiable(stats, *seen)
        ctx.set_materialize_grads(False)
        return (out, lse, stats, *seen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: Any) -> Any:
        query, key, value, sinks, out, stats, *biases = ctx.saved_tensors
        call = _filled(ctx.call, query, key, value, sinks, biases)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads, d_biases, d_sinks = run_backward(call, out, stats, grad_out, grad_lse, ctx.wanted)
        return None, None, *grads, d_sinks, *d_biases


def _emptied(call: Call) -> Call:
    """The call without the tensors that autograd keeps."""
    nothing = torch.empty(0)
    biases = tuple(replace(b, tensor=nothing) for b in call.biases)
    return replace(
        call, query=nothing, key=nothing, value=nothing, sinks=None, biases=biases, observers=()
    )


def _filled(
    call: Call, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None,
    biases: Sequence[Tensor],
) -> Call:  # fmt: skip
    own = tuple(replace(b, tensor=t) for b, t in zip(call.biases, biases, strict=True))
    return replace(call, query=query, key=key, value=value, sinks=sinks, biases=own)


@torch.library.custom_op(
    "regard::cpu",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {SCHEMA}, str observers, bool stats) "
    "-> Tensor[]",
)
def _op(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    *packed, observers, stats = rest
    return run(unpack(query, key, value, *packed), parse(observers), stats)


@_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    *packed, observers, stats = rest
    call = unpack(query, key, value, *packed)
    rows = query.shape[:3]
    numbers = (*rows, 2) if stats else (0,)
    shapes = [s for o in parse(observers) for s in o.shapes(call.place, call.working)]
    return [
        query.new_empty(*rows, value.shape[-1]),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty(numbers, dtype=torch.float32),
        *(query.new_empty(shape, dtype=dtype) for shape, dtype in shapes),
    ]


@torch.library.custom_op(
    "regard::cpu_backward",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {SCHEMA}, Tensor out, Tensor stats, "
    "Tensor grad_out, Tensor? grad_lse, bool[] wanted) -> Tensor[]",
)
def _backward_op(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    """Gradients of query, key, value, the biases (empty where not wanted), and the sinks."""
    *packed, out, stats, grad_out, grad_lse, wanted = rest
    call = unpack(query, key, value, *packed)
    grads, d_biases, d_sinks = run_backward(call, out, stats, grad_out, grad_lse, wanted)
    grads += [query.new_empty(0) if g is None else g for g in d_biases]
    return grads if d_sinks is None else [*grads, d_sinks]


@_backward_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    _, bias_tensors, sinks = rest[:3]
    like = [query, key, value]
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]
    grads += [
        torch.empty_like(t) if want else query.new_empty(0)
        for t, want in zip(bias_tensors, rest[-1], strict=True)
    ]
    return grads if sinks is None else [*grads, torch.empty_like(sinks)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    query, key, value, mask_tensors, bias_tensors, sinks, seed, *numbers, _, _ = inputs
    ctx.counts, ctx.numbers = (len(mask_tensors), len(bias_tensors)), numbers
    out, _, stats = output[:3]
    ctx.save_for_backward(query, key, value, sinks, seed, out, stats, *mask_tensors, *bias_tensors)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    query, key, value, sinks, seed, out, stats, *lists = ctx.saved_tensors
    masks, biases = lists[: ctx.counts[0]], lists[ctx.counts[0] :]
    wanted = [b.requires_grad for b in biases]
    grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
    answers = torch.ops.regard.cpu_backward(
        query, key, value, masks, biases, sinks, seed, *ctx.numbers,
        out, stats, grad_out, grads[1], wanted,
    )  # fmt: skip
    d_query, d_key, d_value, *more = answers
    d_biases = [g if want else None for g, want in zip(more, wanted, strict=False)]
    d_sinks = None if sinks is None else more[-1]
    nothing: list[Any] = [[] if n == [] else None for n in ctx.numbers]
    return (
        d_query, d_key, d_value, [None] * len(masks), d_biases, d_sinks, None, *nothing, None, None
    )  # fmt: skip


_op.register_autograd(_gradients, setup_context=_save)


class Buffers:
    """Numbers as the kernels read them; keeps what they point to alive."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def view(self, tensor: Tensor, kind: int) -> tuple[int, ...]:
        """A RegardView of a tensor of up to 4 dimensions; a dimension of size 1 has stride 0."""
        self.kept.append(tensor)
        strides = [0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        return (tensor.data_ptr(), kind, *strides, *(0,) * (4 - len(strides)))

    def packed(self, form: str, *numbers: float) -> int:
        """The address of packed numbers; 0 if there are none."""
        if not numbers:
            return 0
        kept = ctypes.create_string_buffer(struct.pack(form, *numbers))
        self.kept.append(kept)
        return ctypes.addressof(kept)

    def integers(self, numbers: Sequence[int]) -> int:
        """The address of int64s; 0 if there are none."""
        return self.packed(f"{len(numbers)}q", *numbers)

    def tensor(self, tensor: Tensor | None) -> int:
        """The address of a contiguous tensor; 0 for None."""
        if tensor is None:
            return 0
        self.kept.append(tensor)
        return tensor.data_ptr()


def words_of(
    call: Call, out: Tensor, lse: Tensor, stats: Tensor | None, kept: Buffers, observe: int = 0
) -> bytes:
    """The call as a RegardCall (kernels/cpu/abi.h)."""
    place, value = call.place, call.value
    assert value is not None
    kind = TYPES[call.query.dtype]
    floats = [_float(b.tensor) for b in call.biases if b.kind == Kind.DENSE]
    dense = [kept.view(t, TYPES[t.dtype]) for t in floats]
    mask = [kept.view(t, 0) for t in _mask_tensors(call)] if call.program.tensors else []
    sizes = [t.shape[0] for t in call.program.tensors]
    dropout = call.dropout
    seed = int(dropout.seed) if dropout is not None and dropout.seed is not None else 0
    sinks = None if call.sinks is None else call.sinks.detach().float().contiguous()
    return struct.pack(
        "9q3d3q24q4q2q4q4qq",
        place.batch, place.heads, place.kv_heads, place.q_len, place.k_len,
        call.query.shape[-1], value.shape[-1], place.query_start, place.key_start,
        call.scale, call.softcap or 0.0, 0.0 if dropout is None else dropout.p,
        seed, torch.get_num_threads(), native.level(),
        call.query.data_ptr(), kind, *call.query.stride(),
        call.key.data_ptr(), kind, *call.key.stride(),
        value.data_ptr(), kind, *value.stride(),
        out.data_ptr(), kind, *out.stride(),
        lse.data_ptr(), 0 if stats is None else stats.data_ptr(), kept.tensor(sinks), kept.tensor(by_offset(call)),
        len(dense), len(call.program.code),
        kept.packed(f"{6 * len(dense)}q", *(n for v in dense for n in v)),
        kept.integers(call.program.code),
        kept.packed(f"{6 * len(mask)}q", *(n for v in mask for n in v)),
        kept.integers(sizes),
        *_pages(call, kept),
        observe,
    )  # fmt: skip


def _pages(call: Call, kept: Buffers) -> tuple[int, ...]:
    """A RegardPages: table, its row, tokens of a page, lengths."""
    if call.pages is None:
        return 0, 0, 0, 0
    table, lengths = (t.to(torch.int32).contiguous() for t in (call.pages.table, call.pages.lengths))
    return kept.tensor(table), table.shape[1], call.key.shape[2], kept.tensor(lengths)


def by_offset(call: Call) -> Tensor | None:
    """The sum of the biases that depend on query − key alone: (heads, q_len + k_len − 1) float32.

    Entry x is that of query index − key index = x − (k_len − 1).
    """
    total: Tensor | None = None
    for bias in call.biases:
        if bias.kind == Kind.DENSE:
            continue
        mine = replace(bias, tensor=bias.tensor.detach().float()).along(offsets(call))
        total = mine if total is None else total + mine
    return None if total is None else total.contiguous()


def offsets(call: Call) -> Tensor:
    """key − query at each entry of `by_offset`: (q_len + k_len − 1,) int64."""
    place = call.place
    count = max(place.q_len + place.k_len - 1, 0)
    first = place.key_start - place.query_start + place.k_len - 1
    return first - torch.arange(count)


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.dtype in TYPES else tensor.detach().float()


def _mask_tensors(call: Call) -> list[Tensor]:
    """The mask's tensors as the kernels read them: ids as int32, pairs and the rest contiguous."""
    tensors = list(call.program.tensors)
    for op, args in call.program.instructions():
        for i in args[: len(op.form.tensors)]:
            if op == Op.DOCUMENTS:
                tensors[i] = tensors[i].to(torch.int32).contiguous()
            elif op != Op.DENSE:
                tensors[i] = tensors[i].contiguous()
    return tensors


class Watching:
    """The tensors that the forward fills for observers, and what each observer asked for of them.

    Of several TopK the kernel keeps the largest k, of several Rows all of them.
    """

    def __init__(self, call: Call, observers: tuple[Observer, ...], lse: Tensor) -> None:
        self.call, self.observers, self.lse = call, observers, lse
        place = call.place
        self.row = (place.batch, place.heads, place.q_len)
        self.k = max((o.k for o in observers if isinstance(o, TopK)), default=0)
        self.wanted = sorted(
            {r for o in observers if isinstance(o, Rows) for _, r in o.local(place)}
        )
        self.top = None if not self.k else self._top()
        self.filled = [self._tensors(o) for o in observers]
        self.rows = torch.full((*self.row[:2], len(self.wanted), place.k_len), -torch.inf)

    def _top(self) -> list[Tensor]:
        row = self.row
        listed = torch.zeros(*row, self.k)
        return [torch.full((*row, self.k), -1, dtype=torch.int32), listed, *torch.zeros(2, *row)]

    def _tensors(self, observer: Observer) -> list[Tensor]:
        if isinstance(observer, TopK | Rows | LogSumExp):
            return []
        place = self.call.place
        if isinstance(observer, Received):  # pooled over heads in the end
            shape = (place.batch, place.heads, place.k_len)
            return [torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)]
        return [
            torch.zeros(shape, dtype=dtype) for shape, dtype in observer.shapes(place, torch.float32)
        ]

    def packed(self, kept: Buffers) -> int:
        """A RegardObserve (kernels/cpu/abi.h)."""
        place = self.call.place
        one: dict[type, int] = {}
        received: list[int] = []
        maps: list[int] = []
        distances: list[int] = []
        for observer, tensors in zip(self.observers, self.filled, strict=True):
            where = [kept.tensor(t) for t in tensors]
            if isinstance(observer, Received):
                received += [*observer.span(place), *where]
            elif isinstance(observer, Map):
                for cells in observer.cells(place):
                    maps += [cells.first, cells.size, cells.count]
                maps += [observer.reduce == "max", *where]
            elif isinstance(observer, Distances):
                edges = observer.edges
                distances += [len(edges), kept.integers(edges), *where]
            elif isinstance(observer, Entropy | MaxScore):
                # Several ask for the same: the first is filled, the others take it
                one.setdefault(type(observer), where[0])
        top = [kept.tensor(t) for t in self.top] if self.top else [0] * 4
        return kept.packed(
            "16q",
            self.k, *top, one.get(Entropy, 0), one.get(MaxScore, 0),
            len(received) // 4, len(maps) // 8, len(distances) // 4, len(self.wanted),
            kept.integers(received), kept.integers(maps), kept.integers(distances),
            kept.integers(self.wanted), kept.tensor(self.rows),
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """The tensors of each observer's `shapes`, one after another."""
        place = self.call.place
        answers: list[Tensor] = []
        first: dict[type, Tensor] = {}
        for observer, filled in zip(self.observers, self.filled, strict=True):
            if isinstance(observer, TopK):
                answers += self._largest(observer.k)
            elif isinstance(observer, Rows):
                mine = [self.wanted.index(r) for _, r in observer.local(place)]
                answers.append(self.rows[:, :, mine])
            elif isinstance(observer, LogSumExp):
                answers.append(self.lse.clone())
            elif isinstance(observer, Received):
                answers += observer.pool(*filled, place)
            elif isinstance(observer, Entropy | MaxScore):
                answers.append(first.setdefault(type(observer), filled[0]).clone())
            else:
                answers += filled
        return answers

    def _largest(self, k: int) -> list[Tensor]:
        assert self.top is not None
        index, listed, rest, sink = self.top
        rest = rest + listed[..., k:].sum(-1)
        return [index[..., :k].contiguous(), listed[..., :k].contiguous(), rest, sink]
