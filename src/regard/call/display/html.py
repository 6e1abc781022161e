"""Small pictures for notebooks: inline SVG and tables, escaped, for light and dark pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from .picture import Picture, Side

MOST = (32, 64)  # cells of a small picture, down and across
WIDE = 256  # pixels, about
LEVELS = 8  # of shade
# Of Okabe and Ito's palette: told apart by the colour-blind, seen on white and on black
BLUE, ORANGE = "#0089d6", "#e07b00"


class Shown:
    """Shows itself in a notebook: its repr, and below it a picture."""

    def _repr_html_(self) -> str:
        picture = self._shown()
        return box(repr(self), "" if picture is None else svg(picture))

    def _shown(self) -> Picture | None:
        """The picture; None where there is nothing to draw."""
        raise NotImplementedError


def box(title: str, *parts: str) -> str:
    """Parts of HTML below a title in plain text. No colours of its own: the page's."""
    return (
        '<div style="font:12px/1.4 sans-serif;overflow-x:auto">'
        f'<div style="font-family:monospace">{escape(title)}</div>{"".join(parts)}</div>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], rest: int = 0) -> str:
    """A table of plain texts; `rest` rows more are said to be there."""
    cells = 'style="text-align:left;padding:0 1em 0 0"'
    lines = ["".join(f"<th {cells}>{escape(name)}</th>" for name in head)]
    lines += ["".join(f"<td {cells}>{escape(str(cell))}</td>" for cell in row) for row in rows]
    lines += [f'<td {cells} colspan="{len(head)}">… {rest} more</td>'] if rest else []
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table style="border-collapse:collapse;font-size:12px">{body}</table>'


def svg(picture: Picture, caption: str = "", most: float | None = None) -> str:
    """The picture as inline SVG with a caption, by default its range; "" for one without numbers.

    most: the number of the strongest shade, by default the largest.
    """
    if picture.values.is_meta or not picture.values.numel():
        return ""
    square = picture.rows.sequence and picture.cols.sequence and not picture.rows.labels
    small = picture.fitting(MOST[0], MOST[0] if square else MOST[1])
    values = small.values.detach().double().cpu()
    finite = values.isfinite()
    if not finite.any() and not caption:
        return ""
    shades = _shades(values, small.log, small.signed, most)
    paths = []
    for colour, sign in ((BLUE, 1), (ORANGE, -1)) if small.signed else ((BLUE, 1),):
        for level in range(1, LEVELS + 1):
            path = _path((shades == level * sign) & finite)
            paths += [f'<path fill="{colour}" fill-opacity="{level / LEVELS:.2f}" d="{path}"/>'] * (
                path != ""
            )
    rows, cols = values.shape
    wide = min(max(WIDE // cols, 4), 24)
    high = wide if square else min(max(wide, 7), 12)
    drawn = (
        f'<svg width="{cols * wide}" height="{rows * high}" viewBox="0 0 {cols} {rows}" '
        'preserveAspectRatio="none" shape-rendering="crispEdges" role="img" '
        f'style="border:1px solid #8888;vertical-align:top">{"".join(paths)}</svg>'
    )
    said = [
        *([small.title] if small.title else []),
        caption or f"{small.unit.replace(chr(10), ', ')}: {_range(values[finite])}",
        f"down: {_span(picture.rows, picture.values.shape[0], small.rows.size)}",
        f"across: {_span(picture.cols, picture.values.shape[1], small.cols.size)}",
    ]
    return f'{drawn}<div style="opacity:.75">{escape("; ".join(said))}</div>'


def _range(values: Tensor) -> str:
    """From the least to the most."""
    return f"{float(values.min()):.3g} … {float(values.max()):.3g}"


def _span(side: Side, count: int, size: int) -> str:
    """What one side counts, in words, in cells of `size`."""
    if side.labels:
        return f"{side.name} {side.labels[0]} … {side.labels[-1]}" if side.labels[1:] else side.name
    last = side.start + count * side.size - 1
    said = f"{side.name} {side.start}" + (f" … {last}" if last > side.start else "")
    return said + (f" by {size}" if size > 1 else "")


def _shades(values: Tensor, log: bool, signed: bool, top: float | None) -> Tensor:
    """How strongly each cell is shaded: 0 … LEVELS, below 0 where its number is."""
    shown = values.masked_fill(~values.isfinite(), 0)
    most = float(shown.abs().max()) if top is None else top
    if signed:
        share = shown / (most or 1)
        return share.sign() * (share.abs() * LEVELS).ceil()
    if log and most > 0:
        share = (1 + (shown / most).log10() / 4).clamp(0, 1)  # four magnitudes below the largest
        share = share.masked_fill(shown <= 0, 0)
    else:
        low = min(float(shown.min()), 0.0)
        share = (shown - low) / ((most - low) or 1)
    return (share * LEVELS).ceil().clamp(0, LEVELS)


def _path(cells: Tensor) -> str:
    """The cells that are set, as one SVG path of their runs along the rows."""
    edge = torch.zeros(len(cells), 1, dtype=torch.bool, device=cells.device)
    change = torch.cat([edge, cells, edge], 1).int().diff(dim=1).nonzero().tolist()
    pairs = zip(change[::2], change[1::2], strict=True)
    return "".join(f"M{a} {row}h{b - a}v1h{a - b}z" for (row, a), (_, b) in pairs)
