"""Calls of linear attention whose keys are so long that their random features leave the dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cases import at, bools, floats
from linear_cases import MASKS, gate
from regard.linear import Favor
from regard.ops.linear.front import asked

SIZES = at(83, batch=2, heads=4, kv_heads=2, dim=8, v_dim=5)
FAVOR = Favor(12, 3)


def gated(*more: int):
    return lambda rng: {"decay": gate(rng, SIZES.batch, SIZES.kv_heads, SIZES.k_len, *more)}


def masked(name: str, **more: Any):
    return lambda rng: {"mask": MASKS[name](SIZES, rng), **more}


FORMS = {
    "plain": lambda rng: {},
    "gated": gated(),
    "gated by channel": gated(FAVOR.features),
    "fixed decay of heads": lambda rng: {"decay": -torch.rand(SIZES.heads, generator=rng)},
    "documents": masked("documents of items"),
    "padding": masked("padding"),
    "gaps and padding": masked("both"),
    "gated documents": lambda rng: {**gated()(rng), **masked("documents with gaps")(rng)},
    "everywhere": lambda rng: {"causal": False},
    "everywhere, padding": masked("padding", causal=False),
    "everywhere, documents": masked("both", causal=False),
}
EVERYWHERE = [form for form in FORMS if form.startswith("everywhere")]
# Lengths of keys along the sequence, 0 to 1: an early one may dwarf a later one, and the reverse
GROWTH = {
    "all long": lambda n, rng: torch.ones(n),
    "growing": lambda n, rng: torch.linspace(0, 1, n),
    "shrinking": lambda n, rng: torch.linspace(1, 0, n),
    "some long": lambda n, rng: torch.where(bools(rng, n, share=0.2), 1.0, 0.05),
}


class Long:
    """A case: tensors and request in a dtype; `exactly` the same numbers in float64."""

    def __init__(self, form: str, growth: str, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(0)
        s = SIZES
        query = floats(rng, s.batch, s.heads, s.q_len, s.dim) * 3
        key = floats(rng, s.batch, s.kv_heads, s.k_len, s.dim)
        value = floats(rng, s.batch, s.kv_heads, s.k_len, s.v_dim)
        # Exponents of some −3,000 and −250: float64 ends at −745, float32 at −104
        longest = 40 if dtype == torch.float64 else 11
        key = key * longest * GROWTH[growth](s.k_len, rng)[:, None]
        self.tensors = [t.to(dtype) for t in (query, key, value)]
        self.request = {"feature_map": FAVOR, **FORMS[form](rng)}
        if "decay" in self.request:
            self.request["decay"] = self.request["decay"].to(dtype)

    def exactly(self) -> tuple[list[Tensor], dict[str, Any]]:
        request = {n: v.double() if isinstance(v, Tensor) else v for n, v in self.request.items()}
        return [t.double() for t in self.tensors], request

    def leaves_the_dtype(self) -> bool:
        """Whether features of some key vanish in what it is computed in."""
        working = torch.float64 if self.tensors[1].dtype == torch.float64 else torch.float32
        return not FAVOR.exponents(self.tensors[1].to(working)).exp().all()


def weights_of(query: Tensor, key: Tensor, value: Tensor, **request: Any) -> tuple[Tensor, Tensor]:
    """(weights, ln of their sum before the division), from the logarithms of the features.

    w_ij = softmax over the keys seen of ln Σ_f exp(q_if + e_jf + decay over j + 1 … i).
    """
    given = asked(query, key, value, **request)
    place, heads = given.call.place, given.call.place.heads
    query, key = (FAVOR.exponents(t) for t in (query, key))
    key = key.repeat_interleave(heads // place.kv_heads, 1)
    logs = query[:, :, :, None] + key[:, :, None]
    decay = given.decay
    if decay is not None:
        if decay.dim() == 1:
            decay = decay[None, :, None].expand(place.batch, -1, place.k_len)
        decay = decay if decay.dim() == 4 else decay[..., None]
        if given.keep is not None:  # a hidden key does not decay
            decay = decay.masked_fill(~given.keep[:, None, :, None], 0)
        if given.key_ids is not None:
            decay = decay.masked_fill((given.key_ids < 0)[:, None, :, None], 0)
        until = decay.repeat_interleave(heads // decay.shape[1], 1).cumsum(2)
        logs = logs + (until[:, :, :, None] - until[:, :, None])
    row, col = (torch.arange(n) for n in (place.q_len, place.k_len))
    shown = torch.ones(place.batch, place.q_len, place.k_len, dtype=torch.bool)
    if given.causal:
        shown = shown & (row[:, None] >= col)
    if given.key_ids is not None:
        mine, theirs = given.query_ids[:, :, None], given.key_ids[:, None]
        shown = shown & (mine == theirs) & (mine >= 0)
    if given.keep is not None:
        shown = shown & given.keep[:, None]
    scores = logs.logsumexp(-1).masked_fill(~shown[:, None], -torch.inf)
    empty = ~shown.any(-1)[:, None, :, None]
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return weights, scores.logsumexp(-1)


def literal(query: Tensor, key: Tensor, value: Tensor, **request: Any) -> Tensor:
    """The output, from its definition, in the dtype of the tensors."""
    weights, _ = weights_of(query, key, value, **request)
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
