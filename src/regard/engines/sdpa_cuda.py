"""PyTorch's fused kernels on CUDA with their log-sum-exp: flash, cuDNN, memory-efficient.

Each says `why_not(call, capability)`; the first that can, in the order of `preference`, runs.
Their public function keeps the log-sum-exp to itself, so its inner ops are called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.attention
from torch import Tensor

from ..call.checked import Call
from ..call.geometry import Span
from ..call.opcodes import Op

ROWS = 32  # the memory-efficient kernel's log-sum-exp is that of whole blocks of them
MASK_LIMIT = 2**26  # elements of a materialised mask: beyond it this would not be O(N)
HALF = (torch.float16, torch.bfloat16)
Laid = tuple[Tensor | None, Tensor | None]  # what is added to the scores; the rows that see nothing
Gradients = tuple[Tensor, Tensor, Tensor]  # of query, key, value


def serves(call: Call) -> bool:
    """Whether a call is computed by these kernels, if any can."""
    return call.place.device.type == "cuda"


@dataclass(frozen=True)
class Kernel:
    """One of PyTorch's kernels: why it cannot run a call on a GPU, and how it runs.

    forward, backward: of a call, and the mask as this kernel takes it, which `mask` lays out.
    """

    name: str
    why_not: Callable[[Call, tuple[int, int]], list[str]]
    forward: Callable[[Call, Laid], tuple[Tensor, Tensor]]
    backward: Callable[[Call, Laid, Tensor, Tensor, Tensor], Gradients]
    mask: Callable[[Call], Laid] = lambda call: (None, None)


def plain(call: Call) -> bool:
    """Whether there is nothing to add: no bias, and a full mask or the kernels' own causal one."""
    place = call.place
    causal = call.program.code == (Op.CAUSAL,)
    square = place.q_len == place.k_len and place.query_start == place.key_start
    return not call.biases and (call.program.full or (causal and square))


def _fused(call: Call, least: tuple[int, int], capability: tuple[int, int], most: int) -> list[str]:
    """What flash and cuDNN have in common."""
    reasons, (dim, v_dim) = [], _dims(call)
    if capability < least:
        reasons.append(f"the GPU is of capability {_dotted(capability)}; it needs {_dotted(least)}")
    if call.query.dtype not in HALF:
        reasons.append(f"query is {_name(call)}; it takes float16 and bfloat16")
    if dim != v_dim:
        reasons.append(f"v_dim {v_dim} is not dim {dim}")
    if dim % 8 or dim > most:
        reasons.append(f"dim is {dim}; it takes multiples of 8 up to {most}")
    if not plain(call):
        reasons.append("it takes no bias, and no mask but a square causal one")
    return reasons


def _flash_why_not(call: Call, capability: tuple[int, int]) -> list[str]:
    return _fused(call, (8, 0), capability, 256)


def _flash(call: Call, laid: Laid) -> tuple[Tensor, Tensor]:
    assert call.value is not None
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *_whole(call), 0.0, not call.program.full, False, scale=call.scale
    )
    return out, lse


def _flash_back(call: Call, laid: Laid, out: Tensor, lse: Tensor, grad: Tensor) -> Gradients:
    grads: Gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        _dense(grad), *_whole(call), out, lse, None, None, call.place.q_len, call.place.k_len, 0.0,
        not call.program.full, *_undrawn(call, torch.uint64, (2,)), scale=call.scale,
    )  # fmt: skip
    return grads


def _cudnn_why_not(call: Call, capability: tuple[int, int]) -> list[str]:
    reasons = _fused(call, (9, 0), capability, 128)
    if call.place.heads != call.place.kv_heads:
        reasons.append("it takes as many kv_heads as heads")
    if call.place.q_len == 1:
        reasons.append("a single query is left to flash")
    return reasons


def _cudnn(call: Call, laid: Laid) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_whole(call), None, True, 0.0, not call.program.full, False, scale=call.scale
    )
    return out, lse.reshape(call.query.shape[:3])


def _cudnn_back(call: Call, laid: Laid, out: Tensor, lse: Tensor, grad: Tensor) -> Gradients:
    grads: Gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _dense(grad), *_whole(call), out, lse[..., None], *_undrawn(call, torch.int64), None, None,
        None, call.place.q_len, call.place.k_len, 0.0, not call.program.full, scale=call.scale,
    )  # fmt: skip
    return grads


def _efficient_why_not(call: Call, capability: tuple[int, int]) -> list[str]:
    reasons, place = [], call.place
    if call.query.dtype == torch.float64:
        reasons.append("query is float64; it computes in float32 at most")
    if call.query.dtype == torch.bfloat16 and capability < (8, 0):
        reasons.append(f"the GPU is of capability {_dotted(capability)}; bfloat16 needs 8.0")
    unit = 4 if call.query.dtype == torch.float32 else 8
    if any(d % unit for d in _dims(call)):
        reasons.append(f"dim, v_dim are {_dims(call)}; it takes multiples of {unit}")
    size = place.q_len * place.k_len * items(call)
    if not plain(call) and size > MASK_LIMIT:
        reasons.append(
            f"the mask would be materialised: {place.q_len} × {place.k_len}; beyond 2²⁶ elements "
            "that is not O(N) memory"
        )
    return reasons


