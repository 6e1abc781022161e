"""Fits and intervals, by plain definitions; every draw comes from the generator that is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple, TypeVar

import numpy as np

One = TypeVar("One")
DRAWS = 1000


class Interval(NamedTuple):
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def percent(self) -> str:
        """The same of a share."""
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"


def bootstrap(
    items: Sequence[One],
    figure: Callable[[Sequence[One]], float],
    rng: random.Random,
    draws: int = DRAWS,
) -> Interval:
    """A figure of items, drawn anew with replacement: percentiles 2.5 and 97.5 (Efron 1979)."""
    found = sorted(figure(rng.choices(items, k=len(items))) for _ in range(draws))
    low, high = found[int(0.025 * draws)], found[min(draws - 1, int(0.975 * draws))]
    return Interval(figure(items), low, high)


def mean_interval(values: Sequence[float], rng: random.Random, draws: int = DRAWS) -> Interval:
    """The mean and its interval."""
    return bootstrap(values, fmean, rng, draws)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """b of y = a·x^b, least squares of the logarithms."""
    return power_law(xs, ys)[1]


def power_law(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """a and b of y = a·x^b, least squares of the logarithms. NaN where a number is not positive."""
    if len(xs) < 2 or min(*xs, *ys) <= 0:
        return float("nan"), float("nan")
    b, log_a = np.polyfit(np.log(np.asarray(xs, float)), np.log(np.asarray(ys, float)), 1)
    return float(np.exp(log_a)), float(b)


def with_floor(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """E, a, b of y = E + a·x^b: the E of 200 below min(y) whose power law fits best."""
    best = (0.0, *power_law(xs, ys))
    error = float("inf")
    for step in range(200):
        floor = min(ys) * step / 200
        a, b = power_law(xs, [y - floor for y in ys])
        off = sum((y - floor - a * x**b) ** 2 for x, y in zip(xs, ys, strict=True))
        if off < error:
            best, error = (floor, a, b), off
    return best


def joint_power_law(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]
) -> tuple[float, float]:
    """a and b of loss = E + A·parameters^−a + B·tokens^−b, E, A, B ≥ 0 (Hoffmann et al. 2022, eq.
    2): least squares, over a grid of exponents 0.05 … 1.5. NaN where none fits so."""
    grid = np.arange(0.05, 1.5001, 0.05)
    a, b = (x.ravel() for x in np.meshgrid(grid, grid, indexing="ij"))
    n, d, y = (np.asarray(x, float) for x in (parameters, tokens, losses))
    # Over their means: else powers of large numbers differ by more than can be solved
    terms = [
        np.ones((len(a), len(y))),
        (n / n.mean()) ** -a[:, None],
        (d / d.mean()) ** -b[:, None],
    ]
    given = np.stack(terms, -1)
    solved = np.linalg.pinv(given) @ y
    error = ((given @ solved[..., None])[..., 0] - y) ** 2
    off = np.where((solved >= 0).all(-1), error.sum(-1), np.inf)
    best = int(off.argmin())
    if off[best] == np.inf:
        return float("nan"), float("nan")
    return float(a[best]), float(b[best])


def auc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """How often a right one is above a wrong one, ties half: area under the ROC curve."""
    wins = sum((r > w) + 0.5 * (r == w) for r in right for w in wrong)
    return wins / max(1, len(right) * len(wrong))
