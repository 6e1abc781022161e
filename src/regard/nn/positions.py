"""Positions: what tells a model where a token stands.

Sinusoidal and learned vectors are added to the embeddings, rotary turns queries and keys inside
each attention, and T5's relative table is a bias on the scores. ALiBi has nothing to learn:
`regard.ALiBi()` is the bias itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..call.biases import RelativeBias
from ..call.numbers import at_least
from ..errors import RegardError
from ..ops import region

Positions = int | Tensor


def positions_of(x: Tensor, positions: Positions) -> Tensor:
    """The positions of the rows of x (…, length, dim), as a tensor (length,) or (batch, length).

    positions: that of the first row, or such a tensor.
    """
    length = x.shape[-2]
    if not isinstance(positions, Tensor):
        if (parallel := region.current()) is not None:  # this rank's rows are not the first ones
            return parallel.positions(length, positions, x.device)
        return torch.arange(length, device=x.device, dtype=torch.int64) + positions
    if positions.dim() not in (1, 2) or positions.shape[-1] != length:
        raise RegardError(
            f"positions is {tuple(positions.shape)} for {length} rows of {tuple(x.shape)}; give "
            f"the first one's position, or a tensor ({length},) or (batch, {length})"
        )
    return positions


def _exact(device: torch.device) -> torch.dtype:
    """The dtype of angles: a float32 angle at position 10⁶ is off by 0.03; mps has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def sinusoids(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """sin and cos of position / base^(2i/dim) in turn: (*positions.shape, dim), float64.

    Vaswani et al. 2017, section 3.5.
    """
    angles = positions[..., None] * inverse_wavelengths(dim, base, positions.device)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., :dim]


class SinusoidalPositions(nn.Module):
    """Adds fixed waves to the embeddings, lengths from 2π to 2π · base. Vaswani et al. 2017, 3.5.

    There is no longest position.
    """

    def __init__(self, dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.base = dim, base

    def forward(self, x: Tensor, positions: Positions = 0) -> Tensor:
        """x (batch, length, dim) with the waves added; positions: the first one's, or a tensor."""
        _same_dim(self, x)
        return x + sinusoids(positions_of(x, positions), self.dim, self.base).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}"


