"""`LinearAttention` and `DeltaAttention`: projections around `regard.linear_attention`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..call.masks import Full, Mask
from ..call.numbers import head_counts
from ..call.observers import Observer
from ..errors import RegardError
from ..ops.linear import Favor, LinearState, linear_attention
from .positions import Rotary


class LinearMixer(nn.Module):
    """What linear and delta attention share: projections, decay, what is done to the output."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        decay: str | None = None,
        norm: bool = True,
        norm_eps: float = 1e-5,
        gate: bool = False,
        bias: bool = False,
        rotary: Rotary | None = None,
        engine: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, heads, kv_heads = head_counts(dim, heads, kv_heads)
        if head_dim is None and dim % heads:
            raise RegardError(f"heads {heads} do not divide dim {dim}; give head_dim")
        if decay not in (None, "fixed", "gated", "channel"):
            raise RegardError(f"decay is {decay!r}; give fixed, gated, channel or None")
        self.dim, self.heads, self.kv_heads, self.engine = dim, heads, kv_heads, engine
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.value_head_dim = self.head_dim if value_head_dim is None else value_head_dim
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width = heads * self.value_head_dim
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias, **made)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias, **made)
        self.v_proj = nn.Linear(dim, kv_heads * self.value_head_dim, bias, **made)
        self.out_proj = nn.Linear(width, dim, bias, **made)
        self.rotary = rotary
        self.decay = None if decay is None else Decay(decay, self, **made)
        self.norm = nn.RMSNorm(self.value_head_dim, norm_eps, **made) if norm else None
        self.gate = nn.Linear(dim, width, bias, **made) if gate else None

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask = Full(),
        state: LinearState | None = None,
        return_state: bool = False,
        observe: Sequence[Observer] | None = None,
    ) -> Any:
        """x (batch, length, dim) to the same.

        mask: `Documents`, `Padding`, or both. state: what the tokens before left, of a call with
        return_state: a prompt, chunks and single tokens give what one call gives.
        Returns out; with return_state also a `LinearState`; with observe, last, the results.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise RegardError(
                f"x is {tuple(x.shape)}; this module needs (batch, length, {self.dim})"
            )
        q, k = (
            self._heads(self.q_proj(x), self.head_dim),
            self._heads(self.k_proj(x), self.head_dim),
        )
        v = self._heads(self.v_proj(x), self.value_head_dim)
        if self.rotary is not None:
            start = 0 if state is None else state.length
            q, k = self.rotary(q, start), self.rotary(k, start)
        request = self._request(x)
        if self.decay is not None:
            request["decay"] = self.decay(x)
        q, k = self._prepared(q).to(v.dtype), self._prepared(k).to(v.dtype)
        answer = linear_attention(
            q, k, v, mask=mask, state=state, return_state=return_state, observe=observe,
            engine=self.engine, **request,
        )  # fmt: skip
        out, *more = answer if isinstance(answer, tuple) else (answer,)
        out = out.transpose(1, 2)
        if self.norm is not None:
            out = self.norm(out.to(self.norm.weight.dtype))  # under autocast, the wider
        out = out.flatten(2)
        if self.gate is not None:
            out = out * F.silu(self.gate(x))
        out = self.out_proj(out)
        return (out, *more) if more else out

    def _heads(self, projected: Tensor, size: int) -> Tensor:
        """(batch, length, heads · size) as (batch, heads, length, size)."""
        return projected.unflatten(-1, (projected.shape[-1] // size, size)).transpose(1, 2)

    def _prepared(self, heads: Tensor) -> Tensor:
        """Queries and keys as `linear_attention` gets them."""
        return heads

    def _request(self, x: Tensor) -> dict[str, Any]:
        """What this module sets of the call."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        said = f"{self.dim}, heads={self.heads}"
        return said if self.kv_heads == self.heads else f"{said}, kv_heads={self.kv_heads}"


