"""Reading beside attention that something else computes: its output stays as it is, to the bit.

The log-sum-exp comes from torch's own kernel where its inner op returns it, else from a pass of
ours over queries and keys.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from ..call.checked import Call
from ..call.geometry import Span
from ..engines import sdpa, tiled
from ..engines.cpu import engine as cpu
from ..engines.second_pass.weigh import weigh, whole_rows
from ..errors import RegardError

CHECKED_ROWS = 16  # of each call that is verified: the last ones, which see the most


class Capture(TorchFunctionMode):
    """While active, `F.scaled_dot_product_attention` keeps the log-sum-exp of its own kernel.

    lse: of each call (…, q_len), None where torch does not say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lse: list[Tensor | None] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        out, lse = scaled_dot_product_attention(*args, **(kwargs or {}))
        self.lse.append(lse)
        return out

    def found(self, shape: torch.Size) -> Tensor | None:
        """The lse of the only call, as (batch, heads, q_len); grouped heads may be packed there."""
        lse = self.lse[0] if len(self.lse) == 1 else None
        return lse.reshape(shape) if lse is not None and lse.numel() == shape.numel() else None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch's function, and the log-sum-exp of the kernel that it chooses; None if that has none.

    On CUDA the op is called that torch would call, with the arguments that it would give.
    """
    kernel = None
    if query.is_cuda and query.dim() == 4 and attn_mask is None and not dropout_p:
        kernel = _KERNELS.get(
            torch._fused_sdp_choice(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )
        )  # fmt: skip
    if kernel is None or query.shape[-1] % 8 or value.shape[-1] != query.shape[-1]:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out, None
    out, lse = kernel(query, key, value, is_causal, scale)
    return out, lse.detach().reshape(*query.shape[:2], -1)[..., : query.shape[2]]


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Any:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )[:2]


def _efficient(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Any:
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )[:2]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Any:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )[:2]


_KERNELS: dict[int, Callable[..., Any]] = {
    int(SDPBackend.FLASH_ATTENTION.value): _flash,
    int(SDPBackend.EFFICIENT_ATTENTION.value): _efficient,
    int(SDPBackend.CUDNN_ATTENTION.value): _cudnn,
}


def check_draws(dropout: Any, name: str) -> None:
    """RegardError where regard would compute in a model's place, and drop other weights than it."""
    if dropout:
        raise RegardError(
            f"{name} drops out weights, which cut and Effect, computed by regard, would draw "
            "otherwise than the model; call model.eval(), or set its attention's dropout to 0"
        )


_OPEN = threading.local()


class Rounding:
    """While inside, what is read beside attention is read from queries and keys of this dtype.

    So a log-sum-exp, and all that is read with it, belongs to the numbers that a recording keeps.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._lse: Tensor | None = None

    def __enter__(self) -> Rounding:
        self._before = getattr(_OPEN, "rounding", None)
        _OPEN.rounding = self
        return self

    def __exit__(self, *raised: object) -> None:
        _OPEN.rounding, self._lse = self._before, None

    def rounded(self, call: Call) -> Call:
        """The call of the rounded numbers."""
        if self.dtype in (None, call.query.dtype):
            return call
        value = None if call.value is None else call.value.to(self.dtype)
        return replace(
            call, query=call.query.to(self.dtype), key=call.key.to(self.dtype), value=value
        )

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor in this dtype."""
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def made(self, lse: Tensor) -> bool:
        """Whether this log-sum-exp is the last one read from rounded numbers."""
        return lse is self._lse

    def gathered(self, call: Call, lse: Tensor | None = None) -> tuple[Tensor, dict[int, Any]]:
        """As `gathered`, of the rounded numbers, and with the results of all observers."""
        rounded = self.rounded(call)
        lse, seen = unrounded(rounded, lse if rounded is call else None)
        self._lse = lse
        return lse, dict(enumerate(weigh(rounded, lse, seen=seen)))


def rounded(*tensors: Tensor) -> list[Tensor]:
    """Queries and keys as they are read: in the dtype of the `Rounding` that is open."""
    rounding: Rounding | None = getattr(_OPEN, "rounding", None)
    return [t.detach() if rounding is None else rounding.cast(t.detach()) for t in tensors]