class LearnedPositions(nn.Module):
    """Adds a learned vector per position, weight (length, dim); drawn from N(0, 0.02²).

    Gehring et al. 2017, section 3.1; Devlin et al. 2019.
    """

    def __init__(
        self,
        length: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.length, self.dim = length, dim
        self.weight = nn.Parameter(torch.empty(length, dim, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, positions: Positions = 0) -> Tensor:
        """x (batch, length, dim) with the vectors added; positions: the first one's, or a tensor.

        RegardError where an integer start leads beyond the positions learned.
        """
        _same_dim(self, x)
        if isinstance(positions, Tensor) or region.current() is not None:
            return x + nn.functional.embedding(positions_of(x, positions), self.weight)
        if positions < 0 or positions + x.shape[-2] > self.length:
            raise RegardError(
                f"positions {positions} … {positions + x.shape[-2] - 1} of {tuple(x.shape)} leave "
                f"the {self.length} learned ones; give a longer LearnedPositions, or shorter input"
            )
        return x + self.weight[positions : positions + x.shape[-2]]

    def extra_repr(self) -> str:
        return f"{self.length}, {self.dim}"


def _same_dim(module: SinusoidalPositions | LearnedPositions, x: Tensor) -> None:
    if x.dim() != 3 or x.shape[-1] != module.dim:
        raise RegardError(
            f"{type(module).__name__}({module.dim}) takes (batch, length, {module.dim}), "
            f"not {tuple(x.shape)}"
        )


class RelativePositions(nn.Module):
    """A learned bias per head and bucket of distance. Raffel et al. 2020 (T5), section 2.1.

    weight (buckets, heads), as T5 stores it; it starts at 0, where no distance is preferred.
    Calling it gives the `RelativeBias` for `bias=`; T5 shares one among the layers of a stack.
    bidirectional: keys after the query have buckets of their own (encoders).
    """

    def __init__(
        self,
        heads: int,
        *,
        buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads = at_least(1, heads, "RelativePositions: heads")
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(buckets, heads, device=device, dtype=dtype))

    def forward(self) -> RelativeBias:
        """The bias, whose table is this module's weight."""
        return RelativeBias(self.weight, self.bidirectional, self.max_distance)

    def extra_repr(self) -> str:
        buckets, heads = self.weight.shape
        return f"{heads}, buckets={buckets}, max_distance={self.max_distance}"


def inverse_wavelengths(dim: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """Rotary's angles per position, base^(−2i/dim): (dim / 2,) float64. Su et al. 2021, eq. 15."""
    exact = _exact(torch.device(device or "cpu"))
    return base ** (-torch.arange(0, dim, 2, device=device, dtype=exact) / dim)


class Scaling:
    """How rotary reaches beyond the length that it was trained on."""

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by: the scores grow with its square."""
        return 1.0

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on how long a call is."""
        return False

    def angles(self, dim: int, base: float, length: int, device: torch.device) -> Tensor:
        """The angle per position of each pair, (dim / 2,) float64, for a call up to `length`."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Positions divided by `factor`: position interpolation. Chen et al. 2023, eq. 3."""

    factor: float

    def angles(self, dim: int, base: float, length: int, device: torch.device) -> Tensor:
        return inverse_wavelengths(dim, base, device) / self.factor


@dataclass(frozen=True)
class NTKScaling(Scaling):
    """A larger base: the slowest pair is interpolated by `factor`, the fastest not at all.

    "NTK-aware": base · factor^(dim / (dim − 2)). Peng et al. 2023, section 3.1.

    trained_length: makes it dynamic (section 3.3). Within that length nothing changes; a call whose
    last position is L − 1, beyond it, takes factor · L / trained_length − (factor − 1) in the place
    of `factor`. Keys that are in a cache already keep the rotation that they were given.
    """

    factor: float
    trained_length: int | None = None

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on how long a call is."""
        return self.trained_length is not None

    def angles(self, dim: int, base: float, length: int, device: torch.device) -> Tensor:
        factor = self.factor
        if self.trained_length is not None:
            factor = factor * max(length / self.trained_length, 1.0) - (factor - 1)
        return inverse_wavelengths(dim, base * factor ** (dim / (dim - 2)), device)


@dataclass(frozen=True)
class YaRNScaling(Scaling):
    """Slow pairs interpolated by `factor`, fast ones kept, a ramp between. Peng et al. 2023.

    Section 3.2: a pair that turns more than beta_fast times within trained_length is kept, one that
    turns less than beta_slow times is interpolated. Section 3.4: cos and sin are multiplied by
    attention_factor, by default 0.1 ln(factor) + 1.
    truncate: the ends of the ramp are rounded to whole pairs, as in the published implementation.
    """

    factor: float
    trained_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by: the scores grow with its square."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(max(self.factor, 1.0)) + 1

    def angles(self, dim: int, base: float, length: int, device: torch.device) -> Tensor:
        def pair(turns: float) -> float:
            """The (fractional) pair that turns so many times within the trained length."""
            wavelength = self.trained_length / turns
            return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(base))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        kept = inverse_wavelengths(dim, base, device)
        steps = torch.arange(dim // 2, device=device, dtype=kept.dtype)
        ramp = ((steps - first) / ((last - first) or 1e-3)).clamp(0, 1)
        return kept * (1 - ramp) + kept / self.factor * ramp


@dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Slow pairs interpolated by `factor`, fast ones kept, as in Llama 3.1 to 3.3.

    Grattafiori et al. 2024 (Llama 3). A pair that turns more than `high` times within
    trained_length is kept, one that turns less than `low` times is interpolated; between, the two
    angles are blended, linearly in the number of turns.
    """

    factor: float
    trained_length: int
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise RegardError(f"{self}: give numbers of turns with 0 < low < high")

    def angles(self, dim: int, base: float, length: int, device: torch.device) -> Tensor:
        kept = inverse_wavelengths(dim, base, device)
        turns = self.trained_length * kept / (2 * math.pi)
        ramp = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return kept * ramp + kept / self.factor * (1 - ramp)


@dataclass(frozen=True)
class LongRoPEScaling(Scaling):
    """Each pair interpolated by a factor of its own, found by search. Ding et al. 2024 (LongRoPE).

    short, long: dim / 2 factors each; those for calls up to trained_length, and beyond it. Keys
    that are in a cache already keep the rotation that they were given. factor: the longest length
    by the trained one; cos and sin are multiplied by attention_factor, by default
    √(1 + ln(factor) / ln(trained_length)), as in Phi-3.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    trained_length: int
    factor: float
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("short", "long"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by: the scores grow with its square."""
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(max(self.factor, 1.0)) / math.log(self.trained_length))

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on how long a call is."""
        return True

    def angles(self, dim: int, base: float, length: int, device: torch.device) -> Tensor:
        kept = inverse_wavelengths(dim, base, device)
        factors = self.long if length > self.trained_length else self.short
        if len(factors) != len(kept):
            raise RegardError(
                f"LongRoPEScaling: {len(factors)} factors for Rotary({dim}); give one a pair, "
                f"{len(kept)}"
            )
        return kept / torch.tensor(factors, dtype=kept.dtype, device=device)


class Rotary(nn.Module):
    """Turns each pair of a query's or key's numbers by an angle that grows with its position.

    Scores then depend on distances alone. Su et al. 2021, section 3.2. Pair i turns by
    position · base^(−2i/dim). It has no parameters: all layers may share one.

    dim: how many numbers of a head are turned; those after them pass unchanged.
    interleaved: the pairs are (2i, 2i + 1), as published (RoFormer, GPT-J); otherwise
        (i, i + dim/2) (GPT-NeoX, Llama).
    scaling: how to reach beyond the trained length, such as `YaRNScaling(4, 4096)`.
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise RegardError(f"Rotary({dim}): give an even dim ≥ 2; numbers are turned in pairs")
        if isinstance(scaling, NTKScaling) and dim < 4:
            raise RegardError(f"Rotary({dim}): {scaling} needs dim ≥ 4")
        self.dim, self.base, self.interleaved, self.scaling = dim, base, interleaved, scaling

    def forward(self, x: Tensor, positions: Positions = 0) -> Tensor:
        """x (batch, heads, length, head_dim) turned, in x's dtype.

        positions: the first row's, or a tensor (length,) or (batch, length).
        """
        if x.dim() != 4 or x.shape[-1] < self.dim:
            raise RegardError(
                f"Rotary({self.dim}) turns the first {self.dim} numbers of (batch, heads, length, "
                f"head_dim), not {tuple(x.shape)}"
            )
        cos, sin = self.cos_sin(x, positions)
        part, rest = x[..., : self.dim], x[..., self.dim :]
        if self.interleaved:
            first, second = part.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            first, second = part.chunk(2, -1)
        pair = [first * cos - second * sin, second * cos + first * sin]
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        turned = turned.to(x.dtype)
        return torch.cat([turned, rest], -1) if self.dim < x.shape[-1] else turned

    def cos_sin(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """cos and sin of each row's angles, broadcastable to (batch, heads, length, dim / 2).

        The angles are float64 whatever x is, so that they stay right at any length; cos and sin are
        float32 at least.
        """
        at = positions_of(x, positions)
        angles = self.angles(self._reach(x, positions), x.device)
        turned = at[..., None].to(angles.dtype) * angles
        if turned.dim() == 3:
            turned = turned[:, None]
        dtype = torch.promote_types(x.dtype, torch.float32)
        by = 1.0 if self.scaling is None else self.scaling.magnitude
        return (turned.cos() * by).to(dtype), (turned.sin() * by).to(dtype)

    def angles(self, length: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """The angle per position of each pair, (dim / 2,) float64, for a call up to `length`."""
        if self.scaling is None:
            return inverse_wavelengths(self.dim, self.base, device)
        return self.scaling.angles(self.dim, self.base, length, torch.device(device))

    def _reach(self, x: Tensor, positions: Positions) -> int:
        """One beyond the last position, where the scaling asks for it."""
        if self.scaling is None or not self.scaling.by_length:
            return 0
        if isinstance(positions, Tensor):
            return int(positions.max()) + 1 if positions.numel() else 0
        return positions + x.shape[-2]

    def extra_repr(self) -> str:
        said = f"{self.dim}, base={self.base}"
        said += ", interleaved=True" if self.interleaved else ""
        return said if self.scaling is None else f"{said}, scaling={self.scaling}"
