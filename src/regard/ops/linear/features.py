"""Feature maps φ: linear attention weighs key j for query i by φ(q_i) · φ(k_j).

Where the weights are normalised, a factor common to a query's features cancels: it is taken out of
them, so that they neither overflow nor vanish, and its logarithm is handed on for the log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...errors import RegardError


@dataclass(frozen=True)
class Favor:
    """FAVOR+: positive orthogonal random features. Choromanski et al. 2021, lemma 1, section 3.

    φ(x) = exp(w_i · x / dim^¼ − ‖x‖² / (2 √dim)) / √features, so that φ(q) · φ(k) is on average
    exp(q · k / √dim): normalised, it approaches softmax attention at the default scale as features
    grow. The w_i are rows of random orthogonal matrices with the lengths of Gaussian vectors, drawn
    from the seed alone: the same on every device. Another seed draws others.

    The features of long keys, exp(−‖x‖² / (2 √dim)), leave the dtype: in float32 at a length of
    some 40 for dim 64. Where weights are normalised that is a RegardError (but under a compiler or
    a transform, which see no numbers).
    """

    features: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.features < 1 or self.seed < 0:
            raise RegardError(f"{self}: give features ≥ 1 and seed ≥ 0")

    def exponents(self, x: Tensor) -> Tensor:
        """ln φ(x) (…, features) of x (…, dim)."""
        if not x.shape[-1]:  # no dim: every score is 0
            return x.new_full((*x.shape[:-1], self.features), -0.5 * math.log(self.features))
        x = x * x.shape[-1] ** -0.25
        directions = torch.ops.regard.favor_directions(x, self.features, self.seed)
        # A product for each item and head: folded into one, its bits would depend on the batch
        along = x @ directions.mT.expand(*x.shape[:-2], -1, -1)
        half_square = x.square().sum(-1, keepdim=True) / 2
        return along - (half_square + 0.5 * math.log(self.features))


@lru_cache(maxsize=16)
def _directions(features: int, seed: int, dim: int) -> Tensor:
    """(features, dim) float64: orthogonal within each block of dim rows."""
    rng = torch.Generator().manual_seed(seed)
    blocks = -(-features // dim)
    drawn = torch.randn(blocks, dim, dim, generator=rng, dtype=torch.float64, device="cpu")
    turned, upper = torch.linalg.qr(drawn)
    # Without the signs of R's diagonal, Q would not be uniform over the rotations
    turned = turned * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    lengths = torch.randn(blocks, dim, dim, generator=rng, dtype=torch.float64, device="cpu").norm(
        dim=-1
    )
    return (turned * lengths[..., None]).flatten(0, 1)[:features]


@torch.library.custom_op(
    "regard::favor_directions",
    mutates_args=(),
    schema="(Tensor like, int features, int seed) -> Tensor",
)
def _favor_directions(like: Tensor, features: int, seed: int) -> Tensor:
    drawn = _directions(features, seed, like.shape[-1])
    return drawn.to(like.device, like.dtype, copy=True, memory_format=torch.contiguous_format)


@_favor_directions.register_fake
def _(like: Tensor, features: int, seed: int) -> Tensor:
    return like.new_empty(features, like.shape[-1])


def _no_gradient(ctx: object, grad: Tensor) -> tuple[None, None, None]:
    return None, None, None


_favor_directions.register_autograd(_no_gradient)


def positive(feature_map: object) -> bool:
    """Whether the map is one of ours whose features are all above 0."""
    return feature_map == "elu" or isinstance(feature_map, Favor)


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1: 1 + x above 0, exp(x) below. Katharopoulos et al. 2020, eq. 7."""
    return _above_and_below(x, x.clamp(max=0))


def _above_and_below(x: Tensor, exponent: Tensor) -> Tensor:
    """max(x, 0) + exp(exponent), with one tensor less than written plainly."""
    above = torch.nn.functional.threshold(x, 0.0, 0.0)  # as relu, but its result is not kept
    return above.add_(exponent.exp())


def check_lengths(feature_map: object, key: Tensor, hidden: Tensor | None) -> None:
    """RegardError where a key is so long that its features leave the dtype: rows would be wrong.

    key: its features (batch, kv_heads, k_len, features); hidden bool (batch, k_len) or None. A
    factor of the keys does not cancel as one of a query does: a later key may be far larger, and
    earlier rows must not vanish beside it.
    """
    if not isinstance(feature_map, Favor) or not key.numel():
        return
    # What is 1e-12 of the largest is still a normal number
    vanished = key.detach().amax(-1) < torch.finfo(key.dtype).tiny * 1e12
    if hidden is not None:
        vanished = vanished & ~hidden[:, None]
    if bool(vanished.any()):
        raise RegardError(
            f"{feature_map}: the random features of {int(vanished.sum())} keys vanish in "
            f"{str(key.dtype).removeprefix('torch.')}, for they are too long; scale query and key "
            "down, or compute in float64"
        )


def mapped(
    feature_map: object, query: Tensor, key: Tensor, normalise: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """φ(query), φ(key), and ln of what was taken out of each query's features (None: nothing).

    query (batch, heads, q_len, dim), key (batch, kv_heads, k_len, dim) in the working dtype; the
    features stand in the last dimension, the logarithm is (batch, heads, q_len).
    """
    if isinstance(feature_map, Favor):
        exponents, shift = feature_map.exponents(query), None
        if normalise:
            shift = exponents.detach().amax(-1, keepdim=True)
            exponents = exponents - shift
        taken = None if shift is None else shift[..., 0]
        return exponents.exp(), feature_map.exponents(key).exp(), taken
    if feature_map == "elu":
        if not normalise or not query.shape[-1]:
            return elu(query), elu(key), None
        # Only a query that is negative throughout could vanish
        shift = query.detach().amax(-1, keepdim=True).clamp(max=0)
        return _above_and_below(query, query.clamp(max=0) - shift), elu(key), shift[..., 0]
    if feature_map is None or feature_map == "identity":
        return query, key, None
    assert callable(feature_map)
    return _of(feature_map, query), _of(feature_map, key), None


def _of(function: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    given = function(x)
    if not isinstance(given, Tensor) or given.shape[:-1] != x.shape[:-1]:
        what = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise RegardError(
            f"feature_map gave {what} for {tuple(x.shape)}; it must keep all but the last dimension"
        )
    return given.to(x.dtype)


def check(feature_map: object) -> None:
    """RegardError unless it is a feature map."""
    known = feature_map is None or isinstance(feature_map, Favor) or callable(feature_map)
    if not known and feature_map not in ("elu", "identity"):
        raise RegardError(
            f"feature_map is {feature_map!r}; give 'elu', 'identity' (or None), Favor(features), "
            "or a function of a tensor"
        )
