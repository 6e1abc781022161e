"""PyTorch's own fused kernels, with the log-sum-exp that their public function keeps to itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call
from ..lowered import Op, Span

name = "sdpa"

MASK_LIMIT = 2**26  # elements of a materialised mask: beyond it this engine would not be O(N)


def why_not(call: Call) -> list[str]:
    """PyTorch's kernel takes a mask but no cap, no sinks, and gives no gradient through lse."""
    reasons = []
    place = call.place
    if place.device.type != "cpu":
        reasons.append(f"query is on {place.device}; this engine runs on cpu")
    if call.value is not None and call.value.shape[-1] != call.query.shape[-1]:
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
    if call.pages is not None:
        reasons.append("keys lie in pages; its kernel reads none")
    if call.return_lse and call.needs_grad:
        reasons.append("return_lse needs gradients; its kernel gives none through lse")
    if call.biases and call.needs_grad and any(b.tensor.requires_grad for b in call.biases):
        reasons.append("a bias needs gradients; its kernel gives none through its mask")
    if not _plain(call) and place.q_len * place.k_len * _mask_items(call) > MASK_LIMIT:
        reasons.append(
            f"the mask would be materialised: {place.q_len} × {place.k_len}; beyond 2²⁶ elements "
            "that is not O(N) memory"
        )
    return reasons


def _plain(call: Call) -> bool:
    """Whether the kernel needs no materialised mask."""
    return len(call.biases) == 0 and (call.program.full or _causal(call))


def _causal(call: Call) -> bool:
    """Whether the kernel's own, top-left causal mask says the same as ours."""
    place = call.place
    return call.program.code == (Op.CAUSAL,) and place.query_start == place.key_start


def _mask_items(call: Call) -> int:
    batch, heads = call.program.spread()
    for bias in call.biases:
        heads = max(heads, bias.tensor.shape[1] if bias.tensor.dim() == 4 else call.place.heads)
        batch = max(batch, bias.tensor.shape[0] if bias.tensor.dim() == 4 else 1)
    return batch * heads


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse); out is differentiable, lse is not."""
    place = call.place
    mask = blind = None
    if not _plain(call):
        whole = Span(0, place.q_len, 0, place.k_len)
        visible = call.program.visible(whole)
        mask = torch.zeros((), dtype=call.query.dtype).expand(visible.shape)
        for bias in call.biases:
            mask = mask + bias.tile(whole, call.query.dtype)
        mask = mask.masked_fill(~visible, -torch.inf)
        blind = (mask == -torch.inf).all(-1)
        mask = mask.expand(*mask.shape[:2], place.q_len, place.k_len).contiguous()
    assert call.value is not None
    given = (call.query, call.key, call.value)
    # The kernel takes the last stride to be 1, whatever it is
    tensors = (t if t.stride(-1) == 1 else t.contiguous() for t in given)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *tensors, 0.0, mask is None and not call.program.full, attn_mask=mask, scale=call.scale
    )
    if call.query.dtype in (torch.bfloat16, torch.float16):
        # It drops an infinite score of these; inf − inf is NaN
        out = out.masked_fill((lse == torch.inf)[..., None], torch.nan)
    # It gives a row that sees nothing an lse of 0
    return out, lse if blind is None else lse.masked_fill(blind, -torch.inf)
