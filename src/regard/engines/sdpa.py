"""PyTorch's own fused kernels, with the log-sum-exp that their public function keeps to itself.

On CUDA keys and values in pages are copied out for them, in order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..call.checked import Call
from ..call.mask_program import Program
from ..call.opcodes import Op
from . import functorch as transforms
from . import sdpa_cuda
from .blocks import launch as blocks
from .sdpa_cuda import MASK_LIMIT, items, laid_out

name = "sdpa"


def why_not(call: Call) -> list[str]:
    """PyTorch's kernel takes a mask but no cap, no sinks, and gives no gradient through lse."""
    reasons = []
    place = call.place
    on_gpu = sdpa_cuda.serves(call)
    if place.device.type not in ("cpu", "cuda"):
        reasons.append(f"query is on {place.device}; this engine runs on cpu and cuda")
    if not on_gpu and call.value is not None and call.value.shape[-1] != call.query.shape[-1]:
        reasons.append(
            f"v_dim {call.value.shape[-1]} is not dim {call.query.shape[-1]}; its kernel needs one"
        )
    if not place.q_len or not place.k_len or not place.batch or not call.query.shape[-1]:
        reasons.append("the call is empty; its kernel needs at least one of everything")
    for what in ("softcap", "sinks", "dropout"):
        if getattr(call, what) is not None:
            reasons.append(f"{what} is given; its kernel takes none")
    if call.scale <= 0 and _causal(call):
        reasons.append(f"scale is {call.scale}; below or at 0 its kernel's causal mask gives NaN")
    if call.pages is not None and not on_gpu:
        reasons.append("keys lie in pages; its kernel reads none")
    if not on_gpu and transforms.mapping():
        reasons.append("vmap looks on; its kernel would run once for each slice")
    if call.return_lse and call.needs_grad:
        reasons.append("return_lse needs gradients; its kernel gives none through lse")
    if call.biases and call.needs_grad and any(b.tensor.requires_grad for b in call.biases):
        reasons.append("a bias needs gradients; its kernel gives none through its mask")
    if on_gpu:
        described = replace(call, program=_in_order(call))
        return reasons + sdpa_cuda.why_not(described, capability(call))
    if not _plain(call) and place.q_len * place.k_len * items(call) > MASK_LIMIT:
        reasons.append(
            f"the mask would be materialised: {place.q_len} × {place.k_len}; beyond 2²⁶ elements "
            "that is not O(N) memory"
        )
    return reasons


def _in_order(call: Call) -> Program:
    """The mask once the keys are copied out of their pages: as it is where all items are as long.

    So that PyTorch's kernels that know of no padding can serve those; nor do they know of a causal
    mask whose first query sees every key, as that of one query does.
    """
    if call.pages is not None and not bool((call.pages.lengths == call.place.k_len).all()):
        return call.kept()
    if blocks.sees_all(replace(call, pages=None)):
        return replace(call.program, code=(Op.FULL,), tensors=())
    return call.program


def in_order(call: Call) -> Call:
    """A call as PyTorch's kernels on CUDA take it."""
    return replace(call.gathered(), program=_in_order(call))


def capability(call: Call) -> tuple[int, int]:
    """That of the call's GPU."""
    return torch.cuda.get_device_capability(call.place.device)


def _plain(call: Call) -> bool:
    """Whether the kernel needs no materialised mask."""
    return len(call.biases) == 0 and (call.program.full or _causal(call))


def _causal(call: Call) -> bool:
    """Whether the kernel's own, top-left causal mask says the same as ours."""
    place = call.place
    return call.program.code == (Op.CAUSAL,) and place.query_start == place.key_start


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse); out is differentiable, lse is not.

    On CUDA, what a hidden number has spoiled is mended, where nobody looks on (`sdpa_op`).
    """
    if sdpa_cuda.serves(call):
        call = in_order(call)
        out, lse = sdpa_cuda.forward(call, capability(call))
        if blocks.launchable(call) and blocks.mendable(call):
            blocks.mend(call, out.detach(), lse)
        return out, lse
    mask, blind = _mask(call)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_tensors(call), 0.0, mask is None and not call.program.full, attn_mask=mask,
        scale=call.scale,
    )  # fmt: skip
    if (infinite := _infinite(call, lse)) is not None:
        out = out.masked_fill(infinite, torch.nan)  # inf − inf
    # It gives a row that sees nothing an lse of 0
    return out, lse if blind is None else lse.masked_fill(blind, -torch.inf)


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value on the CPU, given what `forward` returned."""
    mask, blind = _mask(call)
    if (infinite := _infinite(call, lse)) is not None:
        grad_out = grad_out.masked_fill(infinite, 0)
    if blind is not None:
        lse = lse.masked_fill(blind, 0)
    grads: tuple[Tensor, Tensor, Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, *_tensors(call), out, lse, 0.0, mask is None and not call.program.full,
            attn_mask=mask, scale=call.scale,
        )
    )  # fmt: skip
    return grads


def _infinite(call: Call, lse: Tensor) -> Tensor | None:
    """The rows (…, q_len, 1) that see an infinite score, which its kernel drops of 16-bit numbers.

    None: there are none. To fill nothing would copy all of the output, a third of the time of short
    attention; so this looks, where it may.
    """
    if call.query.dtype not in (torch.bfloat16, torch.float16):
        return None
    infinite = lse == torch.inf
    return None if transforms.unwatched(lse) and not infinite.any() else infinite[..., None]


def _mask(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """The mask as the kernel for CPUs takes it, and the rows that see nothing."""
    if _plain(call):
        return None, None
    mask, blind = laid_out(call)
    return mask.contiguous(), blind


def _tensors(call: Call) -> list[Tensor]:
    """query, key, value; the kernel takes the last stride to be 1, whatever it is."""
    assert call.value is not None
    given = (call.query, call.key, call.value)
    return [t if t.stride(-1) == 1 else t.contiguous() for t in given]
