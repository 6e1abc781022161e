"""Pictures drawn with matplotlib: heat maps, or a line where there is but one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import RegardError
from .picture import Picture, Side

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 1024  # cells along a side: more than a plot has pixels for
NAME = 14  # characters of a token
LINE = "#0089d6"  # seen on white and on black


def draw(picture: Picture, ax: Axes | None, tokens: Sequence[str] | None = None) -> Axes:
    """Draw a picture; returns the Axes. RegardError where matplotlib is missing."""
    pyplot = needed()
    if tokens is not None:
        _check(tokens, picture)
    if ax is None:
        ax = pyplot.subplots(layout="constrained")[1]
    small = picture.fitting(MOST, MOST)
    line = small.values.shape[0] == 1 and not small.rows.sequence
    (_line if line else _heat)(small, ax)
    _ticks(ax.xaxis, picture.cols, tokens, picture.values.shape[1])
    ax.set_xlabel(_named(picture.cols, tokens))
    if not line:
        _ticks(ax.yaxis, picture.rows, tokens, picture.values.shape[0])
        ax.set_ylabel(_named(picture.rows, tokens))
    if picture.title:
        ax.set_title(picture.title)
    return ax


def needed() -> Any:
    """matplotlib.pyplot; RegardError where it is missing."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise RegardError('plot needs matplotlib: pip install "regard[plot]"') from error
    return pyplot


def _named(side: Side, tokens: Sequence[str] | None) -> str:
    if not side.sequence or side.labels:
        return side.name
    return side.name if tokens is not None else f"{side.name} [position]"


def _check(tokens: Sequence[str], picture: Picture) -> None:
    """RegardError where tokens do not name every position that is shown."""
    for side, count in zip((picture.rows, picture.cols), picture.values.shape, strict=True):
        last = side.start + (count - 1) * side.size
        if side.sequence and not side.labels and count and last >= len(tokens):
            raise RegardError(
                f"plot: {len(tokens)} tokens, and a {side.name} at position {last}; give those of "
                "the whole sequence"
            )


def _heat(picture: Picture, ax: Axes) -> None:
    """Cells, shaded by their numbers; nothing where there is none."""
    from matplotlib.colors import LogNorm, Normalize

    values, count = _finite(picture.values), picture.values.shape
    if not values.numel():
        return
    lows = [_low(side) for side in (picture.cols, picture.rows)]
    ends = [
        low + n * (1 if side.labels else side.size)
        for low, n, side in zip(lows, count[::-1], (picture.cols, picture.rows), strict=True)
    ]
    shown = values[values.isfinite()]
    most = float(shown.abs().max()) if len(shown) else 1.0
    if picture.signed:
        norm, colours, extend = Normalize(-most, most), "RdBu", "neither"
    elif picture.log and most > 0:
        least = max(float(shown[shown > 0].min()), most * 1e-4)
        norm, colours = LogNorm(least if least < most else most / 10, most), "viridis"
        extend = "min" if float(shown.min()) < least else "neither"
    else:
        norm, colours, extend = None, "viridis", "neither"
    image = ax.imshow(
        values.numpy(),
        norm=norm,
        cmap=colours,
        interpolation="nearest",
        aspect="equal" if _square(picture) else "auto",
        extent=(lows[0], ends[0], ends[1], lows[1]),
    )
    bar = ax.figure.colorbar(image, ax=ax, extend=extend)
    bar.set_label(picture.unit)


def _square(picture: Picture) -> bool:
    """Whether a query is drawn as large as a key: both are positions, and of like number."""
    heights, widths = (
        side.size * n
        for side, n in zip((picture.rows, picture.cols), picture.values.shape, strict=True)
    )
    alike = max(heights, widths) <= 4 * min(heights, widths)
    return alike and picture.rows.sequence and picture.cols.sequence and not picture.rows.labels


def _low(side: Side) -> float:
    """Where the first cell begins: a position's own number stands in its middle."""
    return (0 if side.labels else side.start) - 0.5


def _finite(values: Tensor) -> Tensor:
    values = values.detach().double().cpu()
    return values.masked_fill(values.isinf(), torch.nan)


def _line(picture: Picture, ax: Axes) -> None:
    """One row: steps, or bars where each has a name."""
    values, side = _finite(picture.values)[0], picture.cols
    if side.labels:
        ax.bar(range(len(values)), values.numpy(), color=LINE)
    else:
        starts = _low(side) + side.size * torch.arange(
            len(values) + 1, dtype=torch.float64, device="cpu"
        )
        low = None if picture.log else 0  # of many magnitudes: steps on a scale of logarithms
        ax.stairs(values.numpy(), starts.numpy(), color=LINE, baseline=low, linewidth=1)
        ax.margins(x=0)
    if picture.log and bool((values > 0).any()):
        ax.set_yscale("log")
    ax.set_ylabel(picture.unit)


def _ticks(axis: Any, side: Side, tokens: Sequence[str] | None, count: int) -> None:
    """Ticks with names, or numbers, as many as there is room for whenever it is drawn."""
    from matplotlib.ticker import FuncFormatter

    names: list[str] | None = None
    first = 0
    if side.labels:
        names = list(side.labels)
        if side.sequence and tokens is not None:
            names = [_name(tokens[int(n)]) if int(n) < len(tokens) else n for n in names]
    elif side.sequence and tokens is not None:
        first = side.start
        names = [_name(t) for t in tokens[first : first + count * side.size]]
    wide = axis.axis_name == "x"
    aside = wide and names is not None and max(map(len, names), default=0) > 2
    start = first if names is not None else side.start
    axis.set_major_locator(locator(start, count * side.size, beside=wide and not aside))
    if names is not None:
        axis.set_major_formatter(FuncFormatter(lambda at, _: _at(names, at - first)))
        axis.set_tick_params(rotation=90 if aside else 0)
    axis.grid(False)


def _at(names: list[str], number: float) -> str:
    whole = round(number)
    return names[whole] if whole == number and 0 <= whole < len(names) else ""


def _name(token: str) -> str:
    """A token as a label: no line breaks, no mathematics, not too long."""
    said = "".join(c if c.isprintable() else {"\n": "↵", "\t": "⇥"}.get(c, "�") for c in token)
    said = said if len(said) <= NAME else said[: NAME - 1] + "…"
    return said.replace("$", r"\$")


def locator(start: int, count: int, beside: bool) -> Any:
    """Ticks at whole numbers from `start` on, with room for a line of text each, or a number.

    beside: whether the labels stand beside each other, as numbers do below an axis.
    """
    from matplotlib.ticker import Locator

    class Room(Locator):
        """Every step-th, the step being 1, 2 or 5 times a power of ten."""

        axis: Any

        def __call__(self) -> Any:
            low, high = sorted(self.axis.get_view_interval())
            return self.tick_values(max(low, start), min(high, start + count - 0.5))

        def tick_values(self, low: float, high: float) -> Any:
            step = _step((high - low) / self.room())
            first = -(-int(low + 0.999) // step) * step
            return list(range(first, int(high) + 1, step)) if high >= low else []

        def room(self) -> float:
            """How many labels fit."""
            axes = self.axis.axes
            box, dpi = axes.get_window_extent(), axes.figure.dpi
            labels = self.axis.get_major_ticks(1)
            size = labels[0].label1.get_fontsize() if labels else 10
            each = size * (0.6 * (len(str(start + count)) + 1.5) if beside else 1.3)
            across = self.axis.axis_name == "x"
            length = (box.width if across else box.height) / dpi * 72
            return max(length / each, 1.0)

    return Room()


def _step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that is at least so much."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if step * factor >= least:
                return step * factor
        step *= 10
