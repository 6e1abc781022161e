"""Engine cpu's float32 on inputs that are hard on rounding: its worst error beside PyTorch's own.

Level amx multiplies floats in parts (csrc/parts.h), which loses in other places than a sum
of products: where terms cancel, mantissas split badly, or numbers are tiny or far apart.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor
from torch.nn.functional import scaled_dot_product_attention

from cases import assert_within, plain
from regard import Received, TopK, attention
from regard.engines.cpu import native

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="built without the compiled kernels")

BATCH, HEADS, Q_LEN, K_LEN, DIM = 1, 2, 160, 300, 64  # enough queries for products on tiles
Draw = Callable[[Generator], tuple[list[Tensor], float | None]]


def normal(rng: Generator, *shape: int) -> Tensor:
    return torch.randn(BATCH, HEADS, *shape, generator=rng, dtype=torch.float64)


def powers(rng: Generator, reach: int, *shape: int) -> Tensor:
    """Powers of two, from 2⁻ʳᵉᵃᶜʰ to 2ʳᵉᵃᶜʰ."""
    share = torch.rand(BATCH, HEADS, *shape, generator=rng, dtype=torch.float64)
    return torch.exp2(((2 * share - 1) * reach).round())


def qkv(rng: Generator, dim: int = DIM) -> list[Tensor]:
    return [normal(rng, n, dim) for n in (Q_LEN, K_LEN, K_LEN)]


def scaled(query: float = 1, key: float = 1, value: float = 1, dim: int = DIM) -> Draw:
    def draw(rng: Generator) -> tuple[list[Tensor], float | None]:
        factors = query, key, value
        return [t * f for t, f in zip(qkv(rng, dim), factors, strict=True)], None

    return draw


def cancelling(large: float, rest: float) -> Draw:
    """Each score is the difference of two halves that are nearly alike."""

    def draw(rng: Generator) -> tuple[list[Tensor], float | None]:
        q, k, v = qkv(rng)
        half, other = q[..., : DIM // 2] * large, k[..., : DIM // 2]
        moved = other * (1 + rest * normal(rng, K_LEN, DIM // 2))
        return [torch.cat([half, half], -1), torch.cat([other, -moved], -1), v], 1.0

    return draw


def tied(size: float, rest: float) -> Draw:
    """All keys alike but for a rest."""

    def draw(rng: Generator) -> tuple[list[Tensor], float | None]:
        q, k, v = qkv(rng)
        return [q * 4, k[:, :, :1] * size + rest * k, v], None

    return draw


def spread(reach: int) -> Draw:
    """Exponents differ from one dim to the next; a dim's query and key undo each other."""

    def draw(rng: Generator) -> tuple[list[Tensor], float | None]:
        q, k, v = qkv(rng)
        by = powers(rng, reach, 1, DIM)
        return [q * by, k / by, v * powers(rng, reach, 1, DIM)], None

    return draw


def mantissas(size: float) -> Draw:
    """Every number ± size, whose parts are as large as they can be."""

    def draw(rng: Generator) -> tuple[list[Tensor], float | None]:
        return [t.sign() * size for t in qkv(rng)], None

    return draw


def by_key(rng: Generator) -> tuple[list[Tensor], float | None]:
    q, k, v = qkv(rng)
    return [q, k * powers(rng, 19, K_LEN, 1) * 2.0**-18, v * powers(rng, 30, K_LEN, 1)], None


def some_denormals(rng: Generator) -> tuple[list[Tensor], float | None]:
    tensors = qkv(rng)
    for n, tensor in enumerate(tensors):
        tensor[..., :: 2 + n] *= 1e-40
    return tensors, None


def cancelling_values(rng: Generator) -> tuple[list[Tensor], float | None]:
    q, k, v = qkv(rng)
    v[:, :, 1::2] = -v[:, :, ::2] * (1 + 1e-5 * normal(rng, K_LEN // 2, DIM))
    return [q, k * 1e-3, v * 1e3], None


def offset_values(rng: Generator) -> tuple[list[Tensor], float | None]:
    q, k, v = qkv(rng)
    return [q, k, v + 1e4], None


def rising(rng: Generator) -> tuple[list[Tensor], float | None]:
    """Each key scores higher than the one before, from 0 to 75."""
    q, k, v = qkv(rng)
    q[..., 0], k[..., 0] = 8, torch.arange(K_LEN) / 4
    return [q, k, v], None


HARD: dict[str, Draw] = {
    "normal": scaled(),
    "one dim": scaled(dim=1),
    "256 dims": scaled(dim=256),
    "large scores": scaled(query=30),
    "huge scores": scaled(query=1000),
    "rising scores": rising,
    "cancellation": cancelling(1e3, 1e-6),
    "cancellation of large numbers": cancelling(1e4, 1e-5),
    "nearly tied": tied(1, 1e-6),
    "nearly tied, large": tied(30, 1e-4),
    "large range": spread(10),
    "larger range": spread(30),
    "range from key to key": by_key,
    "long parts": mantissas(2 - 2.0**-8 - 2.0**-16),
    "longest parts": mantissas(1 + 2.0**-8 * (1 - 2.0**-9) + 2.0**-17 * (1 - 2.0**-6)),
    "values far from 0": offset_values,
    "values that cancel": cancelling_values,
    "small values": scaled(value=1e-15),
    "tiny values": scaled(value=1e-30),
    "denormals": scaled(1e-39, 1e-39, 1e-39),
    "denormals times large": scaled(1e-38, 1e37, 1e-38),
    "some denormals": some_denormals,
    "near overflow": scaled(1e18, 1e-18, 1e36),
}


def exact(tensors: list[Tensor], scale: float | None) -> tuple[Tensor, Tensor]:
    query, key, value = (t.double() for t in tensors)
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize("draw", HARD.values(), ids=HARD)
def test_the_worst_error_is_at_most_twice_pytorchs(draw):
    """Over some draws, out and lse; PyTorch's is the larger of its fused and its plain kernel's."""
    ours, theirs, sizes = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for seed in range(3):
        tensors, scale = draw(Generator().manual_seed(seed))
        tensors = [t.float() for t in tensors]
        truths = exact(tensors, scale)
        mine = attention(*tensors, scale=scale, engine="cpu", return_lse=True)
        others = plain(*tensors, scale=scale)
        fused = scaled_dot_product_attention(*tensors, scale=scale)
        for n, truth in enumerate(truths):
            ours[n] = max(ours[n], float((mine[n].double() - truth).abs().max()))
            near = [others[n], fused][: 2 - n]
            errors = [float((t.double() - truth).abs().max()) for t in near]
            theirs[n] = max(theirs[n], *errors)
            sizes[n] = max(sizes[n], float(truth.abs().max()))
    for mine, other, size in zip(ours, theirs, sizes, strict=True):
        assert mine <= 2 * other + torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_that_rise_within_a_tile(dtype):
    """What was weighed before a row's top rises is rescaled: in out, and in what keys receive."""
    tensors = [t.to(dtype) for t in rising(Generator().manual_seed(0))[0]]
    ours, (received, top) = attention(*tensors, engine="cpu", observe=[Received(), TopK(3)])
    query, key, value = (t.double() for t in tensors)
    weights = (query @ key.mT * DIM**-0.5).softmax(-1)
    assert_within(ours, plain(*tensors)[0], weights @ value)
    # Weights are observed in float32, whatever the dtype
    query, key = (t.float() for t in tensors[:2])
    single = (query @ key.mT * DIM**-0.5).softmax(-1)
    assert_within(received.sum, single.sum(-2), weights.sum(-2))
    assert_within(top.weights, single.topk(3).values, weights.topk(3).values)
