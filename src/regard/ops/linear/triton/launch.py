"""Linear attention's recurrence by Triton: `why_not`, `forward` and `backward`, on plain tensors.

Plain torch around the kernels of `recurrence` and `recurrence_back`. The backward keeps nothing of
the forward but what went in, and computes the states between chunks again.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....errors import RegardError
from . import launch_bf16 as linear_bf16
from .launch_bf16 import block

# Asked once: torch.compile cannot trace the search
INSTALLED = importlib.util.find_spec("triton") is not None
CHUNK = 64  # tokens; a power of two from 16
MOST = 256  # features, and columns of values


class FlowArgs(NamedTuple):
    """What goes in beside the values. Flat, as `second_pass.triton.kernel_tuples` says why."""

    query: Tensor
    key: Tensor
    decay: Tensor
    beta: Tensor


class SizeArgs(NamedTuple):
    """How much of what there is."""

    tokens: int
    features: int
    v_dim: int  # columns that the values have; `columns` may be one more, of ones
    columns: int
    decay_width: int  # 1, or features
    group: int  # query heads of a state
    chunks: int
    states: int
    f_blocks: int  # programs that share the features, and the columns
    v_blocks: int


def why_not(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """The reasons why the kernels cannot run this recurrence; empty if they can."""
    reasons = []
    if not INSTALLED:
        reasons.append('triton is not installed; pip install "regard[cuda]"')
    if query.dtype == torch.float64:
        reasons.append("the call is float64; it computes in float32")
    features, v_dim = query.shape[-1], value.shape[-1]
    if features > MOST:
        reasons.append(f"the keys have {features} features; it takes at most {MOST}")
    if v_dim > MOST:
        reasons.append(f"v_dim is {v_dim}; it takes at most {MOST}")
    if not query.numel() or not key.numel() or not v_dim:
        reasons.append("the call is empty; it needs at least one of everything")
    return reasons


def forward(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
    memory: Tensor, exact: bool, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """scale times what the queries read (batch, heads, n, columns), and the last memory.

    The tensors of a `Flow`: query (batch, heads, n, features), key (batch, state_heads, n,
    features), decay (batch, state_heads, n, 1 or features), beta (batch, state_heads, n) and memory
    (batch, state_heads, features, columns) in float32, value (batch, state_heads, n, v_dim) in
    float32 or less. What is read is of the queries' dtype: of bfloat16 queries and keys all
    products are bfloat16's; others are not scaled. exact: products of float32 in full, and not of
    their first ten bits.
    RegardError if `why_not` has a reason.
    """
    check(query, key, value)
    if query.dtype == torch.bfloat16:
        return linear_bf16.forward(query, key, value, decay, beta, memory, scale)
    run = _Run(query, key, value, decay, beta, exact)
    scores = run.pairs(run.query, own=True)
    solved = None if beta is None else run.inverse(run.pairs(run.key, own=False), by_row=False)
    states, news, last = run.walk(memory, solved)
    return run.read(scores, states, news), last


def backward(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
    memory: Tensor, grad: Tensor, grad_last: Tensor, exact: bool, scale: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """Gradients of query, key, value, then decay and beta if they are there, and memory.

    grad, grad_last: of what `forward` returns.
    """
    check(query, key, value)
    if query.dtype == torch.bfloat16:
        wide = (query.float() * scale, key.float(), value, decay, beta, memory)
        d_query, d_key, *others = backward(*wide, grad, grad_last, exact)
        return [(d_query * scale).bfloat16(), d_key.bfloat16(), *others]
    run = _Run(query, key, value, decay, beta, exact)
    scores = run.pairs(run.query, own=True)
    overlap = solved = None
    if beta is not None:
        overlap = run.pairs(run.key, own=False)
        solved = run.inverse(overlap, by_row=False)
    states, news, _ = run.walk(memory, solved)
    return run.backward(
        scores, overlap, states, news, grad.float().contiguous(), grad_last.float().contiguous()
    )


def check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """RegardError if `why_not` has a reason."""
    reasons = why_not(query, key, value)
    if reasons:
        raise RegardError(
            f"the Triton kernels cannot run linear attention on query {tuple(query.shape)}: "
            + "; ".join(reasons)
        )


class _Run:
    """The tensors and sizes of a recurrence, and a launch of each kernel."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
        exact: bool,
    ) -> None:  # fmt: skip
        self.query, self.key, self.value = (t.contiguous() for t in (query, key, value))
        # What is not there is not read
        self.decay = self.query if decay is None else decay.contiguous()
        self.beta = self.query if beta is None else beta.contiguous()
        self.delta = beta is not None
        self.kind = 0 if decay is None else 1 if decay.shape[-1] == 1 else 2
        self.batch, self.heads, self.tokens, self.features = query.shape
        self.state_heads, self.v_dim = key.shape[1], value.shape[-1]
        self.group = self.heads // self.state_heads
        self.width = decay.shape[-1] if decay is not None else 1
        self.states = self.batch * self.state_heads
        self.size = CHUNK
        self.chunks = -(-self.tokens // self.size)
        self.exact, self.precision = exact, "ieee" if exact else "tf32"

    def new(self, *shape: int) -> Tensor:
        return self.query.new_empty(shape, dtype=torch.float32)

    def device(self) -> AbstractContextManager[Any]:
        """Kernels start on the current GPU; it must be the tensors'."""
        device = self.query.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def form(self, **more: int) -> dict[str, Any]:
        """What every kernel is compiled for."""
        return {"T": self.size, "PRECISION": self.precision, **more}

    @cached_property
    def flow(self) -> FlowArgs:
        return FlowArgs(self.query, self.key, self.decay, self.beta)

    def sizes(self, columns: int, v_dim: int, f_blocks: int = 1, v_blocks: int = 1) -> SizeArgs:
        return SizeArgs(
            self.tokens, self.features, v_dim, columns, self.width, self.group, self.chunks,
            self.states, f_blocks, v_blocks,
        )  # fmt: skip

    def blocks(self, columns: int) -> tuple[int, int, int, int]:
        """(F, blocks of features, V, blocks of columns) of a walk: what registers hold."""
        size = block(self.features, MOST if self.delta else 64)
        width = block(columns, 32 if size > 64 else 64)
        return size, -(-self.features // size), width, -(-columns // width)

    def pairs(self, left: Tensor, own: bool) -> Tensor:
        """(batch, heads, chunks, T, T): of the queries with the keys (own), or of the keys."""
        from . import forward_kernel as recurrence

        heads = left.shape[1]
        out = self.new(self.batch, heads, self.chunks, self.size, self.size)
        with self.device():
            recurrence.pairs[(self.batch * heads * self.chunks,)](
                left, self.key, self.decay, out, self.tokens, self.features, self.width,
                heads // self.state_heads, self.chunks,
                KIND=self.kind, OWN=own, LEVELS=self.levels,
                **self.form(F=block(self.features, 32 if self.kind == 2 else 64)),
                num_warps=self.warps, num_stages=2,
            )  # fmt: skip
        return out

    @property
    def levels(self) -> int:
        """How often a chunk can be halved."""
        return self.size.bit_length() - 1

    @property
    def warps(self) -> int:
        """Of a program with a decay per channel, which holds twice as many numbers."""
        return 8 if self.kind == 2 else 4

    def inverse(self, overlap: Tensor, by_row: bool) -> Tensor:
        """(1 + diag(beta) overlap)⁻¹ by row, else (1 + overlap diag(beta))⁻¹."""
        from . import forward_kernel as recurrence

        out = torch.empty_like(overlap)
        with self.device():
            # The error of one block goes into the next: more bits than elsewhere
            recurrence.inverse[(self.states * self.chunks,)](
                overlap, self.beta, out, self.tokens, self.chunks,
                BY_ROW=by_row, T=self.size,
                PRECISION="ieee" if self.exact else "tf32x3", num_warps=4,
            )  # fmt: skip
        return out

    def walk(self, memory: Tensor, solved: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The state before each chunk, the values or r, and the last state."""
        from . import forward_kernel as recurrence

        columns = memory.shape[-1]
        size, f_blocks, width, v_blocks = self.blocks(columns)
        states = self.new(*self.key.shape[:2], self.chunks, self.features, columns)
        last = self.new(*memory.shape)
        news = self.new(*self.key.shape[:3], columns) if self.delta else self.value
        with self.device():
            recurrence.walk[(self.states * f_blocks * v_blocks,)](
                self.flow, self.value, self.query if solved is None else solved,
                memory.contiguous(), states, news, last,
                self.sizes(columns, self.v_dim, f_blocks, v_blocks),
                KIND=self.kind, DELTA=self.delta, **self.form(F=size, V=width),
                num_warps=8 if size > 64 else 4, num_stages=self.stages(size),
            )  # fmt: skip
        return states, news, last

    def stages(self, features: int) -> int:
        """How many chunks' tiles are under way at once: what shared memory holds."""
        return 2 if features <= 64 else 1

    def read(self, scores: Tensor, states: Tensor, news: Tensor) -> Tensor:
        """(batch, heads, tokens, columns)"""
        from . import forward_kernel as recurrence

        columns = states.shape[-1]
        width = block(columns, 64)
        v_blocks = -(-columns // width)
        out = self.new(*self.query.shape[:3], columns)
        with self.device():
            recurrence.read[(self.batch * self.heads * self.chunks * v_blocks,)](
                self.flow, news, scores, states, out,
                self.sizes(columns, news.shape[-1], v_blocks=v_blocks),
                KIND=self.kind, DELTA=self.delta,
                **self.form(F=block(self.features, 64), V=width), num_warps=4, num_stages=2,
            )  # fmt: skip
        return out

    def backward(
        self, scores: Tensor, overlap: Tensor | None, states: Tensor, news: Tensor, grad: Tensor,
        grad_last: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """All gradients, of what the forward left and the gradients of what it returns."""
        columns = states.shape[-1]
        solved = None
        if overlap is None:
            after, _, d_memory = self.walk_back(grad, grad_last, None, None)
            d_value = self.give(scores, grad, after)
        else:
            given = self.give(scores, grad, None)
            by_row = self.inverse(overlap, by_row=True)
            after, solved, d_memory = self.walk_back(grad, grad_last, given, by_row)
            d_value = self.beta[..., None] * solved
        d_pairs, by_pairs = self.products(grad, news, scores, columns, own=True)
        by_pairs = by_pairs.unflatten(1, (self.state_heads, -1)).sum(2)
        d_overlap = None
        if overlap is not None and solved is not None:
            d_overlap, by_overlap = self.products(solved, news, overlap, columns, own=False)
            by_pairs += by_overlap
        d_query, d_key, d_decay = self.gradients(
            news, grad, solved, states, after, d_pairs, d_overlap
        )
        found = [d_query, d_key, d_value[..., : self.v_dim].to(self.value.dtype)]
        if self.kind == 1:
            found.append((d_decay.sum(0) + by_pairs)[..., None])
        elif self.kind == 2:
            found.append(d_decay)
        if solved is not None:
            found.append((news * solved).sum(-1))
        return [*(t.contiguous() for t in found), d_memory]

    def give(self, scores: Tensor, grad: Tensor, after: Tensor | None) -> Tensor:
        """Of u (batch, state_heads, tokens, columns); without the state's part if after is None."""
        from . import backward_kernel as recurrence_back

        columns = grad.shape[-1]
        width = block(columns, 64)
        v_blocks = -(-columns // width)
        out = self.new(*self.key.shape[:3], columns)
        with self.device():
            recurrence_back.give[(self.states * self.chunks * v_blocks,)](
                self.flow, scores, grad, grad if after is None else after, out,
                self.sizes(columns, self.v_dim, v_blocks=v_blocks),
                KIND=self.kind, DELTA=self.delta,
                **self.form(F=block(self.features, 64), V=width), num_warps=4, num_stages=2,
            )  # fmt: skip
        return out

    def walk_back(
        self, grad: Tensor, grad_last: Tensor, given: Tensor | None, by_row: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the state after each chunk, e, and the gradient of the memory."""
        from . import backward_kernel as recurrence_back

        columns = grad.shape[-1]
        size, f_blocks, width, v_blocks = self.blocks(columns)
        after = self.new(*self.key.shape[:2], self.chunks, self.features, columns)
        solved = torch.empty_like(given) if given is not None else grad
        d_memory = torch.empty_like(grad_last)
        with self.device():
            recurrence_back.walk_back[(self.states * f_blocks * v_blocks,)](
                self.flow, grad if by_row is None else by_row, grad,
                grad if given is None else given, grad_last, after, solved, d_memory,
                self.sizes(columns, self.v_dim, f_blocks, v_blocks),
                KIND=self.kind, DELTA=self.delta, **self.form(F=size, V=width),
                num_warps=8 if size > 64 else 4, num_stages=self.stages(size),
            )  # fmt: skip
        return after, solved, d_memory

    def products(
        self, left: Tensor, news: Tensor, scores: Tensor, columns: int, own: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the pairs, and what they give to one decay (batch, heads, tokens)."""
        from . import backward_kernel as recurrence_back

        heads = left.shape[1]
        out = torch.empty_like(scores)
        by_pairs = out.new_zeros(left.shape[:3])  # where there is no one decay, nothing
        with self.device():
            recurrence_back.products[(self.batch * heads * self.chunks,)](
                left, news, self.decay, self.beta, scores, out, by_pairs,
                self.tokens, columns, news.shape[-1], heads // self.state_heads, self.chunks,
                KIND=self.kind, DELTA=self.delta, OWN=own, **self.form(V=block(columns, 64)),
                num_warps=4, num_stages=2,
            )  # fmt: skip
        return out, by_pairs

    def gradients(
        self, news: Tensor, grad: Tensor, solved: Tensor | None, states: Tensor, after: Tensor,
        d_pairs: Tensor, d_overlap: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Of query, key and decay; of one decay for all features, parts to be summed."""
        from . import backward_kernel as recurrence_back

        columns = states.shape[-1]
        size = block(self.features, 16 if self.kind == 2 else 32)
        f_blocks = -(-self.features // size)
        d_query, d_key = torch.empty_like(self.query), torch.empty_like(self.key)
        whole = self.key.shape if self.kind == 2 else (f_blocks, *self.key.shape[:3])
        d_decay = self.new(*whole)
        with self.device():
            recurrence_back.gradients[(self.states * self.chunks * f_blocks,)](
                self.flow, news, grad, grad if solved is None else solved, states, after, d_pairs,
                d_pairs if d_overlap is None else d_overlap, d_query, d_key, d_decay,
                self.sizes(columns, news.shape[-1], f_blocks),
                KIND=self.kind, DELTA=self.delta, LEVELS=self.levels,
                **self.form(F=size, V=block(columns, 32)), num_warps=self.warps, num_stages=2,
            )  # fmt: skip
        return d_query, d_key, d_decay