class Decay(nn.Module):
    """How fast each head forgets, as natural logarithms ≤ 0.

    fixed: ln(1 − 2^(−5−h)) for head h (RetNet, Sun et al. 2023, eq. 8), nothing learned.
    gated: −exp(a_h) · softplus(W x + b) per token and head (Mamba-2, Dao & Gu 2024; Gated DeltaNet,
        Yang et al. 2025), begun as the published ones: a from ln U(1, 16), and b so that the
        softplus lies between 0.001 and 0.1.
    channel: ln σ(W₂ W₁ x + b) / 16 per token, head and key channel, W₁ of rank 16 (GLA, Yang et al.
        2024, section 4.4).
    """

    def __init__(self, kind: str, mixer: LinearMixer, **made: Any) -> None:
        super().__init__()
        self.kind, self.heads = kind, mixer.heads
        self.own = mixer.kv_heads if kind == "channel" else mixer.heads
        self.head_dim = mixer.head_dim
        if kind == "gated":
            self.project = nn.Linear(mixer.dim, self.heads, **made)
            self.log_rate = nn.Parameter(torch.empty(self.heads, **made))
        elif kind == "channel":
            self.narrow = nn.Linear(mixer.dim, 16, bias=False, **made)
            self.project = nn.Linear(16, self.own * self.head_dim, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The gate's published beginnings; the others keep those of their layers."""
        if self.kind != "gated":
            return
        with torch.no_grad():
            self.log_rate.uniform_(1, 16).log_()
            step = self.project.bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            step.add_(torch.log(-torch.expm1(-step)))  # softplus(bias) is then the step

    def forward(self, x: Tensor) -> Tensor:
        """Of x (batch, length, dim): (heads,), (batch, heads, length), or with a last dimension."""
        exact = torch.promote_types(x.dtype, torch.float32)  # half precision forgets too coarsely
        if self.kind == "fixed":
            head = torch.arange(self.heads, device=x.device, dtype=exact)
            return torch.log1p(-torch.exp2(-5 - head))
        if self.kind == "gated":
            # Contiguous: the strides that torch.compile expects of softplus' gradient differ else
            step = F.softplus(self.project(x).mT.contiguous().to(exact))
            return -self.log_rate.to(exact).exp()[:, None] * step
        logits = self.project(self.narrow(x)).unflatten(-1, (self.own, self.head_dim))
        return F.logsigmoid(logits.to(exact)).transpose(1, 2) / 16

    def extra_repr(self) -> str:
        return self.kind


class LinearAttention(LinearMixer):
    """Linear attention between projections, batch first: a state in the place of a cache.

        LinearAttention(512, 8)                                           # Katharopoulos et al.
        LinearAttention(512, 8, feature_map=None, decay="fixed", gate=True, rotary=Rotary(64))
        LinearAttention(512, 8, feature_map=None, decay="channel", gate=True)       # GLA's kind
        LinearAttention(512, 8, feature_map=None, decay="gated", gate=True)         # Mamba-2's

    The second is RetNet's kind, with rotary in the place of xPos.

    feature_map, normalise: as in `regard.linear_attention`. causal: whether tokens see the past
    alone. decay: how heads forget, see `Decay`. norm: RMS norm of each head's output; default where
    the weights are not normalised. gate: the output times SiLU(W x). kv_heads, head_dim, rotary,
    bias: as in `MultiHeadAttention`; value_head_dim: size of a head's values, default head_dim.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        feature_map: str | Favor | Callable[[Tensor], Tensor] | None = "elu",
        normalise: bool | None = None,
        causal: bool = True,
        norm: bool | None = None,
        **more: Any,
    ) -> None:
        if normalise is None:
            normalise = feature_map == "elu" or isinstance(feature_map, Favor)
        super().__init__(dim, heads, norm=not normalise if norm is None else norm, **more)
        self.feature_map, self.normalise, self.causal = feature_map, normalise, causal

    def _request(self, x: Tensor) -> dict[str, Any]:
        return {
            "feature_map": self.feature_map, "normalise": self.normalise, "causal": self.causal,
        }  # fmt: skip


class DeltaAttention(LinearMixer):
    """The delta rule between projections: each token rewrites what its key held. Batch first.

        DeltaAttention(512, 8)                                            # DeltaNet
        DeltaAttention(512, 8, decay="gated", gate=True)                  # Gated DeltaNet

    Yang et al. 2024 (section 3.3) and 2025 (section 3.4): queries and keys are SiLU'd and of length
    1, beta = σ(W x) per token and head says how much is rewritten; without the published models'
    short convolutions. norm, gate, decay and the rest as in `LinearAttention`.
    """

    def __init__(self, dim: int, heads: int, **more: Any) -> None:
        super().__init__(dim, heads, **more)
        made = {"device": more.get("device"), "dtype": more.get("dtype")}
        self.beta = nn.Linear(dim, self.heads, bias=False, **made)

    def _prepared(self, heads: Tensor) -> Tensor:
        return F.normalize(F.silu(heads), dim=-1)

    def _request(self, x: Tensor) -> dict[str, Any]:
        return {"feature_map": None, "beta": self.beta(x).sigmoid().transpose(1, 2)}