def _efficient_mask(call: Call) -> Laid:
    if plain(call):
        return None, None
    place = call.place
    added, blind = laid_out(call)
    # Its rows must begin at multiples of 16 elements
    added = torch.nn.functional.pad(added, (0, -place.k_len % 16))[..., : place.k_len]
    return added.expand(place.batch, place.heads, -1, -1), blind


def _efficient(call: Call, laid: Laid) -> tuple[Tensor, Tensor]:
    added, blind = laid
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *_a_head_each(call), added, True, 0.0, added is None and not call.program.full,
        scale=call.scale,
    )  # fmt: skip
    lse = lse[:, :, : call.place.q_len]  # it pads the rows
    if blind is None:
        return out, lse
    return out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -torch.inf)


def _efficient_back(call: Call, laid: Laid, out: Tensor, lse: Tensor, grad: Tensor) -> Gradients:
    added, blind = laid
    if blind is not None:
        lse = lse.masked_fill(blind, 0)  # e to the power of −∞ − 0 is a weight of 0
    lse = torch.nn.functional.pad(lse, (0, -call.place.q_len % ROWS), value=torch.inf)
    d_query, *others, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        _dense(grad), *_a_head_each(call), added, out, lse, *_undrawn(call, torch.int64), 0.0,
        [True, True, True, False], added is None and not call.program.full, scale=call.scale,
    )  # fmt: skip
    if call.place.heads > call.place.kv_heads:
        others = [g.unflatten(1, (call.place.kv_heads, -1)).sum(2) for g in others]
    return d_query, others[0], others[1]


def _a_head_each(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """As `_whole`, keys and values repeated for the heads that share them."""
    query, key, value = _whole(call)
    group = call.place.heads // call.place.kv_heads
    if group > 1:
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    return query, key, value


def _dense(grad: Tensor) -> Tensor:
    """A gradient as the kernels take it: a sum's is one number, expanded."""
    return grad if grad.stride(-1) == 1 and 0 not in grad.stride() else grad.contiguous()


def _undrawn(call: Call, dtype: torch.dtype, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """In the place of a seed and an offset of dropout, which nothing reads."""
    device = call.place.device
    return (
        torch.empty(shape, dtype=dtype, device=device),
        torch.empty((), dtype=dtype, device=device),
    )


FLASH = Kernel("flash", _flash_why_not, _flash, _flash_back)
CUDNN = Kernel("cudnn", _cudnn_why_not, _cudnn, _cudnn_back)
EFFICIENT = Kernel("efficient", _efficient_why_not, _efficient, _efficient_back, _efficient_mask)


def preference(capability: tuple[int, int]) -> tuple[Kernel, ...]:
    """The kernels in the order in which they are tried on a GPU. Not yet measured here.

    From Hopper on, cuDNN's kernels use what flash attention 2 does not know of. Its successors do:
    once `torch.nn.attention.activate_flash_attention_impl` has put one in its place, it is first.
    """
    if capability < (9, 0):
        return FLASH, EFFICIENT
    # Older releases have no such registry
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    succeeded = active() is not None
    return (FLASH, CUDNN, EFFICIENT) if succeeded else (CUDNN, FLASH, EFFICIENT)


def why_not(call: Call, capability: tuple[int, int]) -> list[str]:
    """Every kernel's reasons against a call, if none of them can run it."""
    reasons = []
    for kernel in preference(capability):
        why = kernel.why_not(call, capability)
        if not why:
            return []
        reasons.append(f"{kernel.name}: {', '.join(why)}")
    return reasons


def kernel_of(call: Call, capability: tuple[int, int]) -> Kernel:
    """The first kernel that can run a call."""
    return next(k for k in preference(capability) if not k.why_not(call, capability))


def forward(call: Call, capability: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(out, lse) by the first kernel that can; out is differentiable, lse is not."""
    kernel = kernel_of(call, capability)
    return kernel.forward(call, kernel.mask(call))


def _whole(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value; the kernels take the last stride to be 1."""
    assert call.value is not None
    query, key, value = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (call.query, call.key, call.value)
    )
    return query, key, value


def _dims(call: Call) -> tuple[int, int]:
    dim = call.query.shape[-1]
    return dim, dim if call.value is None else call.value.shape[-1]


def items(call: Call) -> int:
    """How many items and heads of the mask `laid_out` would have."""
    batch, heads = call.program.spread()
    for bias in call.biases:
        heads = max(heads, bias.tensor.shape[1] if bias.tensor.dim() == 4 else call.place.heads)
        batch = max(batch, bias.tensor.shape[0] if bias.tensor.dim() == 4 else 1)
    return batch * heads


def laid_out(call: Call) -> tuple[Tensor, Tensor]:
    """The biases, −inf where hidden, (batch or 1, heads or 1, q_len, k_len), in query's dtype.

    And the rows that see nothing: (batch or 1, heads or 1, q_len or 1).
    """
    place, whole = call.place, Span(0, call.place.q_len, 0, call.place.k_len)
    visible = call.program.visible(whole)
    added = torch.zeros((), dtype=call.query.dtype, device=place.device).expand(visible.shape)
    for bias in call.biases:
        added = added + bias.tile(whole, call.query.dtype)
    added = added.masked_fill(~visible, -torch.inf)
    blind = (added == -torch.inf).all(-1)
    return added.expand(*added.shape[:2], place.q_len, place.k_len), blind


def _name(call: Call) -> str:
    return str(call.query.dtype).removeprefix("torch.")


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