@torch.no_grad()
def gathered(call: Call, lse: Tensor | None = None) -> tuple[Tensor, dict[int, Any]]:
    """lse (batch, heads, q_len) of a call, and the results that come with it, by their number.

    lse: where it is known already. The compiled engine gathers what it can on the way, without
    mixing any values; on CUDA PyTorch's kernel is the fastest way to an lse.
    """
    rounding: Rounding | None = getattr(_OPEN, "rounding", None)
    return unrounded(call, lse) if rounding is None else rounding.gathered(call, lse)


def unrounded(call: Call, lse: Tensor | None = None) -> tuple[Tensor, dict[int, Any]]:
    """As `gathered`, of the call's own numbers."""
    if lse is not None:
        return lse, {}
    without = replace(call, value=call.key[..., :0])
    if call.place.device.type == "cpu" and not cpu.why_not(without):
        _, lse, seen = cpu.observed(without)
        return lse, seen
    if call.place.device.type == "cuda" and call.value is not None and not sdpa.why_not(call):
        return sdpa.forward(call)[1], {}
    return tiled.log_sum_exp(call), {}


@torch.no_grad()
def verify(call: Call, lse: Tensor, out: Tensor, name: str) -> None:
    """RegardError unless the weights that are read explain the output that was computed.

    out (batch, heads, q_len, v_dim). Rows that see nothing are left out: others mix there what
    they like. The bar is that of two ways to compute the same in out's dtype: at once of scores of
    usual size, else against float64.
    """
    assert call.value is not None
    rows = (max(call.place.q_len - CHECKED_ROWS, 0), call.place.q_len)
    if rows[0] == rows[1]:
        return
    weights = whole_rows(call, lse, rows)
    value = call.value.to(weights.dtype)
    # The heads of a group read the same values
    mixed = (weights.unflatten(1, (call.place.kv_heads, -1)).flatten(2, 3) @ value).unflatten(
        2, (-1, rows[1] - rows[0])
    )
    mixed = mixed.flatten(1, 2)
    sees = (lse[:, :, rows[0] :] != -torch.inf)[..., None]
    given = out[:, :, rows[0] :]
    off = ((mixed - given.to(mixed.dtype)).abs() * sees).amax()
    near = 32 * max(torch.finfo(out.dtype).eps, 1e-7) * (1 + value.abs().amax())
    if off > near and not _both_exact(call, rows, mixed, given):
        raise RegardError(
            f"{name}: the weights as read do not explain its output (it is off by {float(off):.2g},"
            f" more than {float(near):.2g}): the model changes scores or weights in a way of its "
            "own; watch(…, verify=False) reads them nonetheless"
        )


def _both_exact(call: Call, rows: tuple[int, int], *found: Tensor) -> bool:
    """Whether each is as near to float64 as plain torch is: error ≤ 2 × (plain's + rounding).

    Weights round with the size of the scores, so that large ones need this bar.
    """
    exact = _plain_rows(call, rows, torch.float64)
    sees = exact.isfinite()  # a row that sees nothing is NaN, as is what reads a NaN

    def error(mixed: Tensor) -> float:
        return float((mixed.double() - exact).abs().where(sees, 0).amax())

    dtype = found[-1].dtype
    rounding = torch.finfo(dtype).eps * float(exact.abs().where(sees, 0).amax())
    bar = 2 * (error(_plain_rows(call, rows, dtype)) + rounding)
    return all(error(mixed) <= bar for mixed in found)


def _plain_rows(call: Call, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The output's rows start … stop − 1 in plain torch, all of it in dtype."""
    assert call.value is not None
    span = Span(*rows, 0, call.place.k_len)
    group = call.place.heads // call.place.kv_heads
    key, value = (t.to(dtype).repeat_interleave(group, 1) for t in (call.key, call.value))
    scores = call.scale * (call.query[:, :, rows[0] : rows[1]].to(dtype) @ key.mT)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    for bias in call.biases:
        scores = scores + bias.tile(span, dtype)
    scores = scores.masked_fill(~call.program.visible(span), -torch.inf)
    if call.sinks is not None:
        logit = call.sinks.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, logit], -1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1) @ value
