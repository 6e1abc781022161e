"""The chunked form by Triton kernels, on CUDA: `why_not`, and `forward` with its gradients.

As `chunked`: two opaque registered ops. A bfloat16 call without a feature map stays bfloat16, its
products added up in float32 (`narrow`); all else, and gradients, are float32 throughout, where of a
float16 or bfloat16 call the matrix products take the first ten bits of float32 (TF32), three more
than bfloat16 has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....engines.op_with_backward import op_with_backward
from ..chunked import ARGUMENTS, DIFFERENTIABLE
from ..recurrence import Flow, Prepared, full_precision
from ..request import Request
from . import launch as linear

DEVICE = "cuda"


def why_not(ready: Prepared) -> list[str]:
    """The reasons why the kernels cannot run a request; empty if they can."""
    request, flow = ready.request, ready.flow
    reasons = []
    if flow.query.device.type != DEVICE:
        reasons.append(f"query is on {flow.query.device}; it runs on {DEVICE}")
    if not request.causal and request.query_ids is None:
        reasons.append("causal is False: one sum over all keys has no chunks to walk")
    return reasons + linear.why_not(flow.query, flow.key, flow.value)


def narrow(request: Request, engine: str) -> bool:
    """Whether the flow may keep queries and keys as they are, in bfloat16, for the kernels."""
    call = request.call
    return (
        engine in ("auto", "triton")
        and request.causal
        and request.feature_map in (None, "identity")
        and call.query.device.type == DEVICE
        and call.query.dtype == torch.bfloat16
    )


def forward(ready: Prepared, flow: Flow) -> tuple[Tensor, Tensor]:
    """What the queries read (batch, heads, n, columns), and the last memory.

    flow: the request's, or its tokens in another order.
    """
    tensors = (flow.query, flow.key, flow.value, flow.decay, flow.beta, flow.memory)
    exact = ready.request.call.query.dtype == torch.float32
    mixed, last = torch.ops.regard.linear_triton(*tensors, exact, flow.scale)
    return mixed, last


def _forward(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
    memory: Tensor, exact: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with full_precision(query):
        return linear.forward(query, key, value, decay, beta, memory, exact, scale)


def _shapes(
    query: Tensor, key: Tensor, value: Tensor, decay: Any, beta: Any, memory: Tensor, exact: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return query.new_empty(*query.shape[:3], memory.shape[-1]), memory.new_empty(memory.shape)


def _backward(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
    memory: Tensor, exact: bool, scale: float, grad_mixed: Tensor, grad_last: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of query, key, value, then decay and beta if they are there, and memory."""
    with full_precision(query):
        return linear.backward(
            query, key, value, decay, beta, memory, grad_mixed, grad_last, exact, scale
        )  # fmt: skip


op_with_backward(
    "linear_triton",
    f"{ARGUMENTS}, bool exact, float scale",
    "(Tensor, Tensor)",
    forward=_forward,
    fake=_shapes,
    backward=_backward,
    differentiable=DIFFERENTIABLE,
    kept={},
    gradients=("Tensor grad_mixed", "Tensor grad_last"),
)
