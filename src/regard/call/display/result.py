"""What every result can do besides hold numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .frame import Table, frame
from .html import Shown
from .picture import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


class Result(Shown):
    """What an observer saw: a repr, a table, a plot, a picture in a notebook."""

    def to_pandas(self) -> DataFrame:
        """A tidy DataFrame: its index names batch, head, and query or key as positions.

        RegardError where pandas is missing.
        """
        return frame(self._table())

    def plot(
        self,
        ax: Axes | None = None,
        *,
        batch: int = 0,
        head: int | None = None,
        tokens: Sequence[str] | None = None,
    ) -> Axes:
        """Draw one batch item with matplotlib, all heads or one; returns the Axes.

        tokens: of the whole sequence, by position; they name the ticks, as many as there is room.
        Long sequences are drawn in cells, each by its largest number. RegardError where matplotlib
        is missing.
        """
        from .plots import draw

        return draw(self._picture(batch, head), ax, tokens)

    def _table(self) -> Table:
        raise NotImplementedError

    def _picture(self, batch: int, head: int | None) -> Picture:
        raise NotImplementedError

    def _per_head(self) -> tuple[Tensor, str]:
        """The most telling number of each head (batch, heads), and what it is in words."""
        raise NotImplementedError

    def _shown(self) -> Any:
        return self._picture(0, None)
