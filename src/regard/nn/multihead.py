"""`MultiHeadAttention`: projections around `regard.attention`, and what torch's module knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..call.biases import Bias
from ..call.masks import Full, Mask
from ..call.numbers import head_counts
from ..call.observers import Observer
from ..errors import RegardError
from ..ops.attend import attention
from .positions import Positions, Rotary


class Memory(NamedTuple):
    """Keys and values that a cross-attention has projected once, for many steps.

    key (batch, kv_heads, k_len, head_dim), value likewise.
    """

    key: Tensor
    value: Tensor


class AttendingCache(Protocol):
    """What a cache must offer: keep these keys and values, and attend to all that it keeps."""

    @property
    def length(self) -> int:
        """The tokens seen so far: the position of the next one."""
        ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **request: Any) -> Any:
        """out, or (out, seen) with `observe`, as `regard.attention` returns it."""
        ...


def start_of(positions: Positions | None, cache: AttendingCache | None) -> Positions:
    """Where tokens stand: as given, or behind those that the cache has seen, or at 0."""
    if positions is not None:
        return positions
    return 0 if cache is None else cache.length


class MultiHeadAttention(nn.Module):
    """Vaswani et al. 2017, section 3.2.2: self- and cross-attention, batch first.

        attend = MultiHeadAttention(512, 8, kv_heads=2, rotary=Rotary(64))
        out = attend(x, mask=Causal())
        out, (top,) = attend(x, mask=Causal(), observe=[TopK(8)])

    dim: size of the queries and of what comes out. heads; kv_heads: fewer share keys and values
    among groups of queries (Ainslie et al. 2023; 1 is multi-query, Shazeer 2019). head_dim: default
    dim / heads. key_dim, value_dim: sizes of what keys and values are made from, default dim.
    bias: whether the projections add one.
    qk_norm: RMS norm of each query and key, with a learned scale (Dehghani et al. 2023, section 2);
    norm_eps is what it adds to the mean square.
    rotary: turns queries and keys by their positions, after the norm.
    sinks: a learned logit per head in the denominator. softcap, scale, engine: as in
    `regard.attention`. dropout: of the weights, in training.

    Loads the `state_dict` of a `torch.nn.MultiheadAttention` and then gives its numbers; see
    `from_torch`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        rotary: Rotary | None = None,
        sinks: bool = False,
        softcap: float | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        engine: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, heads, kv_heads = head_counts(dim, heads, kv_heads)
        if head_dim is None and dim % heads:
            raise RegardError(f"heads {heads} do not divide dim {dim}; give head_dim")
        if not 0 <= dropout < 1:
            raise RegardError(f"dropout is {dropout}; give 0 ≤ dropout < 1")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        if rotary is not None and rotary.dim > self.head_dim:
            raise RegardError(f"rotary turns {rotary.dim} numbers of heads of {self.head_dim}")
        self.softcap, self.scale, self.dropout, self.engine = softcap, scale, dropout, engine
        self.kind = "self"  # or "cross": how it was last called; `regard.watch` reports it
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width, kv_width = heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, width, bias, **made)
        self.k_proj = nn.Linear(key_dim or dim, kv_width, bias, **made)
        self.v_proj = nn.Linear(value_dim or dim, kv_width, bias, **made)
        self.out_proj = nn.Linear(width, dim, bias, **made)
        self.q_norm = nn.RMSNorm(self.head_dim, norm_eps, **made) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, norm_eps, **made) if qk_norm else None
        self.rotary = rotary
        self.sinks = nn.Parameter(torch.empty(heads, **made)) if sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights by Glorot and Bengio 2010, uniform; biases and sinks 0."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self,
        query: Tensor,
        key: Tensor | Memory | None = None,
        value: Tensor | None = None,
        *,
        mask: Mask = Full(),
        bias: Bias | Tensor | Sequence[Bias | Tensor] | None = None,
        observe: Sequence[Observer] | None = None,
        positions: Positions | None = None,
        cache: AttendingCache | None = None,
    ) -> Any:
        """Self-attention of query, or cross-attention to key and value.

        query (batch, q_len, dim). key (batch, k_len, key_dim), default query; value (batch, k_len,
        value_dim), default key; or key a `Memory` made by `remember`.
        mask, bias, observe: as in `regard.attention`.
        positions: of the queries, and in self-attention of the keys too: the first one's, or a
            tensor (q_len,) or (batch, q_len), which rotary alone reads. Default 0, and with a
            cache what it has seen. The keys of a cross-attention count from 0.
        cache: keeps the keys and values, and attends to all that it keeps.

        Returns (batch, q_len, dim); with `observe`, also a tuple of results in its order.
        """
        self._check(query, key, value, cache)
        positions = start_of(positions, cache)
        if not torch.compiler.is_compiling():
            self.kind = "self" if key is None else "cross"
        q = self._heads(self.q_proj(query), self.q_norm)
        if isinstance(key, Memory):
            k, v = key
        elif key is not None:
            k, v = self.remember(key, value)
        else:
            k, v = self.remember(query, positions=positions)
        if self.rotary is not None:
            q = self.rotary(q, positions)
        # A norm under autocast gives float32
        q, k = q.to(v.dtype), k.to(v.dtype)
        request = {"mask": mask, "bias": bias, "observe": observe} | self._request()
        if cache is not None:
            answer = cache.attend(q, k, v, **request)
        else:
            if not isinstance(positions, Tensor):
                request["query_start"] = positions
                request["key_start"] = positions if key is None else 0
            elif key is not None:
                request["query_start"] = 0
            answer = attention(q, k, v, **request)
        out, seen = (answer, None) if observe is None else answer
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return out if observe is None else (out, seen)

    def remember(
        self, key: Tensor, value: Tensor | None = None, positions: Positions = 0
    ) -> Memory:
        """Keys and values, projected: what a cross-attention needs of a memory that stays.

        key (batch, k_len, key_dim), value (batch, k_len, value_dim), default key.
        """
        k = self._heads(self.k_proj(key), self.k_norm)
        v = self._heads(self.v_proj(key if value is None else value), None)
        return Memory(k if self.rotary is None else self.rotary(k, positions), v)

    def _heads(self, projected: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """(batch, length, heads · head_dim) as (batch, heads, length, head_dim), normed."""
        heads = projected.shape[-1] // self.head_dim
        split = projected.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
        # Under autocast the norm's weights are the wider
        return split if norm is None else norm(split.to(norm.weight.dtype))

    def _request(self) -> dict[str, Any]:
        """What this module sets of an attention call."""
        request: dict[str, Any] = {
            "scale": self.scale, "softcap": self.softcap, "sinks": self.sinks,
            "engine": self.engine,
        }  # fmt: skip
        return request | ({"dropout": self.dropout} if self.training and self.dropout else {})

    def _check(
        self,
        query: Tensor,
        key: Tensor | Memory | None,
        value: Tensor | None,
        cache: AttendingCache | None,
    ) -> None:
        if cache is not None and key is not None:
            raise RegardError(
                "a cache grows by the queries' own keys; keep those of a memory by remember"
            )
        if cache is not None and self.training and self.dropout:
            raise RegardError("a cache is for inference, without dropout; call eval() first")
        if isinstance(key, Memory):
            if value is not None:
                raise RegardError("a value is given beside a Memory, which holds its own; leave it")
            key = None
        elif value is not None and key is None:
            raise RegardError("a value is given without a key; give both, or neither")
        said = {"query": (query, self.dim), "key": (key, self.k_proj.in_features)}
        said["value"] = (key if value is None else value, self.v_proj.in_features)
        for name, (given, size) in said.items():
            if given is not None and (given.dim() != 3 or given.shape[-1] != size):
                raise RegardError(
                    f"{name} is {tuple(given.shape)}; this module needs (batch, length, {size})"
                )

    def extra_repr(self) -> str:
        said = f"{self.dim}, heads={self.heads}"
        return said if self.kv_heads == self.heads else f"{said}, kv_heads={self.kv_heads}"

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> MultiHeadAttention:
        """The same attention with a copy of torch's weights, its device and dtype.

        This one is batch first whatever torch's is. torch's attn_mask and key_padding_mask hide
        where True: here `mask=~Dense(attn_mask) & Padding(~key_padding_mask)`. RegardError for
        add_bias_kv and add_zero_attn.
        """
        if module.add_zero_attn:
            raise RegardError(
                "torch's module has add_zero_attn=True, a key and value of 0; add them to the "
                "input of a module without it, or leave it"
            )
        weight = module.out_proj.weight
        ours = cls(
            module.embed_dim,
            module.num_heads,
            key_dim=module.kdim,
            value_dim=module.vdim,
            bias=module.in_proj_bias is not None,
            dropout=module.dropout,
            device=weight.device,
            dtype=weight.dtype,
        )
        ours.load_state_dict(module.state_dict())
        return ours.train(module.training)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Also takes what a `torch.nn.MultiheadAttention` saved."""
        _from_torch(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _from_torch(state: dict[str, Any], prefix: str, module: MultiHeadAttention) -> None:
    """Rename and split torch's parameters in a state dict, in place."""
    if f"{prefix}bias_k" in state or f"{prefix}bias_v" in state:
        raise RegardError(
            f"{prefix}bias_k: torch's module was made with add_bias_kv=True, a learned key and "
            "value of its own; this one has none"
        )
    joint = state.get(f"{prefix}in_proj_weight")
    if joint is not None and module.kv_heads != module.heads:
        raise RegardError(
            f"{prefix}in_proj_weight {tuple(joint.shape)} is of torch's module, which has a key "
            f"for each head; this one has heads {module.heads}, kv_heads {module.kv_heads}"
        )
    names = ("q_proj", "k_proj", "v_proj")
    for kind in ("weight", "bias"):
        whole = state.pop(f"{prefix}in_proj_{kind}", None)
        if whole is not None:
            for name, part in zip(names, whole.chunk(3), strict=True):
                state[f"{prefix}{name}.{kind}"] = part
    for name in names:  # of other sizes of key or value
        if f"{prefix}{name}_weight" in state:
            state[f"{prefix}{name}.weight"] = state.pop(f"{prefix}{name}_weight")
