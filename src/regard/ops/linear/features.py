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
    some 25 for dim 64. Where weights are normalised they are then taken relative to the largest so
    far (`running_shift`), so that a row is right at any length. Without that division they vanish.
    A vector with a number that is not finite, or whose square is not, has features NaN.
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
        # NaN surfaces in the rows that see it; exp(−∞) would vanish
        half_square = half_square.masked_fill(half_square == torch.inf, torch.nan)
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


def relative_to_largest(exponents: Tensor) -> tuple[Tensor, Tensor]:
    """The features (…, features) of ln φ without their largest factor; its logarithm (…)."""
    taken = exponents.detach().amax(-1, keepdim=True)
    return (exponents - taken).exp(), taken[..., 0]


def mapped(
    feature_map: object, query: Tensor, key: Tensor, normalise: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """φ(query), φ(key), and ln of what was taken out of each query's features (None: nothing).

    query (batch, heads, q_len, dim), key (batch, kv_heads, k_len, dim) in the working dtype; the
    features stand in the last dimension, the logarithm is (batch, heads, q_len). Favor's features
    of weights that are normalised are made in `recurrence`.
    """
    if isinstance(feature_map, Favor):
        return feature_map.exponents(query).exp(), feature_map.exponents(key).exp(), None
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
